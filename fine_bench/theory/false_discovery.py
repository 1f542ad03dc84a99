"""Discoveries among many examples: conformal p-values against trusted data, Benjamini–Hochberg.

They answer *is this example unlike trusted data?*, which is another question than whether an effect
is larger than a run's noise (``p_values``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fine_bench.theory.arrays import (
    ArrayLike,
    FloatArray,
    check_level,
    check_probability,
    check_samples,
)


def trusted_size_needed(level: float, n_tests: int = 1, n_expected: int = 1) -> int:
    """Trusted examples needed before a false discovery rate of `level` can discover anything.

    The smallest conformal p-value is 1/(n + 1); Benjamini–Hochberg rejects `n_expected` of
    `n_tests` only at p ≤ level·n_expected/n_tests, so n ≥ n_tests/(level·n_expected) − 1.
    """
    check_level(level)
    if not 1 <= n_expected <= n_tests:
        raise ValueError(f"need 1 <= n_expected <= n_tests, got {n_expected!r} of {n_tests!r}")
    # The small allowance keeps 1/0.05, which is 20.000000000000004 or so, from costing one more.
    return max(int(np.ceil(n_tests / (level * n_expected) - 1.0 - 1e-9)), 1)


def conformal_p_values(
    scores: ArrayLike,
    trusted: ArrayLike,
    suspicious: Literal["high", "low"],
    *,
    ties: Literal["conservative", "random"] = "conservative",
    rng: np.random.Generator | None = None,
    level: float | None = None,
) -> FloatArray:
    """p-value of "this example is like the trusted ones", for each score; same shape as `scores`.

    `scores`: any shape; `trusted`: (n,) scores of data known to be clean and *trained on like the
    rest*. `suspicious`: the direction that counts as evidence, declared by the target.

        p = (1 + #{trusted at least as suspicious}) / (n + 1)

    Valid in finite samples whatever the scores' distribution, jointly positively dependent, so
    that Benjamini–Hochberg holds its rate (Bates, Candès, Lei, Romano and Sesia 2023). With
    `ties="conservative"` trusted values equal to the score count in full; "random" counts a
    uniform share of them and of the 1, making p exactly uniform (needs `rng`; the proof of the
    joint property does not cover it). `level`: when given, a trusted set too small for any
    discovery at that level is refused.
    """
    values = np.asarray(scores, dtype=np.float64)
    clean = check_samples(trusted, "trusted")
    if clean.ndim != 1:
        raise ValueError(f"trusted must be 1-d, got shape {clean.shape}")
    if values.size and not np.isfinite(values).all():
        raise ValueError(
            "scores hold NaN or infinite values; an undefined score has no p-value: leave it out"
        )
    if suspicious not in ("high", "low"):
        raise ValueError(f"suspicious must be 'high' or 'low', got {suspicious!r}")
    n = clean.size
    if level is not None and n < trusted_size_needed(level):
        raise ValueError(
            f"{n} trusted example(s) give p-values of at least 1/{n + 1}, above the level "
            f"{level:g}: no discovery is possible. At least {trusted_size_needed(level)} are "
            f"needed, and {trusted_size_needed(level, max(values.size, 1))} to find a single bad "
            f"one among {max(values.size, 1)}"
        )
    sign = -1.0 if suspicious == "high" else 1.0
    values, clean = sign * values, np.sort(sign * clean)
    below = np.searchsorted(clean, values, side="left")
    through = np.searchsorted(clean, values, side="right")
    if ties == "conservative":
        return np.asarray((1.0 + through) / (n + 1.0), dtype=np.float64)
    if ties != "random":
        raise ValueError(f"ties must be 'conservative' or 'random', got {ties!r}")
    if rng is None:
        raise ValueError("ties='random' needs rng=numpy.random.default_rng(seed)")
    share = rng.uniform(size=values.shape)
    return np.asarray((below + share * (1.0 + through - below)) / (n + 1.0), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Discoveries:
    """Which hypotheses are rejected at a false discovery rate of `level`."""

    rejected: npt.NDArray[np.bool_]
    adjusted: FloatArray
    """Smallest level at which each would be rejected."""
    level: float


def benjamini_hochberg(p_values: ArrayLike, level: float = 0.1) -> Discoveries:
    """Benjamini and Hochberg (1995) on `p_values` (m,): false discovery rate at most `level`.

    Adjusted p: min over larger p_(j) of m·p_(j)/j. Holds for independent and for positively
    dependent p-values (conformal ones are). An empty list has no discoveries.
    """
    check_level(level)
    values = check_probability(p_values, "p_values")
    if values.ndim != 1:
        raise ValueError(f"p_values must be 1-d, got shape {values.shape}; flatten the table first")
    m = values.size
    order = np.argsort(-values, kind="stable")
    scaled = values[order] * (m / np.arange(m, 0, -1))
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled), 1.0)
    # The same sum decides mask and table, so that they can never disagree.
    return Discoveries(adjusted <= level, adjusted, level)
