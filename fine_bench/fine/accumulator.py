"""f-INE for every example, from the batches of one training run.

Idea. The influence of an example is how well a test can tell *trained with it* from *trained
without it* (Panda et al., arXiv:2510.10510). At step t, with batch size m and step size η_t, the
statistic is x_t = ⟨mean gradient of the batch, ∇h⟩ for a target h: to first order, how much the
step lowers h. Replacing an average example by example i shifts x_t by (c_i,t − c̄_t)/m, where
c_i,t = ⟨g_i, ∇h⟩; its standard deviation over batches is σ_t/√m. Hence, over the steps at which i
was observed,

    accumulated   μ_i = Σ_t η_t (c_i,t − c̄_t) / sqrt( n_train · Σ_t η_t² σ_t² )
    weighted      μ_i = Σ_t η_t z_i,t / sqrt( n_train · Σ_t η_t² ),      z_i,t = (c_i,t − c̄_t)/σ_t
    standardised  μ_i = Σ_t μ_i,t / sqrt(number of observations),  μ_i,t = (c_i,t − c̄_t)/(√m σ_t)
    bound         |μ_i| ≤ sqrt( Σ_t μ_i,t² )                          (Gaussian composition)

with c̄_t and σ_t (n − 1) over the reference examples j ≠ i of the batch. *Accumulated* is the test
on X = Σ_t η_t x_t: seeing i shifts X by Σ η_t (c_i,t − c̄_t)/m, and the variance of X over *all*
steps, n/m times as many as i was seen in, is (n/m) Σ η_t² σ_t²/m. μ > 0: i helps the target.
*Weighted* is the test on X = Σ_t η_t x_t/σ_t, whose steps all have the same noise: a step counts by
η_t alone, not by how large its gradients are (*accumulated*), nor as much as any other
(*standardised*).

``contrast="substitution"`` compares i with an average example, as above; ``"removal"`` leaves c_i
uncentred. Only the second one speaks of harm: with substitution a third of perfectly clean
examples come out slightly negative.

``step_weight`` replaces η_t in the accumulated and the weighted μ by a weight w_t: ``"lr"`` takes
w_t = η_t, ``"uncertainty"`` w_t = η_t · (batch mean of 1 − p), the mean probability that the model
still gives to other labels: it favours the steps before the data are fitted. It exists for softmax
cross-entropy, where the training pass holds it (half the sum of the absolute gradient at the
logits).

``noise`` says where σ comes from: ``"sample"``, from the reference examples; or, for *self* in the
EK-FAC geometry, ``"model"``: the geometry states it (``whitened_effects``).

Difference from the paper: its estimator draws P and Q batches for a given subset and counts
errors; this one uses the Gaussian moments of the batches that training draws anyway, for all
examples at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.effects import Composition, choose
from fine_bench.fine.group_parts import GroupParts
from fine_bench.fine.standard_error import INFLATION, ratio_error
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.types import InfluenceScores, Target

VERSION = 2
"""Raised when scores may change."""

SUMS = ("shift", "shift2", "variance", "mu", "mu2", "cross", "variance2")
"""Σ u, Σ u², Σ v, Σ μ_t, Σ μ_t², Σ u v, Σ v², with u = η(c − c̄) and v = η²σ²; weighted: u = ηz and
v = η²."""

SUMS_BEFORE_BLOCKS = 5
"""States saved by earlier versions hold the first five only."""


class FineAccumulator:
    """Sums over the steps of a run from which μ follows. A few floats per example and row.

    Args:
        n_train: number of training examples.
        n_rows: number of query rows R.
        composition: which μ ``scores`` reports.
        group_errors: whether to keep what errors of groups are measured by (``fine.group_parts``).

    Attributes:
        n_observations: steps in which each example was observed, ``(n_train,)``.
        n_passed_over: the same for steps that were passed over; None if none was.
        n_steps, n_short_batches, n_without_noise: steps that were observed, steps that were too
            short, and examples in a step that had no noise beside them.
        with_replacement, n_repeats: whether examples are drawn with replacement, and rows beyond
            an example's first in its batch (``fine.draws``).
    """

    def __init__(
        self,
        n_train: int,
        n_rows: int,
        composition: Composition = "accumulated",
        group_errors: bool = False,
    ) -> None:
        choose(composition, Composition, "composition")
        if n_train < 1 or n_rows < 1:
            raise ValueError(f"n_train and n_rows must be at least 1, got {n_train}, {n_rows}")
        self.n_train = n_train
        self.composition = composition
        # one tensor, so that a step costs one indexed addition; the names are in SUMS
        self._sums = torch.zeros((len(SUMS), n_rows, n_train), dtype=torch.float64)
        self.n_observations = torch.zeros(n_train, dtype=torch.int64)
        self.n_passed_over: Tensor | None = None  # as n_observations, once a step is passed over
        self.n_steps = 0
        self.n_short_batches = 0
        self.n_without_noise = 0
        self.with_replacement = False
        self.n_repeats = 0
        self.group_parts = GroupParts(n_rows, n_train) if group_errors else None

    def observe(
        self, index: Tensor, effect: Tensor, sigma: Tensor, lr: float, n_rows: int | None = None
    ) -> None:
        """Take in one step.

        Args:
            index: which training examples, ``(m,)``, no repeats.
            effect, sigma: ``(R, m)`` or ``(m,)``, from ``self_effects`` or ``direction_effects``.
            lr: step size η_t, or the step's weight w_t.
            n_rows: length of the batch, where examples stand in it several times
                (``fine.draws``); m if None.
        """
        m = len(index)
        self.n_repeats += 0 if n_rows is None else n_rows - m
        self.observe_steps(
            index[None],
            effect.reshape(1, -1, m),
            sigma.reshape(1, -1, m),
            torch.tensor([lr], dtype=torch.float64),
            n_rows,
        )

    def observe_steps(
        self, index: Tensor, effect: Tensor, sigma: Tensor, lr: Tensor, n_rows: int | None = None
    ) -> None:
        """Take in S steps with batches of one size.

        Args:
            index: ``(S, m)``.
            effect, sigma: ``(S, R, m)``, finite.
            lr: step sizes or weights, ``(S,)``.
            n_rows: length of the batches; m if None.
        """
        n_steps, m = index.shape
        length = m if n_rows is None else n_rows
        effect, sigma = self._usable(effect, sigma)
        eta = lr.double().cpu()[:, None, None]
        shift = eta * effect
        mu = effect / sigma.clamp_min(torch.finfo(sigma.dtype).tiny) * length**-0.5
        noise = (eta * sigma).square_()
        if self.group_parts is not None:
            self.group_parts.observe(index, shift, noise, self._times_in_batch())
        steps = torch.stack(
            [shift, shift * shift, noise, mu, mu * mu, shift * noise, noise * noise]
        )
        kinds, rows = len(SUMS), steps.shape[2]
        # (kinds, S, R, m) → (kinds, R, S·m): one addition, in the order of the steps
        flat = steps.transpose(1, 2).reshape(kinds, rows, n_steps * m)
        seen = index.cpu().reshape(-1)
        self._sums.index_add_(2, seen, flat)
        self.n_observations.index_add_(0, seen, torch.ones_like(seen))
        self.n_steps += n_steps

    def _usable(self, effect: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Without noise there is no test: such an entry adds nothing, and is counted."""
        effect, sigma = effect.double().cpu(), sigma.double().cpu()
        usable = sigma > 0
        n_usable = int(usable.sum())
        if n_usable < usable.numel():
            self.n_without_noise += usable.numel() - n_usable
            effect = torch.where(usable, effect, 0.0)
        if self.composition == "weighted":  # in units of the step's own noise
            effect = effect / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
            sigma = usable.double()
        return effect, sigma

    def pass_over(self, index: Tensor) -> None:
        """Note a step that is not observed; the observed ones stand for it.

        Args:
            index: which training examples were in it, ``(m,)``.
        """
        rows = index.cpu()
        index = torch.unique(rows)
        self.n_repeats += len(rows) - len(index)
        if self.n_passed_over is None:
            self.n_passed_over = torch.zeros_like(self.n_observations)
        self.n_passed_over.index_add_(0, index, torch.ones_like(index))

    def skip_short_batch(self) -> None:
        """Count a batch that is too short for a standard deviation."""
        self.n_short_batches += 1

    def mu(self) -> tuple[Tensor, Tensor]:
        """μ and its spread within the run, each ``(n_rows, n_train)`` in float64.

        The spread is what the run's own blocks show of μ's error (``fine.standard_error``):
        ``scores`` inflates it.
        """
        s, blocks = self._whole_run()
        k = self.n_observations.double()
        times = self._times_in_batch()
        tiny = torch.finfo(torch.float64).tiny
        if self.composition != "standardised":
            scale = (self._n_draws() * s["variance"]).sqrt()
            known = scale > 0
            inverse = inverse_or_zero(scale)
            values = s["shift"] * inverse
            error = ratio_error(values, inverse, s["variance"], *blocks)
            if self.with_replacement:  # how often it is drawn differs from run to run
                error = (error.square() + values.square() / times.clamp_min(1.0)).sqrt()
            several = blocks[-1] > 1
        else:
            known = (k > 0).expand_as(s["mu"])
            inverse = torch.where(k > 0, times, 1.0).rsqrt()
            values = s["mu"] * inverse
            # k observations that stand for ``times`` of them
            centred = (s["mu2"] - s["mu"].square() / times.clamp_min(tiny)).clamp_min(0.0)
            error = (centred * times / (k - 1).clamp_min(1)).sqrt() * inverse
            several = k > 1
        return values, torch.where(several & known & torch.isfinite(error), error, float("inf"))

    def scores(self, method: str, target: Target, inflation: float = INFLATION) -> InfluenceScores:
        """The scores so far.

        Values are μ, dimensionless and signed; with another ``step_weight`` than ``"lr"`` they are
        the test on the statistic in which step t counts w_t instead of η_t.

        ``std_error`` accounts for other seeds: values ± 1.96 ``std_error`` is meant to cover the
        mean over other runs of the same training in 95 % of the examples. It is the run's own
        spread over epochs times ``inflation`` (``standard_error.inflation`` says how often it did).
        An example with fewer than two observations has an infinite one; without any observation its
        value is 0. ``extras["bound"]`` ``(n_query, n_train)`` is sqrt(Σ μ_i,t²), whatever the
        weights. ``extras["group_parts"]`` ``(epochs, n_query, n_train)``, where they are kept, are
        the parts of μ's error by epoch (``fine.group_parts``), ``inflation`` included; not where
        examples were drawn with replacement, whose draws are no epochs.
        """
        values, error = self.mu()
        extras = {"bound": self._whole_run()[0]["mu2"].sqrt().float()}
        if self.group_parts is not None and not self.with_replacement:
            variance = self.sums["variance"]
            inverse = inverse_or_zero((self._n_draws() * variance).sqrt())
            parts = self.group_parts.parts(values, inverse, variance, self._open_block())
            extras["group_parts"] = (inflation * parts).float()
        return InfluenceScores(
            values=values.float(),
            std_error=(inflation * error).float(),
            n_observations=self.n_observations.clone(),
            method=method,
            target=target,
            version=VERSION,
            extras=extras,
        )

    def _n_draws(self) -> Tensor | int:
        """Of how many rows of the run one is this example's: n where each comes once an epoch.

        See ``fine.draws``.
        """
        if not self.with_replacement:
            return self.n_train
        times = self._times_in_batch()
        return (times.sum() + self.n_repeats) / times.clamp_min(1.0)

    def _times_in_batch(self) -> Tensor:
        """How often each example was in a batch, ``(n_train,)``."""
        passed_over = 0 if self.n_passed_over is None else self.n_passed_over
        return (self.n_observations + passed_over).double()

    def _whole_run(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]:
        """The sums and those over blocks, with the observed steps standing for all."""
        sums, (squares, cross, variances, blocks) = self.sums, self._blocks()
        if self.n_passed_over is not None:
            ratio = self._times_in_batch() / self.n_observations.double().clamp_min(1.0)
            sums = {name: values * ratio for name, values in sums.items()}
            squares, cross, variances = (x * ratio**2 for x in (squares, cross, variances))
        return sums, (squares, cross, variances, blocks)

    def _blocks(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ U², Σ U V, Σ V² and the number of blocks; here every observation is a block.

        In-batch an example is seen once an epoch, so that its blocks are the epochs.
        """
        s = self.sums
        return s["shift2"], s["cross"], s["variance2"], self.n_observations.double()

    def _open_block(self) -> Tensor | None:
        """Σ u and Σ v of an epoch that is going on, ``(2, R, n)``, where they are kept apart."""
        return None

    @property
    def sums(self) -> dict[str, Tensor]:
        """The sums by name, ``(n_rows, n_train)`` each, in float64."""
        return dict(zip(SUMS, self._sums, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        kept = self.group_parts
        return ({} if kept is None else {"group_parts": kept.state_dict()}) | {
            "sums": self._sums.clone(),
            "n_observations": self.n_observations.clone(),
            "n_passed_over": None if self.n_passed_over is None else self.n_passed_over.clone(),
            "counts": (self.n_steps, self.n_short_batches, self.n_without_noise),
            "draws": (self.with_replacement, self.n_repeats),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        sums = state["sums"]
        if len(sums) == SUMS_BEFORE_BLOCKS:
            # the values go on as they were; their error is unknown, that is, infinite
            unknown = sums.new_full((len(SUMS) - len(sums), *sums.shape[1:]), float("nan"))
            sums = torch.cat([sums, unknown])
        if sums.shape != self._sums.shape:
            raise ValueError(
                f"the saved f-INE state is for {tuple(sums.shape[1:])} (rows, examples), this run "
                f"has {tuple(self._sums.shape[1:])}; resume with the same data and queries"
            )
        self._sums = sums.clone()
        self.n_observations = state["n_observations"].clone()
        passed_over = state.get("n_passed_over")  # states of earlier versions have none
        self.n_passed_over = None if passed_over is None else passed_over.clone()
        self.n_steps, self.n_short_batches, self.n_without_noise = state["counts"]
        # states of earlier versions are of runs without replacement
        self.with_replacement, self.n_repeats = state.get("draws", (False, 0))
        if self.group_parts is not None:
            self.group_parts.load_state_dict(state["group_parts"])
