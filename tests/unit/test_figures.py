"""Figures: from records and scores alone, the same bytes every time, nothing left out silently."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.stats import spearmanr

from fine_bench.commands.figures import main
from fine_bench.leaderboard.build import build
from fine_bench.metrics.agreement import agreement
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.gaussianity import curve_fit
from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures import agreement as agreements
from fine_bench.report.figures import benchmark, labels, retraining, runs, theory
from fine_bench.report.figures import recall as recall_figure
from fine_bench.report.figures.collection import Measures, draw, run_samples
from fine_bench.report.figures.style import FORMATS, Kind, canvas, looks, to_bytes
from fine_bench.report.figures.tables import TRUTH, kind_of, table_results
from fine_bench.store.records import RecordStore
from fine_bench.theory.composition import compose
from fine_bench.theory.ordering import compare
from fine_bench.types import SUSPICIOUS_END, InfluenceScores, RunRecord, Target
from support.benchmarks import BENCHMARKS, loaded
from support.records import make_record

N = 80
BAD = torch.arange(N) < 16
CLASSES = {
    "fine": "fine_bench.callback.FINECallback",
    "tracin": "baselines.tracin.TracIn",
    "mean_loss": "baselines.controls.MeanTrainingLoss",
    "constant": "baselines.controls.ConstantScores",
}
SHARP = {"fine": 3.0, "tracin": 1.5, "mean_loss": 2.5}


def scores_of(estimator: str, target: Target, seed: int) -> InfluenceScores:
    if estimator == "constant":
        values = torch.ones(1, N)
    else:
        draw = torch.Generator().manual_seed(100 * seed + len(estimator) + len(target))
        sign = 1.0 if SUSPICIOUS_END[target] == "high" else -1.0
        values = sign * BAD * SHARP.get(estimator, 1.0) + torch.randn(1, N, generator=draw)
    return InfluenceScores(values, estimator, target, extras={TRUTH: BAD})


def paper_scores(seed: int) -> InfluenceScores:
    """Scores of some examples with traces: a bad one, a clean one, a rare strong one, a group."""
    draw = np.random.default_rng(seed)
    n = 1000
    q = draw.normal(size=(4, n))
    p = draw.normal(size=(4, n)) + np.array([[1.0], [0.6], [0.0], [0.2]])
    p[2] += np.where(draw.random(n) < 0.2, 3.0, 0.0)
    auxiliary = np.sin(np.arange(n) / 50)[None] * np.ones((4, 1))
    watched = torch.arange(0, N, 2)
    values = torch.zeros(1, N)
    values[0, watched] = torch.linspace(1, 0, len(watched))
    extras = {
        TRUTH: BAD,
        "trace/p": torch.tensor(p + auxiliary),
        "trace/q": torch.tensor(q + auxiliary),
        "trace/auxiliary": torch.tensor(auxiliary),
        "trace/step": torch.arange(n),
        "trace/subset": torch.tensor([2, 40, 44, -1]),
    }
    return InfluenceScores(values, "fine_paper", "self", watched=watched, extras=extras)


def record_of(estimator: str, target: Target, seed: int, scores: InfluenceScores) -> RunRecord:
    row = suspicion(scores.values, SUSPICIOUS_END[target])
    target_class = CLASSES.get(estimator, "fine_bench.callback.paper.PaperFINECallback")
    metrics = {**detection_metrics(row, BAD), "n_bad": float(BAD.sum())}
    if scores.watched is not None:
        metrics |= {
            "n_watched": float(len(scores.watched)),
            "n_bad": 8.0,
            "group/flips_0_to_2/index": 0.0,
        }
    losses = [2.0 / (epoch + 1) + 0.05 * seed for epoch in range(6)]
    return make_record(
        estimator=estimator,
        target=target,
        seed=seed,
        metrics=metrics,
        cost={"seconds": 1.0},
        data_sha256="da7a" * 16,
        config={"estimator": {"_target_": target_class}, "model": {"name": "mlp"}},
        environment={"commit": "c0ffee", "dirty": False},
        training={"test_accuracy": 0.9, "curves": {"test_loss": losses}},
    )


Edit = Callable[[RunRecord, InfluenceScores], tuple[RunRecord, InfluenceScores | None] | None]


def fill(root: Path, seeds: tuple[int, ...] = (0, 1, 2), edit: Edit | None = None) -> RecordStore:
    store = RecordStore(root)
    for estimator in CLASSES:
        targets: tuple[Target, ...] = ("self", "validation")
        for target in targets:
            for seed in seeds:
                scores = scores_of(estimator, target, seed)
                record = record_of(estimator, target, seed, scores)
                kept = (record, scores) if edit is None else edit(record, scores)
                if kept is not None:
                    store.save(*kept)
    return store


def add_paper(store: RecordStore) -> None:
    for seed in (0, 1):
        scores = paper_scores(seed)
        store.save(record_of("fine_paper", "self", seed, scores), scores)


def run(root: Path, *arguments: str) -> int:
    return main(["--results", str(root), *arguments])


def names(root: Path) -> set[str]:
    return {path.name for path in (root / "figures").iterdir()}


def texts(figure: Figure) -> str:
    """Everything that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


