"""Controls that read losses, margins or features, never a gradient: cheap, and hard to beat.

All of them look at an example beside its own label, so they serve the target ``self`` only, and
all are oriented like ``self``: a HIGH value is suspicious.

- ``FinalLoss``: loss at the last checkpoint.
- ``AUM``: *minus* the area under the margin.
- ``ForgettingEvents``: how often an example was learned and lost again.
- ``EL2N``: norm of the error of the predicted probabilities.
- ``KNNDisagreement``: share of the nearest neighbours in feature space with another label.
- ``ConfidentLearning``: cleanlab's label quality score.
"""

from __future__ import annotations

import importlib.util
from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.controls import _SelfControl
from baselines.neighbours import nearest_neighbours
from fine_bench.estimator import Schedule
from fine_bench.gradients.margin import classification_reason
from fine_bench.types import Checkpoint, InfluenceScores, Problem

_ROWS = 4096
"""Examples whose logits are read at a time."""


class _LogitControl(_SelfControl):
    """A control that reads the logits of every training example at each checkpoint."""

    def unsupported(self, problem: Problem) -> str | None:
        """Only ``self``, and only where there are class logits."""
        return super().unsupported(problem) or classification_reason(problem)

    def update(self, checkpoint: Checkpoint) -> None:
        """Read one checkpoint."""
        self.load(checkpoint)
        logits = self.shared_value("logits", self._logits)
        start = 0
        for part in torch.split(logits, _ROWS):
            rows = slice(start, start + len(part))
            self.read(rows, part.double(), self.labels[rows])
            start = rows.stop

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model, and the labels."""
        super().setup(problem)
        self.labels = problem.labels("train")

    @abstractmethod
    def read(self, rows: slice, logits: Tensor, y: Tensor) -> None:
        """Take in the examples ``rows``: logits ``(batch, classes)`` float64, labels."""

    def _row(self, values: Tensor) -> InfluenceScores:
        """Scores from one value an example, in the model's precision."""
        return self._scores(values.to(next(self.model.parameters()).dtype)[None])


class FinalLoss(_SelfControl):
    """Each example's own loss at the last checkpoint, in the loss's unit (nats)."""

    name = "final_loss"
    schedule = Schedule.LAST

    def update(self, checkpoint: Checkpoint) -> None:
        """Losses at this checkpoint; the last one counts."""
        self.load(checkpoint)
        self._values = self._losses()[None]

    def compute(self) -> InfluenceScores:
        """The losses."""
        self.require_update()
        return self._scores(self._values)


class _MeanControl(_LogitControl):
    """The mean over the checkpoints of a function of an example's logits."""

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self._total = torch.zeros(problem.n_train, dtype=torch.float64)

    def read(self, rows: slice, logits: Tensor, y: Tensor) -> None:
        """Add the batch's values."""
        self._total[rows] += self.value(logits, y)

    @abstractmethod
    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """What is averaged, ``(batch,)``."""

    def compute(self) -> InfluenceScores:
        """The mean over the checkpoints so far."""
        return self._row(self._total / max(self.n_updates, 1))


class AUM(_MeanControl):
    """Minus the area under the margin: −mean_c (z_y − max_{k≠y} z_k), z the logits.

    Pleiss, Zhang, Elenberg, Weinberger: *Identifying Mislabeled Data using the Area Under the
    Margin Ranking* (NeurIPS 2020, arXiv:2001.10528). There a *low* area is suspicious; the sign is
    turned here, so that high is suspicious as for every ``self`` score. The mean is over the given
    checkpoints instead of over every epoch, and no indicator class is trained for a threshold.
    """

    name = "aum"

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """The margin by which another class wins."""
        others = logits.scatter(1, y[:, None], float("-inf"))
        return others.amax(1) - logits.gather(1, y[:, None])[:, 0]


