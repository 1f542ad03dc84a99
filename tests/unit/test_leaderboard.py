"""The leaderboard: rebuilt from records alone, the same bytes every time, nothing hidden."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fine_bench.commands.leaderboard import main
from fine_bench.leaderboard import captions
from fine_bench.leaderboard import render as view
from fine_bench.leaderboard.build import build, build_from, cells
from fine_bench.leaderboard.consistency import Comparisons
from fine_bench.leaderboard.sheet import Entry, Head, Line, Sheet, number, rich_table, show
from fine_bench.leaderboard.tables import Leaderboard, Row
from fine_bench.metrics.consistency import agreements, pairwise_consistency
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.intervals import mean_interval, pair_mean_interval, paired_difference
from fine_bench.store import files as files_module
from fine_bench.store.files import StoreError
from fine_bench.store.record_json import comparison_file
from fine_bench.store.records import RecordStore, Scan, newest
from fine_bench.types import SUSPICIOUS_END, InfluenceScores, RunRecord, Target
from support.records import make_record

N = 60
BAD = torch.arange(N) < 12


def values_of(estimator: str, target: str, seed: int) -> torch.Tensor:
    """Scores that find the bad examples fairly well; ``constant`` says nothing."""
    if estimator == "constant":
        return torch.zeros(1, N)
    draw = torch.Generator().manual_seed(1000 * seed + 10 * len(estimator) + len(target))
    noise = torch.randn(1, N, generator=draw)
    sign = 1.0 if SUSPICIOUS_END[target] == "high" else -1.0
    return sign * BAD * {"fine": 3.0, "tracin": 1.5}.get(estimator, 0.0) + noise


def config(**own: Any) -> dict[str, Any]:
    return {
        "task": {"name": "digits", "n_train": N, "noise_rate": 0.2, "n_query": 10, "seed": 0},
        "model": {"name": "mlp", "hidden": [32]},
        "trainer": {"max_epochs": 5, "batch_size": 16, "lr": 0.1, "momentum": 0.0},
        "estimator": {"observable": "margin", **own},
        "seed": own.get("seed", 0),
    }


def finished(estimator: str, target: str, seed: int, **changes: Any) -> RunRecord:
    end = SUSPICIOUS_END[target]
    metrics = detection_metrics(suspicion(values_of(estimator, target, seed), end), BAD)
    base = make_record(
        estimator=estimator,
        target=target,
        seed=seed,
        metrics={**metrics, "n_bad": 12, "lds": 0.5 + seed / 100},
        cost={"seconds": 1.5 + seed, "gradient_evaluations": 600.0},
        data_sha256="da7a" * 16,
        config=config(),
        environment={"commit": "c0ffee", "dirty": False},
        training={"test_accuracy": 0.9 + seed / 100, "seconds": 12.5 + seed},
    )
    return replace(base, **changes)


def unfinished(record: RunRecord, status: Any, reason: str) -> RunRecord:
    return replace(record, status=status, reason=reason, scores_sha256="", metrics={}, cost={})


def save(store: RecordStore, record: RunRecord, values: torch.Tensor | None = None) -> RunRecord:
    if record.status != "finished":
        return store.save(record, None)
    if values is None:
        values = values_of(record.estimator, record.target, record.seed)
    target: Target = record.target  # type: ignore[assignment]
    return store.save(record, InfluenceScores(values, record.estimator, target))


def fill(
    root: Path, seeds: tuple[int, ...] = (0, 1, 2), edit: Callable[[RunRecord], Any] | None = None
) -> RecordStore:
    """Records of three estimators, two targets; ``edit`` changes a record or drops it (None)."""
    store = RecordStore(root)
    for estimator in ("fine", "tracin", "constant"):
        for target in ("self", "validation"):
            for seed in seeds:
                record = finished(estimator, target, seed)
                record = edit(record) if edit is not None else record
                if record is not None:
                    save(store, record)
    return store


def row_of(board: Leaderboard, estimator: str, target: str = "self", table: int = 0) -> Row:
    rows = board.tables[table].rows
    (row,) = [r for r in rows if (r.estimator, r.target) == (estimator, target)]
    return row


def printed(board: Leaderboard, width: int = 100) -> str:
    text = io.StringIO()
    view.show(board, Console(file=text, width=width, highlight=False))
    return text.getvalue()


# ------------------------------------------------------------------------------------- numbers


def test_numbers_are_those_of_the_metrics(tmp_path: Path) -> None:
    board = build(fill(tmp_path))
    assert board.problems == ()
    assert board.complete
    (table,) = board.tables
    assert table.seeds == (0, 1, 2)
    assert table.k == 12
    row = row_of(board, "tracin", "validation")
    aurocs = {s: finished("tracin", "validation", s).metrics["auroc"] for s in range(3)}
    stat = row.stats["auroc"]
    assert (stat.mean, stat.lower, stat.upper) == tuple(mean_interval(aurocs))
    assert (stat.n, row.seeds) == (3, (0, 1, 2))
    assert row.stats["cost_seconds"].mean == 2.5
    vectors = [values_of("tracin", "validation", s)[0] for s in range(3)]
    pairs = {
        (a, b): pairwise_consistency(vectors[a], vectors[b], 12, "low")
        for a, b in ((0, 1), (0, 2), (1, 2))
    }
    for name in ("spearman", "kendall", "jaccard", "jaccard_corrected"):
        expected = pair_mean_interval({pair: found[name] for pair, found in pairs.items()})
        stat = row.stats[f"consistency_{name}"]
        assert (stat.mean, stat.lower, stat.upper) == pytest.approx(tuple(expected), abs=1e-12)
    assert table.training["test_accuracy"].mean == pytest.approx(0.91)
    assert table.training["seconds"].n == 3


def test_sorted_by_target_then_auroc(tmp_path: Path) -> None:
    (table,) = build(fill(tmp_path)).tables
    assert [(r.target, r.estimator) for r in table.rows] == [
        ("self", "fine"),
        ("self", "tracin"),
        ("self", "constant"),
        ("validation", "fine"),
        ("validation", "tracin"),
        ("validation", "constant"),
    ]


def test_constant_scores_are_undefined_not_perfect(tmp_path: Path) -> None:
    board = build(fill(tmp_path))
    row = row_of(board, "constant")
    assert math.isnan(row.stats["consistency_spearman"].mean)
    assert row.stats["auroc"].mean == 0.5
    assert board.complete
    text = printed(board)
    lines = [x for x in text.splitlines() if x.split()[:1] == ["constant"]]
    assert [line.count("undefined") for line in lines] == [0, 0, 4, 4]
    assert "a score that is constant" in view.to_markdown(board)


def test_a_single_seed_has_neither_interval_nor_consistency(tmp_path: Path) -> None:
    board = build(fill(tmp_path, seeds=(0,)))
    row = row_of(board, "fine")
    assert math.isnan(row.stats["auroc"].lower)
    assert "consistency_spearman" not in row.stats
    assert "[nan" not in view.to_markdown(board)
    assert board.complete


def test_further_metrics_and_costs_reach_the_csv_by_themselves(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        return replace(r, metrics={**r.metrics, "nobody/declared": 7.0})

    lines = list(csv.DictReader(io.StringIO(view.to_csv(build(fill(tmp_path, edit=edit))))))
    assert len({(x["estimator"], x["target"]) for x in lines}) == 6
    assert len({(x["estimator"], x["target"], x["metric"]) for x in lines}) == len(lines)
    first = {x["metric"]: x for x in lines if (x["estimator"], x["target"]) == ("fine", "self")}
    lds = first["lds"]
    assert float(lds["mean"]) == pytest.approx(0.51)
    assert (lds["n"], lds["label"], lds["direction"]) == ("3", "LDS", "higher")
    assert float(first["cost_gradient_evaluations"]["mean"]) == 600
    assert (lds["seeds"], lds["missing"]) == ("0 1 2", "")
    aurocs = {s: finished("fine", "self", s).metrics["auroc"] for s in range(3)}
    mean = mean_interval(aurocs).mean
    assert float(first["auroc"]["mean"]) == pytest.approx(mean, rel=1e-12)  # thirteen digits
    seconds = first["cost_seconds"]
    assert (seconds["unit"], seconds["direction"], seconds["tie"]) == ("s", "lower", "False")
    unknown = first["nobody/declared"]
    assert (unknown["label"], unknown["direction"]) == ("nobody/declared", "")


def test_a_metric_that_only_some_seeds_have_says_how_many(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        return replace(r, metrics={**r.metrics, "extra": 1.0}) if r.seed else r

    assert row_of(build(fill(tmp_path, edit=edit)), "fine").stats["extra"].n == 2


def test_records_without_known_bad_examples_have_ranks_but_no_jaccard(tmp_path: Path) -> None:
    board = build(fill(tmp_path, edit=lambda r: replace(r, metrics={})))
    row = row_of(board, "fine")
    assert "consistency_spearman" in row.stats
    assert "consistency_jaccard" not in row.stats
    assert "Jaccard@k: k" not in view.to_markdown(board)


# --------------------------------------------------------------------- what is not in a number


def test_failed_skipped_and_missing_seeds_are_named(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord | None:
        if (r.estimator, r.target) == ("tracin", "self"):
            if r.seed == 1:
                return unfinished(r, "failed", "loss is NaN\nat step 7 | oh")
            if r.seed == 2:
                return None
        if (r.estimator, r.target) == ("constant", "validation"):
            return unfinished(r, "skipped", "has no checkpoints")
        return r

    board = build(fill(tmp_path, edit=edit))
    assert not board.complete
    row = row_of(board, "tracin")
    assert row.seeds == (0,)
    assert row_of(board, "constant", "validation").stats == {}
    for text in (printed(board), view.to_markdown(board)):
        flat = " ".join(text.split())
        assert "failed: tracin · self · seed 1: loss is NaN at step 7 | oh" in flat
        assert "missing: tracin · self · seed 2: other rows have it" in flat
        assert "skipped: constant · validation · seeds 0, 1, 2: has no checkpoints" in flat
        assert "1/3" in flat
    lines = {
        (x["estimator"], x["target"]): x for x in csv.DictReader(io.StringIO(view.to_csv(board)))
    }
    line = lines["tracin", "self"]
    assert (line["seeds"], line["failed"], line["missing"]) == ("0", "1", "2")
    assert lines["constant", "validation"]["skipped"] == "0 1 2"


def test_skipped_cells_alone_are_no_fault(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        return unfinished(r, "skipped", "cannot") if r.estimator == "constant" else r

    fill(tmp_path, edit=edit)
    assert main(["--results", str(tmp_path)]) == 0


def test_method_versions_are_never_mixed(tmp_path: Path) -> None:
    store = fill(tmp_path)
    save(store, finished("fine", "self", 0, version=2))
    board = build(store)
    row = row_of(board, "fine")
    assert (row.version, row.seeds) == (2, (0,))
    reasons = [c.reason for c in board.tables[0].cells]
    assert reasons == ["recorded by an older method version only; this is version 2"] * 2


def test_rows_of_an_older_method_version_leave_the_tables(tmp_path: Path) -> None:
    store = fill(tmp_path)
    renewed = config(observable="loss")
    for seed in (0, 1):  # the same method with other options, recorded by its next version
        new = finished("fine", "self", seed, version=2, estimator_hash="beef" * 16, config=renewed)
        save(store, new)
        other = finished("tracin", "self", seed, estimator_hash="beef" * 16, config=renewed)
        save(store, other)  # other options of the same version are a variant
    board = build(store)
    (table,) = board.tables
    (row,) = [r for r in table.rows if (r.estimator, r.target) == ("fine", "self")]
    assert (row.label, row.version, row.seeds) == ("fine (observable=loss)", 2, (0, 1))
    assert table.superseded == ("fine · self (method version 1, now 2)",)
    assert {r.label for r in table.rows if r.estimator == "tracin" and r.target == "self"} == {
        "tracin (observable=margin)",
        "tracin (observable=loss)",
    }
    # on the other target nothing newer was run: the row stays
    assert row_of(board, "fine", "validation").version == 1
    for text in (printed(board), view.to_markdown(board)):
        line = "Left out, since a newer version of the method has been run: fine · self"
        assert line in " ".join(text.split())
    for seed in (0, 1):
        new = replace(finished("fine", "validation", seed), version=2, config=renewed)
        save(store, replace(new, estimator_hash="beef" * 16))
    assert row_of(build(store), "fine").label == "fine"  # nothing is left to be told from


def test_different_data_are_never_mixed(tmp_path: Path) -> None:
    store = fill(tmp_path)
    save(store, finished("fine", "self", 3, data_sha256="0ther" * 12))
    early = unfinished(finished("fine", "self", 4, data_sha256=""), "failed", "no data")
    save(store, early)
    tables = build(store).tables
    assert [t.seeds for t in tables] == [(3, 4), (0, 1, 2)]
    assert tables[0].options["data"] == "0ther0th"


def test_variants_show_the_options_that_differ(tmp_path: Path) -> None:
    store = fill(tmp_path)
    for seed in range(3):
        loss = config(observable="loss", schedule={"every": 2})
        save(store, finished("fine", "self", seed, estimator_hash="beef" * 16, config=loss))
        odd = config()  # a hash that differs though the options look the same
        save(store, finished("tracin", "self", seed, estimator_hash="beef" * 16, config=odd))
    board = build(store)
    labels = {r.label for r in board.tables[0].rows}
    assert {"fine (observable=margin, every=-)", "fine (observable=loss, every=2)"} <= labels
    assert {"tracin (feedfeed)", "tracin (beefbeef)"} <= labels
    assert "constant" in labels
    assert max(map(len, printed(board).splitlines())) <= 100


def test_an_option_that_is_not_set_gives_a_row_no_suffix(tmp_path: Path) -> None:
    """The plain sum over queries was called ``fine (query_weighting=None)`` beside the weighted."""
    store = RecordStore(tmp_path)
    weights = {"aa" * 32: None, "bb" * 32: "noise", "cc" * 32: "norm"}
    for sha, weighting in weights.items():
        own = config(query_weighting=weighting)
        for seed in range(2):
            save(store, finished("fine", "self", seed, estimator_hash=sha, config=own))
    board = build(store)
    assert sorted(row.label for row in board.tables[0].rows) == [
        "fine", "fine (query_weighting=noise)", "fine (query_weighting=norm)",
    ]  # fmt: skip
    # two that say nothing are told apart all the same
    for sha, own in (("dd" * 32, config()), ("ee" * 32, config(every=None))):
        save(store, finished("tracin", "self", 0, estimator_hash=sha, config=own))
    labels = {row.label for row in build(store).tables[0].rows if row.estimator == "tracin"}
    assert labels == {"tracin (every=-)", "tracin"}


def test_settings_of_one_task_show_what_tells_them_apart(tmp_path: Path) -> None:
    store = fill(tmp_path)
    other = config()
    other["trainer"] = {**other["trainer"], "momentum": 0.9}
    save(store, finished("fine", "self", 0, setting="f" * 16, config=other))
    first, second = build(store).tables
    assert first.options["trainer.momentum"] == 0.0
    assert second.options["trainer.momentum"] == 0.9
    text = captions.caption(first)[0]
    assert text.startswith("60 training examples · noise rate 0.2 · 10 queries · mlp · 5 epochs · ")
    assert "batch 16 · lr 0.1 · trainer.momentum 0.0" in text


def test_records_from_a_dirty_tree_are_marked(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        dirty = (r.estimator, r.target, r.seed) == ("fine", "self", 2)
        return replace(r, environment={"commit": "c0ffee", "dirty": dirty})

    board = build(fill(tmp_path, edit=edit))
    assert row_of(board, "fine").dirty
    assert not row_of(board, "tracin").dirty
    for text in (printed(board), view.to_markdown(board)):
        assert "fine †" in text
        assert "† made by code with uncommitted changes" in text
        assert "tracin †" not in text


LEVELS = {"fine": 0.9, "tracin": 0.9, "constant": 0.5}


def with_aurocs(tmp_path: Path, seeds: int, gap: Callable[[int], float]) -> Leaderboard:
    """``fine`` at 0.9, ``tracin`` below it by ``gap(seed)``, ``constant`` far below."""

    def edit(r: RunRecord) -> RunRecord:
        below = gap(r.seed) if r.estimator == "tracin" else 0.0
        auroc = LEVELS[r.estimator] - below + r.seed / 1000
        return replace(r, metrics={**r.metrics, "auroc": auroc})

    return build(fill(tmp_path, seeds=tuple(range(seeds)), edit=edit))


def test_ties_are_marked_from_six_seeds_on(tmp_path: Path) -> None:
    # now above it and now below
    board = with_aurocs(tmp_path, 6, lambda seed: (-1) ** seed * 0.02 + 0.001)
    tied = {r.estimator: "auroc" in r.ties for r in board.tables[0].rows if r.target == "self"}
    assert tied == {"fine": False, "tracin": True, "constant": False}
    text = printed(board)
    assert "tracin =" in text
    assert "Fewer than six seeds" not in text


def test_three_seeds_tie_when_the_interval_of_the_difference_holds_zero(tmp_path: Path) -> None:
    board = with_aurocs(tmp_path / "tie", 3, lambda seed: (0.02, -0.01, 0.01)[seed])
    assert "auroc" in row_of(board, "tracin").ties
    assert "tracin =" in printed(board)
    board = with_aurocs(tmp_path / "worse", 3, lambda seed: (0.02, 0.01, 0.01)[seed])
    assert "auroc" not in row_of(board, "tracin").ties
    text = " ".join(printed(board).split())
    assert "Fewer than six seeds: a row without = is not thereby significantly worse" in text


def test_six_seeds_need_the_sign_flip_test_too(tmp_path: Path) -> None:
    # the interval of the mean lies above 0, yet one seed in six goes the other way
    gaps = (0.01, 0.01, 0.01, 0.01, 0.01, -0.001)
    board = with_aurocs(tmp_path, 6, lambda seed: gaps[seed])
    found = paired_difference(dict.fromkeys(range(6), 0.0), {s: -gaps[s] for s in range(6)})
    assert found.lower > 0
    assert found.significant is False
    assert "auroc" in row_of(board, "tracin").ties


def test_a_single_seed_and_other_columns_carry_their_own_marks(tmp_path: Path) -> None:
    assert not any(row.ties for row in build(fill(tmp_path / "one", seeds=(0,))).tables[0].rows)
    # the lds of all rows is the same at every seed: every row but the first ties there
    board = with_aurocs(tmp_path / "three", 3, lambda seed: 0.3)
    assert "auroc" not in row_of(board, "tracin").ties
    assert "lds" in row_of(board, "tracin").ties
    assert "lds" not in row_of(board, "constant").ties  # the first by name
    # costs are never compared
    assert not any(key.startswith("cost_") for row in board.tables[0].rows for key in row.ties)


def test_an_estimator_that_scores_groups_alone_is_no_problem(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in (0, 1):
        record = replace(
            finished("fine", "self", seed), metrics={"group/a/mu": 1.0, "n_watched": 0.0}
        )
        nobody = torch.empty(0, dtype=torch.int64)
        store.save(record, InfluenceScores(torch.zeros(1, N), "fine", "self", watched=nobody))
    board = build(store)
    assert not board.problems
    assert not any(key.startswith("consistency") for key in board.tables[0].rows[0].stats)


def test_consistency_ties_are_those_of_the_pairs(tmp_path: Path) -> None:
    board = build(fill(tmp_path, seeds=tuple(range(4))))
    rows = [row_of(board, name) for name in ("fine", "tracin")]
    vectors = {name: [values_of(name, "self", s)[0] for s in range(4)] for name in LEVELS}
    pairs = {
        name: {
            (a, b): pairwise_consistency(vectors[name][a], vectors[name][b], 12, "high")["kendall"]
            for a, b in combinations(range(4), 2)
        }
        for name in ("fine", "tracin")
    }
    best, other = sorted(rows, key=lambda r: -r.stats["consistency_kendall"].mean)
    _, low, high = pair_mean_interval(
        {pair: pairs[best.estimator][pair] - pairs[other.estimator][pair] for pair in pairs["fine"]}
    )
    assert ("consistency_kendall" in other.ties) == (low <= 0 <= high)
    assert "consistency_kendall" not in best.ties


# -------------------------------------------------------------------------------------- rebuild


def test_rebuild_is_byte_identical_whatever_the_order_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path)

    def outputs() -> list[bytes]:
        board = build(store)
        paths = view.write(board, tmp_path)
        text = view.to_json(board) + printed(board)
        return [path.read_bytes() for path in paths] + [text.encode()]

    first = outputs()  # computed from scores
    assert outputs() == first  # from the cache
    glob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda p, pattern: list(glob(p, pattern))[::-1])
    assert outputs() == first
    scan = store.scan()
    shuffled = Scan(scan.records[::-1], scan.problems, scan.consistency[::-1])
    monkeypatch.setattr(RecordStore, "scan", lambda _: shuffled)
    assert outputs() == first


def test_rebuild_needs_the_records_alone(tmp_path: Path) -> None:
    store = fill(tmp_path / "a")
    board = build(store)
    shutil.copytree(tmp_path / "a" / "records", tmp_path / "b" / "records")
    assert view.to_json(build(RecordStore(tmp_path / "b"))) == view.to_json(board)
    assert main(["--results", str(tmp_path / "b")]) == 0


def test_without_scores_and_cache_consistency_is_a_named_problem(tmp_path: Path) -> None:
    store = fill(tmp_path)
    shutil.rmtree(tmp_path / "scores")
    board = build(store)
    assert not board.complete
    assert len(board.problems) == 6
    problem = board.problems[0]
    assert problem.startswith("digits/01234567: constant self: no consistency: the score file")
    assert str(tmp_path) not in problem
    assert "scores/digits/01234567/constant--self--seed0" in problem
    assert row_of(board, "fine").stats["auroc"].n == 3  # what the records know is there
    assert main(["--results", str(tmp_path)]) == 1


def test_added_seeds_reuse_the_pairs_and_fewer_seeds_need_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    compare = agreements

    def counting(runs: Any, pairs: Any) -> list[dict[str, float]]:
        compared.extend([1] * len(pairs))
        return compare(runs, pairs)

    monkeypatch.setattr("fine_bench.leaderboard.consistency.agreements", counting)
    store = fill(tmp_path)
    full = build(store)
    once = 4 * 3 + 2  # the three constants are one and the same score
    assert len(compared) == once
    build(store)
    assert len(compared) == once
    save(store, finished("fine", "self", 3))
    build(store)
    assert len(compared) == once + 3
    # a forced recomputation of one seed failed: the other two still have their pair
    shutil.rmtree(tmp_path / "scores")
    save(store, unfinished(finished("tracin", "self", 2), "failed", "NaN"))
    board = build(store)
    assert board.problems == ()
    assert row_of(board, "tracin").stats["consistency_spearman"].n == 2
    assert row_of(full, "tracin").stats["consistency_spearman"].n == 3


def test_seeds_added_one_by_one_keep_each_pair_once(tmp_path: Path) -> None:
    whole = build(fill(tmp_path / "whole", seeds=tuple(range(6))))
    store = RecordStore(tmp_path / "one by one")
    for seed in range(6):
        save(store, finished("fine", "self", seed))
        board = build(store)
        assert not board.problems
    kept = [c for c in store.scan().consistency if c.estimator == "fine"]
    assert sorted(len(c.scores) for c in kept) == [2, 3, 4, 5, 6]
    assert sorted(pair for c in kept for pair in c.pairs) == list(combinations(range(6), 2))
    known = {k: s for k, s in row_of(whole, "fine").stats.items() if k.startswith("consistency")}
    # without scores: from what is kept alone
    shutil.rmtree(store.scores)
    rebuilt = build(store)
    assert not rebuilt.problems
    assert repr({k: row_of(rebuilt, "fine").stats[k] for k in known}) == repr(known)


def test_a_lost_comparison_is_made_again_and_loses_no_other(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in range(3):
        save(store, finished("fine", "self", seed))
        first = build(store)
    by_size = {len(c.scores): c for c in store.scan().consistency}
    lost = store.records / comparison_file(by_size[2])
    lost.unlink()
    again = build(store)
    assert view.to_json(again) == view.to_json(first)
    (kept,) = store.scan().consistency
    assert sorted(kept.pairs) == [(0, 1), (0, 2), (1, 2)]


def test_a_full_disk_while_caching_keeps_the_numbers_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fill(tmp_path)
    expected = build(fill(tmp_path / "other"))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module, "_write_whole", full)
    board = build(store)
    assert row_of(board, "fine").stats == row_of(expected, "fine").stats
    assert len(board.problems) == 6
    assert "No space left on device" in board.problems[0]
    with pytest.raises(StoreError, match=r"could not write .*leaderboard\.md"):
        view.write(board, tmp_path)
    assert main(["--results", str(tmp_path)]) == 1


def test_a_damaged_record_is_named_and_its_seed_missing(tmp_path: Path) -> None:
    store = fill(tmp_path)
    build(store)
    (path,) = (tmp_path / "records").rglob("fine--self--seed1*.json")
    path.write_text(path.read_text()[:99])
    board = build(store)
    assert "fine--self--seed1" in board.problems[0]
    assert [(c.estimator, c.seed, c.state) for c in board.tables[0].cells] == [
        ("fine", 1, "missing")
    ]
    assert "fine--self--seed1" in view.to_markdown(board)
    assert main(["--results", str(tmp_path)]) == 1


def test_costs_in_cpu_seconds_are_told_from_wall_time(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        if r.estimator != "fine":
            return r
        return replace(r, training={**r.training, "seconds": 0.5, "clock": "cpu"})

    board = build(fill(tmp_path, edit=edit))
    assert (row_of(board, "fine").clock, row_of(board, "tracin").clock) == ("cpu", "")
    words = "Cost in CPU seconds, of all threads, not in wall time: fine."
    for text in (" ".join(printed(board).split()), view.to_markdown(board)):
        assert words in text
    # and what the training took is no mean of both
    assert "plain training, of the CPU, 0.500 [0.500, 0.500] s a seed (n = 3)" in text
    by_wall = {
        name: stat.mean for name, stat in build(fill(tmp_path / "wall")).tables[0].training.items()
    }
    assert board.tables[0].training["seconds"].mean == by_wall["seconds"] != 0.5
    assert "seconds_cpu" not in by_wall
    clocks = view.frame(board).groupby("estimator")["clock"].unique()
    assert (list(clocks["fine"]), list(clocks["tracin"])) == (["cpu"], ["wall"])


def test_seconds_of_two_clocks_are_said_not_to_be_comparable(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        # one seed of fine by the other clock; tracin from checkpoints measured by the other
        clock = "cpu wall" if r.estimator == "tracin" else "cpu" if r.seed == 1 else None
        return r if clock is None else replace(r, training={**r.training, "clock": clock})

    board = build(fill(tmp_path, edit=edit))
    assert row_of(board, "fine").clock == row_of(board, "tracin").clock == "cpu wall"
    words = "Cost partly in CPU seconds and partly in wall time, so its mean says nothing: "
    assert f"{words}constant, fine, tracin." in view.to_markdown(board)
    assert "Cost in CPU seconds" not in view.to_markdown(board)


# ------------------------------------------------------------------------------- looks and CLI


def test_tables_fit_100_columns_even_with_awkward_numbers(tmp_path: Path) -> None:
    def edit(r: RunRecord) -> RunRecord:
        cost = {"seconds": 123456.7 * (1 + r.seed)}
        name = "an_estimator_with_quite_a_long_name_" + r.estimator
        return replace(r, cost=cost, estimator=name)

    def awkward(r: RunRecord) -> RunRecord:
        # after reading: a stored record that says a negative AUROC is refused
        metrics = dict.fromkeys(r.metrics, -0.9876 + 0.1 * r.seed)
        return replace(r, metrics={**metrics, "n_bad": 12})

    store = fill(tmp_path, edit=edit)
    records = [awkward(r) for r in newest(store.scan().records)]
    board = build_from(records, Comparisons(store, ()))
    text = printed(board)
    assert max(map(len, text.splitlines())) <= 100
    assert "-0.888 " in text
    assert "-.988–-.788 " in text
    assert "123,457–370,370" in text
    assert "…" not in text  # nothing is cut away


def test_names_stay_whole_beside_long_headings(tmp_path: Path) -> None:
    name = "confident_learning"  # the longest of ours

    def edit(r: RunRecord) -> RunRecord:
        numbers = {"stable_recall": 0.5, "fidelity": 0.5, "fidelity_of_ceiling": 0.6}
        estimator = name if r.estimator == "fine" else r.estimator
        return replace(r, metrics={**r.metrics, **numbers}, estimator=estimator)

    text = printed(build(fill(tmp_path, edit=edit)))
    assert max(map(len, text.splitlines())) <= 100
    for heading in ("recall@rate ↑", "precision ↑", "all runs ↑", "Spearman ↑"):
        assert heading in text  # each whole, on one line
    assert text.count(f" {name} ") >= 4


def test_table_shows_means_with_intervals(tmp_path: Path) -> None:
    board = build(fill(tmp_path))
    stat = row_of(board, "tracin").stats["average_precision"]
    short = f"{stat.mean:.3f} {stat.lower:.3f}–{stat.upper:.3f}".replace(" 0.", " .")
    assert short.replace("–0.", "–.") in printed(board)
    assert f"{stat.mean:.3f} [{stat.lower:.3f}, {stat.upper:.3f}]" in view.to_markdown(board)


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    parsed = json.loads(view.to_json(build(fill(tmp_path))), parse_constant=refuse)
    row = next(r for r in parsed["tables"][0]["rows"] if r["estimator"] == "constant")
    assert row["stats"]["consistency_spearman"] == {
        "mean": None,
        "lower": None,
        "upper": None,
        "n": 3,
    }


@pytest.mark.parametrize("form", ["table", "md", "csv", "json"])
def test_cli_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    store = fill(tmp_path)
    assert main(["--results", str(tmp_path), "--format", form]) == 0
    out, err = capsys.readouterr()
    assert "leaderboard.md" in err
    board = build(store)
    if form == "table":
        assert "AUROC" in out
        assert max(map(len, out.splitlines())) <= 100
    else:
        assert out == getattr(view, f"to_{'markdown' if form == 'md' else form}")(board)
    assert (tmp_path / "leaderboard.md").read_text() == view.to_markdown(board)
    assert (tmp_path / "leaderboard.csv").read_text() == view.to_csv(board)


def test_names_stay_whole_where_every_column_has_an_interval() -> None:
    heads = ("Spearman", "Kendall", "Jaccard@k", "corrected", "found in all runs", "extra s")
    entries = (*[number(0.802, 0.778, 0.831)] * 5, number(0.00072, 0.00068, 0.00081, None))
    lines = tuple(
        Line("self", (Entry(name), Entry("3"), *entries))
        for name in ("influence_function", "confident_learning", "forgetting_events =")
    )
    columns = tuple(Head(head, "higher") for head in heads)
    sheet = Sheet("", (Head("estimator", left=True), Head("n", count=True), *columns), lines)
    out = io.StringIO()
    show([rich_table(sheet)], Console(file=out, width=100, highlight=False))
    text = out.getvalue()
    assert all(line.entries[0].text in text for line in lines)
    assert "Jaccard@k" in text


def test_a_sweep_that_was_stopped_before_its_first_cell_has_an_empty_table() -> None:
    empty = view.to_csv(Leaderboard(tables=(), problems=()))
    assert empty.strip().split(",") == list(view.COLUMNS)


def test_cli_prints_one_task_but_writes_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path)
    save(store, finished("fine", "self", 0, task="mnist"))
    assert main(["--results", str(tmp_path), "--task", "mnist", "--format", "md"]) == 0
    out = capsys.readouterr().out
    assert "## mnist" in out
    assert "## digits" not in out
    assert "## digits" in (tmp_path / "leaderboard.md").read_text()
    assert main(["--results", str(tmp_path), "--task", "cifar"]) == 2
    assert "no task 'cifar'; there are: digits, mnist" in capsys.readouterr().err


def test_cli_without_records_says_what_to_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--results", str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert "fine-bench run" in err
    assert "--results DIR" in err
    assert not (tmp_path / "none").exists()


def test_cells_of_a_sweep() -> None:
    done = finished("fine", "self", 0)
    failed = unfinished(finished("fine", "self", 1), "failed", "NaN loss")
    skipped = unfinished(finished("trak", "self", 0), "skipped", "too wide")
    again = replace(failed, revision=2, reason="worse")
    planned = [
        (done.setting, "fine", done.estimator_hash, "self", 0),
        (done.setting, "fine", done.estimator_hash, "self", 1),
        (done.setting, "fine", done.estimator_hash, "self", 2),
        (done.setting, "trak", done.estimator_hash, "self", 0),
        ("other", "fine", done.estimator_hash, "self", 0),
    ]
    found = cells([again, done, failed, skipped], planned)
    assert [c.state for c in found] == ["finished", "failed", "missing", "skipped", "missing"]
    assert [c.reason for c in found][1:4] == ["worse", "no record", "too wide"]
    assert [(c.setting, c.estimator, c.estimator_hash, c.target, c.seed) for c in found] == planned


def test_runs_as_a_module_and_needs_no_trainer(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['leaderboard', '--results', {str(tmp_path)!r}]\n"
        "try:\n"
        "    runpy.run_module('fine_bench.leaderboard', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    print(end.code)\n"
        "print([m for m in ('pytorch_lightning', 'hydra', 'wandb') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == ["2", "[]"], done.stderr
    assert "no records below" in done.stderr


# ---------------------------------------------------------------------- scores of some examples

WATCHED = torch.arange(0, N, 3)


def save_watched(
    store: RecordStore, seed: int, watched: torch.Tensor = WATCHED, **changes: Any
) -> RunRecord:
    values = torch.zeros(1, N)
    values[:, watched] = values_of("fine", "self", seed)[:, watched]
    bad = BAD[watched]
    metrics = detection_metrics(suspicion(values[:, watched], "high"), bad)
    extra = {"n_bad": float(bad.sum()), "n_watched": float(len(watched))}
    record = finished("fine_paper", "self", seed, metrics={**metrics, **extra} | changes)
    return store.save(record, InfluenceScores(values, "fine_paper", "self", watched=watched))


def test_a_row_of_some_examples_is_measured_on_them(tmp_path: Path) -> None:
    store = fill(tmp_path)
    saved = [save_watched(store, seed) for seed in (0, 1, 2)]
    board = build(store)
    assert board.problems == ()
    row, table = row_of(board, "fine_paper"), board.tables[0]
    assert (row.label, row.watched, row.k) == ("fine_paper (20 examples)", 20, 4)
    assert table.k == row_of(board, "fine").k == 12
    vectors = [suspicion(store.load_scores(record).values[:, WATCHED], "high") for record in saved]
    pairs = [pairwise_consistency(vectors[a], vectors[b], 4, "high") for a, b in PAIRS]
    expected = sum(pair["jaccard"] for pair in pairs) / 3
    assert row.stats["consistency_jaccard"].mean == pytest.approx(expected)
    text = " ".join(printed(board).split())
    assert "scores a sample of the training examples" in text
    line = next(
        x for x in csv.DictReader(io.StringIO(view.to_csv(board))) if "paper" in x["estimator"]
    )
    assert (line["watched"], line["k"]) == ("20", "4")
    assert view.to_csv(build(store)) == view.to_csv(board)  # from the cache


PAIRS = [(0, 1), (0, 2), (1, 2)]


def test_a_sample_of_all_examples_is_none(tmp_path: Path) -> None:
    """The paper's estimator may test every example; its row stands beside the others."""
    store = fill(tmp_path)
    for seed in (0, 1, 2):
        save_watched(store, seed, torch.arange(N))
    board = build(store)
    assert board.problems == ()
    row = row_of(board, "fine_paper")
    assert (row.label, row.watched, row.k) == ("fine_paper", None, row_of(board, "fine").k)
    assert "scores a sample of the training examples" not in " ".join(printed(board).split())


