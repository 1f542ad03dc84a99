"""The short form of ``benchmarks/kill_and_resume.py``, and what that script notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from support.commands import SMALL, Commands

TINY = (*SMALL, "estimator=[fine,random]", "seed=0,1", "logger.mode=disabled")


@pytest.mark.slow
def test_two_kills(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--kills", "2", "--seed", "3", *TINY]) == 0, capsys.readouterr().out
    assert "2 of 2 kills ended as if nothing had happened" in capsys.readouterr().out


def test_the_script_notices_what_it_looks_for(
    cli: Commands, script: ModuleType, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    assert cli(good, *TINY).returncode == 0
    shutil.copytree(good, bad)
    before = script.state(bad)
    assert len(before) == 16  # records and scores of 2 estimators, 2 targets, 2 seeds
    assert script.differences(bad, good, before) == []

    found = sorted((bad / "records").rglob("random--self--seed0--*.json"))
    content = json.loads(found[0].read_text())
    content["metrics"]["auroc"] += 1e-12
    found[0].write_text(json.dumps(content))
    lost = sorted((bad / "records").rglob("fine--self--seed1--*.json"))
    lost[0].unlink()
    table = bad / "leaderboard.csv"
    table.write_text(table.read_text().replace("random", "chance"))
    (bad / "checkpoints" / "x.tmp-1").mkdir()
    problems = "\n".join(script.differences(bad, good, before))
    for part in (
        "record missing: fine/self seed 1",
        "record differs: random/self seed 0",
        "leaderboard.csv differs",
        "computed again: records/",
        "left over: checkpoints/x.tmp-1",
    ):
        assert part in problems
