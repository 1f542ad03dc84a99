"""Fidelity: does one run's score say what retraining shows?

The score of every example is compared with its μ from a retraining bank (``metrics.retraining``).
Agreement of the order is Spearman's correlation, read beside the noise ceiling of that truth.
Within the clean examples alone it is a harder question: telling flipped labels from clean ones
already orders a good part of the whole. Whether the score is also a *number*, proportional to μ,
is its calibration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.metrics._arrays import ArrayLike, Vector, as_vector
from fine_bench.metrics.registry import Metric
from fine_bench.metrics.reliability import LEAST_FOR_CORRELATION, spearman

FIDELITY = "fidelity to retraining"
VERSION = "truth_version"
"""Which ground truth a record was compared with; without it there was none."""
_AXIS = "fidelity: Spearman with the μ of retraining"
METRICS = (
    Metric("fidelity", "fidelity", "higher", table=FIDELITY, beside=VERSION, title=_AXIS, rank=20),
    Metric("fidelity_of_ceiling", "fid. of ceiling", "higher", table=FIDELITY, beside=VERSION,
           rank=21),
    Metric("fidelity_clean", "fid. within clean", "higher", table=FIDELITY, beside=VERSION,
           title=_AXIS, rank=22),
    Metric("fidelity_clean_of_ceiling", "fid. within clean, of ceiling", "higher", table=""),
    Metric("fidelity_slope", "true μ in one predicted unit", table=""),
    Metric("fidelity_log_linearity_error", "distance from proportional", "lower", table=""),
    Metric(VERSION, "version of the ground truth", digits=0, table=""),
)  # fmt: skip
"""Computed by the ground truth (``retraining.truth``), which is read only where there is one."""

N_BINS = 10


@dataclass(frozen=True, eq=False)
class Calibration:
    """Predicted against true μ.

    Attributes:
        predicted, true: ``(bins,)`` means over the bins of examples with rising prediction.
        slope: Σ xy / Σ x² over the examples, x the prediction and y the truth: true units in one
            predicted unit. 1 is calibrated. Noise of the truth does not bias it.
        log_linearity_error: how far the bins are from *any* single factor. With c the
            least-squares factor of the bins, c = Σ p t / Σ p² over the bins' means p and t, it is
            sqrt(mean (t − c p)²) / sqrt(mean t²): 0 is proportional (on a logarithmic scale
            a constant distance), 1 no better than predicting 0.
    """

    predicted: Vector
    true: Vector
    slope: float
    log_linearity_error: float


def calibration(scores: ArrayLike, truth: ArrayLike, n_bins: int = N_BINS) -> Calibration:
    """Calibration by bins of equal size (deciles), made by the prediction.

    Args:
        scores, truth: ``(n,)``, finite.
        n_bins: number of bins, 2 … n.

    Raises:
        ValueError: different lengths, values that are not finite, or n_bins out of range.
    """
    x, y = _pair(scores, truth)
    if not 2 <= n_bins <= len(x):
        raise ValueError(f"n_bins must be from 2 to the number of examples, {len(x)}; got {n_bins}")
    bins = np.array_split(np.argsort(x, kind="stable"), n_bins)
    predicted = np.array([x[rows].mean() for rows in bins])
    true = np.array([y[rows].mean() for rows in bins])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = float(np.divide(x @ y, x @ x))
        factor = np.divide(predicted @ true, predicted @ predicted)
        error = np.sqrt(np.mean((true - factor * predicted) ** 2) / np.mean(true**2))
    return Calibration(predicted, true, slope, float(error))


def fidelity(
    scores: ArrayLike,
    truth: ArrayLike,
    ceiling: float,
    clean: Tensor | NDArray[Any] | None = None,
    ceiling_clean: float = float("nan"),
) -> dict[str, float]:
    """Agreement of scores with the μ of retraining, by name.

    - ``fidelity``: Spearman's correlation over all examples.
    - ``fidelity_of_ceiling``: the same divided by ``ceiling``.
    - ``fidelity_clean``, ``fidelity_clean_of_ceiling``: within the clean examples, with their own
      ceiling; only when ``clean`` is given.
    - ``fidelity_slope``, ``fidelity_log_linearity_error``: see ``Calibration``.

    All are NaN for constant scores, which order nothing; the ones within the clean examples also
    where fewer than ten are clean.

    Args:
        scores, truth: ``(n,)``, finite.
        ceiling: highest correlation that can be expected (``metrics.reliability``), in (0, 1];
            NaN where it is not known.
        clean: ``(n,)`` boolean, the examples not known to be bad.
        ceiling_clean: the ceiling within them.

    Raises:
        ValueError: different lengths, fewer than ten examples, values that are not finite, or a
            ceiling outside (0, 1].
    """
    x, y = _pair(scores, truth)
    if len(x) < LEAST_FOR_CORRELATION:
        raise ValueError(
            f"fidelity needs at least {LEAST_FOR_CORRELATION} examples, got {len(x)}; score more"
        )
    for name, value in (("ceiling", ceiling), ("ceiling_clean", ceiling_clean)):
        if value <= 0.0 or value > 1.0:
            raise ValueError(f"{name} must lie in (0, 1] or be NaN when unknown, got {value}")
    constant = np.ptp(x) == 0
    bins = None if constant else calibration(x, y, min(N_BINS, len(x)))
    whole = spearman(x, y)
    result = {"fidelity": whole, "fidelity_of_ceiling": whole / ceiling}
    if clean is not None:
        mask = np.asarray(clean.cpu().numpy() if isinstance(clean, Tensor) else clean)
        if mask.dtype != np.bool_ or mask.shape != x.shape:
            raise ValueError(
                f"clean must be boolean of shape {x.shape}, got {mask.dtype} of shape {mask.shape}"
            )
        few = np.count_nonzero(mask) < LEAST_FOR_CORRELATION
        within = float("nan") if few else spearman(x[mask], y[mask])
        result |= {"fidelity_clean": within, "fidelity_clean_of_ceiling": within / ceiling_clean}
    undefined = float("nan")
    result["fidelity_slope"] = bins.slope if bins else undefined
    result["fidelity_log_linearity_error"] = bins.log_linearity_error if bins else undefined
    return result


def _pair(scores: ArrayLike, truth: ArrayLike) -> tuple[Vector, Vector]:
    x, y = as_vector(scores, "scores"), as_vector(truth, "truth")
    if x.shape != y.shape:
        raise ValueError(
            f"scores has {len(x)} examples, truth {len(y)}; they must be those of one task, in its "
            "order"
        )
    return x, y
