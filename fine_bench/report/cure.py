"""The cure experiment: which records it uses, its tables and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fine_bench.data.task import TaskData
from fine_bench.errors import DataError
from fine_bench.metrics.cure import ORACLE, RANDOM, WORST_FIRST, CurePoint, removals
from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.benchmark import panels_of, reach, title_of
from fine_bench.report.figures.style import (
    BLACK,
    FORMATS,
    GREY,
    PALE,
    Kind,
    Look,
    canvas,
    looks,
    styled,
    to_bytes,
)
from fine_bench.report.figures.tables import kind_of
from fine_bench.store import spreadsheet
from fine_bench.store.files import write_atomic
from fine_bench.types import RunRecord

TITLES = {
    "remove": "removed",
    "relabel": "relabelled",
    "downweight": "weighted down",
    "remove_best": "removed, least suspicious first",
}


def choose(
    records: Sequence[RunRecord], task: str, setting: str, target: str, methods: Sequence[str]
) -> dict[str, list[RunRecord]]:
    """Finished records of each method by row name, one setting and one data set, seeds in order.

    Raises:
        DataError: nothing to choose from, several settings, or no scores of a method.
    """
    here = [
        r for r in records
        if r.status == "finished" and r.task == task and r.setting.startswith(setting)
    ]  # fmt: skip
    if not here:
        tasks = sorted({r.task for r in records if r.status == "finished"})
        raise DataError(
            f"there are no finished records of task {task!r}"
            + (f" and setting {setting!r}" if setting else "")
            + (f"; there are: {', '.join(tasks)}" if tasks else "; make some with "
               "`fine-bench run`, or name the folder with --results")
        )  # fmt: skip
    places = sorted({(r.setting[:8], r.data_sha256[:8]) for r in here})
    if len(places) > 1:
        raise DataError(
            f"task {task!r} has several settings: {', '.join(s for s, _ in places)}; choose one "
            "with --setting"
        )
    found = {}
    rows = sorted({r.estimator for r in here if r.target == target})
    for name in methods:
        mine = sorted(
            (r for r in here if r.estimator == name and r.target == target), key=lambda r: r.seed
        )
        if not mine:
            raise DataError(
                f"{task} has no finished scores of {name!r} for target {target}; there are: "
                f"{', '.join(rows)}. Choose with --methods"
            )
        if len({r.estimator_hash for r in mine}) > 1:
            raise DataError(
                f"{name!r} stands for several configurations in these records; keep one of them "
                "in a results folder of its own"
            )
        found[name] = mine
    return found


def write(
    results: Path,
    name: str,
    points: Sequence[CurePoint],
    data: TaskData,
    chosen: Mapping[str, Sequence[RunRecord]],
    *,
    target: str,
    weight: float,
) -> list[Path]:
    """Write ``NAME.csv``, ``NAME.md`` and the figure below a results folder.

    Args:
        results, name: where to, and what the files are called.
        points: what was found.
        data: of the task.
        chosen: the records whose scores were used, by row.
        target: of the scores.
        weight: of an example that was weighted down.

    Returns:
        what was written.

    Raises:
        StoreError: a file cannot be written.
    """
    size = (
        f"{data.name}, {data.n_train:,} training examples, {data.truth.n_bad:,} of them bad, "
        f"{len(data.test_x):,} test examples, {points[0].n_seeds} retraining seeds"
    )
    notes = [
        "Test accuracy, mean over retraining seeds with its 95 % bootstrap interval, and how many "
        "of the touched examples are bad.",
        f"Scores of target {target}, run seeds: "
        + "; ".join(f"{m}: {', '.join(str(r.seed) for r in rs)}" for m, rs in chosen.items())
        + ". Retraining seed j uses the scores of the (j mod R)-th of R runs.",
        "Removed examples are in no batch; the number of epochs stays. The new label is the most "
        "probable class besides the given one, by the mean probability over the epochs of an "
        "untreated run of the same seed, on its own training data. A down-weighted example's "
        f"loss counts {weight:g}.",
        "The oracle touches the bad examples first, and relabels to the right label.",
    ]
    setting = next(iter(chosen.values()))[0].setting
    table = frame(points, data.name, setting, target)
    heading = f"Made by `fine-bench cure --task {data.name}`: {size}."
    kinds = {row: kind_of(row, rs[0].config) for row, rs in chosen.items()}
    drawn = figure(points, kinds, size=size, rate=data.truth.rate)
    files = {
        results / f"{name}.csv": spreadsheet.to_csv(table).encode(),
        results / f"{name}.md": markdown(points, heading, notes).encode(),
    }
    for kind in FORMATS:
        files[results / "figures" / f"{name}--{data.name}.{kind}"] = to_bytes(drawn, kind)
    for path, content in files.items():
        write_atomic(path, content)
    return list(files)


def frame(points: Sequence[CurePoint], task: str, setting: str, target: str) -> pd.DataFrame:
    """One row a point, numbers in full."""
    rows = []
    for p in points:
        row: dict[str, object] = {
            "task": task,
            "setting": setting[:8],
            "target": target,
            "method": p.method,
            "treatment": p.treatment,
            "touched": p.touched,
            "share": p.share,
            "bad_touched": p.bad_touched,
            "n_seeds": p.n_seeds,
        }
        for name, interval in (("accuracy", p.accuracy), ("gain", p.gain)):
            row |= {name: interval.mean, f"{name}_lower": interval.lower}
            row[f"{name}_upper"] = interval.upper
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(points: Sequence[CurePoint], heading: str, notes: Sequence[str]) -> str:
    """A table for each treatment, the methods side by side."""
    plain = next(p for p in points if p.treatment == "none")
    text = ["# Cure: does acting on the scores help?", "", heading, ""]
    text += [f"Untreated: test accuracy {_three(plain.accuracy)} (n = {plain.n_seeds} seeds).", ""]
    text += [f"- {note}" for note in notes]
    for treatment in dict.fromkeys(p.treatment for p in points if p.treatment != "none"):
        mine = [p for p in points if p.treatment == treatment]
        methods = list(dict.fromkeys(p.method for p in mine))
        text += ["", f"## {TITLES[treatment]}", "", "| touched | " + " | ".join(methods) + " |"]
        text.append("| ---: |" + " ---: |" * len(methods))
        for k in sorted({p.touched for p in mine}):
            at = {p.method: p for p in mine if p.touched == k}
            share = next(iter(at.values())).share
            cells = [f"{_three(at[m].accuracy)}, {at[m].bad_touched:.0f} bad" for m in methods]
            text.append(f"| {k} ({share:.0%}) | " + " | ".join(cells) + " |")
    return "\n".join([*text, *_areas(points)]) + "\n"


def _areas(points: Sequence[CurePoint]) -> list[str]:
    """The table of areas, where both ends of the orders were removed."""
    found = [removal for removal in removals(points) if removal.gap is not None]
    if not found:
        return []
    most = max(p.share for p in points if p.treatment == WORST_FIRST)
    text = ["", "## areas below the curves of removal", ""]
    text += [
        f"Mean test accuracy from 0 to {most:.0%} removed; the gap is 0 for a random order.",
        "",
    ]
    text += ["| order | worst first ↑ | best first ↓ | gap ↑ |", "| --- | ---: | ---: | ---: |"]
    for one in found:
        cells = [_three(x) for x in (one.worst_first, one.best_first, one.gap) if x is not None]
        text.append(f"| {one.method} | " + " | ".join(cells) + " |")
    return text


def _three(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.lower:.3f}, {interval.upper:.3f}]"


# ------------------------------------------------------------------------------------- figure


@styled
def figure(
    points: Sequence[CurePoint], kinds: Mapping[str, Kind], *, size: str, rate: float
) -> Figure:
    """Test accuracy against the share touched, a panel for each treatment, bars for intervals."""
    treatments = list(dict.fromkeys(p.treatment for p in points if p.treatment != "none"))
    plain = next(p for p in points if p.treatment == "none")
    styles = {
        **looks({**kinds, RANDOM: Kind("control", True)}),
        ORACLE: Look(BLACK, "*", "-", False),
    }
    drawn = canvas(3.4 * len(treatments) + 0.4, 3.9)
    title_of(drawn, "Retrained after touching the most suspicious examples", size)
    panels = panels_of(drawn, treatments)
    for axes, treatment in zip(panels, treatments, strict=True):
        axes.axhspan(plain.accuracy.lower, plain.accuracy.upper, color=PALE, alpha=0.35, zorder=0)
        axes.axhline(plain.accuracy.mean, color=GREY, linewidth=0.9, label="untreated")
        axes.axvline(rate, color=PALE, linewidth=0.9, linestyle=":")
        methods = list(dict.fromkeys(p.method for p in points if p.treatment == treatment))
        for i, method in enumerate(methods):
            mine = sorted(
                (p for p in points if (p.method, p.treatment) == (method, treatment)),
                key=lambda p: p.share,
            )
            look = styles[method]
            below, above = zip(*(reach(p.accuracy) for p in mine), strict=True)
            # moved a little sideways, so that bars do not hide each other
            shift = 0.0018 * (i - (len(methods) - 1) / 2)
            axes.errorbar(
                [p.share + shift for p in mine],
                [p.accuracy.mean for p in mine],
                yerr=[below, above],
                color=look.colour,
                linestyle=look.line,
                marker=look.marker,
                markerfacecolor=look.face,
                markersize=5,
                linewidth=1.3,
                elinewidth=0.8,
                label=method,
            )
        axes.set_title(TITLES[treatment], loc="left")
        axes.set_xlabel("share of the training examples touched")
        axes.set_ylabel("test accuracy")
        axes.set_xlim(left=0)
    handles, labels = panels[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8))
    return drawn
