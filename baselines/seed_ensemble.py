"""Influence as a distribution over training runs: its mean, its spread, and whether it is there.

    v_m(q, i)   the score of a base method on the last checkpoint of run m = 1 … M
    value       mean_m v_m / std_m v_m                           (n − 1 in the variance)
    t           √M · value,     p = 2 P(T_{M−1} > |t|)           Student's t, two-sided

A score of one run is one draw; over runs that differ in initialisation and order it has a mean and
a deviation, and only their ratio says whether "i helps q" is true of the *algorithm*. Mlodozeniec
et al.: *Distributional Training Data Attribution* (arXiv:2506.12965) have the view of influence as
a distribution over runs; the test for a mean of zero is Student's (1908). p-values are one a pair,
not corrected for their number, and assume scores normal over runs. For ``self``, whose scores are
positive in every run, they say nothing, and the value is the inverse coefficient of variation.

The runs' checkpoints are passed one a run, as for TRAK's M models; the runner trains the M − 1
further models itself (``Schedule.RUNS``), which is part of this method's cost.

Where we deviate: one method's scores are compared, nothing is retrained without an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from scipy.special import stdtr
from torch import Tensor

from baselines.gradient_similarity import GradCos, GradDot
from baselines.influence_functions import InfluenceFunction
from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.query_weighting import check_weighting
from fine_bench.gradients.reciprocal import ratio_or_zero
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

Base: TypeAlias = Literal["influence_function", "grad_dot", "grad_cos"]


class SeedEnsemble(InfluenceEstimator):
    """Mean over deviation of a method's scores over several runs.

    Args:
        base: ``"influence_function"`` (EK-FAC), ``"grad_dot"`` or ``"grad_cos"``.
        runs: M that the benchmark's runner trains, ≥ 2; ``replay`` takes as many as it is given.
        relative_damping: of the influence function.
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.

    Values are dimensionless. ``extras``: ``mean`` and ``p_value``, each ``(rows, n_train)``. An
    example whose score is zero in every run has the value 0 and p = 1.
    """

    name = "seed_ensemble"
    version = 1
    schedule = Schedule.RUNS

    def __init__(
        self,
        base: Base = "influence_function",
        runs: int = 5,
        relative_damping: float = 0.1,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
    ) -> None:
        check_weighting(query_weighting)
        if base not in get_args(Base):
            raise ValueError(f"base must be one of {get_args(Base)}, got {base!r}")
        if runs < 2:
            raise ValueError(f"runs must be at least 2, since one has no deviation, got {runs}")
        self.runs = runs
        self.base: InfluenceEstimator
        if base == "influence_function":
            self.base = InfluenceFunction(
                relative_damping=relative_damping, layers=layers, query_weighting=query_weighting
            )
        else:
            kind = GradDot if base == "grad_dot" else GradCos
            self.base = kind(layers=layers, query_weighting=query_weighting)

    def unsupported(self, problem: Problem) -> str | None:
        """Whatever the base method does not serve."""
        return self.base.unsupported(problem)

    def setup(self, problem: Problem) -> None:
        """Prepare the base method."""
        super().setup(problem)
        self.base.setup(problem)
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._before: Checkpoint | None = None

    def update(self, checkpoint: Checkpoint) -> None:
        """Take in the last checkpoint of one run.

        Raises:
            ValueError: it is the one before once more.
        """
        self.load(checkpoint)
        if self._before is not None and _same(self._before, checkpoint):
            raise ValueError(
                f"checkpoints {self.n_updates - 1} and {self.n_updates} hold the same parameters; "
                f"{self.name} compares independent runs: pass the last checkpoint of each"
            )
        self._before = checkpoint
        self.base.update(checkpoint)
        self.gradient_evaluations = self.base.gradient_evaluations
        values = self.base.compute().values.double()
        if self._mean is None or self._squares is None:
            self._mean, self._squares = values, torch.zeros_like(values)
            return
        # Welford's recurrence: no sum of squares from which the mean's is subtracted
        step = values - self._mean
        self._mean = self._mean + step / self.n_updates
        self._squares = self._squares + step * (values - self._mean)

    def compute(self) -> InfluenceScores:
        """The ratio over the runs so far.

        Raises:
            ValueError: fewer than two runs.
        """
        self.require_update()
        if self._mean is None or self._squares is None or self.n_updates < 2:
            raise ValueError(
                f"{self.name} needs the checkpoints of at least 2 runs, got {self.n_updates}"
            )
        deviation = (self._squares / (self.n_updates - 1)).sqrt()
        values, p_value = ratio_and_p(self._mean, deviation, self.n_updates)
        dtype = next(self.model.parameters()).dtype
        return InfluenceScores(
            values=values.to(dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras={"mean": self._mean.to(dtype), "p_value": p_value.to(dtype)},
        )


def ratio_and_p(mean: Tensor, deviation: Tensor, n_runs: int) -> tuple[Tensor, Tensor]:
    """mean/deviation and the p-value of Student's test for a mean of zero.

    A deviation below the rounding of the mean counts as that rounding.
    """
    floor = torch.finfo(mean.dtype).eps * mean.abs()
    scale = torch.maximum(deviation, floor)
    ratio = ratio_or_zero(mean, scale)
    t = n_runs**0.5 * ratio.abs()
    p_value = torch.as_tensor(2 * stdtr(n_runs - 1, -t.numpy()))
    return ratio, p_value


def _same(one: Checkpoint, other: Checkpoint) -> bool:
    return all(torch.equal(value, other.params[name]) for name, value in one.params.items())
