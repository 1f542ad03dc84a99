"""Examples that are drawn with replacement, some more often than others.

*Several rows of one example in a batch.* A step's batch has m rows; example i stands in the rows
R_i, r_i of them. The statistic of the step is x = (1/m) Σ_k c_k over rows, c_k = ⟨g_k, ∇h⟩. Had
other examples been drawn in i's place, its rows would have been rows like the others: so seeing i
shifts x by

    (1/m) Σ_{k∈R_i} (c_k − c̄),     c̄ and σ over the rows k ∉ R_i

(``contrast="removal"``: without c̄), the sum over its rows of what one row contributes. The variance
of x is σ²/m, as ever: the rows are the draws. Where rows have weights r_k/ρ
(``fine.micro_batches``), they multiply the terms. A batch of fewer than three different examples
shows no σ and is too short.

For the target *self* i's own observable stands in place of h. Each of its rows holds the gradient
∇h_i once, g_k/(1 − p_k); rows of one example are alike unless training adds noise (dropout,
augmentation), so their mean is taken: with the Gram matrix K of the rows,

    c_k = (1/r_i) Σ_{l∈R_i} K_kl/(1 − p_l),

and the products between two rows of i belong to i's own effect, not to the noise: r_i identical
rows give r_i (K_ii − c̄)/(1 − p_i). Where the geometry states the noise, σ² is the squared norm of
that mean observable, (1/r_i²) Σ_{k,l∈R_i} K_kl/((1 − p_k)(1 − p_l)).

*Over the run.* X = Σ_t η_t x_t has the variance Σ_t η_t² σ_t²/m over all steps. From the k_i steps
in which i was observed, that sum is estimated by T/k_i times Σ_{t∋i} η_t² σ_t²/m, with T steps in
all; so with M = m T rows in all

    μ_i = Σ_{t∋i} η_t Σ_{k∈R_i} (c_k − c̄) / sqrt( (M/k_i) · Σ_{t∋i} η_t² σ_t² ).

Where every example comes once an epoch, M/k_i is n, the formula of ``fine.accumulator``. Under
``WeightedRandomSampler`` an example that is drawn twice as often has twice the effect, and M/k_i
says so where n would not. So n gives way to M/k_i as soon as an example comes a second time within
an epoch. How often an example is drawn then differs from run to run like a Poisson number: the
sum of k_i terms has a variance of μ_i²/k_i for that reason alone, which joins the squared error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_bench.fine.accumulator import FineAccumulator
from fine_bench.fine.effects import Contrast
from fine_bench.fine.micro_batches import GlobalBatch
from fine_bench.fine.training_data import as_positions
from fine_bench.gradients.reciprocal import inverse_or_zero

TOGETHER = 64
"""Batches that wait to be taken in, at most."""

NEARLY_ALL = 0.9
"""Share of the examples after which a new round through them is nothing to wonder at."""


class Draws:
    """Notices when examples come in a second batch of an epoch (within one: ``observe_rows``).

    Args:
        accumulator: is told.

    Attributes:
        told: whether epochs are. Where they are not, an example that comes again after nearly all
            others have come begins the next one.
    """

    def __init__(self, accumulator: FineAccumulator) -> None:
        self.accumulator = accumulator
        self.told = True
        self._epoch: int | None = None
        # of NumPy: on a few dozen numbers faster than tensors
        self._seen, self._count = np.zeros(0, dtype=bool), 0
        self._waiting: list[tuple[Tensor, int]] = []

    def later(self, index: Tensor, epoch: int) -> None:
        """Take in a batch with the next ones: see ``note``, and ``settle`` before asking."""
        self._waiting.append((index, epoch))
        if len(self._waiting) >= TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Take in the batches that wait."""
        waiting, self._waiting = self._waiting, []
        if not waiting or self.accumulator.with_replacement:
            return
        if self.told and {epoch for _, epoch in waiting} == {self._epoch}:
            positions = torch.cat([index for index, _ in waiting]).cpu().numpy()
            fresh = not self._seen[positions].any()
            if fresh and len(np.unique(positions)) == len(positions):  # nearly always
                self._seen[positions] = True
                self._count += len(positions)
                return
        for index, epoch in waiting:
            self.note(index, epoch)

    def note(self, index: Tensor, epoch: int) -> None:
        """Take in a batch.

        Args:
            index: positions ``(m,)``.
            epoch: number of the epoch.
        """
        if self.accumulator.with_replacement:
            return
        positions = index.cpu().numpy()
        # a loop that does not tell counts n examples an epoch, and its loader may leave some out
        epoch = epoch if self.told else 0
        if epoch != self._epoch:
            self._epoch = epoch
            self._begin()
        if self._seen[positions].any():
            if self.told or self._count < NEARLY_ALL * len(self._seen):
                self.accumulator.with_replacement = True
                return
            self._begin()
        self._seen[positions] = True
        self._count += len(positions)

    def _begin(self) -> None:
        self._seen, self._count = np.zeros(self.accumulator.n_train, dtype=bool), 0


