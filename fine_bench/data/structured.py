"""Mislabelling with structure: errors of people and machines are not uniform.

One function for each kind of structure, each for any data set of ``fine_bench.data.image_sets``.
The flips come from the stream "task/flips" of ``task.seed``, the sample and the queries from
streams of their own, as in the uniform task: the queries do not depend on the noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fine_bench.data.corruption import (
    apportion,
    check_confusions,
    check_rate,
    check_transition,
    flip_confusions,
    flip_least_sure,
    flip_transition,
    flip_uniform,
    places,
)
from fine_bench.data.groups import mislabel_groups
from fine_bench.data.image_sets import DataName, load_source
from fine_bench.data.mislabel import mislabel_task
from fine_bench.data.reference_model import class_probabilities, set_aside
from fine_bench.data.sampling import Sample, draw, draw_counts, random_order, task_data
from fine_bench.data.source import Source
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream


def uniform(
    *,
    data: DataName,
    seed: int,
    n_train: int | None = None,
    noise_rate: float = 0.2,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """No structure: ``noise_rate`` of all labels become any other class.

    The same data as ``digits_mislabel`` and ``mnist_mislabel``, and the same task for CIFAR-10.

    Args:
        data: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        seed: ``task.seed``: sample, flips and queries.
        n_train: number of training images; None takes all.
        noise_rate: share of training labels flipped.
        n_query: clean query images, taken from the test images.
        data_dir, download: see ``fine_bench.data.image_sets.load_source``.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, or missing everywhere.
    """
    check_rate(noise_rate)
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    return mislabel_task(
        f"{data}_mislabel",
        source,
        seed=seed,
        n_train=n_train,
        noise_rate=noise_rate,
        n_query=n_query,
    )


def asymmetric(
    *,
    data: DataName,
    seed: int,
    confusions: Sequence[tuple[int, int]] = ((4, 9), (7, 1)),
    n_train: int | None = None,
    noise_rate: float = 0.4,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """Some classes are mistaken for one other class each: 4 for 9, 7 for 1.

    Args:
        confusions: pairs (class, class that it is mistaken for).
        noise_rate: share of the images *of each class named on the left* that are flipped.
        data, seed, n_train, n_query, data_dir, download: as for ``uniform``.

    Raises:
        ConfigError, DataError: as for ``uniform``.
    """
    check_rate(noise_rate)
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    check_confusions(confusions, source.n_classes)
    sample = draw(source, seed=seed, n_train=n_train, n_query=n_query)
    y, _ = flip_confusions(
        sample.y, confusions, noise_rate, source.n_classes, stream(seed, "task/flips")
    )
    return _flipped(f"{data}_asymmetric", source, sample, y, seed)


def transition(
    *,
    data: DataName,
    seed: int,
    matrix: Sequence[Sequence[float]],
    n_train: int | None = None,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """Any class may be mistaken for any other: row a of ``matrix`` says how class a is labelled.

    Args:
        matrix: one row a class, the share of the class that gets each label; rows sum to one.
        data, seed, n_train, n_query, data_dir, download: as for ``uniform``.

    Raises:
        ConfigError, DataError: as for ``uniform``; a row that is no distribution is named.
    """
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    check_transition(matrix, source.n_classes)
    sample = draw(source, seed=seed, n_train=n_train, n_query=n_query)
    y, _ = flip_transition(sample.y, matrix, source.n_classes, stream(seed, "task/flips"))
    return _flipped(f"{data}_transition", source, sample, y, seed)


def instance(
    *,
    data: DataName,
    seed: int,
    n_model: int,
    n_train: int | None = None,
    noise_rate: float = 0.2,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """The images that look least like their class get the label that they look like.

    A simple model (``fine_bench.data.reference_model``) fitted on images that no run trains on says
    which these are.

    Args:
        n_model: images set aside for the simple model; ``n_train`` is drawn from the others.
        noise_rate: share of training labels flipped: those that the model is least sure of.
        data, seed, n_train, n_query, data_dir, download: as for ``uniform``.

    Raises:
        ConfigError, DataError: as for ``uniform``.
    """
    check_rate(noise_rate)
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    model, others = set_aside(source, n_model, seed)
    sample = draw(source, seed=seed, n_train=n_train, n_query=n_query, among=others)
    x = source.to_input(sample.images)
    y, _ = flip_least_sure(sample.y, class_probabilities(source, model, x), noise_rate)
    return _flipped(f"{data}_instance", source, sample, y, seed, x)


def long_tail(
    *,
    data: DataName,
    seed: int,
    imbalance: float = 10.0,
    n_train: int | None = None,
    noise_rate: float = 0.2,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """Class sizes fall off geometrically, and labels are flipped uniformly on top.

    With C classes in a random order, the k-th (k = 0 … C - 1) has a size in proportion to
    imbalance^(-k / (C - 1)). Queries and test images keep their natural classes.

    Args:
        imbalance: size of the largest class over that of the smallest, ≥ 1.
        n_train: training images of all classes together; None takes the most that the pool can
            give in these proportions.
        noise_rate: share of training labels flipped uniformly to another class.
        data, seed, n_query, data_dir, download: as for ``uniform``.

    Raises:
        ConfigError, DataError: as for ``uniform``; a class that would have no image is named.
    """
    check_rate(noise_rate)
    if not 1 <= imbalance < float("inf"):
        raise ConfigError(
            "task.imbalance is the size of the largest class over that of the smallest, at least "
            f"1; got {imbalance}. Type for instance task.imbalance=10"
        )
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    rank = random_order(source.n_classes, seed, "task/long_tail").argsort()
    weights = float(imbalance) ** (-rank.double() / (source.n_classes - 1))
    available = torch.bincount(torch.from_numpy(source.labels), minlength=source.n_classes)
    most = _most(weights, available)
    n_train = most if n_train is None else n_train
    if not source.n_classes <= n_train <= most:
        raise ConfigError(
            f"task.n_train={n_train}, but with task.imbalance={imbalance:g} the images are enough "
            f"for {source.n_classes} to {most} in total. Type a number between, or "
            f"task.n_train=null for {most}"
        )
    counts = apportion(weights, n_train)
    if int(counts.min()) == 0:
        raise ConfigError(
            f"task.imbalance={imbalance:g} leaves class {int(counts.argmin())} without an image "
            f"among task.n_train={n_train}. Type a larger task.n_train (up to {most}), or a "
            "smaller task.imbalance"
        )
    sample = draw_counts(source, seed=seed, counts=counts, n_query=n_query)
    y, _ = flip_uniform(sample.y, noise_rate, source.n_classes, stream(seed, "task/flips"))
    return _flipped(f"{data}_long_tail", source, sample, y, seed)


def _most(weights: Tensor, available: Tensor) -> int:
    """The largest total that ``apportion`` can give without exceeding what a class has."""
    order = places(weights, int(available.sum()) + 1)
    taken = torch.nn.functional.one_hot(order, len(weights)).cumsum(0)
    too_many = (taken > available).any(1).nonzero()[:, 0]
    return int(too_many[0])


def _flipped(
    name: str, source: Source, sample: Sample, y: Tensor, seed: int, x: Tensor | None = None
) -> TaskData:
    x = source.to_input(sample.images) if x is None else x
    return task_data(
        name,
        source,
        sample,
        x=x,
        y=y,
        is_bad=y != sample.y,
        kind="flipped label",
        groups=mislabel_groups(x, sample.y, y, source.n_classes, seed),
    )
