"""How similar two gradients are: plainly, or in units of the model's own curvature.

    euclidean   ⟨g, g'⟩
    ekfac       ⟨g, (F + λ)⁻¹ g'⟩
    kernel      the average run's: a regression on all examples at once (``fine.kernel_scores``)

F is an EK-FAC estimate of the model's own Fisher matrix, the second moment of its gradients under
the labels that it predicts itself (``fine_bench.gradients.curvature.ekfac``), and λ a share of each
layer's mean eigenvalue. A direction in which gradients vary a lot counts less: for a fixed ∇h this
is the natural-gradient direction, and for the target ``self``, if F is the covariance of gradients,
the direction in which example i stands out most from the noise of a batch (Neyman–Pearson).

F moves with the parameters, so it is fitted anew during the run, in evaluation mode, on training
examples drawn from a stream of their own. Its scale moves too: one step's μ does not depend on it,
but the accumulated sums count a step in units of its own 1/F, so steps after the data are fitted,
where F is small, weigh more than in the Euclidean geometry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import query_weights
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.seeds import stream
from fine_bench.types import Loss, QueryWeighting, UnsupportedProblemError

Geometry: TypeAlias = Literal["euclidean", "ekfac", "kernel"]

FIT_BATCH = 256
"""Examples read at a time when F is fitted. It changes memory, and results in rounding only."""

CHUNK_FLOATS = 2**25
"""Numbers that the gradients of the examples handled at a time may take, should they be formed."""


class Metric(ABC):
    """What f-INE asks of a geometry.

    Attributes:
        plain: whether products are plain dot products, the same at every step.
    """

    plain: bool = False

    @abstractmethod
    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """Products of all pairs, ``(B, B')``; with itself by default."""

    @abstractmethod
    def norm2(self, x: PerExampleGradients) -> Tensor:
        """Products of every gradient with itself, ``(B,)``."""

    @abstractmethod
    def solve(self, direction: Direction) -> Direction:
        """Directions whose *plain* products with gradients are the products of this geometry."""

    def due(self, step: int, epoch: int) -> bool:
        """Whether it is to be fitted before anything is scored after ``step`` steps."""
        return False

    def fit(self, engine: GradientEngine, data: TrainingData, step: int, epoch: int) -> int:
        """Fit it at the present parameters; per-example gradients taken."""
        return 0

    def refresh(self) -> bool:
        """Read what it depends on, before a step; whether there is a geometry to score in."""
        return True

    def watch(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:  # noqa: B027
        """Other parameters are trained than before.

        Args:
            parameters: behind each block, by the block's name.
        """

    def state_dict(self) -> dict[str, Any]:
        """What it must remember to go on after an interruption; empty if nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: the state is that of another geometry.
        """
        if state:
            raise ValueError(
                "the saved f-INE state holds a fitted geometry, but this one is never fitted; "
                "resume with the geometry=… that it was saved with"
            )

    def own_and_rows(self, x: PerExampleGradients, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """``norm2`` ``(B,)``, and the products of the chosen positions with all, ``(r, B)``."""
        return self.norm2(x), self.gram(x.rows(chosen), x)

    def query_weights(
        self,
        queries: PerExampleGradients,
        reference: PerExampleGradients,
        weighting: QueryWeighting,
    ) -> Tensor:
        """One weight a query, ``(V,)``: ``"noise"`` is the spread of this geometry's statistic.

        See ``fine_bench.gradients.query_weighting``.
        """
        if weighting != "noise":
            return query_weights(queries, None, weighting)
        return spread_weights(self.gram(reference, queries))


class Euclidean(Metric):
    """Plain dot products."""

    plain = True

    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """⟨g_i, g'_j⟩, ``(B, B')``."""
        return x.gram(y)

    def norm2(self, x: PerExampleGradients) -> Tensor:
        """‖g_i‖², ``(B,)``."""
        return x.norm2()

    def own_and_rows(self, x: PerExampleGradients, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """‖g_i‖² ``(B,)`` and ⟨g_c, g_i⟩ of the chosen positions, ``(r, B)``."""
        return x.own_and_rows(chosen)

    def solve(self, direction: Direction) -> Direction:
        """The directions themselves."""
        return direction

    def query_weights(
        self,
        queries: PerExampleGradients,
        reference: PerExampleGradients,
        weighting: QueryWeighting,
    ) -> Tensor:
        """One weight a query, ``(V,)``."""
        return query_weights(queries, reference, weighting)


class Whitened(Metric):
    """Products ⟨g, (F + λ)⁻¹ g'⟩, with F fitted anew when it is due.

    Args:
        loss: loss of the run, per example.
        relative_damping: λ in units of each layer's mean eigenvalue, > 0.
        refit_every: steps between two fits; None for one an epoch.
        fit_examples: training examples in a fit; all if there are fewer.
        seed: of the draws of these examples (and of their labels, where the model has more than
            100 classes).
    """

    def __init__(
        self,
        loss: Loss,
        *,
        relative_damping: float = 0.1,
        refit_every: int | None = None,
        fit_examples: int = 2000,
        seed: int = 0,
    ) -> None:
        self.loss = loss
        self.relative_damping = relative_damping
        self.refit_every = refit_every
        self.fit_examples = fit_examples
        self.seed = seed
        self.fitted_at: tuple[int, int] | None = None
        self._fitted: EKFAC | None = None

    @property
    def fitted(self) -> EKFAC:
        """The present F + λ."""
        if self._fitted is None:
            raise RuntimeError("F is not fitted yet; call fit() first")
        return self._fitted

    def watch(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Other layers are trained than F was fitted for."""
        self._fitted, self.fitted_at = None, None

    def due(self, step: int, epoch: int) -> bool:
        """Whether F is to be fitted before anything is scored after ``step`` steps."""
        if self.fitted_at is None:
            return True
        if self.refit_every is None:
            return epoch != self.fitted_at[1]
        return step - self.fitted_at[0] >= self.refit_every

    def draw(self, step: int, n_train: int) -> tuple[Tensor, Tensor]:
        """Positions ``(k,)`` of the examples of a fit, ascending, and a uniform number for each."""
        generator = stream(self.seed, f"fine/ekfac/step {step}")
        positions = torch.randperm(n_train, generator=generator)[: self.fit_examples]
        uniforms = torch.rand(len(positions), 1, generator=generator, dtype=torch.float64)
        return positions.sort().values, uniforms

    def fit(self, engine: GradientEngine, data: TrainingData, step: int, epoch: int) -> int:
        """Fit F at the present parameters and set λ.

        A model whose parameters or gradients are no longer finite keeps the fit that it had: its
        steps cannot be scored, and are left out and counted elsewhere.

        Returns:
            per-example gradients taken.

        Raises:
            UnsupportedProblemError: the model states no distribution of labels.
            ValueError: F vanishes on a layer, so that λ has no scale.
        """
        finite = all(bool(torch.isfinite(p).all()) for p in engine.model.parameters())
        if not finite and self._fitted is not None:
            return 0
        positions, uniforms = self.draw(step, data.n)
        self._check(engine, data, positions[:1])
        roots = Roots("fisher", self.loss, uniforms)
        try:
            fitted = fit_ekfac(
                engine, lambda: data.batches(positions, FIT_BATCH), roots, len(positions)
            )
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # not finite: no eigenvectors
            if self._fitted is None:
                raise
            return 2 * len(positions)
        fitted.damp(None, self.relative_damping)
        self._fitted, self.fitted_at = fitted, (step, epoch)
        return 2 * len(positions)

    @staticmethod
    def _check(engine: GradientEngine, data: TrainingData, positions: Tensor) -> None:
        x, y = data.read(positions)
        with torch.no_grad():
            logits = engine.forward(x)
        if logits.ndim != 2 or y.ndim != 1 or y.is_floating_point():
            raise UnsupportedProblemError(
                'geometry="ekfac" takes the Fisher matrix of the labels that the model predicts: '
                "it needs class logits (batch, classes) and integer labels (batch,), got shapes "
                f'{tuple(logits.shape)} and {tuple(y.shape)} ({y.dtype}); use geometry="euclidean"'
            )

    def gram(self, x: PerExampleGradients, y: PerExampleGradients | None = None) -> Tensor:
        """⟨g_i, (F + λ)⁻¹ g'_j⟩, ``(B, B')``."""
        return self.fitted.gram(x, y)

    def norm2(self, x: PerExampleGradients) -> Tensor:
        """⟨g_i, (F + λ)⁻¹ g_i⟩, ``(B,)``."""
        size = max(1, CHUNK_FLOATS // x.n_params)
        parts = [x.rows(slice(i, i + size)) for i in range(0, len(x), size)]
        return torch.cat([self.fitted.quadratic(part) for part in parts])

    def own_and_total(self, x: PerExampleGradients) -> tuple[Tensor, Tensor]:
        """K_ii and Σ_j K_ij over the batch, each ``(B,)``."""
        return self.fitted.own_and_total(x)

    def solve(self, direction: Direction) -> Direction:
        """(F + λ)⁻¹ times directions."""
        return self.fitted.solve(direction)

    def state_dict(self) -> dict[str, Any]:
        """The present fit: a checkpoint in the middle of an epoch cannot fit it again."""
        fitted = None if self._fitted is None else self._fitted.state_dict()
        return {"fitted": fitted, "fitted_at": self.fitted_at}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on from ``state_dict()``."""
        fitted, at = state["fitted"], state["fitted_at"]
        self._fitted = None if fitted is None else EKFAC.from_state(fitted, device)
        self.fitted_at = None if at is None else (int(at[0]), int(at[1]))


def spread_weights(products: Tensor) -> Tensor:
    """1/σ_v of each query's products with reference examples ``(r, V)``; 0 without a spread."""
    return inverse_or_zero(products.std(0))
