"""Arguments of the metrics: tensors or arrays in, checked float64 arrays out."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.types import End as End

ArrayLike: TypeAlias = Tensor | NDArray[Any]
Vector: TypeAlias = NDArray[np.float64]


def as_array(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Finite float64 array."""
    raw = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    array = np.asarray(raw, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} has {int((~np.isfinite(array)).sum())} values that are not finite; look for a "
            "diverged training run"
        )
    return array


def as_vector(values: ArrayLike, name: str) -> Vector:
    """Finite float64 vector ``(n_train,)`` with at least one entry."""
    array = as_array(values, name)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(
            f"{name} must be a vector (n_train,), got shape {array.shape}; reduce a score matrix "
            "with fine_bench.metrics.detection.suspicion first"
        )
    return array


def oriented(values: NDArray[np.float64], end: str) -> NDArray[np.float64]:
    """Values turned so that high means suspicious."""
    if end not in ("high", "low"):
        raise ValueError(f'end must be "high" or "low", got {end!r}')
    return values if end == "high" else -values


def suspicion(values: ArrayLike, end: End) -> Vector:
    """One suspicion for each training example.

    Args:
        values: scores, ``(n_train,)`` or ``(n_query, n_train)``. Several rows (queries, or
            classes of the validation set) are summarised by their mean, each row counted the
            same: the influence on the mean query.
        end: the suspicious end of the scores.

    Returns:
        ``(n_train,)`` float64, high for suspicious.
    """
    array = as_array(values, "values")
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(
            f"values must have shape (n_train,) or (n_query, n_train), got {array.shape}"
        )
    return oriented(array if array.ndim == 1 else array.mean(axis=0), end)
