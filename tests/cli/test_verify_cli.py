"""Records come out equal when they are computed again, and what differs is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from fine_bench.commands.verify import main
from fine_bench.errors import ConfigError
from fine_bench.runner import machine_difference
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.machine_difference import Row
from fine_bench.runner.plan import plan
from fine_bench.runner.recorded import cell_of
from fine_bench.runner.verify import distance, results_of, verify
from fine_bench.store.comparisons import Consistency
from fine_bench.store.environment import environment
from fine_bench.store.files import StoreError
from fine_bench.store.record_json import PENDING, record_from, score_file
from fine_bench.store.records import RecordStore, read_record
from fine_bench.store.scores import scores_digest
from fine_bench.types import InfluenceScores, RunRecord
from support.records import digits_run

ESTIMATORS = {
    "fine": {"_target_": "fine_bench.callback.FINECallback"},
    "tracin": {"_target_": "baselines.tracin.TracIn"},
    "random": {"_target_": "baselines.controls.RandomScores", "seed": None},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of three estimators in one training on 120 digits; its tests only read it."""
    root = tmp_path_factory.mktemp("verify") / "results"
    config = {
        "seed": 3,
        **digits_run(num_threads=1),
        "targets": ["self", "validation"],
        "estimators": ESTIMATORS,
        "results_dir": str(root),
    }
    outcomes = execute(plan(check(OmegaConf.create(config))), "test", say=lambda _: None)
    assert all(o.record.status == "finished" for o in outcomes)
    return root


def path_of(results: Path, name: str) -> Path:
    (path,) = results.rglob(f"{name}--*.json")
    return path


Edit = Callable[[dict[str, Any]], None]


def edited(results: Path, folder: Path, edit: Edit, name: str = "fine--self") -> Path:
    """A changed copy of a record, in a results folder of its own, with the scores beside it.

    Where its identity has changed, its scores lie under the name that follows from it: a record
    that names other scores than its own is not even read (``tests/security/test_store.py``).
    """
    payload = json.loads(path_of(results, name).read_text())
    given = payload["scores_file"]
    edit(payload)
    if payload["scores_file"] == given:
        own = score_file(record_from({**payload, "scores_file": ""}))
        copy = results / "scores" / own
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((results / "scores" / given).read_bytes())
        payload["scores_file"] = own
    path = folder / "records" / "digits_mislabel" / "x" / "copy.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(payload))
    (folder / "scores").symlink_to(results / "scores")
    return path


# -------------------------------------------------------------------------------------- command


@pytest.mark.parametrize("name", ["fine--self", "tracin--validation", "random--self"])
def test_an_untouched_record_is_equal(
    results: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert main([str(path_of(results, name))]) == 0
    text = capsys.readouterr().out
    assert "equal: scores bit for bit" in text
    assert "metrics and facts of training" in text
    # nothing that is stored is touched
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_a_changed_metric_is_named(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(results, tmp_path, lambda p: p["metrics"].update(auroc=0.123))
    assert main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "auroc: 0.123 in the record" in text
    assert "scores:" not in text


def test_another_seed_gives_other_scores_and_their_distance(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(results, tmp_path, lambda p: p.update(seed=4))
    assert main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "scores: " in text
    assert "of 120 values differ, at most by" in text
    assert "Spearman 0." in text
    assert "training: train_loss" in text


def test_other_circumstances_explain_and_do_not_decide(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def edit(payload: dict[str, Any]) -> None:
        payload["environment"] |= {"cpu": "Abacus", "dirty": True}
        payload["metrics"]["agreement/fine/spearman"] = 0.5

    assert main([str(edited(results, tmp_path, edit))]) == 0
    text = capsys.readouterr().out
    assert "made under other circumstances" in text
    assert "cpu: Abacus in the record" in text
    assert "made by code with uncommitted changes" in text
    assert "not compared: agreement/" in text


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda p: p.update(version=9), "method version: 9 in the record, "),
        (lambda p: p.update(data_sha256="0" * 64), "data: '0000"),
        (lambda p: p["config"]["trainer"].update(lr=0.3), "setting: "),
        (lambda p: p["config"]["estimator"].update(observable="loss"), "estimator's configuration"),
    ],
)
def test_another_identity_is_not_computed(
    results: Path, tmp_path: Path, edit: Edit, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(edited(results, tmp_path, edit))]) == 1
    text = capsys.readouterr().out
    assert words in text
    assert "not computed" in text


