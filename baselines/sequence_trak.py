"""TRAK for token sequences.

The formula of ``baselines.trak`` with, for a sample of n_i labelled tokens,

    φ_i = Pᵀ∇ (1/n_i) Σ_t log(p_it / (1 − p_it)),      1 − p_i = (1/n_i) Σ_t (1 − p_it):

a sequence is treated as n_i classifications and averaged, as Park et al. (arXiv:2303.14186) do for
language models. The residual 1 − p_i is averaged likewise; that choice is ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from baselines.trak import MAX_SIDE, TRAK
from fine_bench.gradients.cache import engine_of
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.gradients.token_losses import (
    is_sequence_problem,
    mean_complement,
    negative_token_margin,
)
from fine_bench.types import Problem


class SequenceTRAK(TRAK):
    """TRAK of sequences over all given checkpoints; the arguments are those of ``TRAK``.

    Args:
        projection, dim, ridge, seed, query_weighting, layers: see ``TRAK``.
    """

    name = "sequence_trak"
    version = 1

    def unsupported(self, problem: Problem) -> str | None:
        """No token sequences, a singular ΦᵀΦ foreseen, or P = I on too large a problem."""
        _, x, y = next(iter(problem.batches("train", batch_size=1)))
        if not is_sequence_problem(x, y):
            return "needs token ids and labels (batch, T) each; for class labels use TRAK"
        n = problem.n_train
        if self.projection is None:
            p = self._n_params(problem)
            if self.ridge == 0 or min(p, n) > MAX_SIDE:
                return (
                    f"projection=None needs ridge > 0 and at most {MAX_SIDE} parameters or "
                    f'examples, got {p} and {n}; pass projection="rademacher"'
                )
        elif self.ridge == 0 and self.projection.dim > n:
            return (
                f"dim={self.projection.dim} is more than the {n} training examples, so ΦᵀΦ is "
                f"singular; pass dim={max(1, n // 2)} or less, or ridge > 0"
            )
        return None

    def _n_params(self, problem: Problem) -> int:
        recorder = LayerRecorder(problem.model, self.layers)
        recorder.close()
        return sum(p.numel() for own in recorder.parameters().values() for p in own)

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine.close()
        if callable(getattr(self.model, "gradient_engine", None)):
            factors = self.projection is not None and self.projection.takes_factors
            options = {"dense": False} if factors else {}
            self.engine = engine_of(
                self.model, negative_token_margin, self.layers, complement=True, **options
            )
        else:
            self.engine = SequenceMarginEngine(self.model, negative_token_margin, self.layers)


class SequenceMarginEngine(GradientEngine):
    """Gradients of the mean token margin, with the mean 1 − p of each sample beside them."""

    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        observable: Literal["loss", "margin"] = "loss",
    ) -> PerExampleGradients:
        """Gradients at the present parameters."""
        kept: list[torch.Tensor] = []
        inner = self.forward

        def listening(ids: torch.Tensor) -> torch.Tensor:
            logits = inner(ids)
            kept.append(logits.detach())
            return logits

        self.forward = listening
        try:
            gradients = super().__call__(x, y, observable)
        finally:
            self.forward = inner
        return replace(gradients, one_minus_p=mean_complement(kept[0], y))
