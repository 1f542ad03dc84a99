"""The README's table and figure, and the list of commands of ``docs/index.md``.

``python benchmarks/readme.py`` makes them. Table and figure show a choice of rows of
``results/published/leaderboard.md`` and nothing else: each cell of the table is the text of a cell
there, and the figure draws the same numbers. A row or a number that a task does not have is a dash;
a row that no task has is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from fine_bench.commands import COMMANDS
from fine_bench.leaderboard.captions import BY_RETRAINING
from fine_bench.report.figures.style import BLACK, GREY, Kind, canvas, looks, styled, to_bytes
from fine_bench.retraining.truth_files import load
from fine_bench.store.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
LEADERBOARD = ROOT / "results" / "published" / "leaderboard.md"
README, INDEX = ROOT / "README.md", ROOT / "docs" / "index.md"
IMAGE = ROOT / "results" / "images" / "fidelity.png"

EASY, FITTED = "mnist_mlp", "mnist_mlp_interpolating"
"""The two regimes with a ground truth."""

REGIMES = {
    EASY: "training stops before the flips are fitted",
    FITTED: "training goes on until they are",
}
LIMIT = f"self{BY_RETRAINING}"
FIDELITY, OF_CEILING = "fidelity ↑", "fid. of ceiling ↑"

METHODS: Mapping[str, Kind] = {
    "fine_ekfac": Kind("f-INE", False),
    "fine": Kind("f-INE", False),
    "trak": Kind("trak", False),
    "tracin": Kind("tracin", False),
    "influence_function": Kind("influence_functions", False),
    "grad_dot": Kind("gradient_similarity", False),
    "mean_loss": Kind("control", True),
    "el2n": Kind("control", True),
    "knn_disagreement": Kind("control", True),
    "aum": Kind("control", True),
    "final_loss": Kind("control", True),
    "confident_learning": Kind("control", True),
    "random": Kind("control", True),
}
"""The best variant of each method, *self*, and the controls: rows of the table in this order."""

LIMITS = ("retraining_mu", "retraining_out_of_sample")
"""What retraining itself says, below the methods: rows of no method."""


@dataclass(frozen=True)
class Column:
    """A column of the README: its heading, and whose column of which task it is."""

    heading: str
    task: str
    label: str


COLUMNS = (
    Column("fidelity, flips not fitted", EASY, OF_CEILING),
    Column("fidelity, flips fitted", FITTED, OF_CEILING),
    Column("AP, random flips", EASY, "avg. precision ↑"),
    Column("found in all 6 runs", EASY, "found in all runs ↑"),
    Column("AP, human errors", "cifar10n", "avg. precision ↑"),
    Column("agreement of seeds", EASY, "Spearman ↑"),
    Column("extra s", EASY, "extra s ↓"),
)

Cells = dict[tuple[str, str, str], dict[str, str]]
"""By task, target and row: its cells by heading."""


def read(leaderboard: str) -> Cells:
    """The cells of ``leaderboard.md``, names of rows without their marks.

    Raises:
        ValueError: a task of the table has several settings, which it cannot tell apart.
    """
    cells: Cells = {}
    tasks: list[str] = []
    headings: list[str] = []
    for line in leaderboard.splitlines():
        parts = [part.strip() for part in line.strip("|").split("|")]
        if line.startswith("## "):
            tasks.append(line.removeprefix("## ").split(" · ")[0])
        elif line.startswith("| target"):
            headings = parts
        elif line.startswith("| ") and "---" not in line:
            name = re.sub(r" [=†]+$", "", parts[1])
            cells.setdefault((tasks[-1], parts[0], name), {}).update(
                zip(headings[2:], parts[2:], strict=True)
            )
    twice = sorted({c.task for c in COLUMNS if tasks.count(c.task) > 1})
    if twice:
        raise ValueError(f"several settings of {', '.join(twice)}: name the one that is shown")
    return cells


def table(cells: Cells) -> str:
    """Markdown: a row a method, a column a question.

    Raises:
        ValueError: the leaderboard has no row of that name at all.
    """
    known = {name for _, target, name in cells if target == "self"}
    made_of = {name.split(" (")[0]: name for _, target, name in cells if target == LIMIT}
    lost = sorted(METHODS.keys() - known) + sorted(set(LIMITS) - made_of.keys())
    if lost:
        raise ValueError(f"not in {LEADERBOARD.name}: {', '.join(lost)}")
    lines = [
        "| method | " + " | ".join(column.heading for column in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for name in METHODS:
        shown = [cells.get((c.task, "self", name), {}).get(c.label, "–") for c in COLUMNS]
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    for name in LIMITS:
        shown = [cells.get((c.task, LIMIT, made_of[name]), {}).get(c.label, "–") for c in COLUMNS]
        lines.append(f"| *by retraining:* `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def numbers(cell: str) -> tuple[float, float, float]:
    """``0.961 [0.960, 0.962]`` as mean, lower and upper end."""
    mean, lower, upper = map(float, re.findall(r"-?\d+\.\d+", cell))
    return mean, lower, upper


def ceiling(task: str) -> float:
    """The highest fidelity that the noise of the task's ground truth allows."""
    return load(ROOT / "results" / "ground_truth" / f"{task}.safetensors").published.ceiling


