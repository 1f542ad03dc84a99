"""EK-FAC: a curvature that is diagonal, layer by layer, in a Kronecker-factored basis.

George, Laurent, Bouthillier, Ballas, Vincent: *Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis* (NeurIPS 2018, arXiv:1806.03884); for influence functions Grosse et
al., *Studying Large Language Model Generalization with Influence Functions* (arXiv:2308.03296).

A layer's weight and bias are one matrix [W|b] (O, I), its inputs extended by a one where it has a
bias. With a_it the inputs and b_ikt the gradients at the output of the k-th root (``products.py``)

    A = mean_i Σ_t a_it a_itᵀ = Q_A · Q_Aᵀ,     G = mean_i Σ_k Σ_t b_ikt b_iktᵀ = Q_G · Q_Gᵀ
    G_ik = Q_Gᵀ (Σ_t b_ikt a_itᵀ) Q_A,         s_oi = mean_i Σ_k (G_ik)²_oi
    (C + λ)⁻¹ V = Q_G [ (Q_Gᵀ V Q_A)_oi / (s_oi + λ) ] Q_Aᵀ

The scale of A and G does not matter: only their eigenvectors are used, the eigenvalues are the
second moments s of the *per-example* gradient, positions T (pixels, uses of a layer) summed first.
Layers are independent of each other, and each kind has a file of its own. Linear and Conv1d/2d
layers have both factors (``ekfac_linear.py``); an embedding table has the output's, its inputs
being one-hot (``ekfac_embedding.py``). A norm layer's weight and bias are one block, as are a
grouped convolution's, a layer's that ``torch.func`` has to take, and all trained parameters of no
layer together: their exact second moments, or the diagonal of those (``ekfac_dense.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection, Direction
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.blocks.single_examples import HeldDirection, SingleExamples

# the kinds of curvature register themselves
from fine_bench.gradients.curvature import ekfac_dense, ekfac_embedding, ekfac_linear  # noqa: F401
from fine_bench.gradients.curvature.block import (
    KINDS,
    BlockCurvature,
    CurvatureFit,
    curvature_fit,
)
from fine_bench.gradients.curvature.products import Batches, Roots, root_gradients
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients


class SolvedExamples(HeldDirection):
    """(C + λ)⁻¹ times single examples' gradients of a layer, left in the eigenbasis.

    Turning R of them back costs R O I (I + O); the gradients that they meet are turned instead, for
    B (I² + O²).

    Args:
        curvature: C and λ; as they are now.
        examples: the gradients.
    """

    def __init__(self, curvature: BlockCurvature[Any], examples: SingleExamples) -> None:
        self._curvature, self._examples = copy(curvature), examples
        self._prepared = curvature.prepare(examples.block)

    def products(self, block: Block) -> Tensor:
        """Dot products in the eigenbasis, ``(R, B)``."""
        return self._curvature.view(block).contract(self._prepared)

    def formed(self) -> BlockDirection:
        """Turned back."""
        return self._curvature.solve(self._examples.formed())


@dataclass(eq=False)
class EKFAC:
    """A block-diagonal curvature and its damped inverse.

    Attributes:
        blocks: one for each block of a ``PerExampleGradients``, in the same order.
        damping: λ of each block, ``(blocks,)``; set by ``damp``.
    """

    blocks: list[BlockCurvature[Any]]
    damping: Tensor

    def damp(self, damping: float | None, relative: float) -> None:
        """Set λ: ``damping`` itself, or ``relative`` times each block's mean eigenvalue.

        Raises:
            ValueError: a block of C + λI is singular.
        """
        used = []
        for block in self.blocks:
            s = block.eigenvalues
            lam = damping if damping is not None else relative * float(s.mean())
            low, top = float(s.min()) + lam, float(s.max())
            # rounding leaves second moments of this size where the true one is zero
            eps = torch.finfo(block.inverse.dtype).eps
            if low <= max(s.shape) ** 2 * eps**2 * top:
                raise ValueError(
                    f"the EK-FAC curvature of {block.name!r} is singular: smallest eigenvalue "
                    f"{low - lam:.3g} plus damping {lam:.3g} (largest {top:.3g}); give a larger "
                    "damping, or leave the layer out with layers=[...]"
                )
            block.inverse = (s + lam).reciprocal().to(block.inverse.dtype)
            used.append(lam)
        self.damping = torch.tensor(used, dtype=torch.float64)

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""
        pairs = zip(self.blocks, gradients.blocks, strict=True)
        return torch.stack([mine.quadratic(block) for mine, block in pairs]).sum(0)

    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients, ``(B, B')``; with itself by default."""
        total: Tensor | None = None
        others = x.blocks if y is None else y.blocks
        for mine, block, other in zip(self.blocks, x.blocks, others, strict=True):
            term = mine.gram(block, other)
            total = term if total is None else total.add_(term)
        assert total is not None
        return total

    def own_and_total(self, gradients: PerExampleGradients) -> tuple[Tensor, Tensor]:
        """K_ii and Σ_j K_ij of K = vᵢᵀ(C + λ)⁻¹v_j, each ``(B,)``, without the pairs."""
        pairs = zip(self.blocks, gradients.blocks, strict=True)
        owns, totals = zip(*(mine.own_and_total(block) for mine, block in pairs), strict=True)
        return torch.stack(owns).sum(0), torch.stack(totals).sum(0)

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λ)⁻¹g for every query, to be contracted with ``view`` of the training gradients."""
        pairs = zip(self.blocks, queries.blocks, strict=True)
        return [mine.prepare(block) for mine, block in pairs]

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """Training gradients in the coordinates of ``prepare``."""
        pairs = zip(self.blocks, gradients.blocks, strict=True)
        blocks = [mine.view(block) for mine, block in pairs]
        return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)

    def solve(self, direction: Direction) -> Direction:
        """(C + λ)⁻¹ times directions in the model's own coordinates."""
        return [
            SolvedExamples(mine, d) if isinstance(d, SingleExamples) else mine.solve(d)
            for mine, d in zip(self.blocks, direction, strict=True)
        ]

    def copy(self) -> EKFAC:
        """The same eigenvectors and eigenvalues, to be damped in its own way."""
        return EKFAC([copy(block) for block in self.blocks], self.damping)

    def mapped(self, function: Callable[[Tensor, float], Tensor]) -> EKFAC:
        """The same eigenvectors with function(s, λ) ≥ 0 in the place of 1/(s + λ).

        ``quadratic``, ``solve`` and the others then apply that function of the curvature.
        """
        result = self.copy()
        for block, lam in zip(result.blocks, self.damping.tolist(), strict=True):
            block.inverse = function(block.eigenvalues, lam).to(block.inverse.dtype)
        return result

    def solved_norm2(self, gradients: PerExampleGradients) -> Tensor:
        """‖(C + λ)⁻¹v‖² for every example's gradient v, ``(B,)``."""
        return self.mapped(lambda s, lam: (s + lam).pow(-2)).quadratic(gradients)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain tensors and numbers: about (I² + O² + 2 OI) numbers a layer."""
        return {"blocks": [dict(vars(block)) for block in self.blocks], "damping": self.damping}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> EKFAC:
        """The inverse of ``state_dict``."""
        blocks = []
        for saved in state["blocks"]:
            values: dict[str, Any] = {
                k: v.to(device) if isinstance(v, Tensor) else v for k, v in saved.items()
            }
            # the names of its parts say which kind it is
            kind = next(kind for kind in KINDS if kind.__annotations__.keys() == values.keys())
            blocks.append(kind(**values))
        return cls(blocks, state["damping"])


def fit_ekfac(engine: GradientEngine, batches: Batches, roots: Roots, n: int) -> EKFAC:
    """Estimate the curvature from all training examples, in two passes; λ is still unset.

    Args:
        engine: gradients of the model at its present parameters.
        batches: the n training examples.
        roots: which curvature (``"fisher"``, ``"ggn"`` or ``"empirical_fisher"``).
    """
    fits: list[CurvatureFit[Any]] = []
    dtype = torch.float32
    for rows, x, y in batches():
        for k, _, blocks in root_gradients(engine, x, y, roots, rows):
            fits = fits or [curvature_fit(block) for block in blocks]
            for fit, block in zip(fits, blocks, strict=True):
                fit.see(block, k)
            dtype = blocks[-1].values.dtype
    for fit in fits:
        fit.decompose(dtype)
    for rows, x, y in batches():
        for _, n_roots, blocks in root_gradients(engine, x, y, roots, rows):
            for fit, block in zip(fits, blocks, strict=True):
                fit.add(block, n_roots)
        for fit in fits:
            fit.end_batch()
    fitted = [fit.curvature(n) for fit in fits]
    return EKFAC(fitted, torch.zeros(len(fitted), dtype=torch.float64))
