"""Arguments of this package, checked: probabilities, samples, levels of confidence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
ArrayLike = npt.ArrayLike


def check_probability(value: ArrayLike, name: str) -> FloatArray:
    """`value` as float64, refused with a ValueError unless every entry lies in [0, 1]."""
    array = np.asarray(value, dtype=np.float64)
    outside = ~((array >= 0.0) & (array <= 1.0))  # also true for NaN
    if outside.any():
        worst = array[outside].flat[0]
        raise ValueError(
            f"{name} must lie in [0, 1], got {worst:.6g} among {array.size} value(s); "
            "pass probabilities, not percentages or scores"
        )
    return array


def check_samples(samples: ArrayLike, name: str, least: int = 1) -> FloatArray:
    """`samples` of shape (..., n) as float64, refused unless finite and n ≥ `least`."""
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim == 0:
        raise ValueError(f"{name} must have shape (..., n), got a single number; pass a sequence")
    if array.shape[-1] < least:
        raise ValueError(
            f"{name} has {array.shape[-1]} sample(s) on its last axis, at least {least} needed; "
            "draw more samples (longer run, or more batches a step)"
        )
    bad = int(np.count_nonzero(~np.isfinite(array)))
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite value(s) of {array.size}; find where the "
            "statistic diverged, or drop these steps from both samples before testing"
        )
    return array


def check_arms(p: ArrayLike, q: ArrayLike, least: int = 1) -> tuple[FloatArray, FloatArray]:
    """Both samples of a test, (..., n_p) and (..., n_q): `check_samples`, equal leading axes."""
    xp, xq = check_samples(p, "p", least), check_samples(q, "q", least)
    if xp.shape[:-1] != xq.shape[:-1]:
        raise ValueError(
            f"p {xp.shape} and q {xq.shape} must agree in all axes but the last; "
            "stack the subsets of both in the same order"
        )
    return xp, xq


def check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}; try 0.95")
