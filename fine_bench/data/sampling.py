"""What every task does first: draw training images, queries and test images from a source.

Everything random comes from streams of ``task.seed`` named after their use. A larger sample
contains the smaller one, and more queries contain the fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.data.source import Source, check_seed
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream
from fine_bench.types import GroundTruth


@dataclass(frozen=True, eq=False)
class Sample:
    """Clean raw images and labels of a task, before anything is done to them.

    Attributes:
        images: ``(n_train, ...)`` uint8.
        y: ``(n_train,)`` int64, the source's labels.
        ids: ``(n_train,)`` int64, positions in the source data set.
        query_images, query_y: in the order in which they were drawn.
        test_images, test_y: the other test images.
    """

    images: NDArray[np.uint8]
    y: Tensor
    ids: Tensor
    query_images: NDArray[np.uint8]
    query_y: Tensor
    test_images: NDArray[np.uint8]
    test_y: Tensor

    @property
    def n(self) -> int:
        """Number of training images."""
        return len(self.y)


def check_query_count(n_query: int, n_test: int) -> None:
    """Refuse a number of queries that the test images cannot give."""
    if not 1 <= n_query < n_test:
        raise ConfigError(
            f"task.n_query={n_query}, but the queries are taken from {n_test} test images, and at "
            f"least one must remain to measure accuracy. Type task.n_query={min(100, n_test - 1)}, "
            f"or any number from 1 to {n_test - 1}"
        )


def check_train_count(n_train: int, n_pool: int, n_classes: int) -> None:
    """Refuse a number of training images that the pool cannot give, or fewer than classes."""
    if n_train > n_pool:
        raise ConfigError(
            f"task.n_train={n_train}, but the pool has {n_pool} training images. Type "
            f"task.n_train={n_pool} or less, or task.n_train=null for all of them"
        )
    if n_train < n_classes:
        raise ConfigError(
            f"task.n_train={n_train} is fewer than the {n_classes} classes. Type "
            f"task.n_train={n_classes} or more, or task.n_train=null for all {n_pool} images"
        )


def random_order(n: int, seed: int, name: str) -> Tensor:
    """A random order of 0 … n - 1 from the stream ``name`` of ``task.seed``."""
    return torch.randperm(n, generator=stream(seed, name))


def draw(
    source: Source,
    *,
    seed: int,
    n_train: int | None,
    n_query: int,
    among: Tensor | None = None,
    query_among: Tensor | None = None,
) -> Sample:
    """Training images, queries and test images, each a uniform draw.

    Args:
        source: the clean data.
        seed: ``task.seed``, ≥ 0.
        n_train: size of the sample, kept in source order; None takes all of ``among``.
        n_query: number of queries; the other test images measure accuracy.
        among: positions of the pool to draw from; None for the whole pool.
        query_among: boolean ``(n_test,)``, which test images may be queries; None for all.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
    """
    check_seed(seed)
    pool = torch.arange(len(source.labels)) if among is None else among
    n_train = len(pool) if n_train is None else n_train
    check_train_count(n_train, len(pool), source.n_classes)
    positions = pool[random_order(len(pool), seed, "task/sample")[:n_train]]
    return _sample(source, positions.sort().values, seed, n_query, query_among)


def draw_counts(
    source: Source, *, seed: int, counts: Tensor, n_query: int, among: Tensor | None = None
) -> Sample:
    """As ``draw``, with a number of training images ``counts (n_classes,)`` for each class.

    Raises:
        ValueError: a class has fewer images than asked for; callers check that and name options.
    """
    check_seed(seed)
    pool = torch.arange(len(source.labels)) if among is None else among
    ordered = pool[random_order(len(pool), seed, "task/sample")]
    labels = torch.from_numpy(source.labels)[ordered]
    chosen = []
    for label, count in enumerate(counts.tolist()):
        members = ordered[labels == label]
        if len(members) < count:
            raise ValueError(f"class {label} has {len(members)} images, {count} were asked for")
        chosen.append(members[:count])
    return _sample(source, torch.cat(chosen).sort().values, seed, n_query, None)


def _sample(
    source: Source, positions: Tensor, seed: int, n_query: int, query_among: Tensor | None
) -> Sample:
    order = random_order(len(source.test_images), seed, "task/queries")
    allowed = order if query_among is None else order[query_among[order]]
    check_query_count(n_query, len(allowed))
    query = allowed[:n_query]
    is_test = torch.ones(len(order), dtype=torch.bool)
    is_test[query] = False
    test = is_test.nonzero()[:, 0]
    test_labels = torch.from_numpy(source.test_labels)
    return Sample(
        images=source.images[positions.numpy()],
        y=torch.from_numpy(source.labels)[positions],
        ids=torch.from_numpy(source.ids)[positions],
        query_images=source.test_images[query.numpy()],
        query_y=test_labels[query],
        test_images=source.test_images[test.numpy()],
        test_y=test_labels[test],
    )


def task_data(
    name: str,
    source: Source,
    sample: Sample,
    *,
    x: Tensor,
    y: Tensor,
    is_bad: Tensor,
    kind: str,
    groups: Mapping[str, Tensor],
    clean_y: Tensor | None = None,
    ids: Tensor | None = None,
    query_y: Tensor | None = None,
) -> TaskData:
    """The sample with what a task made of it; what is None stays as it was drawn."""
    return TaskData(
        name=name,
        x=x,
        y=y,
        clean_y=sample.y if clean_y is None else clean_y,
        truth=GroundTruth(is_bad=is_bad, kind=kind),
        query_x=source.to_input(sample.query_images),
        query_y=sample.query_y if query_y is None else query_y,
        test_x=source.to_input(sample.test_images),
        test_y=sample.test_y,
        n_classes=source.n_classes,
        train_ids=sample.ids if ids is None else ids,
        groups=groups,
    )


def named_group(positions: Tensor, count: int, seed: int, name: str) -> Tensor:
    """``count`` of the positions, drawn from the stream ``name``, ascending."""
    order = random_order(len(positions), seed, name)
    return positions[order[:count]].sort().values
