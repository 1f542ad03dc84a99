"""Ranges of options: which cells they are, what band follows from records, and what is missing."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose
from omegaconf import OmegaConf
from rich.console import Console

from fine_bench.commands.report import main as report
from fine_bench.commands.sensitivity import main
from fine_bench.errors import ConfigError
from fine_bench.leaderboard import build as leaderboard
from fine_bench.leaderboard import render, sensitivity_tables, summary
from fine_bench.leaderboard.option_grid import declared_for, label_of, points
from fine_bench.leaderboard.sensitivity import Spread, spreads
from fine_bench.report.figures import option_ranges as ranges_figure
from fine_bench.report.figures.requirements import LeftOutError
from fine_bench.report.figures.tables import table_results
from fine_bench.runner.conclusion import conclude
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.schema import config_folder
from fine_bench.runner.sweep import announce
from fine_bench.runner.verify import verify
from fine_bench.store.record_json import PENDING
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores, RunRecord, Status

CONF = config_folder()
N = 20
OWN = {"_target_": "baselines.tracin.TracIn", "k": 20, "kind": "a"}
GRID = [{"k": 5}, {"k": 40}, {"kind": "b"}]


# ---------------------------------------------------------------------------------------- grid


def test_a_grid_is_every_combination_and_a_list_is_a_union() -> None:
    found = points(
        [{"k": [5, 20], "kind": ["a", "b"]}, {"other": [None, True], "targets": ["self"]}],
        {"k": 20, "kind": "a", "other": None},
        "sensitivity.x",
    )
    # (20, a) is the row itself, and so is other=null: neither is run twice
    changes = [dict(point.changes) for point in found]
    assert changes == [{"k": 5}, {"k": 5, "kind": "b"}, {"kind": "b"}, {"other": True}]
    assert [p.serves("validation") for p in found] == [True, True, True, False]
    assert declared_for(found, "validation") == changes[:3]
    assert label_of({"kind": "b", "k": 5, "x": True}) == "k=5,kind=b,x=true"


def test_what_two_grids_declare_is_one_configuration() -> None:
    grids = [{"k": [5], "targets": ["self"]}, {"k": [5], "targets": ["queries"]}]
    (both,) = points(grids, {"k": 20}, "w")
    assert both.targets == {"self", "queries"}
    (every,) = points([*grids, {"k": [5]}], {"k": 20}, "w")
    assert every.serves("validation")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("5", "is no grid; give lists of values"),
        ([{"targets": ["self"]}], "is no grid"),
        ({"k": 5}, r"w.k=5 must be a list of at least one value; type k: \[5\]"),
        ({"k": []}, "at least one value"),
        ({"k": [5], "targets": ["all"]}, "must be some of"),
        ({"k": [20]}, "only the values that the row has itself"),
        ([], "only the values that the row has itself"),
    ],
)
def test_what_is_no_range_is_refused(declared: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        points(declared, {"k": 20}, "w")


# --------------------------------------------------------------------------------- composition


def planned(*overrides: str) -> Job:
    return plan(check(compose("config", list(overrides))))


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "sensitivity").glob("*.yaml")))
def test_every_sensitivity_file(hydra: None, name: str) -> None:
    """Each composes beside its estimator, is accepted by the method, and changes something."""
    job = planned(f"estimator={name}", f"sensitivity={name}", "targets=[self,validation]")
    rows = [cell for cell in job.cells if not cell.variation]
    assert [cell.estimator for cell in rows] == [name, name]
    varied = [cell for cell in job.cells if cell.variation]
    assert varied
    for cell in varied:
        assert cell.estimator == f"{name}@{label_of(cell.variation['changes'])}"
        assert cell.variation["of"] == name
        assert cell.variation["base"] == rows[0].estimator_hash != cell.estimator_hash
        assert cell.variation["changes"] in cell.variation["grid"]
    names = [(c.estimator, c.target, c.estimator_hash) for c in job.cells]
    assert len(names) == len(set(names))


def test_without_the_flag_nothing_is_added(hydra: None) -> None:
    assert not any(cell.variation for cell in planned().cells)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sensitivity=trak", r"trak is not among the estimators.*type 'estimator=\[fine,"),
        ("+sensitivity.fine.observible=[loss]", "sensitivity.fine.observible is unknown; did you"),
        ("+sensitivity.fine.refresh_every=[often]", "sensitivity.fine.refresh_every=often has a"),
        ("+sensitivity.fine.composition=[standardised]", "step_weight='uncertainty' weighs"),
        ("+sensitivity.fine=3", "is no grid"),
    ],
)
def test_impossible_ranges_are_refused_before_training(
    hydra: None, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(override)


def test_a_row_may_not_be_called_like_a_configuration_of_a_range(hydra: None) -> None:
    config = compose("config", ["estimator=tracin"])
    OmegaConf.set_struct(config, False)
    config.estimators["fine@k=5"] = config.estimators.tracin
    with pytest.raises(ConfigError, match=r"fine@k=5: @ marks .*call the row otherwise"):
        check(config)


# --------------------------------------------------------------------------------------- bands


def record(
    changes: Mapping[str, Any],
    seed: int,
    auroc: float,
    *,
    store: RecordStore | None = None,
    status: Status = "finished",
    grid: Any = GRID,
    **other: Any,
) -> RunRecord:
    """A hand-made record of the row ``knn`` (no changes) or of a configuration of its range."""
    name = f"knn@{label_of(changes)}" if changes else "knn"
    config: dict[str, Any] = {"estimator": {**OWN, **changes}, "task": {"n_train": N}}
    if changes:
        config["sensitivity"] = {"of": "knn", "base": "own", "changes": changes, "grid": grid}
    made = RunRecord(
        task="t", setting="0123456789", estimator=name,
        estimator_hash=label_of(changes) if changes else "own",
        version=1, target="self", seed=seed, status=status,
        reason="" if status == "finished" else "the loss is NaN",
        metrics={"auroc": auroc, "n_bad": 4.0} if status == "finished" else {},
        cost={"seconds": 1.0} if status == "finished" else {},
        scores_sha256=PENDING if status == "finished" else "",
        data_sha256="data", config=config,
    )  # fmt: skip
    made = replace(made, **other)
    if store is not None:
        draw = torch.Generator().manual_seed(seed + 100 * len(name))
        values = torch.arange(N)[None] + torch.randn(1, N, generator=draw)
        scores = InfluenceScores(values, made.estimator, "self")
        store.save(made, scores if status == "finished" else None)
    return made


def fill(root: Path) -> RecordStore:
    """Own options at seeds 0 to 3; its range at seeds 0 and 1, where one cell is missing."""
    store = RecordStore(root)
    for seed, auroc in enumerate((0.8, 0.9, 0.1, 0.1)):
        record({}, seed, auroc, store=store)
    for seed, auroc in enumerate((0.7, 0.7)):
        record({"k": 5}, seed, auroc, store=store)
    for seed, auroc in enumerate((0.99, 0.95)):
        record({"kind": "b"}, seed, auroc, store=store)
    record({"k": 40}, 0, 0.3, store=store)
    return store


def found_in(store: RecordStore) -> Spread:
    (spread,) = spreads(store, store.scan())
    return spread


def test_a_band_goes_from_the_lowest_to_the_highest_mean_over_the_same_seeds(
    tmp_path: Path,
) -> None:
    spread = found_in(fill(tmp_path))
    assert (spread.estimator, spread.target, spread.seeds) == ("knn", "self", (0, 1))
    band = spread.bands["auroc"]
    # seeds 2 and 3 of the row itself are in no band, nor is the configuration with one seed
    assert band.own == pytest.approx(0.85)
    assert (band.lowest, band.highest, band.n) == (pytest.approx(0.7), pytest.approx(0.97), 3)
    assert {"consistency_spearman", "consistency_kendall"} <= set(spread.bands)
    assert "cost_seconds" not in spread.bands
    assert dict(spread.options) == {"k": [20, 5, 40], "kind": ["a", "b"]}
    assert spread.configurations == 4
    assert (spread.finished, spread.skipped, spread.expected) == (7, 0, 8)
    assert spread.missing == ("k=40, seed 1: missing: no record",)
    assert not spread.complete


def test_consistency_is_that_of_the_leaderboard(tmp_path: Path) -> None:
    """Its own value over the seeds of the range is what a board of these seeds alone shows."""
    spread = found_in(fill(tmp_path / "all"))
    few = RecordStore(tmp_path / "few")
    for seed in (0, 1):
        record({}, seed, 0.5, store=few)
    (row,) = leaderboard.build(few).tables[0].rows
    own = row.stats["consistency_spearman"].mean
    assert spread.bands["consistency_spearman"].own == own
    assert spread.bands["consistency_spearman"].lowest <= own


def test_the_rows_of_the_leaderboard_are_not_touched(tmp_path: Path) -> None:
    store = fill(tmp_path / "with")
    alone = RecordStore(tmp_path / "alone")
    for seed, auroc in enumerate((0.8, 0.9, 0.1, 0.1)):
        record({}, seed, auroc, store=alone)
    boards = [leaderboard.build(s) for s in (store, alone)]
    assert [row.label for row in boards[0].tables[0].rows] == ["knn"]
    assert render.to_csv(boards[0]) == render.to_csv(boards[1])
    assert render.to_markdown(boards[0]) == render.to_markdown(boards[1])
    assert boards[0].complete  # a cell that the band lacks is no gap of the leaderboard
    shown = [summary.summarise(board, "auroc", "self") for board in boards]
    assert summary.to_markdown(shown[0]) == summary.to_markdown(shown[1])
    (results,) = table_results(store, boards[0], store.scan())
    assert set(results.looks) == {"knn"}


def test_every_gap_has_its_reason(tmp_path: Path) -> None:
    store = fill(tmp_path)
    record({"k": 40}, 1, 0.0, store=store, status="failed")
    record({"k": 5}, 2, 0.7, store=store)  # one configuration alone has a third seed
    spread = found_in(store)
    assert spread.seeds == (0, 1, 2)
    assert spread.missing == (
        "k=40, seed 1: failed: the loss is NaN",
        "k=40, seed 2: missing: no record",
        "kind=b, seed 2: missing: no record",
    )
    assert spread.bands["auroc"].n == 2


def test_own_options_that_are_missing_leave_a_band_without_its_mark(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in (0, 1):
        record({"k": 5}, seed, 0.7, store=store, grid=[{"k": 5}])
    record({}, 0, 0.8, store=store)
    spread = found_in(store)
    assert math.isnan(spread.bands["auroc"].own)
    assert (spread.bands["auroc"].lowest, spread.bands["auroc"].highest) == (0.7, 0.7)
    assert spread.missing == ("its own options, seed 1: missing: no record",)
    assert "undefined" in sensitivity_tables.to_markdown([spread])


def test_records_of_an_older_method_version_are_in_no_band(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    record({"k": 5}, 0, 0.7, store=store, grid=[{"k": 5}])
    record({}, 0, 0.8, store=store, version=2)
    spread = found_in(store)
    assert spread.bands["auroc"].n == 1
    assert "recorded by method version 1 only; this is version 2" in spread.missing[0]


def test_a_shorter_range_makes_no_narrower_band(tmp_path: Path) -> None:
    """What was declared once stays declared: nobody trims a band by editing the range."""
    store = fill(tmp_path)
    before = found_in(store).bands["auroc"]
    record({"k": 5}, 0, 0.7, store=store, grid=[{"k": 5}])
    record({"k": 5}, 1, 0.7, store=store, grid=[{"k": 5}])
    assert found_in(store).bands["auroc"] == before


def test_skipped_configurations_are_named_and_no_fault(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in (0, 1):
        record({}, seed, 0.8, store=store)
        record({"k": 5}, seed, 0.7, store=store, grid=[{"k": 5}, {"k": 99}])
        record({"k": 99}, seed, 0.0, store=store, status="skipped", grid=[{"k": 5}, {"k": 99}])
    spread = found_in(store)
    assert spread.complete
    assert spread.missing == ("k=99, seeds 0, 1: skipped: the loss is NaN",)
    assert main(["--results", str(tmp_path)]) == 0


def test_a_target_that_the_method_does_not_serve_is_left_out(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    record({}, 0, 0.0, store=store, status="skipped")
    record({"k": 5}, 0, 0.0, store=store, status="skipped")
    assert spreads(store, store.scan()) == []


# --------------------------------------------------------------------------------------- views


def test_the_tables_say_what_a_band_is_and_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    assert main(["--results", str(tmp_path)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "7/8" in said
    assert ".700–.970" in said
    assert "knn · self · k=40, seed 1: missing: no record" in said
    assert "Nothing is chosen by the truth" in said
    text = (tmp_path / "sensitivity.md").read_text()
    assert "| self | knn | k 20 \\| 5 \\| 40; kind a \\| b | 2 (0, 1) | 4 | 7/8 |" in text
    assert "0.850 [0.700, 0.970] of 3" in text
    assert "it is no confidence interval" in text
    # no table says which configuration stands at an end
    assert "kind=b" not in text
    table = pd.read_csv(tmp_path / "sensitivity.csv").set_index("metric")
    row = table.loc["auroc"]
    assert (row.own, row.lowest, row.highest) == (
        pytest.approx(0.85), pytest.approx(0.7), pytest.approx(0.97)
    )  # fmt: skip
    assert (row.cells_finished, row.cells_expected, str(row.seeds)) == (7, 8, "0 1")
    assert json.loads(row.options) == {"k": [20, 5, 40], "kind": ["a", "b"]}
    assert row.missing == "k=40, seed 1: missing: no record"


def test_the_printed_table_has_at_most_100_columns(tmp_path: Path) -> None:
    out = io.StringIO()
    spread = found_in(fill(tmp_path))
    long = replace(spread, estimator="a_method_with_quite_a_long_name", options={"x" * 70: [1, 2]})
    sensitivity_tables.show([spread, long], Console(file=out, width=100))
    assert max(map(len, out.getvalue().splitlines())) <= 100


@pytest.mark.parametrize(("kind", "first"), [("md", "# Sensitivity"), ("csv", "task,setting")])
def test_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, first: str) -> None:
    fill(tmp_path)
    main(["--results", str(tmp_path), "--format", kind])
    assert capsys.readouterr().out.startswith(first)


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--results", str(tmp_path)]) == 2
    assert "no cells of a range" in capsys.readouterr().err
    fill(tmp_path)
    assert main(["--results", str(tmp_path), "--task", "x"]) == 2
    assert "no task 'x'; there are: t" in capsys.readouterr().err
    (tmp_path / "sensitivity.md").unlink(missing_ok=True)
    (tmp_path / "sensitivity.md").mkdir()
    assert main(["--results", str(tmp_path)]) == 1
    assert "could not write" in capsys.readouterr().err


def test_the_report_shows_bands_and_names_the_missing_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    assert report(["--results", str(tmp_path), "--no-images"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Hyperparameter sensitivity" in page
    assert '<span class="mean">0.850</span><span class="ci">.700–.970 of 3</span>' in page
    assert "<div>seeds 0, 1; 7 of 8 cells</div>" in page
    assert "<li>knn · self · k=40, seed 1: missing: no record</li>" in page
    assert "Nothing is chosen by the truth" in page
    assert "knn@" not in page


def test_the_figure_draws_each_band_where_it_is(tmp_path: Path) -> None:
    store = fill(tmp_path)
    (results,) = table_results(store, leaderboard.build(store), store.scan())
    figure = ranges_figure.draw(results)
    axes = figure.axes[0]
    assert "AUROC" in axes.get_xlabel()
    bar, ends, own = axes.lines
    assert np.allclose(bar.get_xdata(), [0.7, 0.97])
    assert np.allclose(ends.get_xdata(), [0.7, 0.97])
    assert np.allclose(own.get_xdata(), [0.85])
    alone = replace(results, spreads=[])
    with pytest.raises(LeftOutError, match="'sensitivity="):
        ranges_figure.draw(alone)
    empty = replace(results, spreads=[replace(results.spreads[0], bands={})])
    with pytest.raises(LeftOutError, match="has finished all of its seeds"):
        ranges_figure.draw(empty)


# ------------------------------------------------------------------------------------- running


def test_a_run_writes_the_range_beside_the_row_and_verifies(
    hydra: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (
        "task.n_train=60", "task.n_query=10", "trainer.max_epochs=3", "trainer.batch_size=16",
        "trainer.progress=false", "targets=[self]", "logger.mode=disabled",
        f"results_dir={tmp_path}", "estimator=[tracin,fine,fine_paper]",
        "estimators.fine_paper.sample=6", "estimators.fine_paper.auxiliary=null",
        "estimators.fine_paper.every_n_steps=1",
        "sensitivity=tracin", "+sensitivity.fine={observable: [loss]}",
    )  # fmt: skip
    jobs = [planned(*small, f"seed={seed}") for seed in (0, 1)]
    announce(jobs, tmp_path, "basic")
    assert "sensitivity tracin (3 cells), fine (1 cells)" in capsys.readouterr().err
    for job in jobs:
        execute(job, "sweep", say=lambda _: None)
    assert conclude(jobs, "sweep") == 0
    assert (tmp_path / "sensitivity.csv").is_file()
    store = RecordStore(tmp_path)
    spread = next(s for s in spreads(store, store.scan()) if s.estimator == "tracin")
    assert spread.options == {"every": ["default", 2, 4, 8]}
    assert (spread.finished, spread.expected, spread.seeds) == (8, 8, (0, 1))
    # three checkpoints: every second are the first and the last, every fourth the last alone
    scores = {r.estimator: store.load_scores(r).values for r in store.scan().records if r.seed == 0}
    assert torch.equal(scores["tracin@every=4"], scores["tracin@every=8"])
    assert not torch.equal(scores["tracin@every=2"], scores["tracin@every=4"])
    records = {r.estimator: r for r in store.scan().records if r.seed == 0}
    varied = records["fine@observable=loss"]
    assert varied.varies == "fine"
    assert varied.config["sensitivity"]["changes"] == {"observable": "loss"}
    assert "sensitivity" not in records["fine"].config
    # what the paper's estimator agrees with is the row, not the configurations of its range
    others = {k.split("/")[1] for k in records["fine_paper"].metrics if k.startswith("agreement/")}
    assert others == {"fine"}
    verdict = verify(varied, tmp_path)
    assert verdict.equal, verdict.differences
    # nothing is computed twice, and the row alone does not need its range
    assert execute(jobs[0].opened(), "again", say=lambda _: None) == []
