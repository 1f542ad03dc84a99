"""The backdoor task: who taught the model to obey a trigger?

A few training images of other classes carry a small patch, the *trigger*, and the attacker's label.
A model trained on them gives that label to any image with the trigger. Source: T. Gu, B.
Dolan-Gavitt, S. Garg, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain", 2017.

The queries are test images of other classes with the trigger, and their label is the *attacker's*:
a positive influence on such a query means "steers the model towards the attack". So for the targets
that ask queries the suspicious end of a score is high, which the task declares. ``self`` keeps
its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.data.image_sets import WHITE, DataName, load_source
from fine_bench.data.sampling import Sample, draw, named_group, random_order, task_data
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream
from fine_bench.types import End

SUSPICIOUS: Mapping[str, End] = {
    "queries": "high",
    "validation": "high",
    "validation_per_class": "high",
}
"""The queries carry the attacker's label: the poison helps them."""


def stamp(images: NDArray[np.uint8], size: int, white: int) -> NDArray[np.uint8]:
    """A copy of the images with the trigger in the lower right corner.

    The trigger is a chequered square: ``white`` where row plus column (counted from the corner) is
    even, 0 elsewhere; the same in every channel.

    Args:
        images: ``(n, height, width)`` or ``(n, channels, height, width)``.
        size: side of the square in pixels, ≥ 1.
        white: the largest value of a pixel.

    Raises:
        ConfigError: a square that is no small part of the image.
    """
    smallest = min(images.shape[-2:])
    if not 1 <= size <= smallest // 2:
        raise ConfigError(
            f"task.trigger_size={size} is the side of the trigger in pixels, from 1 to "
            f"{smallest // 2}: half of the image. Type for instance "
            f"task.trigger_size={max(1, smallest // 9)}"
        )
    steps = np.arange(size)[::-1]
    patch = np.where((steps[:, None] + steps[None, :]) % 2 == 0, white, 0).astype(np.uint8)
    stamped = images.copy()
    stamped[..., -size:, -size:] = patch
    return stamped


def backdoor(
    *,
    data: DataName,
    seed: int,
    target_class: int = 0,
    poison_rate: float = 0.01,
    trigger_size: int = 3,
    n_train: int | None = None,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """A backdoor in ``round(poison_rate * n_train)`` training images; bad are these.

    Besides, as many other labels are flipped at random: a background of ordinary label errors that
    are not to be found. They are no part of the truth, and ``clean_y`` is the label before the
    poisoning, so it has them too.

    Groups, all of the poison's size and disjoint: ``poison``; ``random_flips``, the background;
    ``target_class``, correctly labelled images of the attacker's class; ``random_clean``, other
    correctly labelled images.

    Args:
        data: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        seed: ``task.seed``: sample, poison, background and queries.
        target_class: the attacker's label.
        poison_rate: share of the training images that is poisoned.
        trigger_size: side of the trigger in pixels.
        n_train: number of training images; None takes all.
        n_query: test images of other classes, stamped, with the attacker's label. The other test
            images stay as they are, and measure accuracy.
        data_dir, download: see ``fine_bench.data.image_sets.load_source``.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, or missing everywhere.
    """
    if not 0 < poison_rate < 1:
        raise ConfigError(
            "task.poison_rate is the share of the training images that is poisoned, above 0 and "
            f"below 1; got {poison_rate}. Type for instance task.poison_rate=0.01"
        )
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    if not 0 <= target_class < source.n_classes:
        raise ConfigError(
            f"task.target_class={target_class} is no class; type a number from 0 to "
            f"{source.n_classes - 1}"
        )
    sample = draw(
        source,
        seed=seed,
        n_train=n_train,
        n_query=n_query,
        query_among=torch.from_numpy(source.test_labels) != target_class,
    )
    groups = _groups(sample, target_class, poison_rate, seed)
    poison, flips = groups["poison"], groups["random_flips"]

    images = sample.images.copy()
    images[poison.numpy()] = stamp(images[poison.numpy()], trigger_size, WHITE[data])
    clean_y = sample.y.clone()
    clean_y[flips] = _other_labels(sample.y[flips], source.n_classes, seed)
    y = clean_y.clone()
    y[poison] = target_class
    is_bad = torch.zeros(sample.n, dtype=torch.bool)
    is_bad[poison] = True
    made = task_data(
        f"{data}_backdoor",
        source,
        replace(sample, query_images=stamp(sample.query_images, trigger_size, WHITE[data])),
        x=source.to_input(images),
        y=y,
        clean_y=clean_y,
        is_bad=is_bad,
        kind="poisoned image",
        query_y=torch.full_like(sample.query_y, target_class),
        groups=groups,
    )
    return replace(made, suspicious=SUSPICIOUS)


def _other_labels(labels: Tensor, n_classes: int, seed: int) -> Tensor:
    """A uniformly drawn other class for each label."""
    shift = torch.randint(
        1, n_classes, (len(labels),), generator=stream(seed, "task/background labels")
    )
    return (labels + shift) % n_classes


def _groups(sample: Sample, target_class: int, rate: float, seed: int) -> dict[str, Tensor]:
    """Four disjoint groups of one size."""
    size = round(rate * sample.n)
    victims = (sample.y != target_class).nonzero()[:, 0]
    n_target = sample.n - len(victims)
    # victims give poison, background and clean ones; the attacker's class gives its own group
    most = min(len(victims) // 3, n_target)
    if not 1 <= size <= most:
        raise ConfigError(
            f"task.poison_rate={rate:g} of {sample.n} training images is {size} poisoned ones; "
            f"this needs from 1 to {most}, so that groups of the same size to compare with fit in "
            f"beside them. Type a rate from {1 / sample.n:.2g} to {most / sample.n:.2g}"
        )
    order = victims[random_order(len(victims), seed, "task/poison")]
    rest = order[size:]
    others = (sample.y == target_class).nonzero()[:, 0]
    flips = named_group(rest, size, seed, "task/background")
    clean = rest[~torch.isin(rest, flips)].sort().values
    return {
        "poison": order[:size].sort().values,
        "random_flips": flips,
        "target_class": named_group(others, size, seed, "task/groups/target class"),
        "random_clean": named_group(clean, size, seed, "task/groups/clean"),
    }
