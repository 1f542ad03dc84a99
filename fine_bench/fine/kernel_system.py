"""The mean kernel as a regression takes it: whole, or by the rows of landmarks; and the ridge.

Part of ``fine.kernel_scores``, which says what is computed from it.

Shapes: n training examples, V queries, N = n + V, L landmarks, k classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fine_bench.gradients.landmark_kernel import LandmarkFlow, landmark_features
from fine_bench.gradients.tangent_kernel import KernelFlow, KernelRidge

LEAST_RIDGE, MOST_RIDGE = 0.01, 1000.0
_TOLERANCE, _MOST_TRIALS = 1e-3, 12


class Solver(Protocol):
    """``tangent_kernel.KernelFlow`` or one of its kind."""

    def smoother(self, sought: Tensor) -> Tensor:
        """Z, ``(V, n)``."""

    def solve(self, targets: Tensor) -> Tensor:
        """α, ``(n, k)``."""


class System(NamedTuple):
    """K̄ of mean diagonal 1 for the regression.

    Attributes:
        flow: the solver of a time and a number of steps; one step is ridge regression.
        cross, asked: K̄_q ``(V, n)`` and K̄_qq ``(V, V)``.
        sought: what the solver takes for K̄_q.
        fitted: α ↦ K̄α.
    """

    flow: Callable[[float, int], Solver]
    cross: Tensor
    asked: Tensor
    sought: Tensor
    fitted: Callable[[Tensor], Tensor]


def train_diagonal(kernel: Tensor, landmarks: Tensor | None, n: int) -> Tensor:
    """K_ii of the training examples whose rows there are.

    Args:
        kernel, landmarks: see ``regression``.
        n: training examples.
    """
    if landmarks is None:
        return kernel.diagonal()[:n]
    own = landmarks[landmarks < n].to(kernel.device)
    return kernel[torch.arange(len(own), device=kernel.device), own]


def system_of(kernel: Tensor, landmarks: Tensor | None, n: int) -> System:
    """Of the kernel, see ``regression``."""
    if landmarks is None:
        kernel = kernel / train_diagonal(kernel, None, n).mean()
        train, cross = kernel[:n, :n], kernel[n:, :n]

        def flow(time: float, steps: int) -> Solver:
            return KernelFlow(train.clone(), time, steps)

        return System(flow, cross, kernel[n:, n:], cross, lambda alpha: train @ alpha)
    m = int((landmarks < n).sum())
    kernel = kernel / train_diagonal(kernel, landmarks, n).mean()
    features = landmark_features(kernel, landmarks)
    known = features[:, :n].contiguous()
    return System(
        lambda time, steps: LandmarkFlow(known, time, steps),
        kernel[m:, :n],
        kernel[m:, n:],
        features[:, n:].contiguous(),
        lambda alpha: known.T @ (known @ alpha),
    )


def matched_ridge(
    kernel: Tensor | Callable[[float], Solver], targets: Tensor, level: float
) -> float:
    """λ at which the mean squared residual mean_i ‖y_i − f(x_i)‖² is ``level``.

    It rises with λ from 0 to mean_i ‖y_i‖²; found by secants of its log-odds over log λ, in which
    it is nearly straight.

    Args:
        kernel: ``(n, n)`` of mean diagonal 1, or the ridge regression of a λ.
        targets: y, ``(n, k)``.
        level: ≥ 0.

    Returns:
        λ between ``LEAST_RIDGE`` and ``MOST_RIDGE``, the nearest of them where none will do.
    """
    n = len(targets)
    most = float(targets.square().sum()) / n

    def log_odds(value: float) -> float:
        share = min(max(value / most, 1e-12), 1 - 1e-12)
        return math.log(share / (1 - share))

    def excess(x: float) -> float:
        ridge = math.exp(x)
        solver = KernelRidge(kernel.clone(), ridge) if isinstance(kernel, Tensor) else kernel(ridge)
        alpha = solver.solve(targets)
        return log_odds(math.exp(2 * x) * float(alpha.square().sum()) / n) - log_odds(level)

    least, largest = math.log(LEAST_RIDGE), math.log(MOST_RIDGE)
    before, at_before = 0.0, excess(0.0)
    x = min(max(-2 * at_before, least), largest)  # the log-odds rise about half as fast as log λ
    for _ in range(_MOST_TRIALS):
        at_x = excess(x)
        if abs(at_x) < _TOLERANCE or x == before:
            break
        rise = (at_x - at_before) / (x - before)
        before, at_before = x, at_x
        x = min(max(x - at_x / rise if rise > 0 else x, least), largest)
    return math.exp(x)
