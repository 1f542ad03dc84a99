"""The nearest neighbours of every training example among the others, exactly.

For x the nearest z has the largest ⟨x, z⟩ − ‖z‖²/2, so neighbours come from one product of the
features with themselves, n² d multiplications, of which symmetry saves half: a tile of it speaks
for its rows and for its columns. Nothing of size (n, n) is held. The other examples fall into
groups; the tiles leave the nearest of each group only, and the k nearest of x lie in the k groups
whose nearest ones are nearest. These are looked at again, one group with all examples that ask for
it at a time: n k (group's size) d multiplications.

Shapes: n examples, d features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 64
"""Examples in a group at least."""

GROUPS = 2**28
"""Numbers of the nearest of each group, n G, that are held at most (about): 1 GiB."""

TILE = 512
"""Rows and columns of the product at a time, about: both it and its differences stay in a cache."""

CANDIDATES = 2**24
"""Numbers of the second look that are sorted at a time."""


def nearest_neighbours(features: Tensor, k: int) -> Tensor:
    """Positions of the k nearest other rows of ``(n, d)``, ``(n, k)``, nearest first.

    Args:
        features: of the examples; distances are Euclidean.
        k: number of neighbours, from 1 to n − 1.
    """
    n = len(features)
    width = WIDTH * -(-n * n // (WIDTH * GROUPS))
    # of what fills the last group up no distance is small
    padding = -n % width
    x = features - features.mean(0)  # distances keep more digits near the origin
    x = torch.cat([x, x.new_zeros(padding, x.shape[1])])
    half = torch.cat([0.5 * x[:n].square().sum(1), x.new_full((padding,), float("inf"))])
    best = _nearest_of_groups(x, half, width)[:n].topk(min(k, len(x) // width)).indices
    result = torch.empty(n, k, dtype=torch.int64)
    for rows in torch.split(torch.arange(n), max(1, CANDIDATES // (best.shape[1] * width))):
        nearness = _nearness_in_groups(x, half, width, rows, best[rows])
        found = nearness.flatten(1).topk(k).indices
        result[rows] = best[rows].gather(1, found // width) * width + found % width
    return result


def _nearest_of_groups(x: Tensor, half: Tensor, width: int) -> Tensor:
    """The largest nearness in each group of columns for each row, ``(n, G)``."""
    n = len(x)
    found = x.new_empty(n, n // width)
    size = width * max(1, TILE // width)
    starts = range(0, n, size)
    for i in starts:
        rows = slice(i, min(i + size, n))
        for j in starts[i // size :]:
            columns = slice(j, min(j + size, n))
            products = x[rows] @ x[columns].T
            if i == j:  # nobody is a neighbour of its own
                products.fill_diagonal_(float("-inf"))
            else:
                own = products - half[rows, None]
                nearest = own.view(-1, width, own.shape[1]).amax(1)
                found[columns, i // width : rows.stop // width] = nearest.T
            nearest = products.sub_(half[columns]).view(len(products), -1, width).amax(2)
            found[rows, j // width : columns.stop // width] = nearest
    return found


def _nearness_in_groups(
    x: Tensor, half: Tensor, width: int, rows: Tensor, groups: Tensor
) -> Tensor:
    """The nearness of the examples of some groups, ``(r, c, width)``.

    Args:
        x: features, centred, and filled up to whole groups.
        half: half of their squares.
        width: examples in a group.
        rows: whose neighbours are looked for, ``(r,)``.
        groups: where, ``(r, c)``.
    """
    nearness = x.new_empty(groups.numel(), width)
    # each group with all rows that ask for it: a few large products instead of many small ones
    asked, order = groups.flatten().sort()
    present, counts = torch.unique_consecutive(asked, return_counts=True)
    parts = torch.split(order, counts.tolist())
    for group, places in zip(present.tolist(), parts, strict=True):
        columns = slice(group * width, (group + 1) * width)
        nearness[places] = x[rows[places // groups.shape[1]]] @ x[columns].T - half[columns]
    nearness = nearness.view(*groups.shape, width)
    own = (groups == rows[:, None] // width).nonzero(as_tuple=True)
    nearness[(*own, rows[own[0]] % width)] = float("-inf")
    return nearness


__all__ = ["nearest_neighbours"]
