"""Numbers that cannot be: a share above one, a correlation of seven, half an example.

What can be checked without computing anything again is checked whenever a record or a comparison is
read. NaN stands for a number that is not defined and is always allowed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_SLACK = 1e-9
"""Rounding of sums that are 1 on paper."""

_RANGES = (
    (
        re.compile(
            r"(.*/)?(auroc|average_precision|recall_at_rate|recall_curve_area|jaccard|p_value)"
            r"|reviewed_(auroc|average_precision)"
            r"|precision_at_\d+|recall_top_\d+|jaccard_top_\d+"
            r"|(stable|majority)_(recall|precision)(_top_\d+)?|agreeing_precision"
        ),
        (0.0, 1.0),
    ),
    (
        re.compile(
            r"(.*/)?(spearman|kendall|pearson)|fidelity(_clean|_out_of_sample)?|lds|outcome_spread"
        ),
        (-1.0, 1.0),
    ),
    (re.compile(r"jaccard_corrected"), (-math.inf, 1.0)),
    (re.compile(r"cv_median|lds_error"), (0.0, math.inf)),
)
_COUNTS = ("n_bad", "n_watched", "n_known", "n_reviewed")
N_TRAIN = "n_train"
"""Among the facts about the training in a record: how many examples its scores are of."""
FILES = "files"
"""Among the same facts, of data from the user's own files: option → ``sha256`` and ``samples``."""
CLOCK = "clock"
"""Among the same facts, where costs are not in wall time: the clock that measured them, or both,
with a space between, where the training was measured by the other one."""
_SIZED = "fine_bench.data."
"""Tasks below it have as many examples as their option ``n_train`` says, where it says a number."""


@lru_cache(maxsize=4096)
def _range(name: str) -> tuple[float, float] | None:
    """What a number of this name may be; None for names that are not ours."""
    return next((span for pattern, span in _RANGES if pattern.fullmatch(name)), None)


def check_numbers(numbers: Mapping[str, float]) -> None:
    """Refuse numbers outside of what their names allow; names that are not ours allow anything.

    Raises:
        ValueError: names the first one, its value and its range.
    """
    for name, value in numbers.items():
        if math.isnan(value):
            continue
        low, high = _range(name) or (-math.inf, math.inf)
        if not low - _SLACK <= value <= high + _SLACK:
            span = f"between {low:g} and {high:g}" if low > -math.inf else f"at most {high:g}"
            span = span if high < math.inf else f"at least {low:g}"
            raise ValueError(f"says {name} = {value:g}, which is {span} by its definition")
        if name in _COUNTS and not (value >= 0 and value.is_integer()):
            raise ValueError(f"says {name} = {value:g}, which counts examples")


def check_size(training: Mapping[str, Any], config: Mapping[str, Any], n: int) -> None:
    """Hold a number of scored examples against what a record says of its task.

    Args:
        training: facts about the training; records of before they held the size have none.
        config: full configuration; only our own tasks promise what ``task.n_train`` means.
        n: columns of the scores.

    Raises:
        ValueError: the numbers differ.
    """
    task = config.get("task", {})
    own = str(task.get("_target_", "")).startswith(_SIZED)
    for size in (training.get(N_TRAIN), task.get(N_TRAIN) if own else None):
        if isinstance(size, int) and not isinstance(size, bool) and size != n:
            raise ValueError(f"scores {n:,} examples, its record's task has {size:,}")
