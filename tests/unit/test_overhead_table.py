"""The script that measures what watching costs: two parts of it, and nothing left patched."""

from __future__ import annotations

from types import ModuleType

import pandas as pd
import pytest
from torch import nn

from fine_bench.callback import FINECallback
from fine_bench.fine.statistic import Statistic
from support.benchmarks import BENCHMARKS, loaded


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("callback_overhead")


@pytest.mark.parametrize("options", [{}, {"sketch": 2}, {"reference_columns": 3}])
def test_arithmetic_is_timed_within_the_watched_run(
    script: ModuleType, options: dict[str, int]
) -> None:
    before = vars(Statistic)["of_steps"]
    load = script.Workload(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10)),
        (6,),
        8,
        4,
    )
    ticks = iter(range(10**6))
    pairs = script.measure(
        load, 4, 2, lambda: FINECallback("self", **options), "cpu", lambda: float(next(ticks))
    )
    assert vars(Statistic)["of_steps"] is before
    for pair in pairs:  # a clock that counts its readings: one call, one tick
        assert pair["plain"] == 1
        assert pair["watched"] == 1 + 2 * pair["arithmetic"]
        assert pair["arithmetic"] >= 2


def test_the_parts_add_up_to_the_ratio(script: ModuleType) -> None:
    pairs = pd.DataFrame({"plain": [2.0, 4.0], "watched": [3.0, 6.0], "arithmetic": [0.4, 0.8]})
    found = script.summary(pairs)
    assert found["ratio"] == pytest.approx(1.5)
    assert found["arithmetic"] == pytest.approx(0.2)
    assert found["overhead"] == pytest.approx(0.3)
    frame = pairs.assign(model="mlp", setting="self", steps=10)
    assert "| mlp | self | 1.50 (1.50 to 1.50) | 0.20 | 0.30 | 2 | 300.00 |" in script.markdown(
        frame, "command", "about"
    )
