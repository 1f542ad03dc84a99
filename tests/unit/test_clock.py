"""The clock of costs: what it counts, and what a record says of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fine_bench import clock
from fine_bench.store.records import RecordStore
from support.commands import SMALL, Commands


def test_sleep_takes_wall_time_and_no_cpu_time() -> None:
    took = {}
    for name in clock.CLOCKS:
        with clock.measured_by(name):
            start = clock.now()
            time.sleep(0.3)
            took[name] = clock.now() - start
    assert took[clock.WALL] >= 0.3
    assert took[clock.CPU] < 0.15


def test_the_clock_before_is_back_even_after_an_error() -> None:
    with pytest.raises(RuntimeError), clock.measured_by(clock.CPU):
        raise RuntimeError
    assert abs(clock.now() - time.perf_counter()) < 1.0


def test_records_say_the_clock_of_their_costs(cli: Commands, tmp_path: Path) -> None:
    said = {}
    for name in clock.CLOCKS:
        folder = tmp_path / name
        chosen = ("estimator=[fine,tracin]", "targets=[self]", "seed=0", f"clock={name}")
        done = cli.run("fine_bench", f"results_dir={folder}", *SMALL, *chosen)
        assert done.returncode == 0, done.stdout + done.stderr
        said[name] = RecordStore(folder).scan().records
    assert [len(records) for records in said.values()] == [2, 2]
    for wall, cpu in zip(*said.values(), strict=True):
        assert "clock" not in wall.training
        assert cpu.training["clock"] == "cpu"
        assert cpu.cost["seconds"] > 0
        # the same run by every other measure
        assert wall.scores_sha256 == cpu.scores_sha256
        assert (wall.setting, wall.config) == (cpu.setting, cpu.config)


def test_checkpoints_measured_by_another_clock_are_told(cli: Commands, tmp_path: Path) -> None:
    chosen = (f"results_dir={tmp_path}", *SMALL, "targets=[self]", "seed=0")
    for more in (("estimator=tracin", "clock=cpu"), ("estimator=trak",)):
        done = cli.run("fine_bench", *chosen, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    clocks = {r.estimator: r.training.get("clock") for r in RecordStore(tmp_path).scan().records}
    # trained under one clock, read by a method under the other
    assert clocks == {"tracin": "cpu", "trak": "cpu wall"}
