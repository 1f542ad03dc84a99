"""SOURCE: influence through the training that really happened, segment by segment.

Training is cut into L segments in each of which curvature H_l, step size and gradients are taken
as constant. With the segment's time τ_l = Σ lr · steps and ḡ_l,i the mean of example i's gradient
over the segment's checkpoints

    S_l = exp(−τ_l H_l)                        how much of an earlier change survives the segment
    R_l = (I − exp(−τ_l H_l)) H_l⁻¹            what a constant push during the segment adds up to
    SOURCE(q, i) = g_qᵀ Σ_l (S_L S_{L−1} ⋯ S_{l+1}) R_l ḡ_l,i          g_q at the last checkpoint

Bae, Lin, Lorraine, Grosse: *Training Data Attribution via Approximate Unrolled Differentiation*
(NeurIPS 2024, arXiv:2405.12186). It is the derivative of the *last parameters*, not of an optimum:
it knows that early examples are forgotten and that training stopped, and it needs no damping,
since R_l stays finite (τ_l) where H_l has no curvature. With one long segment, τ → ∞, it is the
undamped influence function.

H_l is an EK-FAC curvature fitted to the segment's checkpoints together
(``fine_bench.gradients.curvature.ekfac``), so S_l and R_l are functions of its eigenvalues.
Momentum β counts as the step size lr/(1 − β); weight decay w adds w to every eigenvalue.

Sign and scale: as for ``InfluenceFunction``, −dℓ_q/dε for ε more of example i in the mean loss;
positive helps.

Where we deviate: the paper's factor 1/n is left out, as for influence functions; checkpoints are
all that the run left, in L parts of equal number, where the paper picks a few by hand; step sizes
are those at the checkpoints.

``self`` takes one direction in parameter space an example; beyond ``SELF_FLOATS`` numbers of those
it is refused with the reason.

Cost: two passes over data and checkpoints for the curvatures (one gradient an example and class),
one gradient an example and checkpoint for the scores, for every chunk of queries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from baselines.tracin import gather
from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.blocks.direction import Direction, add_directions
from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import Roots, count_parameters
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import (
    check_weighting,
    query_groups,
    query_weights,
    reference_rows,
)
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.seeds import stream
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

Factored: TypeAlias = Literal["fisher", "ggn", "empirical_fisher"]

QUERY_FLOATS = 2**26
"""Numbers that the directions of one chunk of queries may take, all segments together."""

HELD_FLOATS = 2**26
"""Numbers that the gradients of a batch may take, at the checkpoints of a segment that are summed
before their product: a quarter of a gigabyte in float32."""

SELF_FLOATS = 2**32
"""Examples × parameters beyond which ``self`` is refused."""

SELF_CHUNK = 64
"""Examples whose own directions are contracted together: pairs of them are computed for nothing."""


class Segment:
    """One part of the training.

    Attributes:
        checkpoints: those in it.
        time: τ.
        survives: S, as an EK-FAC curvature whose ``solve`` applies it.
        adds: R, likewise.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], fitted: EKFAC, time: float, decay: float
    ) -> None:
        self.checkpoints = checkpoints
        self.time = time
        self.survives = fitted.mapped(lambda s, _: torch.exp(-time * (s + decay)))
        self.adds = fitted.mapped(lambda s, _: accumulated(s + decay, time))


def accumulated(eigenvalues: Tensor, time: float) -> Tensor:
    """(1 − exp(−τσ))/σ, and its limit τ at σ = 0; no digit is lost for small τσ."""
    safe = torch.where(eigenvalues > 0, eigenvalues, 1.0)
    return torch.where(eigenvalues > 0, -torch.expm1(-time * safe) / safe, time)


def contract_sum(parts: Sequence[PerExampleGradients], direction: Direction) -> Tensor:
    """Dot products of R directions with the sum of several gradients of B examples, ``(R, B)``.

    Args:
        parts: gradients of the same examples at several checkpoints.

    Returns:
        float64.
    """
    total: Tensor | None = None
    layers = zip(*(part.blocks for part in parts), strict=True)
    for blocks, d in zip(layers, direction, strict=True):
        for block in summed(blocks):
            term = block.contract(d).double()
            total = term if total is None else total.add_(term)
    assert total is not None
    return total


def summed(blocks: Sequence[Block]) -> Sequence[Block]:
    """Blocks with the same sum for every example: one, where the kind of layer allows it.

    Gradients of a linear layer are sums over positions already, so further checkpoints are further
    positions.
    """
    factors = [block for block in blocks if type(block) is FactorBlock]
    if len(factors) == len(blocks):
        a = torch.cat([block.a for block in factors], 1)
        return [factors[0].with_tensors(a, torch.cat([block.b for block in factors], 1))]
    return blocks