def test_rows_of_other_examples_are_not_ranked_against_each_other(tmp_path: Path) -> None:
    seeds = tuple(range(6))
    store = fill(tmp_path, seeds)
    for seed in seeds:
        save_watched(store, seed)
    board = build(store)
    assert not row_of(board, "fine_paper").ties  # alone with its sample


def test_seeds_that_score_different_examples_are_not_compared(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    save_watched(store, 0)
    save_watched(store, 1, WATCHED + 1)
    board = build(store)
    assert "consistency_jaccard" not in row_of(board, "fine_paper").stats
    assert any("its seeds score different examples" in problem for problem in board.problems)
    save_watched(store, 2, WATCHED[:-2])
    problems = build(store).problems
    assert any("different numbers of examples" in problem for problem in problems)


def test_infinite_numbers_of_a_group_do_no_harm(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in (0, 1):
        save_watched(store, seed, **{"group/flips/mu": 1.0, "group/flips/upper": math.inf})
    board = build(store)
    stats = row_of(board, "fine_paper").stats
    assert stats["group/flips/mu"].mean == 1.0
    assert not math.isfinite(stats["group/flips/upper"].mean)
    assert "group/flips/mu" in view.to_csv(board)
    json.loads(view.to_json(board))


def test_the_ceilings_of_a_truth_stand_below_its_table(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    seen = {"lds": 0.3, "lds_of_ceiling": 0.375, "truth_version": 1.0, "lds_error": 0.02,
            "outcome_spread": -0.2, "outcome_spread_of_ceiling": -0.25}  # fmt: skip
    other = {"lds": 0.4, "lds_of_ceiling": 0.5, "truth_version": 1.0, "outcome_spread": math.nan,
             "outcome_spread_of_ceiling": math.nan}  # fmt: skip
    for name, more in (("fine", seen), ("tracin", other)):
        record = finished(name, "self", 0)
        record = replace(record, metrics={**record.metrics, **more})
        store.save(record, InfluenceScores(values_of(name, "self", 0), name, "self"))
    text = " ".join(printed(build(store)).split())
    assert "The noise of the truth allows: LDS 0.800, spread over runs 0.800." in text
    assert "LDS ± over queries: half of one run's 95 % bootstrap interval" in text
    assert "Spread over runs: rank correlation, over the queries, of" in text
    assert "0.020" in text
