"""The schedule ``snapshot``: now and then, every example is scored at the same parameters.

A snapshot s is taken after a step and stands for the steps t ∈ T_s since the snapshot before. With
η_t the step size and m_t the size of batch t, n training examples, and the statistic of ``fine``,
X = Σ_t η_t x_t over *all* steps of the run:

*Shift.* Batch t holds example i with probability m_t/n, and then i instead of an average example
shifts x_t by (c_i − c̄)/m_t. In expectation a step shifts X by η_t (c_i − c̄)/n, whatever m_t.

*Variance.* Batch means vary by σ_t²/m_t around their mean, so a step adds η_t² σ_t²/m_t; as in
``fine``, batches count as independent draws.

With c_i, c̄ and σ taken at the snapshot for all of T_s,

    accumulated   μ_i = Σ_s H_s (c_i,s − c̄_s)/n / sqrt( Σ_s V_s σ_s² )
    weighted      μ_i = Σ_s H_s z_i,s/n / sqrt( Σ_s V_s ),  z_i,s = (c_i,s − c̄_s)/σ_s
    standardised  μ_i = Σ_s r_s (c_i,s − c̄_s)/σ_s / sqrt( Σ_s k_s )
    bound         sqrt( Σ_s (|T_s|/n) (c_i,s − c̄_s)²/σ_s² )

    H_s = Σ_{t∈T_s} η_t           the step size of the snapshot
    V_s = Σ_{t∈T_s} η_t²/m_t
    k_s = Σ_{t∈T_s} m_t/n         how often i was in a batch; r_s = Σ_{t∈T_s} √m_t/n

*The same number as in-batch.* There the sums run over the steps at which i was in the batch, a
share m/n of all. If c, η and m do not change over E epochs, H = E η n/m and V = E η² n/m², so the
snapshots give sqrt(E/n) (c_i − c̄)/σ, and so does E η (c_i − c̄) / sqrt(n E η² σ²). What differs is
the sampling noise: in-batch takes c̄ and σ from m − 1 batch mates at each step, which also makes
its standardised μ a little larger (the mean of 1/σ̂ lies above 1/σ).

c̄_s and σ_s (n − 1 in the variance) are taken over *reference examples*: a fresh random draw from
the whole training set at every snapshot, without i itself; never a subset that the user chose to
watch. Under ``step_weight="uncertainty"`` their mean 1 − p, u_s, turns H_s into u_s H_s and V_s
into u_s² V_s.

Choice of ours: a snapshot stands for the steps *before* it, so that an interrupted run needs none
of its past; the steps after the last one get a snapshot of their own when training ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import Composition
from fine_bench.fine.standard_error import INFLATION
from fine_bench.types import InfluenceScores, Target


@dataclass
class SnapshotInterval:
    """The steps that a snapshot stands for.

    Attributes:
        steps: |T_s|.
        lr: H_s = Σ η_t.
        noise: V_s = Σ η_t²/m_t.
        examples: Σ m_t.
        roots: Σ √m_t.
        by_parameter: Σ η_p,t by parameter, where they differ (``fine.step_sizes``).
        reach: Σ η_t times the optimiser's ``StepSizes.carry``; NaN where that is.

    Where a step is put together from micro-batches, η_t counts times mean r_i in H_s and times ρ in
    V_s, and √m_t times mean r_i/ρ (``fine.micro_batches``). Where parameters have step sizes of
    their own, η_t is the largest, and the snapshot weighs products by Σ η_p,t / H_s: exactly what
    the steps shifted; their noise, where the ratios do not change within T_s.
    """

    steps: int = 0
    lr: float = 0.0
    noise: float = 0.0
    examples: int = 0
    roots: float = 0.0
    by_parameter: dict[str, float] = field(default_factory=dict)
    reach: float = 0.0

    def add(
        self,
        lr: float,
        m: int,
        mean: float = 1.0,
        rms: float = 1.0,
        relative: Mapping[str, float] | None = None,
        carry: float = math.nan,
    ) -> None:
        """Take in a step with step size ``lr`` and a batch of ``m``.

        Args:
            lr: η_t, the largest one.
            m: number of examples in the step.
            mean, rms: mean r_i and ρ.
            relative: η_p,t/η_t by parameter; None where all are one.
            carry: see ``StepSizes``.
        """
        if relative or self.by_parameter:
            # as long as all were alike, each parameter had what all had
            earlier = 0.0 if self.by_parameter else self.lr
            for name in sorted(self.by_parameter.keys() | (relative or {}).keys()):
                before = self.by_parameter.get(name, earlier)
                share = 1.0 if not relative else relative.get(name, 0.0)
                self.by_parameter[name] = before + lr * mean * share
        self.steps += 1
        self.lr += lr * mean
        self.reach += lr * mean * carry
        self.noise += (lr * rms) * (lr * rms) / m
        self.examples += m
        self.roots += math.sqrt(m) * (mean / rms)

    @property
    def relative(self) -> dict[str, float]:
        """Σ η_p,t / H_s by parameter; empty where all are one."""
        return {name: lr / self.lr if self.lr else 1.0 for name, lr in self.by_parameter.items()}


@dataclass(frozen=True)
class SnapshotPlan:
    """After which steps there is a snapshot.

    Args:
        every_n_steps: after every so many steps.
        n_snapshots: so many, equally spaced, the last one after the last step.
        total_steps: steps of the whole run; needed for ``n_snapshots``.

    With neither of the two, once an epoch, at its end.
    """

    every_n_steps: int | None = None
    n_snapshots: int | None = None
    total_steps: float = math.inf

    def __post_init__(self) -> None:
        if self.n_snapshots is not None and not math.isfinite(self.total_steps):
            raise ValueError(
                f"n_snapshots={self.n_snapshots} spaces snapshots over the whole run, but the "
                "number of steps is unknown; give the Trainer max_epochs or max_steps, or use "
                "every_n_steps=…"
            )

    def due(self, step: int, *, epoch_ends: bool) -> bool:
        """Whether there is a snapshot after step number ``step``, counted from 1."""
        if self.every_n_steps is not None:
            return step % self.every_n_steps == 0
        if self.n_snapshots is not None:
            n, total = self.n_snapshots, int(self.total_steps)
            return step * n // total > (step - 1) * n // total
        return epoch_ends


class SnapshotAccumulator(FineAccumulator):
    """Sums over snapshots, from which μ, its error and the bound follow as for ``FineAccumulator``.

    ``n_observations`` counts snapshots. For ``std_error`` the snapshots of an epoch are one block
    (``fine.standard_error``); for ``standardised``, snapshots are taken as independent and equally
    spaced.

    Args:
        n_train, n_rows, composition: see ``FineAccumulator``.
        watched: positions of the examples that are scored, ascending; None for all.
        group_errors: see ``FineAccumulator``.
    """

    def __init__(
        self,
        n_train: int,
        n_rows: int,
        composition: Composition = "accumulated",
        watched: Tensor | None = None,
        group_errors: bool = False,
    ) -> None:
        super().__init__(n_train, n_rows, composition, group_errors)
        self.watched = watched
        self._epochs = 0.0
        # Σ u and Σ v of the epoch that is going on, and how many have ended
        self._open = torch.zeros((2, n_rows, n_train), dtype=torch.float64)
        self._open_epoch: int | None = None
        self._n_closed = 0

    def observe_snapshot(
        self,
        index: Tensor,
        effect: Tensor,
        sigma: Tensor,
        interval: SnapshotInterval,
        uncertainty: float = 1.0,
        epoch: int | None = None,
    ) -> None:
        """Take in one snapshot.

        Args:
            index: which training examples, ``(B,)``, no repeats; the same at every snapshot.
            effect, sigma: ``(R, B)``, finite.
            interval: the steps that it stands for.
            uncertainty: u_s; 1 for ``step_weight="lr"``.
            epoch: the epoch in which it was taken; without one it is a block of its own.
        """
        effect, sigma = self._usable(effect, sigma)
        n = self.n_train
        z = effect / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        # ``mu`` divides by sqrt(n · variance); n · (n V σ²) is n² times the variance of X, and H d
        # is n times its shift
        shift = uncertainty * interval.lr * effect
        variance = uncertainty**2 * interval.noise * n * sigma.square()
        if epoch is None or epoch != self._open_epoch:
            self._close()
        self._open.index_add_(2, index, torch.stack([shift, variance]))
        self._open_epoch = -1 if epoch is None else epoch
        none = torch.zeros_like(shift)  # what ``_close`` adds, an epoch at a time
        terms = [shift, none, variance, interval.roots / n * z, interval.steps / n * z * z]
        self._sums.index_add_(2, index, torch.stack([*terms, none, none]))
        self.n_observations.index_add_(0, index, torch.ones_like(index))
        self._epochs += interval.examples / n
        self.n_steps += interval.steps

    def scores(self, method: str, target: Target, inflation: float = INFLATION) -> InfluenceScores:
        """The scores so far; see ``FineAccumulator.scores``."""
        return replace(super().scores(method, target, inflation), watched=self.watched)

    def _close(self) -> None:
        """End the block that is going on."""
        if self._open_epoch is None:
            return
        u, v = self._open
        for name, product in (("shift2", u * u), ("cross", u * v), ("variance2", v * v)):
            self.sums[name].add_(product)
        if self.group_parts is not None:
            self.group_parts.close(self._open)
        self._open.zero_()
        self._open_epoch = None
        self._n_closed += 1

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ U², Σ U V, Σ V² over epochs, the one that is going on included, and their number."""
        s, (u, v) = self.sums, self._open
        count = self._n_closed + (self._open_epoch is not None)
        number = torch.where(self.n_observations > 0, count, 0).double()
        return s["shift2"] + u * u, s["cross"] + u * v, s["variance2"] + v * v, number

    def _open_block(self) -> Tensor | None:
        return None if self._open_epoch is None else self._open

    def _times_in_batch(self) -> Tensor:
        return torch.where(self.n_observations > 0, self._epochs, 0.0).double()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        block = (self._open.clone(), self._open_epoch, self._n_closed)
        return {**super().state_dict(), "epochs": self._epochs, "block": block}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        if "epochs" not in state:
            raise ValueError(
                'the saved f-INE state is of schedule="in_batch"; resume with that schedule'
            )
        super().load_state_dict(state)
        self._epochs = float(state["epochs"])
        if "block" in state:  # states of earlier versions have none
            opened, self._open_epoch, self._n_closed = state["block"]
            self._open = opened.clone()
