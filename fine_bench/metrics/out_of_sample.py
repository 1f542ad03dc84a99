"""Fidelity of loss-like scores: does one run say how badly the other data predict an example?

A score that looks at an example alone (a loss, a margin) does not estimate its influence μ, and
need not agree with it. What it estimates, with a bias, is how the example fares in a model that
never saw it. Retraining knows this too: the out-of-sample margin o_i, the mean of log(p/(1 − p))
over the models of the bank whose subset lacks i. So each kind of score has a truth of its own, and

    fidelity_out_of_sample = Spearman(score, −o)

stands beside ``metrics.fidelity``: high where a *high* score marks examples that the rest of the
data predicts badly. Its ceiling is that of o, the square root of the correlation of the two halves
of the bank, which use no model in common.
"""

from __future__ import annotations

import numpy as np

from fine_bench.metrics._arrays import ArrayLike, as_vector
from fine_bench.metrics.fidelity import FIDELITY, VERSION
from fine_bench.metrics.registry import Metric
from fine_bench.metrics.reliability import LEAST_FOR_CORRELATION, spearman

METRICS = (
    Metric("fidelity_out_of_sample", "out-of-sample fid.", "higher", table=FIDELITY, beside=VERSION,
           title="Spearman with minus the out-of-sample margin of retraining", rank=23,
           note="Out-of-sample fidelity: Spearman with minus the mean margin of the retrained "
           "models that never saw the example, the truth of loss-like scores."),
    Metric("fidelity_out_of_sample_of_ceiling", "of its ceiling", "higher", table=FIDELITY,
           beside="fidelity_out_of_sample", rank=24),
)  # fmt: skip
"""Computed by the ground truth (``retraining.truth``), which is read only where there is one."""


def out_of_sample_fidelity(
    scores: ArrayLike, margin: ArrayLike, ceiling: float
) -> dict[str, float]:
    """Agreement of scores with minus the out-of-sample margin, by name.

    Args:
        scores: ``(n,)``, high where an example stands out.
        margin: ``(n,)``, mean margin of the models that never saw it.
        ceiling: highest correlation that can be expected, in (0, 1]; NaN where it is not known.

    Returns:
        ``fidelity_out_of_sample`` and the same divided by the ceiling; NaN for constant scores.

    Raises:
        ValueError: different lengths, fewer than ten examples, values that are not finite, or a
            ceiling outside (0, 1].
    """
    x, y = as_vector(scores, "scores"), as_vector(margin, "margin")
    if x.shape != y.shape:
        raise ValueError(
            f"scores has {len(x)} examples, margin {len(y)}; they must be those of one task, in "
            "its order"
        )
    if len(x) < LEAST_FOR_CORRELATION:
        raise ValueError(
            f"fidelity needs at least {LEAST_FOR_CORRELATION} examples, got {len(x)}; score more"
        )
    if ceiling <= 0.0 or ceiling > 1.0:
        raise ValueError(f"ceiling must lie in (0, 1] or be NaN when unknown, got {ceiling}")
    value = spearman(x, -y)
    return {
        "fidelity_out_of_sample": value,
        "fidelity_out_of_sample_of_ceiling": float(np.divide(value, ceiling)),
    }
