"""What a run says of groups in the terminal."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

from fine_bench.runner.progress import describe, describe_groups


def lines(**parts: float) -> list[str]:
    metrics: dict[str, Any] = {f"group/flips/{name}": value for name, value in parts.items()}
    return describe_groups(cast(Any, SimpleNamespace(metrics=metrics)))


def test_what_a_run_cannot_tell_is_said_to_be_unknown() -> None:
    known = lines(mu=0.5, lower=0.25, upper=0.75, p_value=0.012, size=30)
    assert known == ["  flips (30): μ +0.50 [+0.25, +0.75], p = 0.012"]
    nothing = lines(mu=math.nan, lower=-math.inf, upper=math.inf, p_value=math.nan, size=3)
    assert nothing == ["  flips (3): μ unknown: too few samples with and without it in this run"]
    wide = lines(mu=0.5, lower=-math.inf, upper=math.inf, p_value=math.nan, size=3)
    assert wide == ["  flips (3): μ +0.50, interval unknown"]


def test_what_ranks_nothing_is_undefined() -> None:
    record = SimpleNamespace(
        estimator="constant", target="self", status="finished", cost={"seconds": 0.5},
        metrics={"auroc": 0.5, "fidelity": math.nan},
    )  # fmt: skip
    said = describe(cast(Any, record)).split()
    assert said == ["constant", "self", "AUROC", "0.500", "fidelity", "undefined", "0.5", "s"]