def test_a_damaged_score_file_is_a_difference(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = edited(results, tmp_path, lambda p: None)
    (tmp_path / "scores").unlink()
    file = tmp_path / "scores" / read_record(path).scores_file
    file.parent.mkdir(parents=True)
    file.write_bytes((results / "scores" / read_record(path).scores_file).read_bytes()[:-4])
    assert main([str(path)]) == 1
    assert "is damaged" in capsys.readouterr().out
    # without any score file the digests decide
    file.unlink()
    assert main([str(path)]) == 0
    assert "digests decide" in capsys.readouterr().out


def test_what_cannot_be_computed_is_refused(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bad(number: int, edit: Edit) -> str:
        assert main([str(edited(results, tmp_path / str(number), edit))]) == 2
        return capsys.readouterr().err

    assert "holds no full configuration" in bad(0, lambda p: p["config"].pop("model"))
    evil = {"_target_": "os.system", "command": "true"}
    assert "add --allow-packages os" in bad(1, lambda p: p["config"].update(estimator=evil))
    assert "only a finished record" in bad(
        2, lambda p: p.update(status="failed", reason="NaN", scores_sha256="", scores_file="")
    )
    assert "unknown is unknown" in bad(3, lambda p: p["config"]["trainer"].update(unknown=1))
    assert main([str(tmp_path / "nowhere.json")]) == 2
    assert "there is no record" in capsys.readouterr().err
    (tmp_path / "half.json").write_text("{")
    assert main([str(tmp_path / "half.json")]) == 2
    assert "is not whole JSON" in capsys.readouterr().err


# ------------------------------------------------------------------------------ another machine


def row_of_seeds(
    results: Path,
    folder: Path,
    *,
    seeds: int = 4,
    moved: float = 0.002,
    noise: float = 0.01,
    agreement: float = 0.6,
    edit: Edit = lambda _: None,
) -> Path:
    """A record of another machine among other seeds: its numbers and scores are not those of here.

    Args:
        results: where the true record is.
        folder: a new results folder.
        seeds: how many there are; they differ by 0.05 from one to the next in every number.
        moved: by how much the record's numbers are moved.
        noise: of its scores, relative to their spread.
        agreement: lowest Spearman between two seeds, as their kept comparison says.
        edit: of the record, before its digests.
    """
    true = read_record(path_of(results, "fine--self"))
    scores = RecordStore(results).load_scores(true)
    store, shas = RecordStore(folder), {}
    for seed in range(3, 3 + seeds):
        mine = seed == 3
        step = moved if mine else 0.05 * (seed - 3)
        draw = torch.Generator().manual_seed(seed)
        spread = (noise if mine else 1.0) * scores.values.std()
        values = scores.values + spread * torch.randn(scores.values.shape, generator=draw)
        own = replace(scores, values=values)
        numbers = ("auroc", "average_precision", "recall_at_rate", "recall_curve_area")
        payload = json.loads(path_of(results, "fine--self").read_text())
        payload |= {"seed": seed, "scores_file": "", "scores_sha256": scores_digest(own)}
        for name in numbers:
            payload["metrics"][name] = abs(payload["metrics"][name] - step)
        payload["training"]["test_loss"] += step
        payload["environment"]["cpu"] = "Abacus"
        if mine:
            edit(payload)
        saved = store.save(record_from(payload), own)
        shas[seed] = saved.scores_sha256
    pairs = {
        pair: {"spearman": agreement + 0.1 * (pair != (3, 4))} for pair in combinations(shas, 2)
    }
    row = (true.task, true.setting, true.estimator, true.target)
    store.save_consistency(Consistency(*row, 24, 1, shas, pairs, {"cv_median": 0.1}))
    (path,) = folder.rglob("fine--self--seed3--*.json")
    return path


def test_another_machine_explains_what_seeds_do_too(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget(payload: dict[str, Any]) -> None:
        del payload["environment"]["blas"]

    path = row_of_seeds(results, tmp_path, edit=forget)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert main([str(path)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "equal within what this difference of machine explains:" in text
    assert "cpu: Abacus in the record" in text
    assert "not in the record: blas" in text
    assert "against the 4 recorded seeds of the row: auroc: 0." in text
    assert "moved by 0.002 (interval over seeds [" in text
    assert "scores: Spearman 0.9" in text
    assert "(two seeds of the row 0.6000 or more)" in text
    assert "not explained" not in text
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moved": 0.4}, "auroc moved farther than seeds do"),
        ({"seeds": 2}, "only 2 recorded seeds of this row are at hand, and 3 are needed"),
        ({"noise": 3.0}, "the scores agree less (Spearman"),
        (
            {"edit": lambda p: p["environment"].update(cpu=environment()["cpu"])},
            "the machine is the same: nothing that moves bits differs",
        ),
        (
            {"edit": lambda p: p["metrics"].update(unheard_of=1.0)},
            "unheard_of is nothing that a machine rounds",
        ),
        (
            {"edit": lambda p: p["training"].update(n_steps=p["training"]["n_steps"] + 40)},
            "training: n_steps is nothing that a machine rounds",
        ),
    ],
)
def test_what_a_machine_does_not_explain_is_different(
    results: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(row_of_seeds(results, tmp_path, **changes))]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "different:" in text
    assert "not explained: " in text
    assert words in text


def test_the_limit_is_what_two_seeds_may_differ_by() -> None:
    """Of pairs of normal seeds one in twenty differs by more, whatever their number."""
    rng = np.random.default_rng(0)
    for n in (3, 10):
        beyond = 0
        for _ in range(1500):
            values = rng.normal(0.8, 0.02, n).tolist()
            row = [
                RunRecord("t", "s", "e", "h", 1, "self", seed, "finished", scores_sha256="x",
                          metrics={"auroc": value})
                for seed, value in enumerate(values)
            ]  # fmt: skip
            then = float(rng.normal(0.8, 0.02))
            change = machine_difference.change("auroc", then, values[0], row, seed=0)
            assert change.limit == machine_difference.two_seeds_differ_by(values)
            limits = abs(rng.normal(0.8, 0.02) - then)  # two seeds that the row does not have
            beyond += bool(limits > change.limit)
        assert 0.035 < beyond / 1500 < 0.065


def test_without_numbers_and_scores_nothing_says_how_large_a_difference_is() -> None:
    record = RunRecord("t", "s", "e", "h", 1, "self", 0, "finished", scores_sha256="x")
    again = replace(record, scores_sha256="y", environment={"cpu": "Abacus"})
    found = machine_difference.explain(record, again, [], [], Row((record,), ()), None)
    assert not found.holds
    assert "unpack the archive of scores" in found.against[0]


# --------------------------------------------------------------------------------------- pieces


def test_a_comparison_of_seeds_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "consistency.json"
    row = {"task": "t", "setting": "s", "estimator": "e", "target": "self"}
    more = {"k": 1, "metric_version": 1, "scores": {}, "pairs": [], "variation": {}}
    path.write_text(json.dumps({"format": 1, "kind": "consistency", **row, **more}))
    with pytest.raises(StoreError, match="is no record"):
        read_record(path)


def test_a_run_that_fails_now_is_a_difference(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr("fine_bench.runner.backends.images.train", fails)
    verdict = verify(read_record(path_of(results, "fine--self")), results)
    assert not verdict.equal
    assert "no memory" in str(verdict.differences[0])


def test_fidelity_to_another_truth_is_not_compared(results: Path) -> None:
    record = read_record(path_of(results, "random--self"))
    metrics = {**record.metrics, "fidelity": 0.9, "truth_version": 2.0}
    verdict = verify(replace(record, metrics=metrics), None)
    assert verdict.equal
    assert any("ground truth then: version 2, now: none" in note for note in verdict.notes)
    assert any("no score file to look at" in note for note in verdict.notes)
    # an undefined number is equal to itself, and one that is gone is a difference
    gone = verify(replace(record, metrics={**record.metrics, "other": math.nan}), None)
    assert [d.name for d in gone.differences] == ["other"]


def test_distance_counts_and_measures() -> None:
    a = InfluenceScores(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), "m", "self")
    b = InfluenceScores(torch.tensor([[0.0, 1.0, 2.0, 3.5]]), "m", "self")
    words = distance(a, b)
    assert "1 of 4 values differ, at most by 0.5" in words
    assert "Spearman 1.000000" in words
    other = InfluenceScores(torch.zeros(1, 3), "m", "self")
    assert "shape (1, 4) in the record, (1, 3) now" in distance(a, other)


def test_where_a_record_lies(tmp_path: Path) -> None:
    assert results_of(tmp_path / "r/records/t/s/a.json") == (tmp_path / "r").resolve()
    assert results_of(tmp_path / "a.json") is None


def test_job_needs_allowed_packages(tmp_path: Path) -> None:
    task = {"_target_": "mine.task"}
    record = RunRecord(
        "t", "s", "e", "h", 1, "self", 0, "finished", scores_sha256=PENDING,
        config={"task": task, "model": {}, "trainer": {}, "estimator": {}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--allow-packages mine"):
        cell_of(record, tmp_path)
    assert RecordStore(tmp_path).scan().records == []


def test_a_record_cannot_call_what_modules_of_ours_import(tmp_path: Path) -> None:
    """``fine_bench.store.files.os.system`` begins with an allowed package and is not ours."""
    touched = tmp_path / "touched"
    evil = {"_target_": "fine_bench.store.files.os.system", "command": f"touch {touched}"}
    fine = {"_target_": "fine_bench.models.networks.mlp", "hidden": [4]}
    method = {"_target_": "baselines.tracin.TracIn"}
    task = {"_target_": "fine_bench.data.digits.digits_mislabel", "seed": 0}
    for section in ("task", "model", "estimator"):
        config = {"task": task, "model": fine, "estimator": method, "trainer": {}}
        record = RunRecord(
            "t", "s", "e", "h", 1, "self", 0, "failed", "why", config={**config, section: evil}
        )
        with pytest.raises(ConfigError, match="comes from posix"):
            cell_of(record, tmp_path)
    assert not touched.exists()
