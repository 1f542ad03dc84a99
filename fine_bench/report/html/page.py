"""The whole page: head, navigation, an overview, and a page for every table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fine_bench.leaderboard import captions as view
from fine_bench.leaderboard.sensitivity import Spread
from fine_bench.leaderboard.tables import Leaderboard, Table
from fine_bench.report.html.examples import Gallery, galleries_block, groups
from fine_bench.report.html.figures import ORDER, PageFigure, figure_block
from fine_bench.report.html.gallery import CORRELATED_SINCE
from fine_bench.report.html.headlines import Headline, headlines
from fine_bench.report.html.images import TaskExamples
from fine_bench.report.html.markup import Safe, document, join, slug, tag
from fine_bench.report.html.sensitivity import ranges
from fine_bench.report.html.tables import target_tables
from fine_bench.retraining.truth import Truth
from fine_bench.types import End

HERE = Path(__file__).parent
LONGEST = 2000
"""Characters of a problem: it says what to do at its end, and may name every task before."""


@dataclass(frozen=True)
class TableSection:
    """Everything that the page says of one table.

    Attributes:
        table: of the leaderboard.
        name: its files' suffix, unique among the tables.
        figures: its figures.
        galleries: its galleries.
        task_examples: its data, if at hand.
        truth: its ground truth, if there is one.
        made_by: commits, versions and hardware of its records: name → the distinct values.
        spreads: what ranges of options show.
        ends: by target, the suspicious end that the records declare.
    """

    table: Table
    name: str
    figures: Sequence[PageFigure]
    galleries: Sequence[Gallery]
    task_examples: TaskExamples
    truth: Truth | None
    made_by: Mapping[str, Sequence[Any]]
    spreads: Sequence[Spread] = ()
    ends: Mapping[str, End] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The task, with what tells it from its siblings."""
        return self.name.removeprefix("--").replace("--", " · ")

    @property
    def anchor(self) -> str:
        """Of its page."""
        return "task-" + slug(self.name)


def page(
    board: Leaderboard,
    sections: Sequence[TableSection],
    general: Sequence[PageFigure],
    notes: Sequence[str],
) -> bytes:
    """The HTML file.

    Args:
        board: the leaderboard.
        sections: one a table.
        general: figures that belong to no table.
        notes: problems met while reading.
    """
    links = [("overview", "Overview"), *((c.anchor, c.title) for c in sections)]
    body = [
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag(
            "header",
            tag("h1", "fine_bench"),
            tag("p", "Training-data influence under training randomness: results"),
            tag(
                "nav",
                tag("ul", *(tag("li", tag("a", text, href=f"#{a}")) for a, text in links)),
                aria_label="Pages",
            ),
        ),
        tag(
            "main",
            _overview(board, sections, general, notes),
            *(_section(board, section) for section in sections),
            id="main",
            tabindex="-1",
        ),
        tag("p", id="said", class_="unseen", aria_live="polite"),
    ]
    return document(
        title="fine_bench: results",
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        body=join(body),
    )


def _overview(
    board: Leaderboard,
    sections: Sequence[TableSection],
    general: Sequence[PageFigure],
    notes: Sequence[str],
) -> Safe:
    head = ("task", "training examples", "bad", "seeds", "methods", "retraining truth", "state")
    body = [
        tag(
            "tr",
            tag("th", tag("a", c.title, href=f"#{c.anchor}"), scope="row"),
            tag("td", _size(c)),
            tag("td", f"{c.table.k:,}" if c.table.k else "unknown"),
            tag("td", ", ".join(map(str, c.table.seeds))),
            tag("td", len({row.label for row in c.table.rows})),
            tag("td", f"{c.truth.name}, version {c.truth.version}" if c.truth else "none"),
            tag("td", _state(c.table)),
        )
        for c in sections
    ]
    table = tag(
        "table",
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
        class_="plain",
    )
    problems = [view.one_line(line, LONGEST) for line in (*board.problems, *notes)]
    how: tuple[object, ...] = (
        join(
            [
                tag("code", "self"),
                " asks how strongly training on an example moved its own prediction; high scores "
                "are suspicious. ",
                tag("code", "validation"),
                " asks which examples help or harm the queries of the task. Where these are clean, "
                "low scores are suspicious; where they show what a poison does, the task declares "
                "high ones suspicious. The end stands above each table and is never chosen by the "
                "truth.",
            ]
        ),
        "Numbers are means over run seeds, with 95 % bootstrap intervals over seeds below them. "
        "With three seeds such intervals cover about 75 %.",
        "Finding bad labels, finding the same ones again in another run, and saying what "
        "retraining shows are three different questions: a method may lead in one and not in "
        "another.",
        "Click a heading to sort by it, once more to turn the order; the arrow marks the column by "
        "which a table is sorted. A long table shows its first rows until you ask for all.",
    )
    return tag(
        "section",
        tag("h2", "Overview"),
        *headlines([Headline(c.title, c.anchor, c.table) for c in sections]),
        tag("h3", "Tasks"),
        tag("div", table, class_="scroll", role="region", tabindex="0", aria_label="Tasks"),
        tag("h3", "How to read the tables"),
        tag("ul", *(tag("li", line) for line in how)),
        *_problems(problems),
        *([tag("h3", "Theory"), *map(figure_block, general)] if general else []),
        id="overview",
        class_="page",
    )


