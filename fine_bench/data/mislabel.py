"""The mislabelling task: some training labels are flipped, and the flips have to be found.

Everything random comes from streams of ``task.seed`` named after their use. So the queries do not
depend on ``n_train`` or the noise rate, nor the flips on ``n_query``; and a larger sample (or more
queries) contains the smaller one.
"""

from __future__ import annotations

import torch

from fine_bench.data.corruption import check_rate, flip_uniform
from fine_bench.data.groups import mislabel_groups
from fine_bench.data.source import Source, check_seed
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream
from fine_bench.types import GroundTruth


def _check_sizes(source: Source, n_train: int, n_query: int) -> None:
    n_pool, n_test, n_classes = len(source.images), len(source.test_images), source.n_classes
    if n_train > n_pool:
        raise ConfigError(
            f"task.n_train={n_train}, but the data set has {n_pool} training images. Type "
            f"task.n_train={n_pool} or less, or task.n_train=null for all of them"
        )
    if n_train < n_classes:
        raise ConfigError(
            f"task.n_train={n_train} is fewer than the {n_classes} classes. Type "
            f"task.n_train={n_classes} or more, or task.n_train=null for all {n_pool} images"
        )
    if not 1 <= n_query < n_test:
        raise ConfigError(
            f"task.n_query={n_query}, but the queries are taken from {n_test} test images, and at "
            f"least one must remain to measure accuracy. Type task.n_query={min(100, n_test - 1)}, "
            f"or any number from 1 to {n_test - 1}"
        )


def mislabel_task(
    name: str,
    source: Source,
    *,
    seed: int,
    n_train: int | None,
    noise_rate: float,
    n_query: int,
) -> TaskData:
    """Sample, flip and split: a ``TaskData`` whose bad examples are the flipped ones.

    Args:
        name: name of the task.
        source: the clean data.
        seed: ``task.seed``, ≥ 0.
        n_train: size of a uniform sample of the pool, kept in source order; None takes all.
        noise_rate: share of labels flipped uniformly to another class, 0 ≤ rate < 1.
        n_query: queries, drawn uniformly from the test images; the others measure accuracy.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
    """
    check_seed(seed)
    check_rate(noise_rate)
    n_pool = len(source.images)
    n_train = n_pool if n_train is None else n_train
    _check_sizes(source, n_train, n_query)

    sample = torch.randperm(n_pool, generator=stream(seed, "task/sample"))[:n_train].sort().values
    clean_y = torch.from_numpy(source.labels)[sample]
    y, is_flipped = flip_uniform(clean_y, noise_rate, source.n_classes, stream(seed, "task/flips"))

    order = torch.randperm(len(source.test_images), generator=stream(seed, "task/queries"))
    query, test = order[:n_query], order[n_query:].sort().values
    test_labels = torch.from_numpy(source.test_labels)
    x = source.to_input(source.images[sample.numpy()])
    return TaskData(
        name=name,
        x=x,
        y=y,
        clean_y=clean_y,
        truth=GroundTruth(is_bad=is_flipped, kind="flipped label"),
        query_x=source.to_input(source.test_images[query.numpy()]),
        query_y=test_labels[query],
        test_x=source.to_input(source.test_images[test.numpy()]),
        test_y=test_labels[test],
        n_classes=source.n_classes,
        train_ids=torch.from_numpy(source.ids)[sample],
        groups=mislabel_groups(x, clean_y, y, source.n_classes, seed),
    )
