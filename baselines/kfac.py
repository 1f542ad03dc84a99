"""Influence by K-FAC with factored damping, averaged over the run.

    score(q, i) = mean_c Σ_l [a_qᵀ(A + γ_A)⁻¹a_i] [b_qᵀ(G + γ_G)⁻¹b_i]     (T = 1, θ at c)
    γ_A = √λ tr A/I,    γ_G = √λ tr G/O

The curvature of a layer's [W|b] is approximated by A ⊗ G, A the mean of its inputs' and G that of
its output gradients' outer products, and damped *in each factor*: (A + γ_A)⁻¹ ⊗ (G + γ_G)⁻¹ with
γ_A γ_G = λ times A ⊗ G's mean eigenvalue. Martens, Grosse: *Optimizing Neural Networks with
Kronecker-factored Approximate Curvature* (ICML 2015, arXiv:1503.05671); layers with T positions
take G/T (Grosse, Martens 2016, arXiv:1602.01407).

Two things follow from it. A preconditioned gradient keeps its two factors, so all pairs of queries
and examples cost what TracIn's cost, where EK-FAC forms every query's gradient in full. And a
direction in which one factor is small is damped even where the other is large, which smooths more
than λ added to the products; what is smooth is what the next run shares with this one.

Positive: more of i raises q's margin (or lowers its loss, ``observable="loss"``). We differ from
``InfluenceFunction`` in the average over checkpoints, of which each counts alike, and in the
margin, which keeps a query that is fitted well from losing its say to the checkpoints where it was
not. The weight ``query_weighting="norm"`` gives refers to the preconditioned gradient.

Shapes: B examples, T positions, I inputs (with a one for a bias), O outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.curvature.block import added
from fine_bench.gradients.curvature.ekfac_linear import inputs
from fine_bench.gradients.curvature.products import Curvature, Roots, root_gradients
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.margin import classification_reason
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import check_weighting, reduced_rows
from fine_bench.gradients.tangent_kernel import cross_gram
from fine_bench.gradients.transposed import TransposedBlock
from fine_bench.seeds import stream
from fine_bench.types import (
    Checkpoint,
    InfluenceScores,
    Problem,
    QueryWeighting,
    UnsupportedProblemError,
)

FORMED_FLOATS = 2**27
"""Numbers that a batch's gradients may take where layers with positions are formed in full."""

KINDS = ("fisher", "ggn", "empirical_fisher")


class DampedFactors(NamedTuple):
    """One layer: factors of (A + γ_A)⁻¹ ``(I, I)`` and (G + γ_G)⁻¹ ``(O, O)``, M Mᵀ each."""

    inner: Tensor
    outer: Tensor