class SOURCE(InfluenceEstimator):
    """g_qᵀ Σ_l (S_L ⋯ S_{l+1}) R_l ḡ_l,i over the checkpoints of one run.

    Args:
        segments: L, ≥ 1; fewer where there are fewer checkpoints.
        curvature: ``"fisher"`` (the model's own), ``"ggn"`` or ``"empirical_fisher"``.
        momentum: β of the training's SGD, in [0, 1).
        weight_decay: w of the training's SGD, ≥ 0.
        steps_per_checkpoint: optimiser steps between two checkpoints, ≥ 1; None reads them from
            the checkpoints' ``step``, counted from 0.
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        n_samples: labels drawn for each example where the Fisher has too many classes, ≥ 1.
        seed: of those draws.

    Values have the unit of the loss, per unit of an example's weight in the mean loss.
    ``extras``: ``time`` (L,), the τ_l.
    """

    name = "source"
    version = 1
    schedule = Schedule.ALL

    def __init__(
        self,
        segments: int = 3,
        curvature: Factored = "fisher",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        steps_per_checkpoint: int | None = None,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
        n_samples: int = 1,
        seed: int = 0,
    ) -> None:
        check_weighting(query_weighting)
        if segments < 1 or n_samples < 1:
            raise ValueError(
                f"segments and n_samples must be at least 1, got {segments} and {n_samples}"
            )
        if curvature not in get_args(Factored):
            raise ValueError(f"curvature must be one of {get_args(Factored)}, got {curvature!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a finite number ≥ 0, got {weight_decay}")
        if steps_per_checkpoint is not None and steps_per_checkpoint < 1:
            raise ValueError(f"steps_per_checkpoint must be at least 1, got {steps_per_checkpoint}")
        self.segments = segments
        self.curvature: Factored = curvature
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.steps_per_checkpoint = steps_per_checkpoint
        self.layers = layers
        self.query_weighting: QueryWeighting = query_weighting
        self.n_samples = n_samples
        self.seed = seed

    def unsupported(self, problem: Problem) -> str | None:
        """``self`` of many examples and parameters."""
        if not isinstance(problem.queries, str):
            return None
        n_params = count_parameters(copy.deepcopy(problem.model), self.layers)
        if problem.n_train * n_params <= SELF_FLOATS:
            return None
        return (
            f'queries="self" would carry each of {problem.n_train} gradients of {n_params} '
            f"parameters through every segment, more than {SELF_FLOATS:,} numbers; name "
            'layers=[...], or ask for a "validation" target'
        )

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = GradientEngine(self.model, problem.loss, self.layers)
        self._checkpoints: list[Checkpoint] = []
        self._uniforms = torch.rand(
            problem.n_train,
            self.n_samples,
            generator=stream(self.seed, "source/fisher-labels"),
            dtype=torch.float64,
        )

    def update(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint; the work is done when all are known."""
        self.load(checkpoint)
        self._checkpoints.append(checkpoint)

    def compute(self) -> InfluenceScores:
        """Curvatures of the segments, then the scores.

        Raises:
            ValueError: the number of steps between checkpoints is not known.
        """
        self.require_update()
        times = self._times()
        segments = []
        for part in self._parts():
            chosen = [self._checkpoints[c] for c in part]
            time = sum(times[c] for c in part)
            segments.append(Segment(chosen, self._fit(chosen), time, self.weight_decay))
        values = self._self(segments) if self.problem.target == "self" else self._rows(segments)
        return InfluenceScores(
            values=values.to(next(self.model.parameters()).dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras={"time": torch.tensor([s.time for s in segments], dtype=torch.float64)},
        )

    # ------------------------------------------------------------------ segments

    def _times(self) -> list[float]:
        """lr/(1 − β) times the steps that led to each checkpoint."""
        found = [checkpoint.step for checkpoint in self._checkpoints]
        if self.steps_per_checkpoint is not None:
            steps = [self.steps_per_checkpoint] * len(found)
        else:
            known = [step for step in found if step is not None]
            steps = [b - a for a, b in zip([0, *known], known, strict=False)]
            if len(known) < len(found) or min(steps) < 1:
                raise ValueError(
                    f"{self.name} needs the optimiser steps of each checkpoint, ascending from 1, "
                    f"got step={found}; pass Checkpoint(step=...) or steps_per_checkpoint=..."
                )
        return [
            checkpoint.lr / (1 - self.momentum) * count
            for checkpoint, count in zip(self._checkpoints, steps, strict=True)
        ]

    def _parts(self) -> Iterator[list[int]]:
        """Positions of each segment's checkpoints."""
        n = len(self._checkpoints)
        for part in torch.arange(n).tensor_split(min(self.segments, n)):
            yield part.tolist()

    def _at(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(dict(checkpoint.params))

    def _fit(self, part: Sequence[Checkpoint]) -> EKFAC:
        """The curvature of the segment: the mean over its checkpoints and the training examples."""

        def batches() -> Iterator[tuple[slice, Tensor, Tensor]]:
            for checkpoint in part:
                # gradients are taken before the next batch is asked for
                self._at(checkpoint)
                yield from self.problem.batches("train")

        roots = Roots(self.curvature, self.problem.loss, self._uniforms)
        n = len(part) * self.problem.n_train
        self.gradient_evaluations += 2 * n
        return fit_ekfac(self.engine, batches, roots, n)

    def _carried(self, segments: Sequence[Segment], direction: Direction) -> list[Direction]:
        """R_l S_{l+1} ⋯ S_L v for every segment l."""
        result: list[Direction] = []
        for segment in reversed(segments):
            result.insert(0, segment.adds.solve(direction))
            direction = segment.survives.solve(direction)
        return result

    # ------------------------------------------------------------------ scores

    def _chunk(self, segments: Sequence[Segment]) -> int:
        n_params = sum(block.eigenvalues.numel() for block in segments[0].adds.blocks)
        return max(1, QUERY_FLOATS // (n_params * (len(segments) + 2)))

    def _own(self, x: Tensor, y: Tensor) -> Direction:
        """The gradients of a batch as directions, one an example."""
        gradients = self.engine(x, y)
        self.gradient_evaluations += len(x)
        return gradients.weighted_sum(torch.eye(len(x)).to(gradients.norm2()))

    def _self(self, segments: Sequence[Segment]) -> Tensor:
        parts = []
        for _, x, y in self.problem.batches("train", min(SELF_CHUNK, self._chunk(segments))):
            self._at(self._checkpoints[-1])
            carried = self._carried(segments, self._own(x, y))
            total = torch.zeros(len(x), dtype=torch.float64)
            for segment, direction in zip(segments, carried, strict=True):
                for checkpoint in segment.checkpoints:
                    self._at(checkpoint)
                    own = self.engine(x, y).contract(direction).diagonal()
                    total += own.double() / len(segment.checkpoints)
                    self.gradient_evaluations += len(x)
            parts.append(total)
        return torch.cat(parts)[None]

    def _rows(self, segments: Sequence[Segment]) -> Tensor:
        last = self._checkpoints[-1]
        if self.problem.reduce is None:
            bands = []
            for _, x, y in self.problem.batches("queries", self._chunk(segments)):
                self._at(last)
                bands.append(self._against(segments, self._own(x, y)))
            return torch.cat(bands)
        weights = self._weights(segments)
        self._at(last)
        direction: Direction | None = None
        for rows, x, y in self.problem.batches("queries"):
            queries = self.engine(x, y)
            self.gradient_evaluations += len(x)
            part = queries.weighted_sum(weights[:, rows].to(queries.norm2()))
            direction = part if direction is None else add_directions(direction, part)
        assert direction is not None
        return self._against(segments, direction)

    def _against(
        self,
        segments: Sequence[Segment],
        direction: Direction,
        only: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Scores of directions against the training examples (or ``only`` these), float64."""
        carried = self._carried(segments, direction)
        columns = []
        for x, y in self._training() if only is None else [only]:
            total: Tensor | None = None
            for segment, directions in zip(segments, carried, strict=True):
                # one product for the sum over a segment's checkpoints instead of one for each
                terms = [contract_sum(some, directions) for some in self._held(segment, x, y)]
                term = sum(terms[1:], terms[0]) / len(segment.checkpoints)
                total = term if total is None else total + term
            assert total is not None
            columns.append(total)
        return torch.cat(columns, 1)

    def _held(self, segment: Segment, x: Tensor, y: Tensor) -> Iterator[list[PerExampleGradients]]:
        """A batch's gradients at the checkpoints of a segment, as many together as may be held."""
        held: list[PerExampleGradients] = []
        floats = 0
        for checkpoint in segment.checkpoints:
            self._at(checkpoint)
            held.append(self.engine(x, y))
            self.gradient_evaluations += len(x)
            floats += sum(block.n_floats for block in held[-1].blocks)
            if floats * (len(held) + 1) > HELD_FLOATS * len(held):  # the next one is as large
                yield held
                held, floats = [], 0
        if held:
            yield held

    def _training(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _, x, y in self.problem.batches("train"):
            yield x, y

    def _weights(self, segments: Sequence[Segment]) -> Tensor:
        """Weights of the queries in every row of the reduction, ``(rows, V)``."""
        problem, last = self.problem, self._checkpoints[-1]
        groups = query_groups(problem.labels("queries"), problem.reduce)
        if self.query_weighting is None:
            return groups
        only = gather(problem, reference_rows(problem.n_train))
        weights = []
        for _, x, y in problem.batches("queries", self._chunk(segments)):
            self._at(last)
            if self.query_weighting == "norm":
                weights.append(query_weights(self.engine(x, y), None, "norm").double())
                self.gradient_evaluations += len(x)
            else:
                spread = self._against(segments, self._own(x, y), only).std(1)
                weights.append(inverse_or_zero(spread))
        weighted: Tensor = groups * torch.cat(weights)
        return weighted