class EL2N(_MeanControl):
    """mean_c ‖softmax(z) − onehot(y)‖₂, in [0, √2].

    Paul, Ganguli, Dziugaite: *Deep Learning on a Data Diet* (NeurIPS 2021, arXiv:2107.07075). They
    average over several models at one early epoch; here over the given checkpoints of the run.
    """

    name = "el2n"

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Norm of the error."""
        error: Tensor = F.softmax(logits, 1) - F.one_hot(y, logits.shape[1])
        return error.square().sum(1).sqrt()


class ForgettingEvents(_LogitControl):
    """Number of times an example was classified correctly at one checkpoint and not at the next.

    Toneva et al.: *An Empirical Study of Example Forgetting* (ICLR 2019, arXiv:1812.05159). They
    look whenever an example is in a batch; here at the given checkpoints. An example that is never
    classified correctly counts as the maximum, the number of checkpoints, which no forgotten one
    reaches. Counts are coarse: expect ties.
    """

    name = "forgetting_events"

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        n = problem.n_train
        self._events = torch.zeros(n, dtype=torch.int64)
        self._was_correct = torch.zeros(n, dtype=torch.bool)
        self._ever_correct = torch.zeros(n, dtype=torch.bool)

    def read(self, rows: slice, logits: Tensor, y: Tensor) -> None:
        """Compare with the checkpoint before."""
        correct = logits.argmax(1) == y
        self._events[rows] += self._was_correct[rows] & ~correct
        self._was_correct[rows] = correct
        self._ever_correct[rows] |= correct

    def compute(self) -> InfluenceScores:
        """The counts over the checkpoints so far."""
        counts = torch.where(self._ever_correct, self._events, self.n_updates)
        return self._row(counts)


class KNNDisagreement(_SelfControl):
    """Share of the k nearest neighbours among the training examples with another label.

    Neighbours are by Euclidean distance between penultimate features, the inputs of the last
    ``nn.Linear`` that the forward pass calls, at the last checkpoint; an example is not its own
    neighbour. As in Bahri, Jiang, Gupta: *Deep k-NN for Noisy Labels* (ICML 2020,
    arXiv:2004.12289), who filter by it.

    Args:
        k: number of neighbours, from 1 to n_train − 1.
    """

    name = "knn_disagreement"
    schedule = Schedule.LAST

    def __init__(self, k: int = 20) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k

    def unsupported(self, problem: Problem) -> str | None:
        """Only ``self``; needs labels of classes, a linear layer, and more examples than k."""
        reason = super().unsupported(problem) or classification_reason(problem)
        if reason is not None:
            return reason
        if not any(isinstance(module, nn.Linear) for module in problem.model.modules()):
            return "needs a torch.nn.Linear, whose inputs are the features; the model has none"
        if self.k >= problem.n_train:
            return f"k={self.k} neighbours need more than {problem.n_train} training examples"
        return None

    def update(self, checkpoint: Checkpoint) -> None:
        """Neighbours at this checkpoint; the last one counts."""
        self.load(checkpoint)
        features = penultimate_features(self.model, self.problem)
        labels = self.problem.labels("train")
        other = labels[nearest_neighbours(features, self.k)] != labels[:, None]
        self._values = other.to(features.dtype).mean(1)[None]

    def compute(self) -> InfluenceScores:
        """The shares."""
        self.require_update()
        return self._scores(self._values)


def penultimate_features(
    model: nn.Module, problem: Problem, which: Literal["train", "queries"] = "train"
) -> Tensor:
    """Inputs of the last linear layer called, ``(n, features)``, n training examples or queries."""
    last: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        last[:] = [inputs[0]]

    handles = [
        module.register_forward_pre_hook(keep)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    parts = []
    try:
        with torch.no_grad():
            for _, x, _ in problem.batches(which):
                model(x)
                parts.append(last[0].flatten(1).clone())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(parts)


class ConfidentLearning(_LogitControl):
    """One minus cleanlab's label quality score: self-confidence, adjusted for class thresholds.

        t_k = mean of p_k over the examples labelled k
        score = 1 − q_y,   q_k ∝ p_k − t_k + max_j t_j

    Northcutt, Jiang, Chuang: *Confident Learning* (JAIR 2021, arXiv:1911.00068); computed by
    ``cleanlab.rank.get_label_quality_scores(method="self_confidence", adjust_pred_probs=True)`` at
    the last checkpoint, for which high quality is good; turned here so that high is suspicious.

    The method expects *out-of-sample* probabilities, from cross-validation. We give it those of
    the trained model on its own training data, since one run is what every method here is given:
    a model that has memorised its labels is too confident in wrong ones, so this understates what
    confident learning can do at several times the cost.
    """

    name = "confident_learning"
    schedule = Schedule.LAST

    def unsupported(self, problem: Problem) -> str | None:
        """Only ``self``, with class logits, and with the package cleanlab."""
        if importlib.util.find_spec("cleanlab") is None:
            return "needs the package cleanlab: pip install cleanlab"
        return super().unsupported(problem)

    def update(self, checkpoint: Checkpoint) -> None:
        """Probabilities at this checkpoint; the last one counts."""
        self._probabilities: list[Tensor] = []
        super().update(checkpoint)

    def read(self, rows: slice, logits: Tensor, y: Tensor) -> None:
        """Keep the batch's probabilities."""
        del rows, y
        self._probabilities.append(F.softmax(logits, 1))

    def compute(self) -> InfluenceScores:
        """One minus the quality of every label."""
        from cleanlab.rank import get_label_quality_scores

        self.require_update()
        quality = get_label_quality_scores(
            labels=self.problem.labels("train").numpy(),
            pred_probs=torch.cat(self._probabilities).numpy(),
            method="self_confidence",
            adjust_pred_probs=True,
        )
        return self._row(1.0 - torch.as_tensor(quality))