class KFAC(InfluenceEstimator):
    """K-FAC influence, the mean over all given checkpoints.

    Args:
        relative_damping: λ in units of the mean eigenvalue of A ⊗ G, > 0; √λ goes to each factor.
            Of 0.1 and 1 the default has the higher LDS on the development half of two banks.
        observable: of the queries, ``"margin"`` or ``"loss"``.
        curvature: ``"fisher"``, ``"ggn"`` or ``"empirical_fisher"``.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        layers: names of modules whose parameters count; None for all. Layers without factors
            (norm layers, embeddings, free parameters) are refused: leave them out.
        n_samples: labels drawn for each example where the Fisher has too many classes, ≥ 1.
        seed: of those draws.
    """

    name = "kfac"
    version = 1

    def __init__(
        self,
        relative_damping: float = 1.0,
        observable: Literal["margin", "loss"] = "margin",
        curvature: Curvature = "fisher",
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
        n_samples: int = 1,
        seed: int = 0,
    ) -> None:
        check_weighting(query_weighting)
        if not 0 < relative_damping < float("inf"):
            raise ValueError(
                f"relative_damping must be a finite number > 0, got {relative_damping}"
            )
        if observable not in ("margin", "loss"):
            raise ValueError(f'observable must be "margin" or "loss", got {observable!r}')
        if curvature not in KINDS:
            raise ValueError(
                f"curvature must be one of {KINDS}, got {curvature!r}: K-FAC needs a sum of squares"
            )
        if n_samples < 1:
            raise ValueError(f"n_samples must be at least 1, got {n_samples}")
        self.relative_damping, self.curvature, self.layers = relative_damping, curvature, layers
        self.observable: Literal["margin", "loss"] = observable
        self.query_weighting: QueryWeighting = query_weighting
        self.n_samples, self.seed = n_samples, seed

    def unsupported(self, problem: Problem) -> str | None:
        """A margin without class probabilities."""
        if self.observable == "loss":
            return None
        reason = classification_reason(problem)
        return None if reason is None else f'{reason}; or pass observable="loss"'

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = GradientEngine(self.model, problem.loss, self.layers)
        # one row of numbers an example, drawn at once: batches do not change its labels
        generator = stream(self.seed, "kfac/fisher-labels")
        shape = problem.n_train, self.n_samples
        self._uniforms = torch.rand(shape, generator=generator, dtype=torch.float64)
        self._rows: Tensor | None = None
        self._norms: Tensor | None = None

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's scores."""
        self.load(checkpoint)
        factors = self._fit()
        if isinstance(self.problem.queries, str):
            rows = self._own(factors)
            norms = rows[0]
        else:
            rows, norms = self._pairs(factors)
        self._rows = rows if self._rows is None else self._rows + rows
        self._norms = norms if self._norms is None else self._norms + norms

    def compute(self) -> InfluenceScores:
        """The mean over the checkpoints so far."""
        self.require_update()
        assert self._rows is not None
        values = self._rows / self.n_updates
        if not isinstance(self.problem.queries, str):
            values = reduced_rows(values, self.problem, self.query_weighting, self._mean_norms)
        return InfluenceScores(
            values=values.to(next(self.model.parameters()).dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )

    def _mean_norms(self) -> Tensor:
        assert self._norms is not None
        return self._norms / self.n_updates

    # ------------------------------------------------------------------ scores

    def _batches(
        self, which: Literal["train", "queries"], observable: Literal["loss", "margin"]
    ) -> Iterator[tuple[slice, PerExampleGradients]]:
        for rows, x, y in self.problem.batches(which):
            self.gradient_evaluations += len(y)
            yield rows, self.engine(x, y, observable)

    def _pairs(self, factors: Sequence[DampedFactors]) -> tuple[Tensor, Tensor]:
        """Every query against every example ``(V, n)``, and the queries' norms ``(V,)``."""
        cross, norms = cross_gram(
            self._batches("queries", self.observable),
            lambda: self._batches("train", "loss"),
            self.problem.n_train,
            lambda gradients: _preconditioned(gradients, factors),
        )
        return cross.double(), norms.double().sqrt()

    def _own(self, factors: Sequence[DampedFactors]) -> Tensor:
        """Every example as its own query, ``(1, n)``."""
        parts = []
        pairs = zip(
            self._batches("train", self.observable), self._batches("train", "loss"), strict=True
        )
        for (_, asked), (_, gradients) in pairs:
            mine, theirs = (_preconditioned(g, factors) for g in (asked, gradients))
            parts.append(mine.gram(theirs).diagonal())
        return torch.cat(parts).double()[None]

    # ------------------------------------------------------------------ the curvature

    def _fit(self) -> list[DampedFactors]:
        """The damped factors of every layer at the loaded checkpoint."""
        n, roots = self.problem.n_train, Roots(self.curvature, self.problem.loss, self._uniforms)
        inner: dict[str, Tensor] = {}
        outer: dict[str, Tensor] = {}
        dtype = next(self.model.parameters()).dtype
        for rows, x, y in self.problem.batches("train"):
            for k, _, blocks in root_gradients(self.engine, x, y, roots, rows):
                for block in blocks:
                    # transposed factors would take the gradients of one root for all
                    if not isinstance(block, FactorBlock) or isinstance(block, TransposedBlock):
                        raise UnsupportedProblemError(
                            f"{self.name}: {block.name!r} has no Kronecker factors; name the "
                            "linear and convolutional layers by layers=[...], or use "
                            'influence_function with solver="ekfac"'
                        )
                    name, t = block.name, block.n_positions
                    if k == 0:
                        a = inputs(block).flatten(0, 1)
                        inner[name] = added(inner.get(name), a.T @ a / n)
                    b = block.b.flatten(0, 1)
                    outer[name] = added(outer.get(name), b.T @ b / (n * t))
            self.gradient_evaluations += len(y)
        return [self._damped(inner[name], outer[name], dtype) for name in inner]

    def _damped(self, inner: Tensor, outer: Tensor, dtype: torch.dtype) -> DampedFactors:
        """Factors of (A + γ_A)⁻¹ and (G + γ_G)⁻¹."""
        scales = [float(part.diagonal().mean()) for part in (inner, outer)]
        if 0.0 in scales:  # a layer that no gradient reaches: its gradients are zero too
            return DampedFactors(
                torch.zeros_like(inner).to(dtype), torch.zeros_like(outer).to(dtype)
            )
        root = self.relative_damping**0.5
        found = []
        for part, scale in zip((inner, outer), scales, strict=True):
            eye = torch.eye(len(part), dtype=part.dtype, device=part.device)
            factor = torch.linalg.cholesky(part + root * scale * eye)
            found.append(torch.linalg.solve_triangular(factor, eye, upper=False).T.to(dtype))
        return DampedFactors(*found)


def _preconditioned(
    gradients: PerExampleGradients, factors: Sequence[DampedFactors]
) -> PerExampleGradients:
    """Gradients whose dot products are those with (A + γ_A)⁻¹ ⊗ (G + γ_G)⁻¹ between them."""
    blocks = []
    for block, (inner, outer) in zip(gradients.blocks, factors, strict=True):
        assert isinstance(block, FactorBlock)
        turned = FactorBlock(
            block.name, inputs(block) @ inner, block.b @ outer, weight=True, bias=False
        )
        small = turned.n_params * len(turned) <= FORMED_FLOATS
        blocks.append(turned.positions_summed() if small else turned)
    return PerExampleGradients(blocks, gradients.loss, gradients.one_minus_p)
