"""Block conjugate gradients: A x = b for many right-hand sides that share their Krylov space.

Shapes: K right-hand sides, P unknowns. A is symmetric; negative curvature is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fine_bench.gradients.reciprocal import unit_rows


def solve_cg(
    apply: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Solve A x = b for every row b of ``rhs`` ``(K, P)``.

    The recurrences of block CG drift from the true residual, so that is computed when they claim
    to be done, and the remainder is solved for until the truth agrees.

    Returns:
        x ``(K, P)``, the true relative residuals ``(K,)``, and the iterations used.

    Raises:
        ValueError: A is not positive definite; states the negative curvature that was met.
        RuntimeError: a residual is above ``tol`` after ``max_iter`` iterations.
    """
    # rows of one size, and 0 for a query without gradient
    scaled, norms = unit_rows(rhs)
    x = torch.zeros_like(rhs)
    remainder, used = scaled, 0
    relative = remainder.norm(dim=1)
    while float(relative.max()) > tol and used < max_iter:
        goal = 0.5 * tol / float(relative.max())
        step, iterations = block_cg(apply, remainder, goal, max_iter - used)
        used += iterations
        x = x + step
        remainder = scaled - apply(x)
        relative = remainder.norm(dim=1)
    if float(relative.max()) > tol:
        raise RuntimeError(
            f"CG stopped after {used} iterations at a relative residual of "
            f"{float(relative.max()):.2g}, above tol = {tol:.2g}; raise max_iter or damping, or "
            "accept a larger tol"
        )
    return x * norms, relative, used


def block_cg(
    apply: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, int]:
    """Block conjugate gradients from zero, until the largest residual has shrunk by ``tol``.

    The residuals of all K rows are kept as Q C with Q (P, K) orthonormal, so that rows which
    converge or turn dependent do no harm (Dubrulle, *Retooling the method of block conjugate
    gradients*, ETNA 12, 2001).

    Raises:
        ValueError: a search direction of negative curvature.
    """
    q, c = torch.linalg.qr(rhs.T)
    goal = tol * float(c.norm(dim=0).max())
    x, s = torch.zeros_like(q), q
    for iteration in range(max_iter):
        if float(c.norm(dim=0).max()) <= goal:
            return x.T, iteration
        a_s = apply(s.T.contiguous()).T
        curvature = s.T @ a_s
        factor, info = torch.linalg.cholesky_ex((curvature + curvature.T) / 2)
        if int(info) > 0:
            refuse_negative_curvature(apply, s)
            # positive after all, only too ill-conditioned to go on: the caller starts anew
            return x.T, iteration + 1
        x = x + s @ torch.cholesky_solve(c, factor)
        q, turn = torch.linalg.qr(q - a_s @ torch.cholesky_inverse(factor))
        s = q + s @ turn.T
        c = turn @ c
    return x.T, max_iter


def refuse_negative_curvature(apply: Callable[[Tensor], Tensor], s: Tensor) -> None:
    """Raise if the matrix has negative curvature within the span of ``s`` ``(P, K)``."""
    basis = torch.linalg.qr(s)[0]
    inside = basis.T @ apply(basis.T.contiguous()).T
    low = float(torch.linalg.eigvalsh((inside + inside.T) / 2)[0])
    if low <= 0:
        raise ValueError(
            f"C + λI is not positive definite: CG met a direction of curvature {low:.3g}; give a "
            'larger damping, or a curvature that is never negative, such as "ggn"'
        )
