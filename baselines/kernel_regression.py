"""Influence in a kernel regression that stands in for the network.

    score(q, i) = Z_qi ⟨ḡ_q, r̄_i⟩,   Z = K̄_q (K̄ + λI)⁻¹

K̄ ``(n, n)`` a kernel of mean diagonal 1, r̄_i ``(k,)`` a residual of example i, ḡ_q ``(k,)`` what
the logits of query q do to its margin. In ridge regression, leaving out example i moves the value
at q by exactly −Z_qi times the residual *of the regression without i*; see
``fine_bench.gradients.tangent_kernel``. Positive: i raises the margin of q, so it helps q.

``TangentKernel``
    K̄ is the mean over the run's checkpoints of the network's own tangent kernel, each divided by
    its mean diagonal; r̄_i = mean_c (onehot(y_i) − p_i) the example's residual (in general −∂ℓ_i/∂z)
    averaged over the checkpoints, which remembers in a network that has fitted everything how far
    an example was off before; ḡ_q the mean of ∂m_q/∂z. One solve for the whole run: the directions
    that change from one checkpoint to the next, hence from one run to the next, average out
    *before* the inverse and not after it. Kernel regressions that stand in for a network: Jacot et
    al. 2018 (arXiv:1806.07572); for attribution TRAK (Park et al. 2023, arXiv:2303.14186), which
    takes the margin's gradients at each final checkpoint with a kernel weight and no ridge.

A control with a kernel of the inputs alone stands in ``baselines/kernel_controls.py``.

Deviations: one random combination of logits a checkpoint (``Probe``) stands for the mean over
classes; K̄ in the precision of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator
from fine_bench.gradients.curvature.products import output_gradient
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.input_products import InputProducts
from fine_bench.gradients.margin import classification_reason, negative_margin
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import check_weighting, reduced_rows
from fine_bench.gradients.tangent_kernel import KernelRidge, Probe, cross_gram, gram_matrix
from fine_bench.seeds import stream
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

MAX_EXAMPLES = 16_384
"""Training examples whose kernel is held: 1 GiB in float32, and two further ones at work."""


class KernelRegression(InfluenceEstimator):
    """What the regressions have in common: the run's residuals and the regression.

    Args:
        ridge: λ, > 0, in units of the kernel's mean diagonal.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
    """

    def __init__(self, ridge: float, query_weighting: QueryWeighting) -> None:
        check_weighting(query_weighting)
        if not 0 < ridge < float("inf"):
            raise ValueError(f"ridge must be a finite number > 0, got {ridge}; try ridge=1.0")
        self.ridge = ridge
        self.query_weighting: QueryWeighting = query_weighting

    def unsupported(self, problem: Problem) -> str | None:
        """No class probabilities, or more examples than the kernel may have."""
        reason = classification_reason(problem)
        if reason is None and problem.n_train > MAX_EXAMPLES:
            return (
                f"its kernel would have {problem.n_train} rows and columns, more than the limit of "
                f"{MAX_EXAMPLES}; train on fewer examples (task.n_train=…), or use a method that "
                "holds no matrix of all pairs, for instance influence_function"
            )
        return reason

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self._residual: Tensor | None = None
        self._slope: Tensor | None = None

    def observe(self) -> None:
        """Add −∂ℓ_i/∂z of every example and ∂m_q/∂z of every query at the loaded checkpoint."""
        residual = -self._slopes("train", self.problem.loss)
        slope = -self._slopes("queries", negative_margin)
        self._residual = residual if self._residual is None else self._residual + residual
        self._slope = slope if self._slope is None else self._slope + slope

    @torch.no_grad()
    def _slopes(self, which: Literal["train", "queries"], loss: Any) -> Tensor:
        batches = self.problem.batches(which)
        return torch.cat([output_gradient(loss, self.model(x), y) for _, x, y in batches])

    def scores(
        self,
        kernel: Tensor,
        cross: Tensor | None,
        own: Tensor,
        targets: tuple[Tensor, Tensor] | None,
    ) -> InfluenceScores:
        """The scores from kernels whose mean diagonal is 1.

        Args:
            kernel: ``(n, n)``; lost.
            cross: ``(V, n)``, or None for ``self``.
            own: ``(V,)``, K(q, q).
            targets: of the training examples ``(n, k)`` and queries ``(V, k)`` of the regression;
                None for the run's own residuals.
        """
        ridge = KernelRidge(kernel, self.ridge)
        if targets is None:
            assert self._residual is not None
            assert self._slope is not None
            residual, slope = self._residual / self.n_updates, self._slope / self.n_updates
        else:
            residual, slope = ridge.left_out_residuals(targets[0]), targets[1]
        if cross is None:
            smoother = 1 - self.ridge * ridge.inverse_diagonal()
            values: Tensor = (smoother * (slope * residual).sum(1))[None]
        else:
            values = ridge.smoother(cross) * (slope @ residual.T)

            def norms() -> Tensor:
                found: Tensor = own.sqrt() * torch.linalg.vector_norm(slope, dim=1)
                return found

            values = reduced_rows(values, self.problem, self.query_weighting, norms)
        return InfluenceScores(
            values=values.to(next(self.model.parameters()).dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )


class TangentKernel(KernelRegression):
    """Ridge regression with the run's mean tangent kernel.

    Args:
        ridge: λ, > 0, in units of the kernel's mean diagonal. Of 1, 2 and 3 the default has the
            highest sum of LDS on the development half of two retraining banks.
        every: the kernel is taken at every so many checkpoints, the first among them; residuals at
            all of them. ≥ 1.
        probes: random combinations of the logits at each of these, ≥ 1.
        seed: of the combinations, ≥ 0.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        layers: names of modules whose parameters count; None for all.

    Values are relative: they order examples and do not state a unit.
    """

    name = "tangent_kernel"
    version = 1

    def __init__(
        self,
        ridge: float = 2.0,
        every: int = 3,
        probes: int = 1,
        seed: int = 0,
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        super().__init__(ridge, query_weighting)
        for name, value in (("every", every), ("probes", probes)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; pass {name}=1")
        self.every, self.probes, self.seed, self.layers = every, probes, seed, layers

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model and the stream of the probes."""
        super().setup(problem)
        self._probe = Probe()
        self.engine = GradientEngine(self.model, self._probe, self.layers)
        self._generator = stream(self.seed, "tangent-kernel/probes")
        self._products = InputProducts()
        self._kernel: Tensor | None = None
        self._cross: Tensor | None = None
        self._own: Tensor | None = None

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's residuals, and its kernel if it is that checkpoint's turn."""
        self.load(checkpoint)
        self.observe()
        if (self.n_updates - 1) % self.every == 0:
            for _ in range(self.probes):
                self._add_kernel()

    def _add_kernel(self) -> None:
        assert self._residual is not None
        problem, n = self.problem, self.problem.n_train
        self._probe.draw(self._residual.shape[1], self._generator)
        products = self._products
        kernel = gram_matrix(lambda start: self._gradients("train", start), n, products)
        scale = kernel.diagonal().mean()
        self._kernel = _added(self._kernel, kernel.div_(scale))
        if isinstance(problem.queries, str):
            return
        cross, own = cross_gram(
            self._gradients("queries"), lambda: self._gradients("train"), n, products=products
        )
        self._cross = _added(self._cross, cross / scale)
        self._own = _added(self._own, own / scale)

    def _gradients(
        self, which: Literal["train", "queries"], start: int = 0
    ) -> Iterator[tuple[slice, PerExampleGradients]]:
        """Of v·z, batch by batch; batches that end by ``start`` are passed over."""
        for rows, x, y in self.problem.batches(which):
            if rows.stop > start:
                self.gradient_evaluations += len(y)
                yield rows, self.engine(x, y)

    def compute(self) -> InfluenceScores:
        """The regression with the mean kernel so far."""
        self.require_update()
        assert self._kernel is not None
        kernel = self._kernel / self._kernel.diagonal().mean()
        if self._cross is None:
            return self.scores(kernel, None, kernel.diagonal().clone(), None)
        assert self._own is not None
        scale = self._kernel.diagonal().mean()
        return self.scores(kernel, self._cross / scale, self._own / scale, None)


def _added(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)
