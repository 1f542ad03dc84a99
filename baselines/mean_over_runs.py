"""A method's scores, averaged over several runs of the training.

    value(q, i) = mean_m v_m(q, i)              v_m the base method on run m = 1 … M

What limits the LDS of one run's scores is that other runs are other models; the mean over runs is
the natural answer, and what a single run's estimator should be compared with at equal compute
(``benchmarks/runs_at_equal_compute.py``). The runner trains the M − 1 further models, as for
``SeedEnsemble``, which is part of the cost.

Each run is read as the base method reads one: all of its checkpoints (TracIn, K-FAC, the tangent
kernel) or its last (EK-FAC influence). Where one run ends and the next begins is read off the
checkpoints: a run's ``step`` rises, so that one which does not rise begins another. A base that
reads the last checkpoint alone takes checkpoints without ``step`` as one a run.

``TRAK`` over M models as its paper does it is not this mean: it multiplies two means over models,
and has an option ``runs`` of its own.

Random choices of the base (projections, probes) are drawn anew for every run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from baselines.gradient_similarity import GradCos, GradDot
from baselines.influence_functions import InfluenceFunction
from baselines.kernel_regression import TangentKernel
from baselines.kfac import KFAC
from baselines.tracin import TracIn
from fine_bench.estimator import InfluenceEstimator, Schedule, T
from fine_bench.gradients.query_weighting import check_weighting
from fine_bench.seeds import derive
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

BASES: Mapping[str, type[InfluenceEstimator]] = {
    kind.name: kind for kind in (InfluenceFunction, KFAC, TangentKernel, TracIn, GradDot, GradCos)
}


class MeanOverRuns(InfluenceEstimator):
    """Mean over runs of the scores of a base method.

    Args:
        base: ``"influence_function"`` (EK-FAC), ``"kfac"``, ``"tangent_kernel"``, ``"tracin"``,
            ``"grad_dot"`` or ``"grad_cos"``.
        runs: M that the benchmark's runner trains, ≥ 1; ``replay`` takes as many as it is given.
        options: of the base method by name; None for its defaults.
        seed: of the base's random choices, ≥ 0; no meaning for a base without any.
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.

    Values have the base method's unit.
    """

    name = "mean_over_runs"
    version = 1
    schedule = Schedule.ALL_RUNS

    def __init__(
        self,
        base: str = "influence_function",
        runs: int = 5,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
    ) -> None:
        check_weighting(query_weighting)
        if base not in BASES:
            raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
        if runs < 1:
            raise ValueError(f"runs counts trainings, at least 1, got {runs}; try runs=5")
        kind = BASES[base]
        beside = ("seed", "layers", "query_weighting")
        known = inspect.signature(kind).parameters
        own = [name for name in known if name not in beside]
        given = dict(options or {})
        strange = sorted(set(given) - set(own))
        if strange:
            raise ValueError(
                f"{base} has no option {', '.join(strange)}; it has {', '.join(own) or 'none'}, "
                f"and {', '.join(beside)} stand beside options"
            )
        self._kind, self._seeded = kind, "seed" in known
        self._given = given | {"layers": layers, "query_weighting": query_weighting}
        self.runs, self._seed = runs, seed
        self.base = self._base(0)
        self._selected: list[int] | None = None  # checkpoints of each run that replay will give

    def _base(self, run: int) -> InfluenceEstimator:
        """The base method for the run of a number, with randomness of its own."""
        own = {"seed": derive(self._seed, f"mean over runs/{run}")} if self._seeded else {}
        return self._kind(**self._given, **own)

    def unsupported(self, problem: Problem) -> str | None:
        """Whatever the base method does not serve."""
        return self.base.unsupported(problem)

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """Of each run what the base method reads of one."""
        parts: list[list[T]] = []
        before: T | None = None
        for point in checkpoints:
            if before is None or self._begins(before, point):
                parts.append([])
            parts[-1].append(point)
            before = point
        chosen = [self.base.select(part) for part in parts]
        # of the last ones alone nobody can tell any more whether a rising step is another run's
        self._selected = [len(part) for part in chosen]
        return [point for part in chosen for point in part]

    def _begins(self, before: Any, point: Any) -> bool:
        """Whether a checkpoint is of another run than the one before it.

        Raises:
            ValueError: nobody knows.
        """
        if before.step is not None and point.step is not None:
            return bool(point.step <= before.step)
        if self.base.schedule is Schedule.LAST:
            return True
        raise ValueError(
            f"a checkpoint without its number of steps: {self.base.name} reads all checkpoints of "
            "each run, and a run begins where the number does not rise; pass "
            "Checkpoint(params, lr, step=…)"
        )

    def setup(self, problem: Problem) -> None:
        """Prepare the base method for the first run."""
        super().setup(problem)
        self._left, self._selected = self._selected, None
        self._total: Tensor | None = None
        self._before: Checkpoint | None = None
        self._done = 0
        self._evaluations = 0
        self._begin()

    def _another(self, before: Checkpoint, checkpoint: Checkpoint) -> bool:
        """Whether ``update`` has come to another run than the one before."""
        if self._left is None:
            return self._begins(before, checkpoint)
        self._left[0] -= 1
        if self._left[0] == 0:
            self._left.pop(0)
            return True
        return False

    def _begin(self) -> None:
        self.base = self._base(self._done)
        self.base.setup(self.problem)

    def _end(self) -> None:
        """Add the scores of the run that has ended."""
        values = self.base.compute().values.double()
        self._total = values if self._total is None else self._total + values
        self._evaluations += self.base.gradient_evaluations
        self._done += 1

    def update(self, checkpoint: Checkpoint) -> None:
        """Take in one checkpoint; the run before ends where this one begins another."""
        if self._before is not None and self._another(self._before, checkpoint):
            self._end()
            self._begin()
        self.load(checkpoint)
        self.base.update(checkpoint)
        self._before = checkpoint
        self.gradient_evaluations = self._evaluations + self.base.gradient_evaluations

    def compute(self) -> InfluenceScores:
        """The mean over the runs so far, the last one among them."""
        self.require_update()
        last = self.base.compute().values.double()
        total = last if self._total is None else self._total + last
        return InfluenceScores(
            values=(total / (self._done + 1)).to(next(self.model.parameters()).dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )
