"""The paper's f-INE estimator: batches with S against batches without S, errors counted.

Source: Panda, Tarsadiya, Sourav, Prathosh and Karimireddy, *f-INE: A Hypothesis Testing Framework
for Estimating Influence under Training Randomness*, arXiv:2510.10510.

Idea. At parameters θ_t, x = ⟨mean gradient of a batch, ∇h(θ_t)⟩ is, to first order, how much a step
on that batch lowers the target h. Draw a batch that includes S (x ~ P) and one that excludes it
(x ~ Q), one of each at every measured step of a single run:

    x_P,t = (1/m) [ Σ_{i ∈ k members of S} ⟨g_i, ∇h⟩ + Σ_{j ∈ m − k others} ⟨g_j, ∇h⟩ ]
    x_Q,t = (1/m) Σ_{j ∈ m others} ⟨g_j, ∇h⟩

The test rejects "saw S" below a threshold τ, with errors α̂ and β̂ counted over the steps, and
μ̂ = Φ⁻¹(1 − α̂) − Φ⁻¹(β̂) (``fine_bench.theory.estimation``). μ > 0: S helps the target.

- ``selection="split"`` (default): alternate steps choose τ and count the errors, so the choice
  does not bias them. ``"max"``: the published rule, the extreme |μ̂| over all thresholds.
- *Difference in differences*: the signal drifts along the run, which widens both arms. The signal
  of an auxiliary run at the same step, Õ = O − Ô, is subtracted from both arms first.
- *Correlated steps.* Samples of neighbouring steps go together, which no estimate of μ knows of and
  every interval does (``fine_bench.theory.serial``).
- The per-step μ stands for the run by composition of Gaussians (Corollary 2.7): μ_run = μ·√T for T
  update steps, as if S stood in the batch of every step. It bounds what a reader of the whole
  trajectory could tell; the per-step μ is what the statistic of one step tells.

For the target ``self``, h is the mean observable of the members of S; for ``validation`` the
(weighted) mean observable of the queries.

What is not known to us, and what we chose. The threshold grid: every sample is a threshold. The
auxiliary model's data: the same data, another initialisation and order ("reseed"). Its signal: the
mean over *all* outsiders of the step's pool, not over one batch of m; subtracting one batch would
add that batch's noise to both arms and shrink every μ by up to √2. Batches for a group: k members
(``subsets.members_per_batch``). The mode of the network: evaluation, without dropout. The order:
a step is measured after its update, with the parameters that the next step starts from.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fine_bench.fine.subset_options import Selection
from fine_bench.fine.subset_samples import PaperAccumulator, Signal
from fine_bench.seeds import derive
from fine_bench.theory.estimation import InfluenceEstimate, estimate_mu
from fine_bench.theory.p_values import permutation_p_value
from fine_bench.types import InfluenceScores, Target

VERSION = 1
"""Raised when scores may change. It stayed when intervals learnt of the correlation between steps
and became longer, since every μ and p-value remained the same bit for bit. A record tells by its
date which interval it holds, and ``fine-bench audit`` computes it anew from the samples."""

N_EXTREME = 3
"""Traced single examples at either end of μ, and in the middle."""


@dataclass(frozen=True)
class SubsetInfluence:
    """What the run says about one subset.

    Attributes:
        name: position of a single example, or name of a group.
        size: |S|.
        mu: signed per-step μ̂ by the selection that was asked for; NaN where nothing can be told.
        std_error, lower, upper: of ``mu``; an infinite end has a ``reason``.
        mu_run: μ̂·√(update steps), by composition: the sign is carried, |μ_run| is a bound.
        moment, rank, maximum: μ̂ by moments, by ranks, and by the published maximum rule.
        p_value: of "S has no influence", by exchanging P and Q within each step; None for single
            examples, whose influence is never exactly zero.
        n_samples: P samples (and as many Q samples).
        reason: why an end of the interval is infinite; empty when none is.
    """

    name: str
    size: int
    mu: float
    std_error: float
    lower: float
    upper: float
    mu_run: float
    moment: float
    rank: float
    maximum: float
    p_value: float | None
    n_samples: int
    reason: str

    def numbers(self) -> dict[str, float]:
        """What a record keeps of a group, by name."""
        return {
            "mu": float(self.mu),
            "std_error": float(self.std_error),
            "lower": float(self.lower),
            "upper": float(self.upper),
            "p_value": math.nan if self.p_value is None else float(self.p_value),
            "size": float(self.size),
            "mu_run": float(self.mu_run),
            "moment": float(self.moment),
            "rank": float(self.rank),
            "maximum": float(self.maximum),
        }


@dataclass(frozen=True, eq=False)
class PaperResult:
    """Every estimate of a run.

    Attributes:
        subsets: one line a subset, in the order of ``Subsets``.
        estimate: the estimate behind ``mu``.
        steps: measured steps.
        p, q: both arms as tested, ``(S, n)``.
    """

    subsets: tuple[SubsetInfluence, ...]
    estimate: InfluenceEstimate
    steps: Tensor
    p: Tensor
    q: Tensor


def evaluate(
    accumulator: PaperAccumulator,
    *,
    selection: Selection,
    auxiliary: Signal | None,
    level: float,
    seed: int,
) -> PaperResult:
    """Turn the samples of a run into influences.

    Args:
        accumulator: the run's samples.
        selection: ``"split"`` or ``"max"``.
        auxiliary: the signal to subtract from both arms, or None.
        level: coverage of the intervals.
        seed: of the permutations behind the p-values of groups.
    """
    watched = accumulator.subsets
    steps, arm_p, arm_q = accumulator.arms(auxiliary)
    p, q = arm_p.numpy(), arm_q.numpy()
    split = estimate_mu(p, q, "two_stage", level, correlated=True)
    maximum = estimate_mu(p, q, "max", level, correlated=True)
    moment = estimate_mu(p, q, "moment", level, correlated=True)
    rank = estimate_mu(p, q, "rank", level, correlated=True)
    chosen = split if selection == "split" else maximum
    n_singles = len(watched.singles)
    p_values: list[float | None] = [None] * n_singles
    if watched.groups:
        rng = np.random.default_rng(derive(seed, "fine_paper/permutations"))
        found = permutation_p_value(p[n_singles:], q[n_singles:], rng, paired=True)
        p_values += found.tolist()
    root = accumulator.n_steps**0.5
    sizes = watched.sizes.tolist()
    lines = tuple(
        SubsetInfluence(
            name=name,
            size=sizes[s],
            mu=float(chosen.mu[s]),
            std_error=float(chosen.std_error[s]),
            lower=float(chosen.lower[s]),
            upper=float(chosen.upper[s]),
            mu_run=float(chosen.mu[s]) * root,
            moment=float(moment.mu[s]),
            rank=float(rank.mu[s]),
            maximum=float(maximum.mu[s]),
            p_value=p_values[s],
            n_samples=len(steps),
            reason=str(chosen.reason[s]),
        )
        for s, name in enumerate(watched.keys)
    )
    return PaperResult(lines, chosen, steps, arm_p, arm_q)


def to_scores(
    result: PaperResult, accumulator: PaperAccumulator, auxiliary: Signal | None, target: Target
) -> InfluenceScores:
    """The single examples as scores ``(1, n_train)``; groups stand in ``result.subsets``.

    ``watched`` names the single examples. ``values`` holds their signed per-step μ̂, ``std_error``
    its error. A watched example of which nothing can be told (constant samples) has the value 0
    with an infinite error, and a warning gives the reason.

    ``extras``, aligned with ``watched`` (W,): ``lower``, ``upper``, ``mu_run``, ``moment``,
    ``rank``, ``maximum``. For figures, about a dozen subsets (the extremes, some in the middle,
    every group): ``trace/step`` (n,), ``trace/subset`` (n_traced,), the position of a single
    example or −1 − g for group g, ``trace/p`` and ``trace/q`` (n_traced, n) as they were measured
    and ``trace/auxiliary`` (n_traced, n), what was subtracted from both (float32).
    """
    watched = accumulator.subsets
    singles, n = watched.singles, watched.n_train
    lines = result.subsets[: len(singles)]
    unknown = [line for line in lines if not np.isfinite(line.mu)]
    if unknown:
        warnings.warn(
            f"the influence of {len(unknown)} of {len(lines)} watched examples cannot be told, the "
            f"first is example {unknown[0].name}: {unknown[0].reason}. They have the value 0 with "
            "an infinite std_error",
            stacklevel=3,
        )
    values = torch.zeros(1, n)
    error = torch.full((1, n), float("inf"))
    seen = torch.zeros(n, dtype=torch.int64)
    mu = torch.tensor([line.mu for line in lines], dtype=torch.float64)
    spread = torch.tensor([line.std_error for line in lines], dtype=torch.float64)
    told = torch.isfinite(mu)
    values[0, singles] = torch.where(told, mu, 0.0).float()
    error[0, singles] = torch.where(told, spread, float("inf")).float()
    seen[singles] = len(result.steps)
    extras: dict[str, Tensor] = {}
    if len(singles):
        for name in ("lower", "upper", "mu_run", "moment", "rank", "maximum"):
            extras[name] = torch.tensor([getattr(line, name) for line in lines])
    extras |= _traces(result, accumulator, auxiliary, mu)
    return InfluenceScores(
        values=values,
        std_error=error,
        n_observations=seen,
        method="fine_paper",
        target=target,
        version=VERSION,
        watched=singles.clone(),
        extras=extras,
    )


def _traces(
    result: PaperResult, accumulator: PaperAccumulator, auxiliary: Signal | None, mu: Tensor
) -> dict[str, Tensor]:
    watched = accumulator.subsets
    rows = [*extremes(mu), *range(len(mu), len(watched))]
    place = {step: i for i, step in enumerate(accumulator.steps)}
    kept = [place[step] for step in result.steps.tolist()]
    raw = accumulator.stacked()[kept][:, :, rows]
    numbers = [int(watched.singles[r]) if r < len(mu) else len(mu) - r - 1 for r in rows]
    traces = {
        "trace/step": result.steps.clone(),
        "trace/subset": torch.tensor(numbers, dtype=torch.int64),
        "trace/p": raw[:, 0].T.float(),
        "trace/q": raw[:, 1].T.float(),
    }
    if auxiliary is not None:
        traces["trace/auxiliary"] = (raw[:, 0] - result.p.T[:, rows]).T.float()
    return traces


def extremes(mu: Tensor) -> Sequence[int]:
    """Up to ``N_EXTREME`` lowest, middle and highest entries of μ ``(W,)``, ascending in μ."""
    order = torch.argsort(mu.nan_to_num(0.0), stable=True).tolist()
    if len(order) <= 3 * N_EXTREME:
        return order
    middle = (len(order) - N_EXTREME) // 2
    return order[:N_EXTREME] + order[middle : middle + N_EXTREME] + order[-N_EXTREME:]