class Evenness:
    """How often each example was drawn, where what is computed takes all as drawn equally often.

    Args:
        n_train: number of training examples.
    """

    def __init__(self, n_train: int) -> None:
        self.times = torch.zeros(n_train, dtype=torch.float64)

    def note(self, index: Any) -> None:
        """Take in the index of a batch; what is none says nothing."""
        try:
            found = as_positions(index).cpu()
        except ValueError:
            return
        if int(found.min()) >= 0 and int(found.max()) < len(self.times):
            self.times.index_add_(0, found, torch.ones(len(found), dtype=torch.float64))

    @property
    def uneven(self) -> bool:
        """Whether draws differ by more than those of equally likely examples would.

        With M draws of n examples, D = Σ_i (k_i − M/n)²/(M/n) is χ² with n − 1 degrees of freedom
        where all are equally likely and draws independent, and smaller without replacement. It is
        too much six standard deviations above its mean.
        """
        n, mean = len(self.times), float(self.times.mean())
        if mean == 0.0:
            return False
        dispersion = float((self.times - mean).square().sum()) / mean
        return bool(dispersion > (n - 1) + 6 * (2 * (n - 1)) ** 0.5)


def repeats(index: Tensor) -> bool:
    """Whether an example stands in a batch twice."""
    positions = index.tolist()
    return len(set(positions)) != len(positions)


def observe_rows(
    accumulator: FineAccumulator,
    batch: GlobalBatch,
    index: Tensor,
    statistic: tuple[Tensor, Tensor | None],
    one_minus_p: Tensor | None,
    weight: float,
    contrast: Contrast,
    *,
    gram: bool,
) -> bool:
    """Take in a step in which examples stand twice; whether it was finite.

    Args:
        accumulator: takes it in.
        batch: of the step.
        index: which example each row is, ``(m,)``.
        statistic: from ``Statistic.of_rows``.
        one_minus_p: of the rows for the margin, ``(m,)``; None for the loss and for directions.
        weight: step size η_t, or the step's weight w_t.
        contrast, gram: see ``effects_of_rows``.
    """
    accumulator.with_replacement = True
    rows, variance = statistic
    inverse = None if one_minus_p is None else inverse_or_zero(one_minus_p).double()
    examples, effect, sigma = effects_of_rows(
        index, rows, inverse, batch.relative, contrast, gram=gram, variance=variance
    )
    if not bool(torch.isfinite(effect).all() & torch.isfinite(sigma).all()):
        return False
    accumulator.observe(examples, effect, sigma, weight, len(index))
    return True


def effects_of_rows(
    index: Tensor,
    statistic: Tensor,
    inverse: Tensor | None,
    weights: Tensor | None,
    contrast: Contrast,
    *,
    gram: bool,
    variance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Effect and noise of each example of a batch in which some have several rows.

    Args:
        index: which example each row is, ``(m,)``.
        statistic: K ``(m, m)`` with ``gram``, else the products with R directions ``(R, m)``.
        inverse: 1/(1 − p) of each row for the margin, ``(m,)``; None for ones.
        weights: r_k/ρ of the rows, ``(m,)``; None for ones.
        contrast: ``"removal"`` leaves the rows uncentred.
        gram: whether each example has its own observable (target ``self``).
        variance: where the geometry states the noise, the matrix whose entries K_kl of the module's
            text σ² is made of, ``(m, m)``.

    Returns:
        positions of the different examples, ``(u,)``, u ≥ 3, and their effect and σ, ``(R, u)``
        each in float64.
    """
    rows = statistic.double()
    m = len(index)
    examples, inverted = torch.unique(index.to(rows.device), return_inverse=True)
    mine = torch.zeros(len(examples), m, dtype=torch.float64, device=rows.device)
    mine[inverted, torch.arange(m, device=rows.device)] = 1.0
    others = 1.0 - mine
    count = mine.sum(1)
    if gram:
        observable = mine if inverse is None else mine * inverse
        observable = observable / count[:, None]
        c = (observable @ rows)[None]  # (1, u, m)
    weighted = mine if weights is None else mine * weights.to(mine)
    n_others = m - count
    if not gram:  # the same numbers of every example: products, without (R, u, m) numbers
        c = rows - rows.mean(1, keepdim=True)  # variances do not cancel
        mean = (c @ others.T) / n_others
        effect = rows @ weighted.T
        if contrast == "substitution":
            effect = c @ weighted.T - weighted.sum(-1) * mean
        squares = (c.square() @ others.T - n_others * mean.square()) / (n_others - 1.0)
        return examples, effect, squares.clamp_min(0.0).sqrt()
    mean = (c * others).sum(-1) / n_others
    effect = (c * weighted).sum(-1)
    if contrast == "substitution":
        effect = effect - weighted.sum(-1) * mean
    if variance is not None:
        squares = ((observable @ variance.double()) * observable).sum(-1)[None]
    else:
        squares = ((c - mean[..., None]).square() * others).sum(-1) / (n_others - 1.0)
    return examples, effect, squares.clamp_min(0.0).sqrt()


__all__ = ["Draws", "Evenness", "effects_of_rows", "observe_rows", "repeats"]