LOOKS = looks(
    {
        "fine": Kind("f-INE", False),
        "tracin": Kind("tracin", False),
        "random": Kind("control", True),
        "constant": Kind("control", True),
    }
)
NAN = float("nan")


# ------------------------------------------------------------------------- from a results folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything, its figures drawn by the command itself, which printed ``out``."""
    root = tmp_path_factory.mktemp("results")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        add_paper(fill(root))
        assert run(root) == 1  # fine_paper lacks seed 2
    (root / "out").write_text(out.getvalue())
    return root


@pytest.fixture
def _unsaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn but their files stay empty, which saves most of the time."""
    monkeypatch.setattr("fine_bench.report.figures.output.to_bytes", lambda figure, kind: b"")


unsaved = pytest.mark.usefixtures("_unsaved")


def test_every_figure_is_written_in_both_formats(complete: Path) -> None:
    stems = {
        "detection_and_consistency--digits",
        "recall_curves--digits",
        "cost_and_quality--digits",
        "cost_and_stable_recall--digits",
        "tradeoff_curves--digits",
        "figure1_losses_vary--digits",
        "figure2_consistency--digits",
        "figure3_equal_means",
        "figure4_crossing--digits",
        "figure5_p_and_q--digits",
        "agreement--digits",
    }
    assert names(complete) == {f"{stem}.{kind}" for stem in stems for kind in FORMATS}
    for path in (complete / "figures").iterdir():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


def test_the_same_records_give_the_same_bytes(complete: Path, tmp_path: Path) -> None:
    for part in ("records", "scores"):
        shutil.copytree(complete / part, tmp_path / part)
    # another process, another hash seed, a user's own Matplotlib style
    (tmp_path / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: yellow\n")
    command = [sys.executable, "-m", "fine_bench", "figures", "--results", str(tmp_path)]
    command += ["--format", "svg"]
    environment = {"MATPLOTLIBRC": str(tmp_path), "PYTHONHASHSEED": "7", "MPLBACKEND": "svg"}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 1, done.stderr
    for path in (complete / "figures").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "figures" / path.name).read_bytes(), path.name


def test_the_same_figure_gives_the_same_png(complete: Path) -> None:
    figure = theory.equal_means()
    to_bytes(figure, "svg")  # what was written before does not matter
    drawn = to_bytes(figure, "png")
    assert drawn == (complete / "figures" / "figure3_equal_means.png").read_bytes()


def test_no_date_and_no_path_in_the_files(complete: Path) -> None:
    svg = (complete / "figures" / "recall_curves--digits.svg").read_text()
    assert "dc:date" not in svg
    assert str(complete) not in svg
    png = (complete / "figures" / "recall_curves--digits.png").read_bytes()
    assert b"Software" not in png
    assert b"Matplotlib" not in png


def test_missing_seeds_are_named(complete: Path) -> None:
    out = (complete / "out").read_text()
    assert "not drawn, missing: fine_paper · self · seed 2: " in out
    assert "fine_paper (40 examples), target self, ranks a sample" in out
    assert (
        "agreement without target validation: no finished record of an estimator fine_paper" in out
    )


def test_traced_subsets_carry_their_names(complete: Path) -> None:
    store = RecordStore(complete)
    (results,) = table_results(store, build(store), store.scan())
    found = run_samples(results)
    assert [found.name(i) for i in range(4)] == [
        "bad example 2",
        "clean example 40",
        "clean example 44",
        "group flips_0_to_2",
    ]
    # what the auxiliary model explains is taken away
    assert abs(float(np.corrcoef(found.q[0], np.sin(found.step / 50))[0, 1])) < 0.1


def test_agreement_shows_the_watched_examples_of_one_run(complete: Path) -> None:
    store = RecordStore(complete)
    found = table_results(store, build(store), store.scan())
    (drawn,) = [d for d in draw(found, ["--digits"], Measures()) if d.name == "agreement--digits"]
    assert drawn.figure is not None
    (axes,) = drawn.figure.axes
    points = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "None"}
    mine, papers = scores_of("fine", "self", 0), paper_scores(0)
    assert papers.watched is not None
    for name, rows in (("bad", BAD[papers.watched]), ("clean", ~BAD[papers.watched])):
        x, y = mine.values[0, papers.watched][rows], papers.watched_values[0, rows]
        np.testing.assert_array_equal(np.asarray(points[name].get_xdata()), x.double().numpy())
        np.testing.assert_array_equal(np.asarray(points[name].get_ydata()), y.double().numpy())
    assert points["bad"].get_marker() != points["clean"].get_marker()
    assert points["bad"].get_color() != points["clean"].get_color()
    written, numbers = texts(drawn.figure), agreement(papers, mine)
    assert "seed 0" in written
    assert "n = 40" in written
    assert f"Spearman {numbers['spearman']:.2f}, slope ".replace("-", "−") in written
    thirds = ", ".join(f"{numbers[f'tercile_{t}/spearman']:.2f}" for t in (1, 2, 3))
    assert f"Spearman in thirds: {thirds};".replace("-", "−") in written


@unsaved
def test_agreement_needs_both_estimators_at_one_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add_paper(fill(tmp_path / "apart", seeds=(2,)))
    run(tmp_path / "apart", "--format", "svg")
    reason = left_out(capsys)["agreement--digits"]
    assert (
        "target self: fine and fine_paper (40 examples) have no finished seed in common" in reason
    )
    add_paper(fill(tmp_path / "alone", edit=lambda r, s: None if r.estimator == "fine" else (r, s)))
    run(tmp_path / "alone", "--format", "svg")
    reason = left_out(capsys)["agreement--digits"]
    assert "target self: no finished record of an estimator fine;" in reason


@unsaved
def test_two_tasks_and_two_settings_do_not_overwrite_each_other(tmp_path: Path) -> None:
    store = fill(tmp_path, seeds=(0,))
    scores = scores_of("fine", "self", 0)
    record = record_of("fine", "self", 0, scores)
    store.save(replace(record, setting="fedcba9876543210"), scores)
    store.save(replace(record, task="odd name/1"), scores)
    assert run(tmp_path, "--format", "svg") == 0
    recall = {name for name in names(tmp_path) if name.startswith("recall")}
    assert recall == {
        "recall_curves--digits--01234567.svg",
        "recall_curves--digits--fedcba98.svg",
        "recall_curves--odd_name_1.svg",
    }


@unsaved
def test_one_task_of_several(tmp_path: Path) -> None:
    store = fill(tmp_path, seeds=(0,))
    scores = scores_of("fine", "self", 0)
    store.save(replace(record_of("fine", "self", 0, scores), task="other"), scores)
    assert run(tmp_path, "--task", "other", "--format", "svg") == 0
    assert {n.partition("--")[2] for n in names(tmp_path)} == {"", "other.svg"}


# --------------------------------------------------------------------------- what is left out


def left_out(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    found = [line.removeprefix("left out: ") for line in lines if line.startswith("left out: ")]
    return dict(line.split(": ", 1) for line in found)


@unsaved
def test_one_seed_has_no_consistency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, seeds=(4,))
    assert run(tmp_path, "--format", "svg") == 0
    reasons = left_out(capsys)
    for name in ("detection_and_consistency", "figure1_losses_vary", "figure2_consistency"):
        assert "only seed 4" in reasons[f"{name}--digits"]
    for name in ("figure5_p_and_q", "agreement"):
        assert "no finished record of an estimator fine_paper" in reasons[f"{name}--digits"]
    # the textbook pair stands in for the traces
    assert names(tmp_path) == {
        "recall_curves--digits.svg",
        "cost_and_quality--digits.svg",
        "figure3_equal_means.svg",
        "figure4_crossing.svg",
    }


@unsaved
def test_records_without_truth_or_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(
        tmp_path,
        seeds=(0, 1),
        edit=lambda r, s: (replace(r, training={}), replace(s, extras={})),
    )
    assert run(tmp_path, "--format", "svg") == 0
    reasons = left_out(capsys)
    assert TRUTH in reasons["recall_curves--digits"]
    assert "training.curves.test_loss" in reasons["figure1_losses_vary--digits"]
    assert "figure2_consistency--digits" not in reasons


@unsaved
def test_traces_that_never_cross_or_are_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path, seeds=(0, 1))
    whole = paper_scores(0)
    equal = {"trace/q": whole.extras["trace/p"]}
    for seed in (0, 1):
        scores = replace(whole, extras={**whole.extras, **equal})
        store.save(record_of("fine_paper", "self", seed, scores), scores)
    assert run(tmp_path, "--format", "svg") == 0
    reasons = left_out(capsys)
    assert (
        "no two of 4 traced subsets have curves that cross" in reasons["figure4_crossing--digits"]
    )
    assert "figure5_p_and_q--digits" not in reasons
    assert "figure4_crossing.svg" in names(tmp_path)
    bare = replace(whole, extras={})
    for seed in (0, 1):
        store.save(record_of("fine_paper", "self", seed, bare), bare)
    assert run(tmp_path, "--format", "svg") == 0
    assert "hold no P and Q samples" in left_out(capsys)["figure5_p_and_q--digits"]


@unsaved
def test_damaged_scores_are_named_and_the_rest_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = fill(tmp_path, seeds=(0, 1))
    (victim,) = store.scores.rglob("tracin--self--seed1*")
    victim.write_bytes(victim.read_bytes()[:-8])
    assert run(tmp_path, "--format", "svg") == 1
    assert victim.name in capsys.readouterr().err
    assert "recall_curves--digits.svg" in names(tmp_path)


@unsaved
def test_failed_seed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(r: RunRecord, s: InfluenceScores) -> tuple[RunRecord, InfluenceScores | None]:
        if (r.estimator, r.target, r.seed) != ("tracin", "self", 1):
            return r, s
        changes: dict[str, Any] = {"metrics": {}, "cost": {}, "scores_sha256": ""}
        return replace(r, status="failed", reason="RuntimeError: out of luck", **changes), None

    fill(tmp_path, edit=edit)
    assert run(tmp_path, "--format", "svg") == 1
    out = capsys.readouterr().out
    assert "not drawn, failed: tracin · self · seed 1: RuntimeError: out of luck" in out


@unsaved
def test_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 2
    assert "no records below" in capsys.readouterr().err
    fill(tmp_path, seeds=(0,))
    assert run(tmp_path, "--task", "mnist") == 2
    assert "no task 'mnist'; there are: digits" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["pdf", "png,gif", ""])
def test_unknown_format(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--format", given])
    assert stop.value.code == 2
    assert "type png, svg or png,svg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="format must be one of"):
        to_bytes(canvas(1, 1), "pdf")


def test_help_is_useful(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("Exit status", "figure5_p_and_q", "--results", "Nothing is", "Example"):
        assert word in out


# ------------------------------------------------------------------------------- single figures


def interval(mean: float, reach: float = 0.01) -> Interval:
    return Interval(mean, mean - reach, mean + reach)


def test_names_do_not_overlap_each_other() -> None:
    draw = np.random.default_rng(3)
    figure = canvas(5, 4.5)
    axes = figure.subplots()
    assert isinstance(axes, Axes)
    x, y = draw.beta(12, 1.5, 16), draw.beta(12, 1.5, 16)
    axes.plot(x, y, "o")
    figure.draw_without_rendering()
    boxes = labels.place(
        axes,
        [labels.Name(f"method {i}", *xy, "black") for i, xy in enumerate(zip(x, y, strict=True))],
    )
    for a, b in combinations(boxes, 2):
        assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])


def test_controls_and_chance_are_told_apart() -> None:
    points = [
        benchmark.MethodPoint("fine", interval(0.95), interval(0.96), 3),
        benchmark.MethodPoint("tracin", interval(0.9), interval(0.93), 2, "300 examples"),
        benchmark.MethodPoint("random", interval(0.0), interval(0.5), 3),
        benchmark.MethodPoint("constant", Interval(NAN, NAN, NAN), interval(0.5), 3),
    ]
    figure = benchmark.detection_and_consistency(
        {"self": points}, LOOKS, x_label="consistency", y_label="detection", size="n = 3 seeds"
    )
    written = texts(figure)
    assert "tracin (300 examples, 2 of 3 seeds)" in written
    assert "off the scale: random, consistency 0.00, detection 0.50" in written
    assert "off the scale: constant, consistency undefined" in written
    assert figure.axes[0].get_xlim()[0] > 0.8
    assert LOOKS["random"].face == "white"
    assert LOOKS["fine"].face != "white"


def test_recall_curves_show_mean_band_and_references() -> None:
    share = np.linspace(0, 1, 11)
    recall = np.stack([np.minimum(1, 4 * share), np.minimum(1, 2 * share)])
    curve = recall_figure.Recall("fine", share, recall)
    figure = recall_figure.recall_curves({"self": [curve]}, LOOKS, rate=0.2, size="n = 2")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert {"optimal", "random order"} <= lines.keys()
    np.testing.assert_allclose(np.asarray(lines["optimal"].get_xdata()), [0, 0.2, 0.6])
    (mine,) = [line for label, line in lines.items() if str(label).startswith("fine")]
    # up to three times the noise rate, and the area is that of the whole curve
    np.testing.assert_allclose(np.asarray(mine.get_ydata()), recall.mean(axis=0)[:8])
    assert mine.get_label() == "fine  0.810"
    assert axes.get_xlim() == pytest.approx((0, 0.6))
    assert len(axes.collections) == 1


def test_many_recall_curves_stand_in_groups() -> None:
    share = np.linspace(0, 1, 11)
    labels = ["fine", "fine_paper", "tracin", "trak", "grad_cos", "random", "mean_loss"]
    kinds = [Kind("f-INE", False), Kind("f-INE (paper)", False), Kind("tracin", False),
             Kind("trak", False), Kind("gradient_similarity", False), Kind("control", True),
             Kind("control", True)]  # fmt: skip
    found = looks(dict(zip(labels, kinds, strict=True)))
    curves = [
        recall_figure.Recall(label, share, np.minimum(1, (1 + i) * share)[None])
        for i, label in enumerate(labels)
    ]
    groups = recall_figure.grouped(curves, found)
    assert {name: [c.label for c in some] for name, some in groups.items()} == {
        "f-INE": ["fine_paper", "fine"],
        "other methods": ["grad_cos", "trak", "tracin"],
        "controls": ["mean_loss", "random"],
    }
    assert list(recall_figure.grouped(curves[:6], found)) == [""]
    figure = recall_figure.recall_curves({"self": curves}, found, rate=0.2, size="n = 1")
    # two references and all seven curves in each panel, its own with a name
    assert [len(axes.lines) for axes in figure.axes] == [9, 9, 9]
    named = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert [len(names) for names in named] == [4, 5, 4]
    assert recall_figure.shown_up_to(0.01) == 0.1
    assert recall_figure.shown_up_to(0.5) == 1.0
    assert recall_figure.points_for(0.5) == recall_figure.POINTS + 1


def test_no_panel_of_the_retraining_curves_is_empty() -> None:
    """Also where the two groups of models do not overlap: curve and fit lie inside the axes."""
    draw = np.random.default_rng(0)
    members = draw.random((200, 3)) < 0.5
    margin = draw.normal(size=(200, 3)) + members * np.array([12.0, 2.0, -0.3])
    seen = []
    for i in range(3):
        fit = curve_fit(members, margin, i, n_simulations=20)
        inside = members[:, i]
        seen.append(retraining.Seen(f"e{i}", margin[inside, i], margin[~inside, i], fit))
    figure = retraining.retraining_curves(seen, size="made up")
    for axes, one in zip(figure.axes[3:], seen, strict=True):
        low, high = axes.get_xlim()
        lines = {str(line.get_label()): line for line in axes.lines}
        for name in ("models", "Gaussian fit"):
            x, y = (np.asarray(v) for v in lines[name].get_data())
            if name == "Gaussian fit":  # a straight line whose distance from y = −x is μ
                np.testing.assert_allclose(x + y, -one.fit.mu)
                x, y = np.full(1, -one.fit.mu / 2), np.full(1, -one.fit.mu / 2)
            assert ((low < x) & (x < high) & (low < y) & (y < high)).any(), (one.name, name)
    assert "no overlap" in figure.axes[3].get_title(loc="left")
    assert "no overlap" not in figure.axes[4].get_title(loc="left")


def test_budgets_in_the_figure_of_costs_stand_clear_of_the_markers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)  # its scripts import each other
    pareto = loaded("pareto")
    draw = np.random.default_rng(0)
    truth = draw.normal(size=300)
    names = ["TracIn|1", "TracIn|3", "TRAK|1", "f-INE in-batch|1", "f-INE in-batch|2"]
    scores = {
        seed: {
            name: torch.from_numpy(truth + (1 + i) * draw.normal(size=300))[None]
            for i, name in enumerate(names)
        }
        for seed in range(3)
    }
    costs = {seed: {name: 0.1 * (1 + i) for i, name in enumerate(names)} for seed in range(3)}
    frame = pareto.measured(scores, costs, None)
    pair = [spearmanr(scores[a]["TRAK|1"][0], scores[b]["TRAK|1"][0])[0]
            for a, b in ((0, 1), (0, 2), (1, 2))]  # fmt: skip
    line = frame.set_index(["family", "budget"]).loc[("TRAK", 1)]
    assert line.consistency == pytest.approx(np.mean(pair))
    assert line.consistency_lower < line.consistency < line.consistency_upper
    assert frame.fidelity.isna().all()
    known = frame.assign(fidelity=frame.consistency, fidelity_lower=frame.consistency - 0.01,
                         fidelity_upper=frame.consistency + 0.02)  # fmt: skip
    figure = pareto.draw(known, "made up", 0.98)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        budgets = [t for t in axes.texts if t.get_text().isdigit()]
        assert len(budgets) == len(names)
        for text in budgets:
            box = text.get_window_extent(renderer)
            points = axes.transData.transform(known[["extra_cost", "fidelity"]].to_numpy())
            assert not any(box.contains(*point) for point in points)
        assert any(len(c.get_segments()) for c in axes.collections)  # intervals
    lines = [a for a in figure.axes[1].lines if a.get_label() == "ceiling of the truth"]
    assert [np.asarray(a.get_ydata()).tolist() for a in lines] == [[0.98, 0.98]]
    without = pareto.draw(frame, "made up")
    assert any("no ground truth" in t.get_text() for t in without.axes[1].texts)


def test_the_shown_example_is_the_median_mover() -> None:
    percent = np.array([[0.0, 50.0, 10.0], [5.0, 90.0, 30.0]])
    assert runs.median_mover([percent]) == 2
    assert runs.median_mover([percent, np.array([[0.0, 0, 0], [100.0, 0, 0]])]) == 1


def test_agreement_marks_thirds_on_both_sides_and_says_what_is_undefined() -> None:
    def compared(x: list[float], y: list[float]) -> agreements.ScorePair:
        ours, papers = (
            InfluenceScores(torch.tensor([v], dtype=torch.float64), "m", "self") for v in (x, y)
        )
        return agreements.ScorePair(np.array(x), np.array(y), None, agreement(papers, ours))

    both = compared([-9.0, 1, -2, 3, 4, -5, 6, -7, 8], [-8.0, 1, -2, 3, 4, -5, 6, -7, 9])
    assert both.cuts == (3.5, 6.5)
    flat = compared([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    few = compared([1.0, 2.0], [1.0, 2.0])
    figure = agreements.agreement(
        {"self": both, "validation": flat, "queries": few}, x_label="x", y_label="y", size="seed 3"
    )
    first, second, third = (axes.get_title(loc="left") for axes in figure.axes)
    places = {float(np.asarray(line.get_xdata())[0]) for line in figure.axes[0].lines[1:]}
    assert places == {-6.5, -3.5, 3.5, 6.5, -9.0}  # and the fitted line, from −9
    assert "Spearman in thirds: 1.00, 1.00, 1.00; cut at |x| = 3.50 and 6.50" in first
    assert "Spearman undefined, slope undefined" in second
    assert "too few examples" in third


def test_undefined_consistency_is_said_and_not_drawn_as_zero() -> None:
    bars = [
        runs.Bar("fine", interval(0.9), interval(0.88), 3),
        runs.Bar("constant", Interval(NAN, NAN, NAN), Interval(NAN, NAN, NAN), 3),
        runs.Bar("random", interval(0.1), interval(-0.02), 3),
    ]
    figure = runs.consistency_bars({"self": bars}, LOOKS, k=16, size="n = 3 seeds")
    assert "undefined: says the same of all examples" in texts(figure)
    assert len(figure.axes[0].patches) == 4
    assert figure.axes[0].get_xlim()[0] < -0.03  # the interval below zero is inside


def test_the_textbook_pair_crosses_and_tends_to_its_limits() -> None:
    pair = theory.analytic_pair()
    assert compare(pair[0].step, pair[1].step).relation == "crossing"
    for subject in pair:
        gaps = [c.gap for c in subject.composed]
        assert gaps == sorted(gaps, reverse=True)
        assert gaps[-1] < 0.01
    # in the limit there is an order
    assert pair[0].composed[-1].limit.mu > pair[1].composed[-1].limit.mu


def test_samples_compose_to_gaussians() -> None:
    draw = np.random.default_rng(0)
    p, q = draw.normal(0.3, 1, 2000), draw.normal(0, 1, 2000)
    subject = theory.measured("shifted", p, q)
    last = subject.composed[-1]
    assert last.limit.mu == pytest.approx(0.3 * 8, rel=0.15)
    alpha = np.linspace(0, 1, 11)
    np.testing.assert_allclose(last.curve(alpha), compose(subject.step, 64).trade_off(alpha))
    assert last.gap < 0.01


def test_crossing_pair_finds_the_planted_one() -> None:
    scores = paper_scores(0)
    p, q = scores.extras["trace/p"].numpy(), scores.extras["trace/q"].numpy()
    auxiliary = scores.extras["trace/auxiliary"].numpy()
    assert theory.crossing_pair(p - auxiliary, q - auxiliary) == (1, 2)
    same = np.tile(np.arange(50.0), (2, 1))
    assert theory.crossing_pair(same, same) is None


def test_equal_means_and_p_and_q() -> None:
    assert "by 0.1 points in the mean" in texts(theory.equal_means())
    draw = np.random.default_rng(1)
    step = np.arange(900.0)
    q = draw.normal(size=900)
    figure = theory.p_and_q([theory.Trace("shifted", step, q + 2.0, q)], "n = 900")
    assert re.search(r"μ per step (1\.9|2\.[01])", texts(figure))
    constant = np.zeros(900)  # vanished gradients are no reason to fail
    theory.p_and_q([theory.Trace("nothing", step, constant, constant)], "n = 900")


def test_looks_are_unique_and_follow_the_class_not_the_name() -> None:
    kinds = {
        name: kind_of(name, {"estimator": {"_target_": path}}) for name, path in CLASSES.items()
    }
    assert kinds["mean_loss"].control
    assert kinds["constant"].control
    assert kinds["fine"] == Kind("f-INE", False)
    assert kinds["tracin"] == Kind("tracin", False)
    other = kind_of("mine", {"estimator": {"_target_": "my_package.deep.method.Mine"}})
    assert other == Kind("method", False)
    assert kind_of("fine_paper", {}) == Kind("f-INE (paper)", False)
    assert kind_of("fine", {}) == Kind("f-INE", False)
    many = {f"method {i}": Kind("f-INE", False) for i in range(6)} | kinds | {"mine": other}
    found = looks(many)
    shapes = [(look.colour, look.marker) for look in found.values()]
    assert len(set(shapes)) == len(shapes)
    assert looks(dict(reversed(list(many.items())))) == found


def test_drawing_leaves_the_users_matplotlib_alone() -> None:
    before = dict(pyplot.rcParams)
    theory.equal_means()
    assert dict(pyplot.rcParams) == before
    assert pyplot.get_fignums() == []
