"""f-INE for queries, from a regression that stands for the average run: ``geometry="kernel"``.

    μ_qi = Δ_qi / σ_q

Δ_qi is what seeing example i does to the margin of query q in the *average* run, σ_q the spread of
that margin over runs. One run's own derivative says little of either: what is peculiar to the run
drowns it. A Gaussian process with a kernel K̄ that is an average over initialisations and over the
run says both in closed form. With f the centred logits, y = onehot − 1/k their targets, prior
f ~ N(0, s²K̄) and noise s²(A⁻¹ − K̄),

    mean over runs     f(q) = Z y,           Z = K̄_q A,   A = (I − e^{−τK̄}) K̄⁻¹
    spread over runs   Cov(q, q') = s² (K̄_qq' − Z_q K̄_q'ᵀ) ⟨ḡ_q, ḡ_q'⟩
    effect of i        Δ_qi = Z_qi ⟨ḡ_q, r̄_i⟩

f is where gradient flow with the kernel K̄ has come after the training time τ: what the run had no
time to learn is noise to it. What example i adds to the gradient, r̄_i, moves the flow's value at q
by Z_qi r̄_i (``gradients.tangent_kernel.KernelFlow``). ḡ_q are the slopes ∂margin/∂logits and r̄_i
the residuals −∂ℓ_i/∂logits, averaged over the run's snapshots with the weights
w_t = η_t · mean(1 − p), so that what a network knew before it had fitted everything counts. Nothing
here is fitted to a truth:

- K̄: half the mean over the run's kernels, half that over fresh initialisations
  (``fine.kernel_states``), each kernel divided by its mean diagonal, K̄ once more.
- τ = Σ_t η_t c_t h_t κ_t / n over the steps: κ_t the scale of the run's kernel along K̄
  (``kernel_states.take_kernels``), linear in between, c_t what momentum makes of a step
  (``StepSizes.carry``), and
  h_t = mean_i Σ_c p_c(1 − p_c)/(k − 1) the curvature of the cross-entropy in the logits, by which
  residuals shrink as logits move, read at the snapshot after the step. 1/τ is kept between 0.01 and
  1000. Weight decay is left out of account.
- Where c_t is not known (Adam), or ``ridge`` is given, A = (K̄ + λI)⁻¹ is that of ridge regression,
  in which leaving out i moves the value at q by −Z_qi times its residual, exactly. Without a given
  λ the regression fits the labels as well as the run did on average, mean_i ‖λα_i‖² = mean_i ‖r̄_i‖²
  with α = Ay. (No such λ exists where a softmax fits better than any regression with the kernel: a
  linear model of many examples. That is why it is second choice.)
- s²: the prior variance under which the labels are most likely, Σ y ∘ α / (n(k − 1)), α = Ay.

In logits the regression is too small by one factor, a = ⟨z, f⟩/⟨f, f⟩ over training examples
(z the run's last logits). It is in Δ and in σ, so μ does without; ``extras["spread"]`` is a σ_q.

*From some rows alone* (``landmarks``): K̄ is taken between L examples and all others, so that
nothing is cubic in n (``gradients.landmark_kernel``). All queries are among the L: their kernel
with every example stays what it is, and what is left out of K̄ are directions that no query and
none of the other landmarks has.

A row over several queries, weights v: Σ v_q Δ_q over sqrt(vᵀ Cov v). ``contrast="substitution"``
subtracts from Δ_qi the mean over the other examples.

*Error.* Snapshots and kernels fall into four blocks in turn; each block is left out once, and the
jackknife's deviation over what is left, times ``standard_error.KERNEL_INFLATION``, is
``std_error``: it is meant to cover the mean of μ over further runs of the same training.

Gaussian processes for networks of any initialisation: Jacot et al. 2018 (arXiv:1806.07572), Lee et
al. 2019 (arXiv:1902.06720), where training for a time is the same filter of the kernel. Ours: to
read f-influence off one.

Shapes: n training examples, V queries, N = n + V, k classes, R rows, G blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.fine.effects import Contrast
from fine_bench.fine.kernel_system import (
    LEAST_RIDGE,
    MOST_RIDGE,
    matched_ridge,
    system_of,
    train_diagonal,
)
from fine_bench.fine.training_time import training_time
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.gradients.tangent_kernel import FLOW_STEPS
from fine_bench.types import InfluenceScores, QueryWeighting, Target

VERSION = 3
"""Raised when scores of this geometry may change."""

BLOCKS = 4
"""G, blocks of the jackknife."""


@dataclass(frozen=True, eq=False)
class Regression:
    """What one regression says.

    Attributes:
        mu: ``(R, n)``.
        sigma: spread of each row's margin, in the regression's units, ``(R,)``.
        ridge: λ, or 1/τ.
        fitted: f at the training examples, ``(n, k)``.
    """

    mu: Tensor
    sigma: Tensor
    ridge: float
    fitted: Tensor


Rows = Callable[[Tensor, Tensor], Tensor]
"""Weights of the queries in each row ``(R, V)``, of their covariance ``(V, V)`` and the norms of
their kernel features ``(V,)``."""


def regression(
    kernel: Tensor,
    residual: Tensor,
    slope: Tensor,
    targets: Tensor,
    rows: Rows,
    ridge: float | None = None,
    contrast: Contrast = "removal",
    time: float | None = None,
    landmarks: Tensor | None = None,
) -> Regression:
    """μ of every row and training example.

    Args:
        kernel: ``(N, N)``, training examples before queries, of any scale > 0; with landmarks
            their rows alone, ``(L, N)``.
        residual: r̄, ``(n, k)``.
        slope: ḡ, ``(V, k)``.
        targets: y, ``(n, k)``.
        rows: see ``Rows``.
        ridge: λ, > 0; None: matched to ``residual``.
        contrast: see the module's text.
        time: τ, > 0; None for ridge regression.
        landmarks: which rows ``kernel`` has, ``(L,)``, training examples, then all queries; None
            for all rows.

    Raises:
        UnsupportedProblemError: K̄ + λI is numerically singular.
    """
    n, k = targets.shape
    system = system_of(kernel, landmarks, n)
    if time is not None:
        time = min(max(time, 1 / MOST_RIDGE), 1 / LEAST_RIDGE)
        ridge, solver = 1 / time, system.flow(time, FLOW_STEPS)
    else:
        if ridge is None:
            level = float(residual.square().sum()) / n
            ridge = matched_ridge(lambda some: system.flow(1 / some, 1), targets, level)
        solver = system.flow(1 / ridge, 1)
    cross, asked = system.cross, system.asked
    smoother, alpha = solver.smoother(system.sought), solver.solve(targets)
    prior = (targets * alpha).sum() / (n * (k - 1))
    covariance = prior * (asked - smoother @ cross.T) * (slope @ slope.T)
    norms = asked.diagonal().sqrt() * torch.linalg.vector_norm(slope, dim=1)
    weights = rows(covariance, norms).to(covariance)
    effect = weights @ (smoother * (slope @ residual.T))
    if contrast == "substitution":
        effect = (effect - effect.mean(1, keepdim=True)) * (n / (n - 1))
    sigma = ((weights @ covariance) * weights).sum(1).clamp_min(0.0).sqrt()
    mu = effect * inverse_or_zero(sigma)[:, None]
    return Regression(mu, sigma, ridge, system.fitted(alpha))


def rows_of(groups: Tensor, weighting: QueryWeighting) -> Rows:
    """How queries are averaged into rows.

    Args:
        groups: ``(R, V)``; see ``query_weighting.query_groups``.
        weighting: ``"noise"``: 1/σ_q; ``"norm"``: one over the norm of the query's gradient; None.
    """

    def rows(covariance: Tensor, norms: Tensor) -> Tensor:
        if weighting is None:
            return groups
        scale = covariance.diagonal().clamp_min(0.0).sqrt() if weighting == "noise" else norms
        return groups.to(scale) * inverse_or_zero(scale)

    return rows


def jackknife(estimates: Sequence[Tensor], full: Tensor) -> Tensor:
    """sqrt((G − 1)/G Σ (μ_(g) − mean)²) over G ≥ 2 estimates with one block left out; else ∞."""
    count = len(estimates)
    if count < 2:
        return torch.full_like(full, float("inf"))
    each = torch.stack(list(estimates)).double()
    return ((count - 1) * each.var(0, unbiased=False)).sqrt().to(full)


@dataclass
class KernelAccumulator:
    """What a run leaves for the regression: weighted sums of residuals and slopes, block by block.

    Args:
        n_train: n.
        groups: ``(R, V)``.
        weighting: see ``rows_of``; no row of a single query is weighted.
        contrast: see the module's text.
        ridge: λ, or None for the training time, or where that is not known to match it.
        errors: whether the jackknife is computed.

    Attributes:
        residual, slope: Σ w r ``(G, n, k)`` and Σ w ḡ ``(G, V, k)`` of each block's snapshots.
        weight: Σ w of each block.
        logits: of the training examples at the last snapshot, ``(n, k)``.
        labels: ``(n,)``.
        n_snapshots: so far.
        times: Σ η c h of each snapshot; NaN where that is not known.
        found: the regression and its error, once they are computed.
    """

    n_train: int
    groups: Tensor
    weighting: QueryWeighting = None
    contrast: Contrast = "substitution"
    ridge: float | None = None
    errors: bool = True
    residual: Tensor | None = None
    slope: Tensor | None = None
    weight: list[float] = field(default_factory=lambda: [0.0] * BLOCKS)
    logits: Tensor | None = None
    labels: Tensor | None = None
    n_snapshots: int = 0
    n_steps: int = 0
    times: list[float] = field(default_factory=list)
    found: tuple[Regression, Tensor] | None = None

    def observe(
        self,
        weight: float,
        residual: Tensor,
        slope: Tensor,
        logits: Tensor,
        labels: Tensor,
        time: float = math.nan,
    ) -> None:
        """Take in one snapshot.

        Args:
            weight: w_t, ≥ 0.
            residual: r, ``(n, k)``.
            slope: ḡ, ``(V, k)``.
            logits: ``(n, k)``, of the training examples.
            labels: theirs, ``(n,)``.
            time: Σ η c h over the steps since the last snapshot; NaN if that is not known.
        """
        self.times.append(time)
        if self.residual is None or self.slope is None:
            self.residual = residual.new_zeros(BLOCKS, *residual.shape)
            self.slope = slope.new_zeros(BLOCKS, *slope.shape)
        # saved sums come back on the CPU
        self.residual, self.slope = self.residual.to(residual), self.slope.to(slope)
        block = self.n_snapshots % BLOCKS
        self.residual[block] += weight * residual
        self.slope[block] += weight * slope
        self.weight[block] += weight
        self.logits, self.labels = logits, labels
        self.n_snapshots += 1
        self.found = None

    def solve(
        self,
        kernels: Sequence[Tensor],
        scales: Sequence[float] = (),
        landmarks: Tensor | None = None,
    ) -> None:
        """Compute μ and its error.

        Args:
            kernels: of each block, what its kernels add to K̄, ``(N, N)``, or the landmarks' rows of
                it, ``(L, N)``; all G.
            scales: κ before the first step and after each snapshot that ``is_due``; none for
                ridge regression.
            landmarks: which rows the kernels have; see ``regression``.

        Raises:
            UnsupportedProblemError: see ``regression``.
        """
        assert self.residual is not None
        assert self.slope is not None
        assert self.labels is not None
        residual, slope = self.residual, self.slope
        k = residual.shape[2]
        kernel, weight = sum_of(kernels), sum(self.weight)
        targets = F.one_hot(self.labels, k).to(kernel) - 1 / k
        rows = rows_of(self.groups, self.weighting)
        time = training_time(self.times, scales) / self.n_train
        known = self.ridge is None and 0 < time < math.inf  # not where it is NaN

        def estimate(
            kernel: Tensor, residual: Tensor, slope: Tensor, w: float, ridge: float | None
        ) -> Regression:
            averages = (residual / w).to(kernel), (slope / w).to(kernel)
            return regression(
                kernel,
                *averages,
                targets,
                rows,
                ridge,
                self.contrast,
                time if known else None,
                landmarks,
            )

        all_of, all_slopes = residual.sum(0), slope.sum(0)
        full = estimate(kernel, all_of, all_slopes, weight, self.ridge)
        parts = []
        for block in range(BLOCKS if self.errors else 0):
            left, others = weight - self.weight[block], kernel - kernels[block]
            if left > 0 and bool(train_diagonal(others, landmarks, self.n_train).any()):
                part = estimate(
                    others,
                    all_of - residual[block],
                    all_slopes - slope[block],
                    left,
                    full.ridge,
                )
                parts.append(part.mu)
        self.found = full, jackknife(parts, full.mu)

    def mu(self) -> tuple[Tensor, Tensor]:
        """μ and the jackknife's error, before it is inflated, each ``(R, n)`` in float64.

        Zeros with an infinite error where nothing was observed.
        """
        if self.found is None:
            values = torch.zeros(len(self.groups), self.n_train, dtype=torch.float64)
            return values, torch.full_like(values, float("inf"))
        full, error = self.found
        return full.mu.double().cpu(), error.double().cpu()

    def scale(self) -> float:
        """a, by which the run's logits exceed the regression's."""
        assert self.found is not None
        assert self.logits is not None
        fitted = self.found[0].fitted.double()
        z = self.logits.to(fitted)
        z = z - z.mean(1, keepdim=True)
        return float((z * fitted).sum() / fitted.square().sum())

    def scores(self, method: str, target: Target, inflation: float) -> InfluenceScores:
        """The scores; zeros with an infinite error where nothing was observed.

        ``extras["spread"]``, ``(R,)``: a σ of each row, the spread of its margin over runs in
        logits (for a mean of queries, of the weighted mean); times ``values`` the change of the
        margin in logits.
        """
        seen = torch.full((self.n_train,), self.n_snapshots, dtype=torch.int64)
        values, error = self.mu()
        extras: dict[str, Tensor] = {}
        if self.found is not None:
            extras = {"spread": (self.scale() * self.found[0].sigma).float().cpu()}
        return InfluenceScores(
            values=values.float(),
            std_error=(inflation * error).float() if self.errors else None,
            n_observations=seen,
            method=method,
            target=target,
            version=VERSION,
            extras=extras,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        names = ("residual", "slope", "logits", "labels")
        tensors = {name: getattr(self, name) for name in names}
        kept = {name: None if x is None else x.clone().cpu() for name, x in tensors.items()}
        counts = (self.n_snapshots, self.n_steps)
        numbers = {"weight": list(self.weight), "counts": counts, "times": list(self.times)}
        return {"kernel": True, **kept, **numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: the state is of another geometry, or of other data.
        """
        if "kernel" not in state:
            raise ValueError(
                "the saved f-INE state is of another geometry than the kernel; resume with the "
                "geometry=… that it was saved with"
            )
        labels = state["labels"]
        if labels is not None and len(labels) != self.n_train:
            raise ValueError(
                f"the saved f-INE state is for {len(labels)} training examples, this run has "
                f"{self.n_train}; resume with the same data"
            )
        for name in ("residual", "slope", "logits", "labels"):
            value = state[name]
            setattr(self, name, None if value is None else value.clone())
        self.weight = list(state["weight"])
        self.n_snapshots, self.n_steps = state["counts"]
        unknown = [math.nan] * self.n_snapshots  # states of earlier versions have none
        self.times = list(state.get("times", unknown))
        self.found = None


def sum_of(kernels: Sequence[Tensor]) -> Tensor:
    """Σ_g of the blocks' kernels, ``(N, N)``."""
    total = kernels[0].clone()
    for kernel in kernels[1:]:
        total += kernel
    return total


__all__ = [
    "BLOCKS",
    "LEAST_RIDGE",
    "MOST_RIDGE",
    "KernelAccumulator",
    "Regression",
    "jackknife",
    "matched_ridge",
    "regression",
]
