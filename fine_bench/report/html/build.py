"""From a results folder to the page: reading, drawing and gathering, one step after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.report.figures.collection import Measures, count, draw
from fine_bench.report.figures.style import to_bytes
from fine_bench.report.figures.tables import TableResults, suffixes, together
from fine_bench.report.figures.titles import caption_of
from fine_bench.report.html.examples import Gallery
from fine_bench.report.html.figures import DESCRIPTIONS, LARGEST_SVG, PageFigure, packed, size_of
from fine_bench.report.html.gallery import group_lines, largest_examples, rows_shown
from fine_bench.report.html.images import TaskExamples, task_examples
from fine_bench.report.html.page import TableSection, page
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import TruthError, find, folders
from fine_bench.store.records import RecordStore

Step = Callable[[str], None]

MADE_BY = ("commit", "fine_bench", "python", "torch", "pytorch_lightning", "numpy", "cpu", "gpu",
           "threads", "platform")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The page, and what went wrong on the way."""

    html: bytes
    problems: tuple[str, ...]


def steps(found: Sequence[TableResults]) -> int:
    """How often ``make`` will call ``step``, at most."""
    return count(found) + 2 * len(found)


def make(
    store: RecordStore,
    board: Leaderboard,
    found: Sequence[TableResults],
    *,
    examples: int,
    rows: Sequence[str] = (),
    images: bool = True,
    step: Step = lambda _: None,
) -> Report:
    """Draw the figures of all tables and put the page together.

    Args:
        store: the results folder.
        board: its leaderboard, or a part of it.
        found: the results of that board's tables.
        examples: how many a gallery shows.
        rows: estimators whose galleries are shown; none chooses by itself.
        images: whether data sets may be read for the examples' images.
        step: called before each part of the work with its name.
    """
    names = suffixes(board.tables)
    suffix = [names[s.table.task, s.table.setting, s.table.data] for s in found]
    problems: list[str] = []
    figures = _figures(found, suffix, step)
    sections = []
    for results, name in zip(found, suffix, strict=True):
        step(f"gallery of {results.table.task}")
        truth = _truth(store, results, problems)
        galleries = _galleries(results, examples, rows, truth)
        step(f"images of {results.table.task}")
        sections.append(
            TableSection(
                results.table,
                name,
                figures.pop(name, ()),
                galleries,
                _task_examples(results, images and any(gallery.examples for gallery in galleries)),
                truth,
                _made_by(results),
                results.spreads,
                results.ends,
            )
        )
    general = [p for rest in figures.values() for p in rest if p.drawn]
    problems += [line for results in found for line in results.problems]
    unique = tuple(together(problems))
    return Report(page(board, sections, general, unique), unique)


def _figures(
    found: Sequence[TableResults], suffix: Sequence[str], step: Step
) -> dict[str, list[PageFigure]]:
    """Figures by the suffix of their table; those of no table under the empty suffix."""
    figures: dict[str, list[PageFigure]] = {}
    for drawn in draw(found, suffix, Measures()):
        step(drawn.name)
        kind = next((name for name in DESCRIPTIONS if drawn.name.startswith(name)), drawn.name)
        item = PageFigure(kind, drawn.name, reason=drawn.reason)
        if drawn.figure is not None:
            item = _drawing(item, drawn.figure)
        figures.setdefault(drawn.name.removeprefix(kind), []).append(item)
    return figures


def _drawing(item: PageFigure, figure: Figure) -> PageFigure:
    """The figure as the page holds it: drawn once, a vector drawing unless that is too heavy."""
    svg = to_bytes(figure, "svg")
    width, height = size_of(svg)
    small = packed(svg)
    if len(small) > LARGEST_SVG:
        return replace(item, png=to_bytes(figure, "png"), width=width, height=height)
    return replace(item, svg=small, width=width, height=height)


def _galleries(
    results: TableResults, count: int, rows: Sequence[str], truth: Truth | None
) -> list[Gallery]:
    galleries = []
    for target in results.targets:
        for row in rows_shown(results, target, rows):
            # what retraining shows of an example is its influence on itself
            known = truth if target == "self" else None
            shown = largest_examples(results, row, count, known)
            title = caption_of(target, results.ends)
            auroc = row.stats["auroc"].mean if "auroc" in row.stats else math.nan
            galleries.append(
                Gallery(row.label, target, shown, group_lines(results, row), title, auroc)
            )
    return galleries


def _truth(store: RecordStore, results: TableResults, problems: list[str]) -> Truth | None:
    try:
        return find(folders(store.root), results.table.data, results.table.setting)
    except TruthError as error:
        problems.append(str(error))
        return None


def _task_examples(results: TableResults, wanted: bool) -> TaskExamples:
    if not wanted:
        return TaskExamples(None, "they were not asked for")
    record = next(iter(results.records.values()), None)
    options: Any = {} if record is None else record.config.get("task", {})
    if not isinstance(options, Mapping):
        options = {}
    return task_examples(options, results.table.data)


def _made_by(results: TableResults) -> dict[str, list[Any]]:
    """Distinct values of what describes code and machine, over the table's records."""
    found: dict[str, list[Any]] = {}
    for record in results.records.values():
        for name in MADE_BY:
            value = record.environment.get(name)
            if value is not None and value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: sorted(map(str, values)) for name, values in found.items()}
