"""How long a run trained, in the time of a gradient flow with a fixed kernel.

A step of size η moves the logits by −η/n K times the slopes of the losses, and as the logits move
these slopes shrink by the curvature h of the loss. So a flow df/dt = K̄(y − f) with a kernel of mean
diagonal 1 has come as far at

    τ = Σ_t η_t c_t h_t κ_t / n

(symbols: ``fine.kernel_scores``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def curvature(logits: Tensor) -> float:
    """h, mean_i Σ_c p_c(1 − p_c)/(k − 1): 1/k where nothing is known, 0 where all is certain.

    The mean eigenvalue of the cross-entropy's Hessian diag(p) − ppᵀ in the logits, but for the one
    of adding a constant to all of them.

    Args:
        logits: ``(n, k)``.
    """
    p = logits.double().softmax(1)
    return float((p * (1 - p)).sum(1).mean()) / (logits.shape[1] - 1)


def training_time(times: Sequence[float], scales: Sequence[float]) -> float:
    """Σ_s time_s κ(s − 1/2) over the snapshots s = 1, 2, …; NaN where one is not known.

    Args:
        times: of the steps up to each snapshot, since the one before.
        scales: κ after 0, 1, 2, 4, 8, … snapshots; linear in between, constant after the last.
            Those that are NaN are passed over.
    """
    at = [0.0, *(2.0**power for power in range(len(scales) - 1))]
    known = [pair for pair in zip(at, scales, strict=False) if math.isfinite(pair[1])]
    if not known:
        return math.nan
    middles = np.arange(len(times)) + 0.5
    where, scale = (np.array(part, dtype=float) for part in zip(*known, strict=True))
    return float(np.dot(times, np.interp(middles, where, scale)))