@styled
def figure(cells: Cells) -> Figure:
    """Fidelity of each method in both regimes, with the noise ceiling as a vertical line."""
    look = looks(METHODS)
    drawn = [name for name in METHODS if name != "random"]
    drawn.sort(key=lambda name: -numbers(cells[FITTED, "self", name][FIDELITY])[0])
    result = canvas(8.8, 3.9)
    panels = result.subplots(1, 2, sharey=True)
    for axes, (task, title) in zip(panels, REGIMES.items(), strict=True):
        for y, name in enumerate(drawn):
            mean, lower, upper = numbers(cells[task, "self", name][FIDELITY])
            axes.errorbar(
                mean, y, xerr=[[mean - lower], [upper - mean]], color=look[name].colour,
                marker=look[name].marker, markerfacecolor=look[name].face, linestyle="none",
            )  # fmt: skip
        most = ceiling(task)
        axes.axvline(most, color=GREY, linestyle="--", linewidth=1.2, zorder=1)
        axes.annotate(
            f"ceiling {most:.3f}", (most, 0.03), xycoords=("data", "axes fraction"),
            xytext=(-4, 0), textcoords="offset points", ha="right", color=GREY, fontsize=8,
        )  # fmt: skip
        axes.set_title(title, loc="left")
        axes.set_xlim(0.47, 1.01)
        axes.set_yticks(range(len(drawn)), drawn)
        axes.set_ylim(len(drawn) - 0.4, -0.6)
        axes.set_xlabel("Spearman with the μ of retraining")
    for text, name in zip(panels[0].get_yticklabels(), drawn, strict=True):
        text.set_color(look[name].ink if name.startswith("fine") else BLACK)
    return result


def commands() -> str:
    """A block of all commands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"fine-bench {name:<{width}}{line}" for name, line in COMMANDS.items()]
    return "\n".join(["```text", *lines, "```"])


def filled(text: str, parts: Mapping[str, str]) -> str:
    """The text with what stands between ``<!-- NAME:start -->`` and ``<!-- NAME:end -->`` new."""
    for name, part in parts.items():
        before, rest = text.split(f"<!-- {name}:start -->")
        after = rest.split(f"<!-- {name}:end -->")[1]
        text = f"{before}<!-- {name}:start -->\n{part}\n<!-- {name}:end -->{after}"
    return text


def main() -> int:
    """Rewrite the table, the list of commands and the figure."""
    cells = read(LEADERBOARD.read_text())
    for page, parts in (
        (README, {"table": table(cells)}),
        (INDEX, {"commands": commands()}),
    ):
        write_atomic(page, filled(page.read_text(), parts).encode())
    write_atomic(IMAGE, to_bytes(figure(cells), "png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
