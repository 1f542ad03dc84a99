"""Arnoldi influence functions: the curvature inverted where one Krylov space sees it.

    C ≈ Σ_k θ_k e_k e_kᵀ                      Ritz pairs of C in span{v, Cv, C²v, …}
    (C + λI)⁻¹ ≈ Σ_k e_k e_kᵀ/(θ_k + λ) + (I − Σ_k e_k e_kᵀ)/λ

Schioppa, Zablotskaia, Vilar, Sokolov: *Scaling Up Influence Functions* (AAAI 2022,
arXiv:2112.03052). One basis serves all queries and all training examples, so after it is built a
score costs only projections.

Where we deviate:
- The paper keeps the largest θ_k and drops the rest of the space, as if C were infinite there. We
  keep all of the Krylov space, and give its complement the eigenvalue that it has if C is zero
  there: λ. So the approximation is C's compression V Vᵀ C V Vᵀ, exact when the space is whole.
- New vectors are orthogonalised against the last two, which is all that exact arithmetic would
  ask for, then against all, and once more where that shortened them: what is left of a vector is
  rounding's share of the whole ("twice is enough": Parlett, *The Symmetric Eigenvalue Problem*,
  §6.9; the test is that of Daniel, Gragg, Kaufman and Stewart, Mathematics of Computation 30,
  1976). Without it rounding brings found eigenvectors back as copies, and each copy is counted
  again.
- Where the space closes before it is whole (C maps it into itself: repeated eigenvalues), it is
  continued from a fresh random vector.

Shapes: K dimensions of the Krylov space, P parameters, B examples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CLOSED = 1e-10
"""Relative length below which the next vector is rounding: the space is closed under C."""

KEPT = 0.7
"""Share of its length that a vector keeps where it was orthogonal to all others already."""


def krylov_space(
    apply: Callable[[Tensor], Tensor], n_params: int, dim: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis V ``(K, P)`` of the Krylov space, and Vᵀ C V ``(K, K)``.

    Args:
        apply: v ↦ C v, ``(1, P)`` → ``(1, P)``, C symmetric.
        n_params: P.
        dim: K is the smaller of this and P.
        generator: of the start vector, and of fresh ones.
    """
    dim = min(dim, n_params)
    basis = torch.zeros(dim, n_params, dtype=torch.float64)
    compressed = torch.zeros(dim, dim, dtype=torch.float64)
    scale = 0.0
    following: Tensor | None = None
    for k in range(dim):
        basis[k] = _fresh(basis[:k], generator) if following is None else following
        product = apply(basis[k : k + 1])[0]
        scale = max(scale, float(product.norm()))
        rest = product.clone()
        for first in (max(0, k - 1), 0, 0):
            before = float(rest.norm())
            along = basis[first : k + 1] @ rest
            compressed[first : k + 1, k] += along
            rest -= along @ basis[first : k + 1]
            length = float(rest.norm())
            if first == 0 and length > KEPT * before:
                break
        following = rest / length if length > CLOSED * scale else None
    # rows and columns agree but for rounding: what stands above the diagonal is the whole of it
    upper = compressed.triu()
    return basis, upper + upper.triu(1).T


def _fresh(basis: Tensor, generator: torch.Generator) -> Tensor:
    """A random unit vector orthogonal to the rows of ``basis``."""
    v = torch.randn(basis.shape[1], generator=generator, dtype=torch.float64)
    for _ in range(2):
        v = v - (basis @ v) @ basis
        v = v / v.norm()
    return v


class RitzPairs:
    """Eigenpairs of C within a Krylov space, and functions of C + λI by them.

    Args:
        basis: V, ``(K, P)``.
        compressed: Vᵀ C V, ``(K, K)``.
        lam: λ, > 0.

    Attributes:
        values: θ + λ, ``(K,)``, ascending.
        vectors: the e_k, ``(K, P)``.

    Raises:
        ValueError: a value θ_k + λ ≤ 0: C + λI is indefinite.
    """

    def __init__(self, basis: Tensor, compressed: Tensor, lam: float) -> None:
        values, vectors = torch.linalg.eigh(compressed)
        self.lam = lam
        self.values = values + lam
        low = float(self.values[0])
        if low <= 0:
            raise ValueError(
                f"C + λI is not positive definite: the Krylov space holds an eigenvalue of "
                f"{low:.3g} with λ = {lam:.3g} in it; give a damping above {lam - low:.3g}, or a "
                'curvature that is never negative, such as "ggn"'
            )
        self.vectors = vectors.T @ basis

    def excess(self, power: int) -> Tensor:
        """(θ + λ)^−power − λ^−power, ``(K,)``: what the space adds to λ^−power times identity."""
        inside: Tensor = self.values.pow(-power)
        return inside - float(self.lam**-power)

    def solve(self, rows: Tensor) -> Tensor:
        """(C + λI)⁻¹ times rows, ``(B, P)``."""
        along = rows @ self.vectors.T
        solved: Tensor = rows / self.lam + (along * self.excess(1)) @ self.vectors
        return solved

    def quadratic(self, along: Tensor, norm2: Tensor, power: int = 1) -> Tensor:
        """gᵀ (C + λI)^−power g, ``(B,)``.

        Args:
            along: ⟨e_k, g⟩, ``(K, B)``.
            norm2: ‖g‖², ``(B,)``.
        """
        outside: Tensor = norm2 / float(self.lam**power)
        return outside + self.excess(power) @ along.square()
