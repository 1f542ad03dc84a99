"""Kendall's τ_b of many pairs of runs at once, to the last bit what SciPy says of one.

    τ_b = (C − D) / sqrt(N − T_x) / sqrt(N − T_y),   N = n (n − 1) / 2 = C + D + T_x + T_y − T_xy

with C concordant and D discordant pairs of examples, T_x and T_y those tied in either score and
T_xy in both (Kendall, 1945, *The treatment of ties in ranking problems*). D is the number of
inversions of y's order once the examples are sorted by x (Knight, 1966). SciPy sorts both scores
anew for every pair and counts by merging; here each run is sorted once, and the inversions of all
pairs are counted together, bit by bit: sorting a permutation of 2^L numbers stably by its highest
bit puts every number without it before those with it, and each step to the left is an inversion;
both halves go on with the next bit. L passes over ``(pairs, 2^L)`` integers, exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fine_bench.metrics._arrays import Vector

_NUMBERS = 1_000_000
"""Counted together at most: 8 MB of positions."""


@dataclass(frozen=True, eq=False)
class _Sorted:
    """A run's dense ranks ``(n,)``, the order that sorts them, and its tied pairs."""

    dense: NDArray[np.int64]
    order: NDArray[np.intp]
    tied: int


def kendall_taus(values: Sequence[Vector], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """τ_b of each pair of score vectors.

    Args:
        values: ``(n,)`` each, finite.
        pairs: which two are compared, by their positions in ``values``.

    Returns:
        one τ_b a pair; NaN where one of the two is constant.
    """
    runs = {i: _sorted(values[i]) for i in {i for pair in pairs for i in pair}}
    result = [float("nan")] * len(pairs)
    size = 1 << max(1, (max((len(values[i]) for i in runs), default=1) - 1).bit_length())
    step = max(1, _NUMBERS // size)
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        found = [_by_first(runs[a], runs[b]) for a, b in part]
        counts = _inversions(np.stack([permutation for permutation, _ in found]), size)
        for i, ((a, b), (_, both), count) in enumerate(zip(part, found, counts, strict=True)):
            result[start + i] = _tau(runs[a], runs[b], both, count)
    return result


def _sorted(values: Vector) -> _Sorted:
    order = np.argsort(values, kind="stable")
    new = np.diff(values[order]) != 0
    dense = np.empty(len(values), dtype=np.int64)
    dense[order] = np.concatenate([[0], np.cumsum(new)])
    return _Sorted(dense, order, _tied(np.bincount(dense)))


def _tied(counts: NDArray[np.int64]) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _by_first(x: _Sorted, y: _Sorted) -> tuple[NDArray[np.int64], int]:
    """y's ranks as a permutation, examples sorted by x and then by y, and the pairs tied in both.

    Examples tied in y are numbered as they stand, so that they make no inversion.
    """
    order = np.lexsort((y.dense, x.dense)) if x.tied else x.order
    ranks = y.dense[order]
    if not y.tied:
        return ranks, 0
    both = 0
    if x.tied:
        new = (np.diff(ranks) != 0) | (np.diff(x.dense[order]) != 0)
        ends = np.flatnonzero(np.concatenate([[True], new, [True]]))
        both = _tied(np.diff(ends))
    permutation = np.empty_like(ranks)
    permutation[np.argsort(ranks, kind="stable")] = np.arange(len(ranks))
    return permutation, both


def _inversions(permutations: NDArray[np.int64], size: int) -> list[int]:
    """Pairs of positions i < j with a larger number at i, of each row ``(rows, n)``.

    Args:
        permutations: of 0 … n − 1.
        size: a power of two, ≥ n: each row is filled up by numbers that ascend.
    """
    rows, n = permutations.shape
    numbers = np.empty((rows, size), dtype=np.uint16 if size <= 1 << 16 else np.uint32)
    numbers[:, :n] = permutations
    numbers[:, n:] = np.arange(n, size)
    flat = numbers.ravel()
    total = np.zeros(rows, dtype=np.int64)
    half = size // 2
    # where the numbers without the bit would stand if none had to step
    first = np.arange(rows, dtype=np.int64) * size
    while half:
        has = (flat & flat.dtype.type(half)) != 0
        without, with_it = np.flatnonzero(~has), np.flatnonzero(has)
        blocks = size // (2 * half)
        # the sum of where they stand, less that of the first places of their blocks
        stands = without.reshape(rows, -1).sum(axis=1)
        places = half * (2 * half * (blocks * (blocks - 1) // 2)) + blocks * (
            half * (half - 1) // 2
        )
        total += stands - first * (size // 2) - places
        both = np.empty((rows * blocks, 2, half), dtype=flat.dtype)
        both[:, 0] = flat[without].reshape(-1, half)
        both[:, 1] = flat[with_it].reshape(-1, half)
        flat = both.ravel()
        half //= 2
    return [int(count) for count in total]


def _tau(x: _Sorted, y: _Sorted, both: int, discordant: int) -> float:
    """The formula, in the order in which SciPy divides."""
    n = len(x.dense)
    pairs = n * (n - 1) // 2
    if pairs in (x.tied, y.tied):
        return float("nan")
    difference = pairs - x.tied - y.tied + both - 2 * discordant
    tau = difference / np.sqrt(pairs - x.tied) / np.sqrt(pairs - y.tied)
    return float(min(1.0, max(-1.0, tau)))
