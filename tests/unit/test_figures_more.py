"""Quality against cost, fidelity and its ceiling, trade-off curves, consistency by source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from fine_bench.leaderboard.build import build
from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures import costs, fidelity, randomness, tradeoff
from fine_bench.report.figures.benchmark import MethodPoint
from fine_bench.report.figures.collection import Measures, by_source
from fine_bench.report.figures.requirements import LeftOutError
from fine_bench.report.figures.style import Kind, looks
from fine_bench.report.figures.tables import TableResults, table_results
from fine_bench.report.figures.theory import Trace
from fine_bench.store.records import RecordStore
from fine_bench.theory.families import GaussianTradeOff
from support.report_results import fill, record_of, scores_of

LOOKS = looks(
    {
        "fine": Kind("f-INE", False),
        "tracin": Kind("tracin", False),
        "mean_loss": Kind("control", True),
        "random": Kind("control", True),
        "constant": Kind("control", True),
    }
)


def texts(figure: Figure) -> str:
    found = figure.findobj(Text)
    return "\n".join(t.get_text() for t in found if isinstance(t, Text))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if isinstance(axes, Axes)]


def interval(mean: float, reach: float = 0.01) -> Interval:
    return Interval(mean, mean - reach, mean + reach)


def results_of(root: Path) -> list[TableResults]:
    store = RecordStore(root)
    return table_results(store, build(store), store.scan())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("more")
    fill(root)
    return root


# ---------------------------------------------------------------------------------------- cost


def test_controls_that_guess_are_written_below_the_axis() -> None:
    points = [
        MethodPoint("fine", interval(2.0), interval(0.95), 3),
        MethodPoint("mean_loss", interval(0.5), interval(0.9), 3),
        MethodPoint("random", interval(0.001, 0.0), interval(0.51), 3),
        MethodPoint("constant", interval(0.001, 0.0), interval(float("nan")), 3),
    ]
    panel = costs.CostPanel("auroc", points)
    figure = costs.cost_and_quality({"self": panel}, LOOKS, size="n = 3")
    (axes,) = panels(figure)
    assert axes.get_xscale() == "log"
    low, high = axes.get_xlim()
    assert low < 0.5 < 2.0 < high < 10
    assert "off the scale: constant, undefined, 0.001 s" in axes.get_xlabel()
    assert "off the scale: random, 0.51, 0.001 s" in axes.get_xlabel()
    assert "fine" in texts(figure)


def test_the_most_telling_measure_is_drawn(results: Path) -> None:
    (results,) = results_of(results)
    figure = costs.draw(results)
    labels = [axes.get_ylabel() for axes in panels(figure)]
    assert labels == ["fidelity: Spearman with the μ of retraining", "detection: AUROC"]


def test_cost_needs_seconds_and_a_measure(tmp_path: Path) -> None:
    scores = scores_of("fine", "self", 0)
    record = replace(record_of("fine", "self", 0, scores), cost={})
    RecordStore(tmp_path).save(record, scores)
    (results,) = results_of(tmp_path)
    with pytest.raises(LeftOutError, match="no method has both a cost in seconds"):
        costs.draw(results)


def test_what_every_run_finds_is_drawn_against_cost(results: Path, tmp_path: Path) -> None:
    (found,) = results_of(results)
    figure = costs.draw_stable(found)
    labels = [axes.get_ylabel() for axes in panels(figure)]
    assert labels == ["share of the bad examples flagged in every run"] * 2
    row = next(r for r in found.rows("self") if r.label == "fine")
    expected = (row.stats["cost_seconds"].mean, row.stats["consistency_stable_recall"].mean)
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in panels(figure)[0].get_lines()
             if len(line.get_xdata()) == 1]  # type: ignore[arg-type,index]  # fmt: skip
    assert any(pair == pytest.approx(expected) for pair in drawn)
    fill(tmp_path, seeds=(0,))
    (alone,) = results_of(tmp_path)
    with pytest.raises(LeftOutError, match="the scores of at least two seeds"):
        costs.draw_stable(alone)


# ------------------------------------------------------------------------------------ fidelity


def test_methods_are_sorted_and_the_ceiling_is_that_of_the_records(results: Path) -> None:
    (results,) = results_of(results)
    figure = fidelity.draw(results)
    (axes,) = panels(figure)
    assert [t.get_text() for t in axes.get_yticklabels()] == ["fine", "tracin", "constant"]
    assert "undefined: says the same of all examples" in texts(figure)
    xs = [np.unique(np.asarray(line.get_xdata())) for line in axes.get_lines()]
    (ceiling,) = [x[0] for line, x in zip(axes.get_lines(), xs, strict=True)
                  if len(x) == 1 and len(line.get_xdata()) == 2]  # type: ignore[arg-type]  # fmt: skip
    assert ceiling == pytest.approx(0.98)


def test_each_measure_has_one_look_in_every_panel_and_in_the_legend() -> None:
    """A ceiling is drawn as the legend has it, whether its measure is the first of a panel."""
    own = fidelity.FidelityPanel(
        [fidelity.MethodFidelity("fine", 3, {"fidelity": interval(0.9), "fidelity_clean": interval(
            0.8)})], {"fidelity": 0.98, "fidelity_clean": 0.96},
    )  # fmt: skip
    low = Interval(-0.01, -0.2, 0.1)
    queries = fidelity.FidelityPanel(
        [fidelity.MethodFidelity("tracin", 3, {"lds": low})], {"lds": 0.87}
    )
    figure = fidelity.fidelity_and_ceiling({"self": own, "queries": queries}, LOOKS, size="n = 3")
    (legend,) = figure.legends
    said = {t.get_text(): line for t, line in zip(legend.get_texts(), legend.get_lines())}  # noqa: B905
    assert said["all examples or single queries"].get_marker() == "o"
    assert said["clean examples only"].get_marker() == "|"
    for axes, heights in zip(panels(figure), ({0.98: "all", 0.96: "clean"}, {0.87: "single"}),
                             strict=True):  # fmt: skip
        for line in axes.get_lines():
            x = float(np.asarray(line.get_xdata())[0])
            if x in heights:
                (style,) = {v.get_linestyle() for k, v in said.items()
                            if k.startswith(f"ceiling, {heights[x]}")}  # fmt: skip
                assert line.get_linestyle() == style
    assert panels(figure)[1].get_xlim()[0] <= low.lower  # the whole interval is in the panel


def test_fidelity_needs_a_truth(tmp_path: Path) -> None:
    scores = scores_of("fine", "validation", 0)
    RecordStore(tmp_path).save(record_of("fine", "validation", 0, scores), scores)
    (results,) = results_of(tmp_path)
    with pytest.raises(LeftOutError, match="no record was compared with retraining"):
        fidelity.draw(results)


# ------------------------------------------------------------------------------------- curves


def test_curves_follow_the_samples_whatever_their_sign() -> None:
    draw_ = np.random.default_rng(0)
    q = draw_.normal(size=4000)
    step = np.arange(4000.0)
    up, down = (Trace(name, step, q + shift, draw_.normal(size=4000)) for name, shift in
                (("up", 1.0), ("down", -1.0)))  # fmt: skip
    figure = tradeoff.tradeoff_curves([up, down], "n = 4,000")
    alpha = np.linspace(0, 1, 401)
    for axes in panels(figure):
        measured = next(x for x in axes.get_lines() if x.get_label() == "from the samples")
        gap = np.abs(np.asarray(measured.get_ydata()) - GaussianTradeOff(1.0)(alpha))
        assert gap.max() < 0.04
        assert any(str(x.get_label()).startswith("Gaussian, |μ| = ") for x in axes.get_lines())


# ------------------------------------------------------------------------------------- sources


def with_sources(root: Path, *kinds: str) -> list[TableResults]:
    """One table a source, all of one task."""
    fixed = {
        "both": {},
        "order": {"init_seed": 0},
        "initialisation": {"order_seed": 0},
        "none": {"init_seed": 0, "order_seed": 0},
    }
    store = RecordStore(root)
    for number, kind in enumerate(kinds):
        for estimator in ("fine", "tracin", "constant"):
            for seed in range(3):
                scores = scores_of(estimator, "self", seed + 10 * number)
                record = record_of(estimator, "self", seed, scores)
                trainer: dict[str, Any] = {"lr": 0.1, "init_seed": None, "order_seed": None}
                config = {**record.config, "trainer": {**trainer, **fixed[kind]}}
                setting = f"{number}" * 16
                store.save(replace(record, config=config, setting=setting), scores)
    return results_of(root)


def test_tables_that_differ_in_the_two_seeds_alone_belong_together(tmp_path: Path) -> None:
    found = with_sources(tmp_path, "both", "order", "initialisation", "none")
    assert [randomness.source_of(s) for s in found] == ["both", "order", "initialisation", "none"]
    (family,) = randomness.families(found)
    assert set(family.tables) == {"both", "order", "initialisation"}
    figure = randomness.draw(family, "spearman", "Spearman")
    (axes,) = panels(figure)
    widths = sorted(round(p.get_width(), 6) for p in axes.patches)  # type: ignore[attr-defined]
    expected = [
        row.stats["consistency_spearman"].mean
        for results in family.tables.values()
        for row in results.rows()
        if row.estimator != "constant"
    ]
    assert widths == sorted(round(x, 6) for x in expected)
    assert "constant" not in [t.get_text() for t in axes.get_yticklabels()]
    names = [f"--{s.table.setting[:8]}" for s in found]
    (drawn,) = by_source(found, names, Measures())
    assert drawn.figure is not None
    assert drawn.name == "consistency_by_source--00000000"


LONG = "influence on this task's queries (high is suspicious)"


def cut_off(figure: Figure) -> list[str]:
    """Titles and labels that leave the figure, or reach into the panel to the right."""
    found = []
    for axes in panels(figure):
        beside = [o.bbox.x0 for o in panels(figure) if o.bbox.x0 > axes.bbox.x1]
        right = min([figure.bbox.width, *beside])
        for text in (axes._left_title, axes.title, axes.xaxis.label, axes.yaxis.label):  # type: ignore[attr-defined]
            box = text.get_window_extent()
            end = right if text is axes._left_title else figure.bbox.width  # type: ignore[attr-defined]
            if text.get_text() and (box.x0 < 0 or box.x1 > end or box.y1 > figure.bbox.height):
                found.append(text.get_text())
    return found


def test_titles_and_labels_are_broken_before_they_leave_the_figure() -> None:
    name = "fine_paper (every_n_steps=2, sample=1000, 1,000 examples)"
    line = randomness.MethodLine(name, {"order": interval(0.9)}, {"order": 3})
    titles = {"self": f"target self: {LONG}", "validation": f"target validation: {LONG}"}
    for targets in (["self"], ["self", "validation"]):
        figure = randomness.by_source(
            {key: [line] for key in targets},
            measure="Spearman correlation between runs of a task",
            size="n = 3",
            titles=titles,
        )
        assert cut_off(figure) == []
        assert "mean over pairs of 3 seeds" in panels(figure)[0].get_xlabel().replace("\n", " ")
    points = [MethodPoint("fine", interval(2.0), interval(0.95), 3)]
    figure = costs.cost_and_quality(
        {t: costs.CostPanel("lds", points) for t in titles}, LOOKS, size="n = 3", titles=titles
    )
    assert cut_off(figure) == []


def test_one_source_alone_says_what_to_run(tmp_path: Path) -> None:
    found = with_sources(tmp_path, "order")
    (drawn,) = by_source(found, ["--x"], Measures())
    assert (drawn.name, drawn.figure) == ("consistency_by_source--x", None)
    assert "the runs differ in order alone" in drawn.reason
    assert "trainer.order_seed=0" in drawn.reason


def test_other_recipes_are_other_families(tmp_path: Path) -> None:
    found = with_sources(tmp_path, "both", "both")
    assert [set(f.tables) for f in randomness.families(found)] == [{"both"}, {"both"}]
