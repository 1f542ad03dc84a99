"""Options that cannot be: messages, not tracebacks; one method's concern its own cells alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fine_bench.commands import bank, run
from fine_bench.errors import ConfigError
from fine_bench.runner.config import check, refuse_empty_groups
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import plan
from support.records import digits_run

FINE = {"_target_": "fine_bench.callback.FINECallback"}
TRACIN = {"_target_": "baselines.tracin.TracIn"}


def config(results: Path, **more: Any) -> Any:
    return OmegaConf.create(
        {
            "seed": 0,
            **digits_run(num_threads=1),
            "targets": ["self"],
            "results_dir": str(results),
            **more,
        }
    )


@pytest.mark.parametrize("layers", [["nope"], ["net.0"], ["net.1", "nope"]])
def test_a_wrong_option_fails_its_own_cells(tmp_path: Path, layers: list[str]) -> None:
    estimators = {
        "wrong": {**FINE, "layers": layers},
        "wrong_tracin": {**TRACIN, "layers": layers},
        "fine": FINE,
        "tracin": TRACIN,
    }
    ended = execute(
        plan(check(config(tmp_path, estimators=estimators))), "test", say=lambda _: None
    )
    records = {one.record.estimator: one.record for one in ended}
    for name in ("wrong", "wrong_tracin"):
        assert records[name].status in ("failed", "skipped")
        assert "training failed" not in records[name].reason
        assert layers[-1] in records[name].reason
    alone = execute(
        plan(check(config(tmp_path / "alone", estimators={"fine": FINE, "tracin": TRACIN}))),
        "test", say=lambda _: None,
    )  # fmt: skip
    for one in alone:  # bit for bit as without the wrong ones
        assert records[one.record.estimator].scores_sha256 == one.record.scores_sha256


def test_a_training_that_fails_by_itself_fails_all_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("fine_bench.runner.backends.images.train", fails)
    job = plan(check(config(tmp_path, estimators={"fine": FINE, "tracin": TRACIN})))
    ended = execute(job, "test", say=lambda _: None)
    assert {one.record.reason for one in ended} == {"training failed: RuntimeError: no memory"}


@pytest.mark.parametrize("number", [257, 100_000, 2**40])
def test_threads_that_no_machine_has(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    given = config(tmp_path, estimators={"fine": FINE})
    given.trainer.num_threads = number
    with pytest.raises(ConfigError, match=r"type trainer\.num_threads=null"):
        check(given)


GROUPS = ("task", "model", "trainer", "logger", "estimator", "sensitivity", "+experiment")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("value", ["null", "", "~"])
def test_nothing_where_a_group_belongs(
    group: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argument = f"{group}={value}"
    with pytest.raises(ConfigError, match=r"chooses nothing; type \w+=\w+, or another of"):
        refuse_empty_groups(["seed=0", argument])
    for command in (run.main, bank.main):
        with pytest.raises(SystemExit) as ended:
            command([argument])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "chooses nothing" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_no_section_where_one_belongs(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"estimators\.fine=.* is no section"):
        check(config(tmp_path, estimators={"fine": value}))
    for name in ("task", "model", "trainer", "logger", "estimators", "sensitivity"):
        with pytest.raises(ConfigError):
            check(config(tmp_path, **{"estimators": {"fine": FINE}, name: value or [0]}))


@pytest.mark.parametrize("name", [None, 3, "", ["x"]])
@pytest.mark.parametrize("section", ["task", "model"])
def test_a_name_that_is_none(tmp_path: Path, name: Any, section: str) -> None:
    given = config(tmp_path, estimators={"fine": FINE})
    given[section].name = name
    with pytest.raises(ConfigError, match=rf"{section}\.name"):
        check(given)
