"""Controls: scores that cost nothing. A method that does not beat them has not earned its price.

- ``RandomScores``: standard normal noise; detection at chance, no consistency.
- ``ConstantScores``: one number; detection at chance, consistency *undefined* (it would look
  perfect).
- ``MeanTrainingLoss``: each example's loss averaged over the checkpoints; hard to beat at finding
  uniformly flipped labels.
- ``GradientNorm``: ‖g_i‖ at the last checkpoint.

The last two look at an example alone, so they serve the target ``self`` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.engine import GradientEngine, per_example_loss
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.seeds import stream
from fine_bench.types import Checkpoint, InfluenceScores, Problem


class _Control(InfluenceEstimator):
    """What the controls share: the shape of the answer."""

    def _n_rows(self) -> int:
        problem = self.problem
        if isinstance(problem.queries, str):
            return 1
        return len(query_groups(problem.labels("queries"), problem.reduce))

    def _scores(self, values: Tensor) -> InfluenceScores:
        self.require_update()
        return InfluenceScores(
            values=values,
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )

    def update(self, checkpoint: Checkpoint) -> None:
        """Look at the checkpoint; a control that reads nothing from it ignores it."""
        del checkpoint
        self.n_updates += 1


class RandomScores(_Control):
    """Independent standard normal scores.

    Args:
        seed: the run seed, so that runs disagree as runs do; ≥ 0.
    """

    name = "random"
    schedule = Schedule.LAST

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def compute(self) -> InfluenceScores:
        """Scores from the stream ``control/random`` of the seed."""
        generator = stream(self.seed, "control/random")
        shape = (self._n_rows(), self.problem.n_train)
        return self._scores(torch.randn(shape, generator=generator))


class ConstantScores(_Control):
    """The same score for every example."""

    name = "constant"
    schedule = Schedule.LAST

    def compute(self) -> InfluenceScores:
        """Ones."""
        return self._scores(torch.ones(self._n_rows(), self.problem.n_train))


class _SelfControl(_Control):
    def unsupported(self, problem: Problem) -> str | None:
        """Only ``self``: the score of an example does not depend on a query."""
        if not isinstance(problem.queries, str):
            return "looks at each example alone and has no notion of a query"
        return None

    def _losses(self) -> Tensor:
        """Each training example's own loss at the loaded checkpoint, ``(n_train,)``."""
        if self._one_row_each():  # what other controls read of the same pass
            outputs = self.shared_value("logits", self._logits)
            return per_example_loss(self.problem.loss, outputs, self.problem.labels("train"))

        def read() -> Tensor:
            with torch.no_grad():
                parts = [
                    per_example_loss(self.problem.loss, *self._labelled(x, y))
                    for _, x, y in self.problem.batches("train")
                ]
            return torch.cat(parts)

        return self.shared_value("losses", read)

    def _one_row_each(self) -> bool:
        """Whether the model makes of an example one row of numbers, and its label is a number."""
        _, x, y = next(iter(self.problem.batches("train", batch_size=1)))
        with torch.no_grad():
            output = self.model(x) if y.ndim == 1 else None
        return isinstance(output, Tensor) and output.ndim == 2

    def _logits(self) -> Tensor:
        """``(n_train, classes)`` at the loaded checkpoint, in the model's precision."""
        with torch.no_grad():
            return torch.cat([self.model(x) for _, x, _ in self.problem.batches("train")])

    def _labelled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels: those of labelled tokens alone, if the model offers that."""
        labelled = getattr(self.model, "labelled", None)
        if not callable(labelled):
            return self.model(x), y
        logits, labels = labelled(x, y)
        return logits, labels


class MeanTrainingLoss(_SelfControl):
    """Mean over the checkpoints of each example's own loss, in the loss's unit (nats)."""

    name = "mean_loss"

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self._total = torch.zeros(problem.n_train, dtype=torch.float64)

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's losses."""
        self.load(checkpoint)
        self._total += self._losses().double()

    def compute(self) -> InfluenceScores:
        """The mean over the checkpoints so far."""
        dtype = next(self.model.parameters()).dtype
        return self._scores((self._total / max(self.n_updates, 1)).to(dtype)[None])


class GradientNorm(_SelfControl):
    """‖g_i‖ over all trained parameters at the last checkpoint."""

    name = "gradient_norm"
    schedule = Schedule.LAST

    def update(self, checkpoint: Checkpoint) -> None:
        """Norms at this checkpoint; the last one counts."""
        self.load(checkpoint)
        engine = GradientEngine(self.model, self.problem.loss)
        try:
            parts = [engine(x, y).norm2().sqrt() for _, x, y in self.problem.batches("train")]
        finally:
            engine.close()
        self.gradient_evaluations += self.problem.n_train
        self._values = torch.cat(parts)[None]

    def compute(self) -> InfluenceScores:
        """The norms."""
        self.require_update()
        return self._scores(self._values)
