"""Composition of influence over the steps of a run.

If step i of a run is f_i-influential, the whole run is at most f_1 ⊗ … ⊗ f_k-influential, where
T(P, Q) ⊗ T(P', Q') = T(P × P', Q × Q') (Panda et al., arXiv 2510.10510, theorem 2.6; Dong, Roth
and Su 2019, theorem 3.2). The privacy loss L = log dQ/dP of a product is the sum of the losses,
so any pair composes by convolving loss distributions. A composed figure bounds |μ| from above;
it has no sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.fft import irfft, next_fast_len, rfft

from fine_bench.theory.arrays import ArrayLike, FloatArray
from fine_bench.theory.central_limit import as_steps, loss_moments
from fine_bench.theory.families import GaussianTradeOff
from fine_bench.theory.piecewise_linear import convexify
from fine_bench.theory.tradeoff import MAX_LOSS, TradeOff

# Mass that may be cut from either tail of a loss distribution; below it is rounding of the FFT.
_TAIL = 1e-15

_MAX_GRID = 2**22


def compose_mu(mu: ArrayLike) -> FloatArray:
    """Corollary 2.7: G_μ1 ⊗ … ⊗ G_μk = G_m with m = sqrt(Σ μ_i²). `mu`: (..., k) → (...).

    Signed values may be given; the result bounds |μ| and is never negative.
    """
    values = np.asarray(mu, dtype=np.float64)
    if values.ndim == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"mu must be finite with shape (..., steps), got shape {values.shape}; "
            "drop the steps at which nothing was measured"
        )
    return np.asarray(np.sqrt(np.square(values).sum(axis=-1)), dtype=np.float64)


@dataclass(frozen=True)
class Composition:
    """A composed trade-off function and how far it may lie from the true one.

    The numerical curve is pessimistic (at or below the truth: more influence, never less), and

        δ_true(ε) − mass_error ≤ δ(ε) ≤ δ_true(ε − loss_error) + mass_error.

    `loss_error` is the worst case over all steps (steps × grid step). Each step is discretised
    without changing the mass or the mean likelihood ratio of a cell, so what usually counts is an
    added variance of the loss of about step²/6 a step.
    """

    trade_off: TradeOff
    loss_error: float
    mass_error: float

    @property
    def exact(self) -> bool:
        """Whether a closed form was used."""
        return self.loss_error == 0.0 and self.mass_error == 0.0


@dataclass(frozen=True)
class _LossGrid:
    """Loss distribution on the grid `first`, `first` + 1, … (times the step), under P and Q."""

    first: int
    p: FloatArray  # sums to 1 less the P mass at loss −inf
    q: FloatArray
    q_plus: float  # Q mass at loss +inf


def _discretise(f: TradeOff, step: float) -> _LossGrid:
    """Pessimistic loss distribution of `f` on multiples of `step`.

    The mass of a cell (e_k, e_{k+1}] goes to its two ends so that both its P mass and its Q mass
    are kept. Undoing the split is a randomised map, so the true pair is a processed version of the
    discrete one and no easier to tell apart. Its δ is exact on the grid and linear in e^ε between
    (the connect-the-dots construction of Doroshenko et al. 2022).
    """
    low, high = f.loss_range(_TAIL)
    first = int(np.floor(max(low, -MAX_LOSS) / step))
    last = max(int(np.ceil(min(high, MAX_LOSS) / step)), first + 1)
    if last - first > _MAX_GRID:
        raise ValueError(
            f"a grid step of {step:.3g} needs {last - first} cells for losses from {low:.3g} to "
            f"{high:.3g}; pass a step of at least {(high - low) / _MAX_GRID:.3g}"
        )
    edges = step * np.arange(first, last + 1)
    test = f.ratio_test(edges)
    # Differences are taken on the side on which the numbers are small.
    falling = np.where(test.alpha[:-1] < 0.5, -np.diff(test.alpha), np.diff(test.accept))
    rising = np.where(test.beta[1:] < 0.5, np.diff(test.beta), -np.diff(test.power))
    mass_p, mass_q = np.maximum(falling, 0.0), np.maximum(rising, 0.0)

    left, right = edges[:-1], edges[1:]
    up_q = np.clip((mass_q - np.exp(left) * mass_p) / -np.expm1(-step), 0.0, mass_q)
    up_p = np.clip((mass_q * np.exp(-left) - mass_p) / np.expm1(step), 0.0, mass_p)
    # Solved in the measure that is the larger one in the cell, carried over to the other.
    positive = left >= 0.0
    q_left = np.where(positive, mass_q - up_q, (mass_p - up_p) * np.exp(left))
    q_right = np.where(positive, up_q, up_p * np.exp(right))
    p_left = np.where(positive, (mass_q - up_q) * np.exp(-left), mass_p - up_p)
    p_right = np.where(positive, up_q * np.exp(-right), up_p)
    p, q = np.zeros(edges.size), np.zeros(edges.size)
    p[:-1] += p_left
    p[1:] += p_right
    q[:-1] += q_left
    q[1:] += q_right
    # Beyond the grid: above, the cell (e_last, inf) keeps P at its lower end and sends the rest
    # of Q to +inf; below likewise with the measures exchanged.
    top_p, top_q = float(test.alpha[-1]), float(test.power[-1])
    at_top = min(top_p * float(np.exp(edges[-1])), top_q)
    p[-1] += at_top * float(np.exp(-edges[-1]))
    q[-1] += at_top
    low_p, low_q = float(test.accept[0]), float(test.beta[0])
    at_low = min(low_q * float(np.exp(-edges[0])), low_p)
    p[0] += at_low
    q[0] += at_low * float(np.exp(edges[0]))
    return _LossGrid(first, p, q, max(top_q - at_top, 0.0))


def _tail_edge(
    grids: Sequence[_LossGrid], counts: Sequence[int], step: float, upper: bool
) -> float:
    """Chernoff bound: the loss that the sum passes with probability at most `_TAIL`.

    Upwards under Q, downwards under P, each the measure that favours that side.
    """
    sign = 1.0 if upper else -1.0
    tilts = np.logspace(-4, 4, 81)
    total = np.zeros(tilts.size)
    farthest = 0.0
    for grid, count in zip(grids, counts, strict=True):
        mass = grid.q if upper else grid.p
        seen = np.flatnonzero(mass > 0.0)
        if seen.size == 0:  # every loss is infinite: nothing for the window to hold
            continue
        loss = sign * step * (grid.first + seen)
        log_mass = np.log(mass[seen])
        for i, tilt in enumerate(tilts):
            exponent = log_mass + tilt * loss
            peak = exponent.max()
            total[i] += count * (peak + np.log(np.exp(exponent - peak).sum()))
        farthest += count * max(float(loss.max()), 0.0)
    edge = float(((total - np.log(_TAIL)) / tilts).min())
    return sign * min(max(edge, 0.0), farthest)


def compose(
    functions: TradeOff | Sequence[TradeOff],
    counts: int | Sequence[int] = 1,
    step: float | None = None,
) -> Composition:
    """f_1^{⊗c_1} ⊗ f_2^{⊗c_2} ⊗ …: exact for Gaussians, by loss convolution for any other pair.

    `functions`: one trade-off function or several; `counts`: how often each occurs (≥ 1);
    `step`: grid step of the loss, by default 1/128 of the root mean square loss spread of a step,
    which inflates the variance of the composed loss by 1e-5. Losses are convolved by FFT twice,
    under P for negative and under Q for positive sums, so that neither half is a rounding error
    multiplied by e^|loss|. Returns the curve with its error bounds.
    """
    functions, counts = as_steps(functions, counts)
    if step is not None and not (np.isfinite(step) and step > 0.0):
        raise ValueError(f"step must be > 0 (units of the log likelihood ratio), got {step!r}")
    # Gaussian steps are one Gaussian together, so only the others need the grid.
    mus: list[float] = []
    rest: list[tuple[TradeOff, int]] = []
    for f, count in zip(functions, counts, strict=True):
        if isinstance(f, GaussianTradeOff):
            mus.append(f.mu * float(np.sqrt(count)))
        else:
            rest.append((f, count))
    if mus:
        rest.append((GaussianTradeOff(float(compose_mu(mus))), 1))
    if len(mus) == len(functions):
        return Composition(rest[0][0], 0.0, 0.0)
    functions, counts = [f for f, _ in rest], [count for _, count in rest]

    if step is None:
        spread = sum(c * loss_moments(f).variance for f, c in zip(functions, counts, strict=True))
        step = float(np.sqrt(spread / sum(counts))) / 128.0
        widest = max(high - low for low, high in (f.loss_range(_TAIL) for f in functions))
        # Steps with one finite loss each (a pure δ) have no spread: go by the loss itself.
        step = (
            max(step, widest / 2**20) if step > 0.0 else 1e-3 * (widest if widest > 1e-9 else 1.0)
        )
    grids = [_discretise(f, step) for f in functions]
    low = int(np.floor(_tail_edge(grids, counts, step, upper=False) / step)) - 1
    high = int(np.ceil(_tail_edge(grids, counts, step, upper=True) / step)) + 1
    cells = high - low + 1
    if cells > _MAX_GRID:
        raise ValueError(
            f"the composed loss spans {cells * step:.3g}, {cells} cells of {step:.3g}; pass a step "
            f"of at least {cells * step / _MAX_GRID:.3g} (the stated error grows with it)"
        )
    size = int(next_fast_len(cells, real=True))
    spectra = [np.ones(size // 2 + 1, dtype=np.complex128) for _ in range(2)]
    log_q_finite = 0.0
    for grid, count in zip(grids, counts, strict=True):
        slots = (grid.first + np.arange(grid.p.size)) % size
        for spectrum, mass in zip(spectra, (grid.p, grid.q), strict=True):
            spectrum *= rfft(np.bincount(slots, weights=mass, minlength=size)) ** count
        with np.errstate(divide="ignore"):
            log_q_finite += count * float(np.log1p(-grid.q_plus))
    where = (low + np.arange(cells)) % size
    p_sum, q_sum = (np.maximum(irfft(s, n=size)[where], 0.0) for s in spectra)
    loss = step * (low + np.arange(cells))
    positive = loss >= 0.0
    with np.errstate(over="ignore", under="ignore"):
        p = np.where(positive, q_sum * np.exp(-np.maximum(loss, 0.0)), p_sum)
        q = np.where(positive, q_sum, p_sum * np.exp(np.minimum(loss, 0.0)))
    # Rejecting from the highest loss down: α sums P from the top, β sums Q from the bottom.
    alpha = np.cumsum(p[::-1])
    beta = np.append(np.cumsum(q)[:-1][::-1], 0.0)
    curve = convexify(
        np.append(np.minimum(alpha, 1.0), 0.0),
        np.append(np.minimum(beta, 1.0), np.exp(log_q_finite)),
    )
    # Both cut tails, and the rounding of a transform of this length raised to these powers.
    rounding = 4.0 * np.finfo(np.float64).eps * (sum(counts) + np.log2(size)) + cells * 1e-17
    return Composition(curve, step * sum(counts), 4.0 * _TAIL + float(rounding))
