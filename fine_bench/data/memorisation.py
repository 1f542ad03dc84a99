"""Memorisation without noise: examples that a model can only learn by heart.

Labels are all correct here. What stands out is rare: a class of which only a few dozen images are
left, or the images that look least like their class. A model must memorise them to get them right
(V. Feldman, "Does Learning Require Memorization? A Short Tale about a Long Tail", 2020), so a
high self-influence is right and useful for them, while as a sign of an error it would be a false
alarm. The truth marks the members of the rare part: "bad" reads "rare" in these tasks.
"""

from __future__ import annotations

import torch

from fine_bench.data.corruption import least_sure
from fine_bench.data.image_sets import DataName, load_source
from fine_bench.data.reference_model import class_probabilities, set_aside
from fine_bench.data.sampling import (
    Sample,
    check_train_count,
    draw,
    draw_counts,
    named_group,
    random_order,
    task_data,
)
from fine_bench.data.source import Source
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError

KIND = "rare example"


def rare_class(
    *,
    data: DataName,
    seed: int,
    rare: int = 8,
    n_rare: int = 30,
    n_train: int | None = None,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """One class is kept at ``n_rare`` images; these are the rare ones.

    Groups of the same size: ``rare`` and ``random_others``.

    Args:
        data: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        seed: ``task.seed``: sample and queries.
        rare: the class that becomes rare.
        n_rare: how many of its images are kept, ≥ 1; more contain the fewer.
        n_train: number of training images, the rare ones included; None takes all others.
        n_query: query images, taken from the test images, whose classes stay as they are.
        data_dir, download: see ``fine_bench.data.image_sets.load_source``.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, or missing everywhere.
    """
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    if not 0 <= rare < source.n_classes:
        raise ConfigError(
            f"task.rare={rare} is no class; type a number from 0 to {source.n_classes - 1}"
        )
    labels = torch.from_numpy(source.labels)
    order = random_order(len(labels), seed, "task/sample")
    members = order[labels[order] == rare]
    if not 1 <= n_rare <= len(members):
        raise ConfigError(
            f"task.n_rare={n_rare}, but class {rare} has {len(members)} images; type a number "
            f"from 1 to {len(members)}, for instance task.n_rare={min(30, len(members))}"
        )
    kept = torch.cat([members[:n_rare], order[labels[order] != rare]])
    n_train = len(kept) if n_train is None else n_train
    check_train_count(n_train, len(kept), source.n_classes)
    if n_train < 2 * n_rare:
        raise ConfigError(
            f"task.n_rare={n_rare} of task.n_train={n_train} images would be no rare part; type "
            f"task.n_rare={n_train // 2} or less"
        )
    chosen = torch.bincount(labels[kept[:n_train]], minlength=source.n_classes)
    sample = draw_counts(source, seed=seed, counts=chosen, n_query=n_query)
    return _marked(f"{data}_rare_class", source, sample, sample.y == rare, seed)


def atypical(
    *,
    data: DataName,
    seed: int,
    n_model: int,
    rate: float = 0.05,
    n_train: int | None = None,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """The images whose class a simple model finds least probable are the rare ones.

    The model (``fine_bench.data.reference_model``) is fitted on images that no run trains on.

    Groups of the same size: ``rare`` and ``random_others``.

    Args:
        n_model: images set aside for the simple model; ``n_train`` is drawn from the others.
        rate: share of the training images that counts as atypical; a higher one contains the lower.
        data, seed, n_train, n_query, data_dir, download: as for ``rare_class``.

    Raises:
        ConfigError, DataError: as for ``rare_class``.
    """
    if not 0 < rate <= 0.5:
        raise ConfigError(
            "task.rate is the share of the training images that counts as atypical, above 0 and "
            f"at most 0.5; got {rate}. Type for instance task.rate=0.05"
        )
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    model, others = set_aside(source, n_model, seed)
    sample = draw(source, seed=seed, n_train=n_train, n_query=n_query, among=others)
    count = round(rate * sample.n)
    if count == 0:
        raise ConfigError(
            f"task.rate={rate:g} of {sample.n} training images is none; type a rate of at least "
            f"{1 / sample.n:.2g}"
        )
    x = source.to_input(sample.images)
    is_rare = torch.zeros(sample.n, dtype=torch.bool)
    is_rare[least_sure(sample.y, class_probabilities(source, model, x), count)] = True
    return _marked(f"{data}_atypical", source, sample, is_rare, seed)


def _marked(
    name: str, source: Source, sample: Sample, is_rare: torch.Tensor, seed: int
) -> TaskData:
    rare, others = is_rare.nonzero()[:, 0], (~is_rare).nonzero()[:, 0]
    return task_data(
        name,
        source,
        sample,
        x=source.to_input(sample.images),
        y=sample.y,
        is_bad=is_rare,
        kind=KIND,
        groups={
            "rare": rare,
            "random_others": named_group(others, len(rare), seed, "task/groups/others"),
        },
    )
