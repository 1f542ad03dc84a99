"""Tables and figure of the cure experiment: points in, text and a drawing out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from fine_bench.metrics.cure import ORACLE, RANDOM, CurePoint
from fine_bench.metrics.intervals import Interval
from fine_bench.report.figures.benchmark import panels_of, reach, title_of
from fine_bench.report.figures.style import BLACK, GREY, PALE, Kind, Look, canvas, looks, styled

TITLES = {"remove": "removed", "relabel": "relabelled", "downweight": "weighted down"}


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
    return "\n".join(text) + "\n"


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
