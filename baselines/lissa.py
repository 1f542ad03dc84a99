"""LiSSA: the inverse of a damped curvature as a truncated Neumann series over sampled batches.

    x_0 = b,    x_{j+1} = b + x_j − A_j x_j / s,    (C + λI)⁻¹ b ≈ mean over repeats of x_J / s

A_j = C_j + λI, C_j the mean curvature of the j-th draw of training examples, s the *scale*, J the
*depth*. Agarwal, Bullins, Hazan: *Second-Order Stochastic Optimization for Machine Learning in
Linear Time* (JMLR 18, 2017, arXiv:1602.03943); Koh, Liang (ICML 2017, arXiv:1703.04730).

Draws are independent, so the mean of x_J is what the whole data would give,

    x_J = Σ_{j ≤ J} (I − A/s)^j b = [I − (I − A/s)^{J+1}] s A⁻¹ b,

which converges if every eigenvalue of A lies between 0 and 2s, as slowly as (1 − λ_min/s)^J: a
direction of eigenvalue below s/J is hardly inverted at all. That is a choice of the method, not an
error; the relative residual ‖b − A x_J/s‖/‖b‖ on all the data says how far it went. An eigenvalue
above 2s makes the series explode, and a residual above 1 is worse than no answer: at a scale that
was asked for, both are refused. A scale that is open is doubled for the right-hand sides that it
does not answer: a later draw may have a larger eigenvalue than those that it was found from. Each
right-hand side is judged alone, so that its answer does not depend on what else is asked.

Shapes: K right-hand sides, P parameters; all K share the draws and every product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fine_bench.gradients.reciprocal import unit_rows
from fine_bench.seeds import stream

Apply = Callable[[Tensor], Tensor]
"""v ↦ A v, ``(K, P)`` → ``(K, P)``."""

MARGIN = 1.1
"""The scale is this times the largest eigenvalue found; power iteration finds a little less."""

ACCEPTED = 1 + 1e-6
"""Largest relative residual that is returned: 1, that of x = 0, and the rounding of float32."""

TRIES = 8
"""Draws whose largest eigenvalue is looked at where the scale is open."""

DOUBLINGS = 4
"""How often a scale that is open is doubled where it does not do."""


class DivergedSeriesError(ValueError):
    """The series does not converge at this scale; the message says which one would do."""


def power_iteration(
    apply: Apply,
    n_params: int,
    tol: float = 1e-4,
    max_iter: int = 200,
    dtype: torch.dtype = torch.float64,
) -> float:
    """The eigenvalue of largest magnitude of a symmetric matrix, to about ``tol`` relative."""
    v = torch.randn(1, n_params, generator=stream(0, "lissa/power"), dtype=torch.float64).to(dtype)
    value = 0.0
    for _ in range(max_iter):
        v = v / v.norm()
        product = apply(v)
        before, value = value, float((v * product).sum())
        if abs(value - before) <= tol * abs(value):
            break
        v = product
    return value


def series(draws: Iterator[Apply], rhs: Tensor, scale: float, depth: int) -> Tensor:
    """x_J/s for every row b of ``rhs`` ``(K, P)``, J = ``depth``; it may not be finite."""
    x = rhs.clone()
    for _ in range(depth):
        # in place: K vectors of all parameters fill no cache, and each further array is a pass
        x.sub_(next(draws)(x), alpha=1.0 / scale).add_(rhs)
    return x.div_(scale)


class Lissa:
    """(C + λI)⁻¹ by the series, for as many right-hand sides as are asked.

    Args:
        whole: v ↦ (C + λI) v on all the data.
        draws: the draws of one repeat, by its number; endless, and the same at each call.
        n_params: P.
        lam: λ, > 0.
        scale: s, or None: ``MARGIN`` times the largest eigenvalue of (C + λI), of all the data and
            of the first draws, and for right-hand sides which that does not answer a multiple of it
            by 2, up to ``DOUBLINGS`` times over.
        depth: J, ≥ 1.
        repeats: independent series that are averaged, ≥ 1.
        definite: C has no negative eigenvalue, so that it need not be looked for.
        dtype: of the vectors that ``whole`` and ``draws`` take.

    Raises:
        DivergedSeriesError: the scale is too small, or C + λI is indefinite.
    """

    def __init__(
        self,
        whole: Apply,
        draws: Callable[[int], Iterator[Apply]],
        n_params: int,
        lam: float,
        scale: float | None,
        depth: int,
        repeats: int,
        definite: bool,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.whole, self.draws, self.n_params, self.dtype = whole, draws, n_params, dtype
        self.depth, self.repeats = depth, repeats
        top = power_iteration(whole, n_params, dtype=dtype)
        if not definite:
            refuse_indefinite(whole, n_params, top, lam, dtype)
        self.top, self.open = top, scale is None
        if scale is None:
            scale = self.advised()
        elif 2 * scale <= top:
            raise DivergedSeriesError(
                f"LiSSA diverges at scale={scale:.4g}: the largest eigenvalue of C + λI is "
                f"{top:.4g}, and the scale must be above half of it; give scale="
                f"{self.advised():.3g}, or scale=None"
            )
        self.scale = scale

    def advised(self) -> float:
        """A scale that would do, from all the data and from the first draws."""
        draws = self.draws(0)
        sampled = [
            power_iteration(next(draws), self.n_params, 1e-2, dtype=self.dtype)
            for _ in range(TRIES)
        ]
        return MARGIN * max(self.top, *sampled)

    def solve(self, rhs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(K, P)``, the relative residuals on all the data ``(K,)`` and the scales ``(K,)``.

        Raises:
            DivergedSeriesError: a residual above 1, or one that is no number.
        """
        scaled, norms = unit_rows(rhs)
        x, residual = self._attempt(scaled, self.scale)
        scales = torch.full((len(rhs),), self.scale, dtype=torch.float64)
        for _ in range(DOUBLINGS if self.open else 0):
            bad = _unanswered(residual)
            if not bool(bad.any()):
                break
            wider = 2 * float(scales[bad][0])  # all of them have come the same way
            scales[bad] = wider
            x[bad], residual[bad] = self._attempt(scaled[bad], wider)
        bad = _unanswered(residual)
        if bool(bad.any()):
            worst = float(residual.nan_to_num(float("inf")).max())
            tried = float(scales.max())
            advice = "" if self.open else f"scale={self._would_do(scaled[bad]):.3g}, or "
            raise DivergedSeriesError(
                f"LiSSA diverges at scale={tried:.4g}: after {self.depth} steps the relative "
                f"residual is {worst:.3g}, more than that of no answer at all; give "
                f"{advice}larger draws (sample_size)"
            )
        return x * norms, residual, scales

    def _attempt(self, rhs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        x = torch.zeros_like(rhs)
        for repeat in range(self.repeats):
            x += series(self.draws(repeat), rhs, scale, self.depth)
        x /= self.repeats
        return x, self.whole(x).sub_(rhs).norm(dim=1)

    def _would_do(self, rhs: Tensor) -> float:
        """A scale at which these rows are answered, found by trying: draws add noise of their own,
        which no eigenvalue foretells, and which a larger scale averages away.
        """
        scale = max(self.advised(), 2 * self.scale)
        while True:
            scale = float(f"{scale:.3g}")  # as the message will have it
            if bool((self._attempt(rhs, scale)[1] <= ACCEPTED).all()):
                return scale
            scale *= 2


def _unanswered(residual: Tensor) -> Tensor:
    """Which relative residuals are those of no answer: above 1, or not a number."""
    return ~(residual <= ACCEPTED)


def refuse_indefinite(
    whole: Apply, n_params: int, top: float, lam: float, dtype: torch.dtype = torch.float64
) -> None:
    """Raise if C + λI has a negative eigenvalue, in which case no scale makes the series converge.

    Args:
        top: its eigenvalue of largest magnitude.
        lam: λ, part of ``whole``.
        dtype: of the vectors that ``whole`` takes.
    """
    low = top
    if top > 0:
        shift = MARGIN * top
        low = shift - power_iteration(
            lambda v: shift * v - whole(v), n_params, 1e-6, 1000, dtype=dtype
        )
    if low <= 0:
        raise DivergedSeriesError(
            f"C + λI is not positive definite: it has an eigenvalue of {low:.3g} with λ = "
            f"{lam:.3g} in it, so LiSSA diverges at every scale; give a damping above "
            f'{lam - low:.3g}, or a curvature that is never negative, such as "ggn"'
        )