def _problems(lines: Sequence[str]) -> list[Safe]:
    if not lines:
        return []
    body = tag("ul", *(tag("li", line) for line in lines))
    return [tag("h3", "Problems"), tag("div", body, class_="problems")]


def _size(section: TableSection) -> str:
    if section.truth is not None:
        return f"{section.truth.n_train:,}"
    if section.task_examples.data is not None:
        return f"{section.task_examples.data.n_train:,}"
    n = section.table.options.get("n_train")
    return f"{n:,}" if isinstance(n, int) else "all" if n is None else str(n)


def _state(table: Table) -> str:
    count = {s: sum(c.state == s for c in table.cells) for s in ("failed", "missing", "skipped")}
    bad = [f"{n} {state}" for state, n in count.items() if n and state != "skipped"]
    return ", ".join(bad) if bad else "complete"


def _section(board: Leaderboard, section: TableSection) -> Safe:
    table = section.table
    drawn = sorted(
        section.figures, key=lambda p: ORDER.index(p.figure) if p.figure in ORDER else len(ORDER)
    )
    there, left = [p for p in drawn if p.drawn], [p for p in drawn if not p.drawn]
    missing = (
        tag(
            "details",
            tag(
                "summary",
                f"{len(left)} {'figure' if len(left) == 1 else 'figures'} cannot be drawn from "
                "these records",
            ),
            tag("ul", *map(figure_block, left)),
        )
        if left
        else ""
    )
    with_groups = [gallery for gallery in section.galleries if gallery.groups]
    return tag(
        "section",
        tag("h2", section.title),
        *(tag("p", line, class_="caption") for line in view.caption(table)),
        tag("h3", "Leaderboard"),
        target_tables(table, board.columns, section.ends),
        tag("h3", "Figures"),
        *map(figure_block, there),
        missing,
        *(
            [tag("h3", "Hyperparameter sensitivity"), ranges(section.spreads, section.ends)]
            if section.spreads
            else []
        ),
        tag("h3", "Gallery"),
        galleries_block(section.galleries, section.task_examples, section.truth),
        *(_groups(with_groups)),
        tag("h3", "How it was made"),
        _made_by(section),
        id=section.anchor,
        class_="page",
    )


def _groups(galleries: Sequence[Gallery]) -> list[Safe]:
    if not galleries:
        return []
    parts = [tag("h3", "Groups"), _GROUPS]
    if any(line.old for gallery in galleries for line in gallery.groups):
        parts.append(tag("p", _OLD, class_="hint"))
    return [*parts, *map(groups, galleries)]


_OLD = (
    f"–: of records older than {CORRELATED_SINCE} no interval is shown. Theirs took the samples of "
    "neighbouring steps as independent and are too short; run them again, or let fine-bench audit "
    "compute the interval from the stored samples."
)

_GROUPS = tag(
    "p",
    "The interval is that of μ of one step in this run; the p-value is of the hypothesis that the "
    "group has no influence, by exchanging P and Q within each step. The two are different "
    "tests and may disagree; μ of the run bounds what a reader of all steps could tell.",
    class_="hint",
)


def _made_by(section: TableSection) -> Safe:
    lines = [("setting", [section.table.setting]), ("data", [section.table.data])]
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", join(values, ", ")))
            for name, values in [*lines, *section.made_by.items()]
        ),
        class_="facts",
    )
