"""EK-FAC influence of token sequences where their gradients fit into memory.

The formula is that of ``baselines.influence_functions`` with ``solver="ekfac"`` and the empirical
Fisher (a sequence has no distribution over labels to take an expectation of):

    IF(q, i) = Σ_l Σ_oi (Q_Gᵀ G_q Q_A)_oi (Q_Gᵀ G_i Q_A)_oi / (s_oi + λ_l)

with Q_A, Q_G the eigenvectors of the layer's Kronecker factors and s the second moments of the
training gradients in their basis (``fine_bench.gradients.curvature.ekfac``). Two things differ:

- Padding counts nothing. The general method takes it for positions like any other, and so its Q_A
  depend on how samples are batched.
- The price. The factors of T tokens are read once, for the eigenvectors. Everything after it needs
  the gradients themselves: P numbers a sample, which for LoRA matrices of a small model can be
  turned into the basis once and held, and may have been left by another method
  (``fine_bench.gradients.cache``).

Where n · P numbers are too many, or a model does not give its gradients in full, this is
``InfluenceFunction`` itself, padding and all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from baselines.influence_functions import InfluenceFunction
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.cache import engine_of
from fine_bench.gradients.curvature.ekfac import EKFAC
from fine_bench.gradients.curvature.ekfac_linear import LayerCurvature
from fine_bench.gradients.query_weighting import reduced_rows
from fine_bench.gradients.token_losses import PAD
from fine_bench.types import Checkpoint, Problem, QueryWeighting

HELD_FLOATS = 2**27
"""Numbers of the turned training gradients that are held: half a gigabyte in float32."""


class SequenceEKFAC(InfluenceFunction):
    """g_qᵀ (C + λI)⁻¹ g_i at the last checkpoint, C the EK-FAC empirical Fisher.

    Args:
        damping: λ itself, ≥ 0; None for the relative one.
        relative_damping: λ in units of each layer's mean eigenvalue, ≥ 0.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        layers: names of modules whose parameters count; None for all.

    ``extras``: ``damping``, one a layer.
    """

    name = "sequence_ekfac"
    version = 1

    def __init__(
        self,
        damping: float | None = None,
        relative_damping: float = 0.1,
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__(
            "ekfac", "empirical_fisher", damping, relative_damping, layers, query_weighting
        )

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        recorder = self.engine.recorder
        self.held = (
            callable(getattr(self.model, "gradient_engine", None))
            and self._n_params * problem.n_train <= HELD_FLOATS
            and not recorder.leftover
            and all(
                isinstance(layer, nn.Linear)
                and recorder.parameter_names(name) == [f"{name}.weight" if name else "weight"]
                for name, layer in recorder.layers.items()
            )
        )

    def update(self, checkpoint: Checkpoint) -> None:
        """Scores at this checkpoint; the last one counts."""
        if not self.held:
            super().update(checkpoint)
            return
        self.load(checkpoint)
        layers = self._eigenvectors()
        train = self._turned(layers, "train")
        start = 0
        for layer in layers:
            o, i = len(layer.q_out), len(layer.q_in)
            moments = train[:, start : start + o * i].square().mean(0, dtype=torch.float64)
            layer.eigenvalues = moments.view(o, i)
            start += o * i
        fitted = EKFAC(list(layers), torch.zeros(len(layers), dtype=torch.float64))
        fitted.damp(self.damping, self.relative_damping)
        self._extras = {"damping": fitted.damping}
        inverse = torch.cat([layer.inverse.flatten() for layer in layers])
        self._values = self._products(train, inverse, layers).to(self._dtype)

    def _eigenvectors(self) -> list[LayerCurvature]:
        """Q_A and Q_G of every layer, from the tokens' factors; the rest is unset."""
        engine = engine_of(self.model, self.problem.loss, self.layers, dense=False)
        inner: dict[str, Tensor] = {}
        outer: dict[str, Tensor] = {}
        try:
            for _, x, y in self.problem.batches("train"):
                self.gradient_evaluations += len(x)
                for block in engine(x, y).blocks:
                    assert isinstance(block, FactorBlock)
                    real = (x[:, : block.a.shape[1]] != PAD).to(block.a)[:, :, None]
                    for sums, values in ((inner, block.a * real), (outer, block.b)):
                        rows = values.flatten(0, 1)
                        term = (rows.T @ rows).double()
                        sums[block.name] = sums[block.name] + term if block.name in sums else term
        finally:
            engine.close()
        unset = torch.zeros((), dtype=self._dtype)
        return [
            LayerCurvature(
                name,
                torch.linalg.eigh(inner[name])[1].to(self._dtype),
                torch.linalg.eigh(outer[name])[1].to(self._dtype),
                unset,
                False,
                unset,
            )
            for name in inner
        ]

    def _turned(
        self, layers: Sequence[LayerCurvature], which: Literal["train", "queries"]
    ) -> Tensor:
        """Gradients in the eigenbasis, ``(n, P)``."""
        engine = engine_of(self.model, self.problem.loss, self.layers, dense=True)
        parts = []
        try:
            for _, x, y in self.problem.batches(which):
                self.gradient_evaluations += len(x)
                found = []
                for layer, block in zip(layers, engine(x, y).blocks, strict=True):
                    assert isinstance(block, DenseBlock)
                    g = block.g.view(len(x), len(layer.q_out), len(layer.q_in))
                    found.append((layer.q_out.T @ g @ layer.q_in).flatten(1))
                parts.append(torch.cat(found, 1))
        finally:
            engine.close()
        return torch.cat(parts)

    def _products(self, train: Tensor, inverse: Tensor, layers: Sequence[LayerCurvature]) -> Tensor:
        """The scores, rows reduced as the problem asks."""
        problem = self.problem
        if isinstance(problem.queries, str):
            return (train.square() @ inverse)[None]
        queries = self._turned(layers, "queries")
        rows = (queries * inverse) @ train.T
        # the basis is orthogonal, so a gradient's norm is the same in it
        return reduced_rows(rows, problem, self.query_weighting, lambda: queries.norm(dim=1))
