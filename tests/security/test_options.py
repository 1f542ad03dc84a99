"""Options that cannot be: messages, not tracebacks; one method's concern its own cells alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fine_bench.callback import FINECallback, PaperFINECallback
from fine_bench.commands import bank, run
from fine_bench.errors import ConfigError
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import refuse_empty_groups
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


PAPER = {
    "_target_": "fine_bench.callback.paper.PaperFINECallback",
    "sample": 12,
    "every_n_steps": 4,
    "seed": 0,
}
FAILS = 13
"""Examples that the wrong method watches, by which it is told from the others."""


def digests(folder: Path, **more: Any) -> dict[str, tuple[str, str, str]]:
    """Status, reason and digest of the scores of four rows and of those that join them."""
    alone = {**PAPER, "sample": 11, "auxiliary": None}
    rows = {"alone": alone, "paper": PAPER, "fine": FINE, "tracin": TRACIN}
    job = plan(check(config(folder, estimators={**more, **rows})))
    found = [one.record for one in execute(job, "test", say=lambda _: None)]
    return {r.estimator: (r.status, r.reason, r.scores_sha256) for r in found}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    """What the four rows come to when nothing is wrong."""
    found = digests(tmp_path_factory.mktemp("without"))
    assert {status for status, *_ in found.values()} == {"finished"}
    return found


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Lets a function of the paper's estimator raise at its n-th call by the wrong method."""

    def at(name: str, call: int) -> None:
        own, calls = getattr(PaperFINECallback, name), []

        def raises(self: Any, *given: Any) -> Any:
            if self.options.sample == FAILS:
                calls.append(name)
                if len(calls) >= call:
                    raise ValueError(f"{name} went wrong")
            return own(self, *given)

        monkeypatch.setattr(PaperFINECallback, name, raises)

    return at


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("check", 3),  # the plan asks first, then the training; the third is for the second run
        ("on_train_start", 2),
        ("on_train_batch_end", 15 + 3),  # the second run trains: 15 steps of the first are over
        ("auxiliary", 1),
        ("subtract", 1),
    ],
)
def test_what_fails_one_method_s_second_run_fails_its_own_cell(
    tmp_path: Path,
    without: dict[str, tuple[str, str, str]],
    fails: Callable[[str, int], None],
    name: str,
    call: int,
) -> None:
    fails(name, call)
    got = digests(tmp_path, wrong={**PAPER, "sample": FAILS})
    status, reason, _ = got.pop("wrong")
    assert (status, f"{name} went wrong" in reason) == ("failed", True)
    assert got == without


def test_a_method_that_fails_is_compared_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: Any) -> Any:
        raise ValueError("no scores")

    monkeypatch.setattr(FINECallback, "scores", raises)
    job = plan(check(config(tmp_path, estimators={"fine": FINE, "paper": PAPER})))
    records = {r.estimator: r for r in (o.record for o in execute(job, "t", say=lambda _: None))}
    assert records["fine"].reason == "ValueError: no scores"
    assert records["paper"].status == "finished"
    assert not any(key.startswith("agreement/") for key in records["paper"].metrics)


def test_methods_that_keep_their_state_under_one_name_are_trained_apart(tmp_path: Path) -> None:
    rows = {"paper": PAPER, "alone": {**PAPER, "auxiliary": None}, "tracin": TRACIN}
    words = {0: "same name as paper, which watches this training; type the same command again"}
    for again in (0, 1):
        job = plan(check(config(tmp_path, estimators=rows)))
        records = {
            one.record.estimator: one.record for one in execute(job, "t", say=lambda _: None)
        }
        later = records.pop("alone")
        assert {record.status for record in records.values()} <= {"finished"}
        assert words.get(again, "") in later.reason
    assert later.status == "finished"


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
