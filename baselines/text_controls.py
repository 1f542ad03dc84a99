"""Controls for token sequences. A method that does not beat them has not earned its price.

Target ``self``, high is suspicious:

- ``Length``: labelled tokens of a sample.
- ``Perplexity``: exp of the mean token loss under the model *before* tuning, which has not seen
  the data.

Targets with queries, positive is similar:

- ``BM25``: words that query and sample share, weighted by their rarity. Robertson, Zaragoza: *The
  Probabilistic Relevance Framework: BM25 and Beyond* (2009). What it finds can be found by
  counting words.
- ``RepresentationSimilarity``: cosine of the mean hidden states of the last layer.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from baselines.controls import _Control, _SelfControl
from fine_bench.estimator import Schedule
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.gradients.token_losses import (
    IGNORED,
    PAD,
    is_sequence_problem,
    mean_token_loss,
    trimmed,
)
from fine_bench.types import Checkpoint, InfluenceScores, Problem

Part: TypeAlias = Literal["all", "prompt", "completion"]


def _no_sequences(problem: Problem) -> str | None:
    _, x, y = next(iter(problem.batches("train", batch_size=1)))
    if is_sequence_problem(x, y):
        return None
    return "needs token ids and labels (batch, T) each"


class Length(_SelfControl):
    """Number of labelled tokens."""

    name = "length"
    schedule = Schedule.LAST

    def unsupported(self, problem: Problem) -> str | None:
        """Token sequences and ``self`` only."""
        return super().unsupported(problem) or _no_sequences(problem)

    def compute(self) -> InfluenceScores:
        """The lengths."""
        return self._scores((self.problem.labels("train") != IGNORED).sum(1)[None].float())


class Perplexity(_SelfControl):
    """exp(mean token loss) under the model before tuning; 1 at the least.

    The model must say how it spoke then, by a context ``model.untuned()``.
    """

    name = "perplexity"
    schedule = Schedule.LAST

    def unsupported(self, problem: Problem) -> str | None:
        """Token sequences, ``self``, and a model that remembers itself before tuning."""
        reason = super().unsupported(problem) or _no_sequences(problem)
        if reason is None and not hasattr(problem.model, "untuned"):
            return "needs a model with a context untuned(): how it spoke before tuning"
        return reason

    def compute(self) -> InfluenceScores:
        """The perplexities."""
        self.require_update()
        model: Any = self.model
        with torch.no_grad(), model.untuned():
            parts = [
                mean_token_loss(self.model(x), y).double()
                for _, x, y in self.problem.batches("train")
            ]
        return self._scores(torch.cat(parts).exp()[None].float())


class BM25(_Control):
    """BM25 of every query against every training sample, token ids being the words.

    Args:
        part: which tokens count: ``"all"``, the ``"prompt"`` (not labelled) or the
            ``"completion"`` (labelled).
        k1: saturation of repeated words, ≥ 0.
        b: how much long samples are discounted, in [0, 1].
    """

    name = "bm25"
    schedule = Schedule.LAST

    def __init__(self, part: Part = "all", k1: float = 1.5, b: float = 0.75) -> None:
        if part not in get_args(Part):
            raise ValueError(f"part must be one of {get_args(Part)}, got {part!r}")
        if not 0 <= k1 < float("inf") or not 0 <= b <= 1:
            raise ValueError(f"k1 must be ≥ 0 and b lie in [0, 1], got {k1} and {b}")
        self.part, self.k1, self.b = part, k1, b

    def unsupported(self, problem: Problem) -> str | None:
        """Token sequences with queries."""
        if isinstance(problem.queries, str):
            return "compares training samples with queries from elsewhere"
        return _no_sequences(problem)

    def compute(self) -> InfluenceScores:
        """Σ over a query's distinct words w of

        log(1 + (n − n_w + ½)/(n_w + ½)) · tf (k1 + 1) / (tf + k1 (1 − b + b · length/mean length)),

        n_w the number of training samples with w and tf its count in the sample.
        """
        train, queries = self._counts("train"), self._counts("queries")
        with_word = (train > 0).sum(0).double()
        rarity = torch.log1p((len(train) - with_word + 0.5) / (with_word + 0.5))
        length = train.sum(1, keepdim=True)
        discount = 1 - self.b + self.b * length / length.mean().clamp_min(1e-12)
        weight = rarity * train * (self.k1 + 1) / (train + self.k1 * discount).clamp_min(1e-12)
        rows = (queries > 0).double() @ weight.T
        groups = query_groups(self.problem.labels("queries"), self.problem.reduce)
        return self._scores((groups @ rows).float())

    def _counts(self, which: Literal["train", "queries"]) -> Tensor:
        """How often each word of the queries or the training set stands in each sample."""
        rows = []
        for _, x, y in self.problem.batches(which):
            chosen = x != PAD
            if self.part != "all":
                chosen &= (y != IGNORED) == (self.part == "completion")
            rows += [torch.bincount(ids[keep]) for ids, keep in zip(x, chosen, strict=True)]
        size = self._vocabulary()
        counts = torch.zeros(len(rows), size, dtype=torch.float64)
        for row, found in enumerate(rows):
            counts[row, : len(found)] = found.double()
        return counts

    def _vocabulary(self) -> int:
        tops = [int(x.max()) for which in ("train", "queries") for x in self._ids(which)]
        return max(tops) + 1

    def _ids(self, which: str) -> list[Tensor]:
        name: Literal["train", "queries"] = "train" if which == "train" else "queries"
        return [x for _, x, _ in self.problem.batches(name)]


class RepresentationSimilarity(_Control):
    """Cosine of the mean hidden states of query and training sample, at the last checkpoint.

    Args:
        part: over which tokens the mean is taken: ``"all"``, the ``"prompt"`` or the
            ``"completion"``.

    The model must give the states by a method ``model.hidden(x) -> (B, T, d)``.
    """

    name = "representation_similarity"
    schedule = Schedule.LAST

    def __init__(self, part: Part = "all") -> None:
        if part not in get_args(Part):
            raise ValueError(f"part must be one of {get_args(Part)}, got {part!r}")
        self.part = part

    def unsupported(self, problem: Problem) -> str | None:
        """Token sequences with queries, and a model with hidden states."""
        if isinstance(problem.queries, str):
            return "compares training samples with queries from elsewhere"
        if not hasattr(problem.model, "hidden"):
            return "needs a model with a method hidden(x): the states of its last layer"
        return _no_sequences(problem)

    def update(self, checkpoint: Checkpoint) -> None:
        """States at this checkpoint; the last one counts."""
        self.load(checkpoint)
        train, queries = self._states("train"), self._states("queries")
        groups = query_groups(self.problem.labels("queries"), self.problem.reduce)
        self._values = groups @ (queries @ train.T)

    def compute(self) -> InfluenceScores:
        """The cosines."""
        self.require_update()
        return self._scores(self._values.float())

    def _states(self, which: Literal["train", "queries"]) -> Tensor:
        """Mean states of length one, ``(n, d)`` float64."""
        parts: list[Tensor] = []
        model: Any = self.model
        for _, x, y in self.problem.batches(which):
            with torch.no_grad():
                states = model.hidden(x).double().cpu()
            ids = trimmed(x)
            chosen = ids != PAD
            if self.part != "all":
                chosen &= (y[:, : ids.shape[1]] != IGNORED) == (self.part == "completion")
            weight = chosen.double()
            total = torch.einsum("bt,btd->bd", weight, states)
            parts.append(torch.nn.functional.normalize(total, dim=1))
        return torch.cat(parts)
