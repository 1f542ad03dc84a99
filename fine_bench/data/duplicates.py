"""Families of duplicates: each copy matters little, the family matters.

Some of the flipped images come several times, with the same wrong label: as exact copies, shifted
by a pixel, or with noise on the pixels. A run without one copy learns the same error from the
others, so no single copy has much influence, but the family has that of an error told many times.
A method that scores single examples by what would happen without them must miss it; the groups show
whether it sees the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.data.corruption import check_rate, flip_uniform
from fine_bench.data.image_sets import WHITE, DataName, load_source
from fine_bench.data.sampling import draw, random_order, task_data
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream

NOISE = 0.1
"""Noise on a copy's pixels: uniform whole numbers up to this share of the largest value."""


def exact(image: NDArray[np.uint8], n: int, white: int, generator: torch.Generator) -> Tensor:
    """``n`` copies, ``(n, ...)`` uint8."""
    return torch.from_numpy(image).expand(n, *image.shape).clone()


def shifted(image: NDArray[np.uint8], n: int, white: int, generator: torch.Generator) -> Tensor:
    """``n`` copies, each moved by one pixel in one of eight directions; the border is repeated.

    The first eight go in different directions.
    """
    border = [(0, 0)] * (image.ndim - 2) + [(1, 1), (1, 1)]
    wide = torch.from_numpy(np.pad(image, border, mode="edge"))
    steps = [(down, right) for down in (0, 1, 2) for right in (0, 1, 2) if (down, right) != (1, 1)]
    order = torch.randperm(len(steps), generator=generator).tolist()
    height, width = image.shape[-2:]
    copies = []
    for number in range(n):
        down, right = steps[order[number % len(steps)]]
        copies.append(wide[..., down : down + height, right : right + width])
    return torch.stack(copies)


def noised(image: NDArray[np.uint8], n: int, white: int, generator: torch.Generator) -> Tensor:
    """``n`` copies, each with whole numbers up to ± ``NOISE`` · white on its pixels, clipped."""
    level = max(1, round(NOISE * white))
    noise = torch.randint(-level, level + 1, (n, *image.shape), generator=generator)
    return (torch.from_numpy(image.astype(np.int64)) + noise).clamp(0, white).to(torch.uint8)


COPIES: Mapping[str, Callable[[NDArray[np.uint8], int, int, torch.Generator], Tensor]] = {
    "exact": exact,
    "shifted": shifted,
    "noised": noised,
}


def duplicates(
    *,
    data: DataName,
    seed: int,
    n_families: int = 6,
    family_size: int = 8,
    n_train: int | None = None,
    noise_rate: float = 0.1,
    n_query: int = 100,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """Uniform flips, some of which come ``family_size`` times; bad are the flips and their copies.

    The kinds of copies take turns: family 0 is exact, 1 shifted, 2 noised, 3 exact again. Copies
    come after the drawn images and have ids of their own, beyond those of the source.

    Groups: ``exact_0``, ``shifted_1``, …: the families, originals included; ``singles_0``, …: for
    each family as many flips that come once, of the same given label and of the same true class as
    far as there are enough. All groups are disjoint.

    Args:
        data: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        seed: ``task.seed``: sample, flips, families and queries.
        n_families: families of duplicates.
        family_size: members of each, the original included, at least 2.
        n_train: number of training images, copies included; None takes all and adds the copies.
        noise_rate: share of the drawn images whose label is flipped uniformly.
        n_query: clean query images, taken from the test images.
        data_dir, download: see ``fine_bench.data.image_sets.load_source``.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, or missing everywhere.
    """
    check_rate(noise_rate)
    if n_families < 1 or family_size < 2:
        raise ConfigError(
            f"task.n_families={n_families} families of task.family_size={family_size} members: "
            "there must be at least 1 family of 2. Type for instance task.n_families=6 "
            "task.family_size=8"
        )
    source = load_source(data, seed=seed, data_dir=data_dir, download=download)
    n_copies = n_families * (family_size - 1)
    if n_train is not None and n_train - n_copies < source.n_classes:
        raise ConfigError(
            f"task.n_train={n_train} leaves {n_train - n_copies} images beside {n_copies} copies. "
            f"Type task.n_train={n_copies + source.n_classes} or more, or fewer families"
        )
    drawn = draw(
        source, seed=seed, n_train=None if n_train is None else n_train - n_copies, n_query=n_query
    )
    y, is_flipped = flip_uniform(drawn.y, noise_rate, source.n_classes, stream(seed, "task/flips"))
    heads, singles = _families(drawn.y, y, is_flipped, n_families, family_size, seed)

    kinds = list(COPIES)
    images, groups = [drawn.images], {}
    for number, head in enumerate(heads.tolist()):
        kind = kinds[number % len(kinds)]
        made = COPIES[kind](
            drawn.images[head],
            family_size - 1,
            WHITE[data],
            stream(seed, f"task/copies {number}"),
        )
        images.append(made.numpy())
        first = drawn.n + number * (family_size - 1)
        copies = torch.arange(first, first + family_size - 1)
        groups[f"{kind}_{number}"] = torch.cat([torch.tensor([head]), copies])
    groups |= {f"singles_{number}": members for number, members in enumerate(singles)}

    copied = torch.cat([torch.arange(drawn.n), heads.repeat_interleave(family_size - 1)])
    clean_y, given_y = drawn.y[copied], y[copied]
    last_id = int(max(source.ids.max(), drawn.ids.max()))
    return task_data(
        f"{data}_duplicates",
        source,
        replace(drawn, images=np.concatenate(images), y=clean_y),
        x=source.to_input(np.concatenate(images)),
        y=given_y,
        is_bad=given_y != clean_y,
        kind="flipped label",
        ids=torch.cat([drawn.ids, last_id + 1 + torch.arange(n_copies)]),
        groups=groups,
    )


def _families(
    clean_y: Tensor, y: Tensor, is_flipped: Tensor, n_families: int, size: int, seed: int
) -> tuple[Tensor, list[Tensor]]:
    """The originals ``(n_families,)`` and for each family ``size`` flips that stay single.

    Flips are taken in a random order; one of whose given label too few others are left is passed
    over.
    """
    flips = is_flipped.nonzero()[:, 0]
    free = flips[random_order(len(flips), seed, "task/families")]
    heads: list[int] = []
    singles: list[Tensor] = []
    while len(free) and len(heads) < n_families:
        head, free = int(free[0]), free[1:]
        alike = free[y[free] == y[head]]
        if len(alike) < size:
            continue
        # those of the same true class first, in the random order
        nearest = (clean_y[alike] != clean_y[head]).long().argsort(stable=True)
        chosen = alike[nearest[:size]]
        heads.append(head)
        singles.append(chosen.sort().values)
        free = free[~torch.isin(free, chosen)]
    if len(heads) < n_families:
        raise ConfigError(
            f"{len(flips)} flipped labels are too few for {n_families} families, each with {size} "
            f"single flips to the same class to compare it with: they give {len(heads)}. Type a "
            "larger task.noise_rate or task.n_train, or smaller task.n_families or "
            "task.family_size"
        )
    return torch.tensor(heads), singles
