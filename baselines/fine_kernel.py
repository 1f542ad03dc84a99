"""f-INE for queries from the checkpoints of a run that is over: ``geometry="kernel"`` post hoc.

    μ_qi = Δ_qi / σ_q                      formulas: ``fine_bench.fine.kernel_scores``

What ``FINECallback("queries", schedule="snapshot", geometry="kernel")`` reads at its snapshots is
read off the checkpoints here, and the values are the same where a checkpoint is a snapshot and
η does not change in between: a checkpoint counts η_c · mean(1 − p), η_c its ``lr``. The training
time is that of ``problem.steps`` up to each checkpoint's ``step``; where these are not known, a
ridge is matched. The state before the first step is ``problem.steps.initial``; where the problem
has none, the first checkpoint stands for it, whose shuffled entries are an initialisation only if
it is one: pass the initial state first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator
from fine_bench.fine.effects import Contrast, choose
from fine_bench.fine.kernel_scores import VERSION, KernelAccumulator
from fine_bench.fine.kernel_states import (
    State,
    is_due,
    landmarks_of,
    state_of,
    take_kernels,
    too_many,
)
from fine_bench.fine.standard_error import inflation
from fine_bench.fine.step_sizes import carry
from fine_bench.fine.training_time import curvature
from fine_bench.gradients.curvature.products import output_gradient
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.input_kernel import input_kernel
from fine_bench.gradients.margin import (
    classification_reason,
    negative_margin,
    one_minus_probability,
)
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import check_weighting, query_groups
from fine_bench.gradients.tangent_kernel import Probe
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

Part: TypeAlias = Literal["train", "queries"]
_PARTS: tuple[Part, ...] = ("train", "queries")


class FINEKernel(InfluenceEstimator):
    """f-INE for queries, from checkpoints.

    Args:
        n_initialisations: fresh initialisations whose kernels stand for other runs', ≥ 0.
        ridge: λ, > 0, in units of the kernel's mean diagonal; None: the run's training time.
        contrast: ``"substitution"`` or ``"removal"``.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        seed: of initialisations and probes, ≥ 0.
        layers: names of modules whose parameters count; None for all.
        n_landmarks: training examples whose rows of the kernel are taken, ≥ 2; None for all.
        input_share: what a Gaussian kernel of the inputs makes of the mean kernel, in [0, 1).
        errors: whether to compute ``std_error``.

    Values are μ, dimensionless; ``std_error`` and ``extras["spread"]`` are those of the callback.
    """

    name = "fine_kernel"
    version = VERSION

    def __init__(
        self,
        n_initialisations: int = 16,
        ridge: float | None = None,
        contrast: Contrast = "substitution",
        query_weighting: QueryWeighting = "noise",
        seed: int = 0,
        layers: Sequence[str] | None = None,
        n_landmarks: int | None = None,
        input_share: float = 0.0,
        errors: bool = True,
    ) -> None:
        check_weighting(query_weighting)
        choose(contrast, Contrast, "contrast")
        if n_initialisations < 0:
            raise ValueError(f"n_initialisations must be at least 0, got {n_initialisations}")
        if n_landmarks is not None and n_landmarks < 2:
            raise ValueError(f"n_landmarks must be at least 2, got {n_landmarks}")
        if not 0 <= input_share < 1:
            raise ValueError(f"input_share must be in [0, 1), got {input_share}")
        if ridge is not None and not 0 < ridge < float("inf"):
            raise ValueError(f"ridge must be a finite number > 0 or None, got {ridge}")
        self.n_initialisations, self.ridge, self.contrast = n_initialisations, ridge, contrast
        self.query_weighting: QueryWeighting = query_weighting
        self.seed, self.layers, self.n_landmarks = seed, layers, n_landmarks
        self.input_share, self.errors = input_share, errors

    def unsupported(self, problem: Problem) -> str | None:
        """The target ``self``, no class probabilities, or more examples than a kernel may have."""
        if isinstance(problem.queries, str):
            return "says what trained a prediction, and self asks about none; pass queries"
        _, x, _ = next(iter(problem.batches("train", batch_size=1)))
        if self.input_share and not (isinstance(x, Tensor) and x.is_floating_point()):
            return "input_share takes distances of inputs, which have to be real-valued tensors"
        return too_many(problem.n_train, problem.n_query) or classification_reason(problem)

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model and the sums."""
        super().setup(problem)
        groups = query_groups(problem.labels("queries"), problem.reduce)
        weighting = None if problem.reduce is None else self.query_weighting
        self._sums = KernelAccumulator(
            problem.n_train, groups, weighting, self.contrast, self.ridge, self.errors
        )
        self._kept: list[State] = []
        self._n_steps: int | None = 0

    def update(self, checkpoint: Checkpoint) -> None:
        """Read one checkpoint's residuals and slopes."""
        if not self._kept:
            steps = self.problem.steps
            self._kept.append(dict(checkpoint.params if steps is None else steps.initial))
        self.load(checkpoint)
        logits, y = self._outputs("train")
        asked, labels = self._outputs("queries")
        residual = -output_gradient(self.problem.loss, logits, y)
        slope = -output_gradient(negative_margin, asked, labels)
        weight = checkpoint.lr * float(one_minus_probability(logits, y).double().mean())
        time = self._reach(checkpoint.step) * curvature(logits)
        self._sums.observe(weight, residual, slope, logits, y, time)
        if is_due(self._sums.n_snapshots):
            self._kept.append(state_of(self.model))

    def _reach(self, step: int | None) -> float:
        """Σ η_t carry over the steps since the last checkpoint; NaN where they are not known."""
        steps, since = self.problem.steps, self._n_steps
        self._n_steps = step
        if steps is None or step is None or since is None or steps.optimizer.lower() != "sgd":
            return nan
        return sum(steps.lr[since:step]) * carry(steps.options) if step <= len(steps.lr) else nan

    @torch.no_grad()
    def _outputs(self, which: Part) -> tuple[Tensor, Tensor]:
        found = [(self.model(x), y) for _, x, y in self.problem.batches(which)]
        logits, y = zip(*found, strict=True)
        return torch.cat(logits), torch.cat(y)

    def _of_inputs(self, landmarks: Tensor | None) -> Tensor:
        parts = [x for which in _PARTS for _, x, _ in self.problem.batches(which)]
        return input_kernel(torch.cat(parts), self.problem.n_train, landmarks)

    def compute(self) -> InfluenceScores:
        """Take the kernels and solve the regression."""
        self.require_update()
        sums, problem, probe = self._sums, self.problem, Probe()
        engine = GradientEngine(self.model, probe, self.layers)

        def gradients(start: int) -> Iterator[tuple[slice, PerExampleGradients]]:
            first = 0
            for which in _PARTS:
                for rows, x, y in problem.batches(which):
                    if first + rows.stop > start:
                        self.gradient_evaluations += len(y)
                        yield slice(first + rows.start, first + rows.stop), engine(x, y)
                first = problem.n_train

        def at_landmarks() -> Iterator[tuple[slice, PerExampleGradients]]:
            assert landmarks is not None
            first = done = 0
            for which in _PARTS:
                for rows, x, y in problem.batches(which):
                    inside = (landmarks >= first + rows.start) & (landmarks < first + rows.stop)
                    chosen = landmarks[inside] - first - rows.start
                    if len(chosen):
                        self.gradient_evaluations += len(chosen)
                        yield slice(done, done + len(chosen)), engine(x[chosen], y[chosen])
                        done += len(chosen)
                first = problem.n_train

        assert sums.residual is not None
        landmarks = landmarks_of(self.n_landmarks, problem.n_train, problem.n_query, self.seed)
        kernels, scales = take_kernels(
            self.model,
            self._kept,
            [name for name, p in self.model.named_parameters() if p.requires_grad],
            probe,
            gradients,
            n_train=problem.n_train,
            n_query=problem.n_query,
            n_classes=sums.residual.shape[2],
            n_initialisations=self.n_initialisations,
            seed=self.seed,
            landmarks=landmarks,
            some=at_landmarks,
            of_inputs=self._of_inputs(landmarks) if self.input_share else None,
            input_share=self.input_share,
        )
        engine.close()
        sums.solve(kernels, scales, landmarks)
        return sums.scores(self.name, problem.target, inflation(problem.target, "kernel"))
