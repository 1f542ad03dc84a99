"""The LDS's interval over queries: how far would other queries move it?

The intervals of the tables resample run seeds. The queries are a sample, too, and the LDS is a mean
over them, so that its bootstrap over queries is that of a mean. Declared apart from the LDS: the
numbers of one declaration come together in a record, and records of before have none of this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from fine_bench.metrics._arrays import as_array
from fine_bench.metrics.fidelity import FIDELITY, VERSION
from fine_bench.metrics.registry import Metric
from fine_bench.seeds import derive

METRICS = (
    Metric("lds_error", "LDS ± over queries", "", table=FIDELITY, beside=VERSION, rank=27,
           title="LDS: half of its 95 % interval over the queries",
           note="LDS ± over queries: half of one run's 95 % bootstrap interval over the queries, "
                "how far other queries would move it; brackets say how far other runs would."),
)  # fmt: skip
"""Computed by the ground truth (``retraining.truth``)."""

RESAMPLES = 2000


def interval_over_queries(per_query: NDArray[Any], level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean over the queries.

    Args:
        per_query: ``(q,)``, at least two.
        level: of the interval, in (0, 1).

    Raises:
        ValueError: fewer than two queries, or values that are not finite.
    """
    values = as_array(per_query, "per_query")
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"an interval over queries needs at least two of them, got shape {values.shape}"
        )
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(derive(0, "metrics/lds queries")),
    ).confidence_interval
    return float(found.low), float(found.high)
