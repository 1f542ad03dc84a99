"""The main command from start to leaderboard."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from fine_bench.commands import leaderboard, publish
from fine_bench.leaderboard.build import build
from fine_bench.store.records import RecordStore, newest
from fine_bench.types import SUSPICIOUS_END
from support.commands import Commands, small
from support.wandb_files import read_runs

FEW = "estimator=[fine,tracin,mean_loss,random,constant]"


@pytest.fixture(scope="module")
def finished(cli: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """As typed: Python starts afresh."""
    folder = tmp_path_factory.mktemp("main") / "results"
    return folder, cli.typed("fine_bench", *small(folder), FEW, "seed=0,1")


def score_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted((folder / "scores").rglob("*.safetensors"))
    }


def test_a_sweep_ends_in_a_leaderboard(finished: tuple[Path, Any]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert "120 training examples, 24 bad (20%, flipped label)" in done.stderr
    assert "20 of 20 cells" in done.stderr
    records = RecordStore(folder).scan().records
    assert {r.seed for r in records} == {0, 1}
    assert sum(r.status == "finished" for r in records) == 18
    skipped = [r for r in records if r.status == "skipped"]
    assert {(r.estimator, r.target) for r in skipped} == {("mean_loss", "validation")}
    for text in (done.stdout, (folder / "leaderboard.md").read_text()):
        assert "fine" in text
        assert "no notion of a query" in " ".join(text.split())
    table = pd.read_csv(folder / "leaderboard.csv").set_index(["estimator", "target", "metric"])
    assert ("tracin", "validation", "auroc") in table.index
    assert table.loc[("fine", "self", "auroc"), "mean"] > 0.55  # two epochs on 120 images
    assert table.loc[("constant", "self", "auroc"), "mean"] == 0.5


def test_the_printed_table_fits_a_terminal(finished: tuple[Path, Any]) -> None:
    assert max(len(line) for line in finished[1].stdout.splitlines()) <= 100


def test_all_seeds_share_one_corrupted_data_set(finished: tuple[Path, Any]) -> None:
    assert len({r.data_sha256 for r in RecordStore(finished[0]).scan().records}) == 1


def test_a_record_says_how_it_was_made(finished: tuple[Path, Any]) -> None:
    record = next(r for r in RecordStore(finished[0]).scan().records if r.estimator == "fine")
    assert record.config["task"]["n_train"] == 120
    assert record.config["estimator"]["observable"] == "margin"
    assert record.config["estimator"]["query_weighting"] == "noise"
    assert {"commit", "torch", "cpu", "python"} <= set(record.environment)
    assert {"test_accuracy", "seconds", "n_steps"} <= set(record.training)
    assert record.cost["seconds"] > 0
    assert str(finished[0]) not in json.dumps(dict(record.config))


def test_finished_records_are_not_recomputed(cli: Commands, finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    # -m between the overrides, as the README has it
    again = cli(folder, FEW, "logger.mode=disabled", "-m", "seed=0,1")
    assert again.returncode == 0, again.stderr
    assert "0 of 20 cells (20 finished earlier)" in again.stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


def test_the_leaderboard_is_rebuilt_from_the_records_alone(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, _ = finished
    shutil.copytree(folder / "records", tmp_path / "records")
    assert leaderboard.main(["--results", str(tmp_path)]) == 0
    for name in ("leaderboard.md", "leaderboard.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_published_cells_are_not_recomputed_and_published_files_not_touched(
    cli: Commands, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    """As in a fresh clone, which has neither records of its own nor scores."""
    shutil.copytree(finished[0] / "records", tmp_path / "records")
    for path in (tmp_path / "records").rglob("*.json"):  # a checkout under work is no obstacle here
        path.write_text(path.read_text().replace('"dirty": true', '"dirty": false'))
    assert publish.main(["--results", str(tmp_path)]) == 0
    shutil.rmtree(tmp_path / "records")
    before = {p: p.read_bytes() for p in (tmp_path / "published").iterdir()}
    again = cli(tmp_path, FEW, "logger.mode=disabled", "-m", "seed=0,1")
    assert again.returncode == 0, again.stderr
    assert "0 of 20 cells (20 finished earlier)" in again.stderr
    assert "read: 20 published records, 0 of your own" in again.stdout + again.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "published").iterdir()}
    assert not list(tmp_path.rglob("*.json"))
    assert (tmp_path / "leaderboard.md").read_bytes() == before[
        tmp_path / "published" / "leaderboard.md"
    ]


def test_a_task_may_declare_its_own_suspicious_end(cli: Commands, tmp_path: Path) -> None:
    done = cli(
        tmp_path,
        "task=digits_backdoor",
        "task.poison_rate=0.05",
        "estimator=[tracin]",
        "targets=[self,validation]",
        "seed=0,1",
        "logger.mode=disabled",
        "-m",
    )
    assert done.returncode == 0, done.stderr
    store = RecordStore(tmp_path)
    records = {r.target: r for r in store.scan().records if r.seed == 0}
    # the queries carry the attacker's label, so what helps them is suspicious
    assert records["validation"].suspicious == "high" != SUSPICIOUS_END["validation"]
    assert records["self"].suspicious == ""
    for record in records.values():
        scores = store.load_scores(record)
        bad = scores.extras["truth/is_bad"].numpy()
        auroc = roc_auc_score(bad, scores.values[0].double().numpy())
        assert record.metrics["auroc"] == pytest.approx(auroc, abs=1e-9)
    # and the sets that are compared between seeds are those of the same end
    (table,) = build(store).tables
    rows = {row.target: row for row in table.rows}
    tops = [
        set(np.argsort(-store.load_scores(r).values[0].numpy())[: rows["validation"].k])
        for r in store.scan().records
        if r.target == "validation"
    ]
    jaccard = len(tops[0] & tops[1]) / len(tops[0] | tops[1])
    assert rows["validation"].stats["consistency_jaccard"].mean == pytest.approx(jaccard)


def test_some_checkpoints_are_kept(cli: Commands, tmp_path: Path) -> None:
    some = ("trainer.max_epochs=5", "trainer.checkpoint_every=3", "logger.mode=disabled", "seed=0")
    done = cli(tmp_path, "estimator=[mean_loss]", "targets=[self]", *some)
    assert done.returncode == 0, done.stderr
    kept = sorted(path.stem for path in (tmp_path / "checkpoints").rglob("*.ckpt"))
    assert kept == ["epoch=0001", "epoch=0004"]  # counted from 0: the second and the last
    again = cli(tmp_path, "estimator=[mean_loss,tracin]", "targets=[self]", *some)
    assert again.returncode == 0, again.stderr
    assert "not trained again" in again.stderr


def test_the_same_command_gives_identical_scores(
    cli: Commands, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    done = cli(tmp_path, FEW, "seed=0,1", "logger.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert score_files(tmp_path) == score_files(finished[0])
    forced = cli(tmp_path, "estimator=[random]", "seed=0", "force=true", "logger.mode=disabled")
    assert forced.returncode == 0, forced.stderr
    store = RecordStore(tmp_path)
    revisions = [
        r.revision for r in store.scan().records if r.estimator == "random" and r.seed == 0
    ]
    assert sorted(revisions) == [1, 1, 2, 2]  # two targets; the first revisions are still there
    chosen = [r for r in newest(store.scan().records) if r.estimator == "random" and r.seed == 0]
    assert [r.revision for r in chosen] == [2, 2]


def test_a_new_estimator_uses_the_checkpoints_of_the_finished_run(
    cli: Commands, finished: tuple[Path, Any]
) -> None:
    done = cli(finished[0], "estimator=[gradient_norm]", "seed=0", "logger.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert "not trained again" in done.stderr


def test_wandb_shows_the_runs_as_a_person_looks_for_them(finished: tuple[Path, Any]) -> None:
    """Read back from the offline files."""
    folder, done = finished
    found = {run.name: run for run in read_runs(folder)}
    store = RecordStore(folder)
    kept = {(r.estimator, r.target, r.seed): r for r in store.scan().records}
    record = kept["fine", "self", 1]
    name = "digits_mislabel mlp n_train=120 n_query=20 max_epochs=2 batch_size=16 seed 1"
    assert name in found, list(found)
    run = found[name]
    (board,) = (run for run in found.values() if run.job_type == "leaderboard")
    assert len(found) == 3
    assert {run.group for run in found.values()} == {f"digits_mislabel mlp {record.setting[:8]}"}
    for one in found.values():
        assert one.tags == ["digits_mislabel", "images", "mlp", f"sweep {record.sweep}"]
        assert one.config["trainer"]["max_epochs"] == 2
        assert one.config["sweep"] == record.sweep
    assert (run.job_type, run.config["seed"]) == ("train", 1)
    assert board.config["seeds"] == [0, 1]
    assert f"wandb sync {folder}/wandb/offline-run-*" in done.stderr

    # training: over epochs, train and test alike, and what f-INE sees meanwhile
    assert run.axes == dict.fromkeys(("train/*", "test/*", "observed_steps/*", "mu/*"), "epoch")
    curves = record.training["curves"]
    for key, own in (("train/loss", "train_loss"), ("test/accuracy", "test_accuracy")):
        assert run.column(key) == pytest.approx(curves[own])
        assert [row["epoch"] for row in run.history if key in row] == [0, 1]
    steps = run.column("observed_steps/fine/self")
    assert len(steps) == 2
    assert 0 < steps[0] < steps[1] <= record.training["n_steps"]
    assert [sum(h["values"]) for h in run.column("mu/fine/self")] == [120, 120]

    # results: every number in one table, one chart a target with all methods, pictures
    columns, rows = run.table("cells")
    numbers = {tuple(row[:3]): row[3] for row in rows}
    assert columns == ["estimator", "target", "metric", "value"]
    assert numbers["fine", "self", "auroc"] == pytest.approx(record.metrics["auroc"], abs=1e-12)
    assert ("fine", "self", "cost/seconds") in numbers
    assert run.summary["self/average_precision/fine"] == record.metrics["average_precision"]
    columns, rows = run.table("detection/self_table")
    assert {row[columns.index("lineKey")] for row in rows} == {
        "fine", "tracin", "mean_loss", "random", "constant",
    }  # fmt: skip
    columns, rows = run.table("suspicious/self")
    scores = store.load_scores(record)
    mine = [dict(zip(columns, row, strict=True)) for row in rows if row[0] == "fine"]
    values = scores.values[0].double()
    assert [row["example"] for row in mine] == values.argsort(descending=True)[:16].tolist()
    first = mine[0]
    assert first["score"] == pytest.approx(float(values.max()))
    assert first["known to be bad"] == bool(scores.extras["truth/is_bad"][first["example"]])
    assert scores.std_error is not None
    width = 1.96 * float(scores.std_error[0, first["example"]])
    assert first["± 1.96 standard errors"] == (pytest.approx(width) if width < 1e9 else None)
    assert first["image"]["_type"] == "image-file"
    assert (first["image"]["height"], first["image"]["width"]) == (8, 8)

    # the sweep: tables that say what leaderboard.csv says, and the figures themselves
    table = pd.read_csv(folder / "leaderboard.csv").set_index(["estimator", "target", "metric"])
    columns, rows = board.table("consistency_and_cost")
    shown = {(row[2], row[1]): dict(zip(columns, row, strict=True)) for row in rows}
    expected = table.loc[("fine", "self", "consistency_spearman"), "mean"]
    assert shown["fine", "self"]["Spearman"] == pytest.approx(expected)
    columns, rows = board.table("detection")
    assert {"AUROC", "AUROC ±"} <= set(columns)
    columns, rows = board.table("leaderboard")
    tidy = [dict(zip(columns, row, strict=True)) for row in rows]
    assert len(tidy) > 50
    for row in tidy:
        if row["metric"] == "auroc":
            mean = table.loc[(row["estimator"], row["target"], "auroc"), "mean"]
            assert row["mean"] == pytest.approx(mean)
    figures = {key for row in board.history for key in row if key.startswith("figures/")}
    assert figures == {
        f"figures/{name}--digits_mislabel"
        for name in ("detection_and_consistency", "recall_curves")
    }
    assert not [key for key in board.summary if key.startswith("digits_mislabel/")]
    assert "leaderboard" in board.artifacts
    assert f"scores-digits_mislabel-{record.setting[:8]}-seed1" in run.artifacts


def test_one_failing_seed_does_not_take_the_others_along(cli: Commands, tmp_path: Path) -> None:
    done = cli(
        tmp_path,
        "estimator=[random]",
        "seed=0,1,2",
        "targets=[self]",
        "+estimators.broken._target_=support.broken_estimators.FailsOnSeedOne",
        "+estimators.broken.seed=null",
        "allow_packages=[support]",
        "logger.mode=disabled",
    )
    assert done.returncode == 1, done.stderr
    assert "broken/self seed 1 failed: RuntimeError: the disk is on [fire]" in done.stderr
    assert "random" in done.stdout
    states = {(r.estimator, r.seed): r.status for r in RecordStore(tmp_path).scan().records}
    assert states == {
        **{("random", s): "finished" for s in range(3)},
        ("broken", 0): "finished",
        ("broken", 1): "failed",
        ("broken", 2): "finished",
    }
    assert "failed: broken" in (tmp_path / "leaderboard.md").read_text()


def test_a_diverged_run_is_a_failed_record(cli: Commands, tmp_path: Path) -> None:
    done = cli(tmp_path, "trainer.lr=1e30", "seed=0", "estimator=[fine]", "logger.mode=disabled")
    assert done.returncode == 1
    assert "lower the step size" in done.stderr
    assert all(r.status == "failed" for r in RecordStore(tmp_path).scan().records)


def test_bad_input_ends_with_a_message_and_status_two(cli: Commands, tmp_path: Path) -> None:
    done = cli(tmp_path, "task.noise_rate=-0.1", "seed=0,1")
    assert done.returncode == 2
    assert "task.noise_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "records").exists()


KILL_OPTIONS = ("estimator=[fine,tracin,random]", "seed=0,1", "logger.mode=disabled")


@pytest.fixture(scope="module")
def uninterrupted(cli: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    done = cli(folder, *KILL_OPTIONS)
    assert done.returncode == 0, done.stderr
    return score_files(folder)


@pytest.mark.parametrize("after", ["start", "first epoch", "first record", "second seed"])
def test_killed_and_run_again(
    cli: Commands, tmp_path: Path, after: str, uninterrupted: dict[str, bytes]
) -> None:
    """SIGKILL at several moments; the same command again completes the sweep."""

    def reached() -> bool:
        marks = {
            "start": "checkpoints/**/*.tmp-*",
            "first epoch": "checkpoints/**/*.ckpt",
            "first record": "records/**/*--seed0--*.json",
            "second seed": "records/**/*--seed1--*.json",
        }
        return any(tmp_path.glob(marks[after]))

    process = cli.start("fine_bench", *small(tmp_path), *KILL_OPTIONS)
    deadline = time.monotonic() + 120
    while not reached() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    done = cli(tmp_path, *KILL_OPTIONS)
    assert done.returncode == 0, done.stderr
    assert score_files(tmp_path) == uninterrupted
    assert not list(tmp_path.glob("checkpoints/**/*.tmp-*"))
    assert not RecordStore(tmp_path).scan().problems


def test_killed_between_two_cells(cli: Commands, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    options = (
        "estimator=[fine,random]",
        "targets=[self]",
        "seed=0",
        "+estimators.killer._target_=support.broken_estimators.Kills",
        f"+estimators.killer.flag={flag}",
        "+estimators.killer.seed=null",
        "allow_packages=[support]",
        "logger.mode=disabled",
    )
    killed = cli(tmp_path, *options)
    assert killed.returncode == -9
    flag.touch()
    done = cli(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert "not trained again" in done.stderr
    records = RecordStore(tmp_path).scan().records
    assert sorted(r.estimator for r in records) == ["fine", "killer", "random"]
    assert all(r.revision == 1 for r in records)


def test_the_leaderboard_command_without_records(cli: Commands, tmp_path: Path) -> None:
    shown = cli.run("fine_bench", "leaderboard", "--results", str(tmp_path))
    assert shown.returncode == 2
    assert "no records below" in shown.stderr
