"""From a results folder to the page: reading, drawing and gathering, one step after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fine_bench.leaderboard.tables import Leaderboard
from fine_bench.report.figures.collection import Choice, count, draw
from fine_bench.report.figures.output import write
from fine_bench.report.figures.style import FORMATS
from fine_bench.report.figures.tables import Shelf, shelves, suffixes
from fine_bench.report.html.examples import Room
from fine_bench.report.html.figures import SAYS, Plate
from fine_bench.report.html.gallery import exhibits, group_lines, rows_shown
from fine_bench.report.html.images import Album, album
from fine_bench.report.html.page import Chapter, page
from fine_bench.retraining.truth import Truth
from fine_bench.retraining.truth_files import TruthError, find, folders
from fine_bench.store.files import StoreError
from fine_bench.store.records import RecordStore

Step = Callable[[str], None]

MADE_BY = ("commit", "fine_bench", "python", "torch", "pytorch_lightning", "numpy", "cpu", "gpu",
           "threads", "platform")  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The page, and what went wrong on the way."""

    html: bytes
    problems: tuple[str, ...]


def steps(found: Sequence[Shelf]) -> int:
    """How often ``make`` will call ``step``, at most."""
    return count(found) + 2 * len(found)


def make(
    store: RecordStore,
    board: Leaderboard,
    found: Sequence[Shelf],
    *,
    examples: int,
    rows: Sequence[str] = (),
    images: bool = True,
    step: Step = lambda _: None,
) -> Report:
    """Draw the figures of all tables into ``figures/`` and put the page together.

    Args:
        store: the results folder.
        board: its leaderboard, or a part of it.
        found: the shelves of that board's tables.
        examples: how many a gallery shows.
        rows: estimators whose galleries are shown; none chooses by itself.
        images: whether data sets may be read for the examples' images.
        step: called before each part of the work with its name.
    """
    names = suffixes(board.tables)
    suffix = [names[s.table.task, s.table.setting, s.table.data] for s in found]
    problems: list[str] = []
    plates = _plates(store, found, suffix, problems, step)
    chapters = []
    for shelf, name in zip(found, suffix, strict=True):
        step(f"gallery of {shelf.table.task}")
        truth = _truth(store, shelf, problems)
        rooms = _rooms(shelf, examples, rows, truth)
        step(f"images of {shelf.table.task}")
        chapters.append(
            Chapter(
                shelf.table,
                name,
                plates.pop(name, ()),
                rooms,
                _album(shelf, images and any(room.exhibits for room in rooms)),
                truth,
                _made_by(shelf),
                shelf.spreads,
            )
        )
    loose = [p for rest in plates.values() for p in rest if p.svg]
    problems += [line for shelf in found for line in shelf.problems]
    unique = tuple(dict.fromkeys(problems))
    return Report(page(board, chapters, loose, unique), unique)


def _plates(
    store: RecordStore,
    found: Sequence[Shelf],
    suffix: Sequence[str],
    problems: list[str],
    step: Step,
) -> dict[str, list[Plate]]:
    """Figures by the suffix of their table; those of no table under the empty suffix."""
    plates: dict[str, list[Plate]] = {}
    for drawn in draw(found, suffix, Choice()):
        step(drawn.name)
        kind = next((name for name in SAYS if drawn.name.startswith(name)), drawn.name)
        item = Plate(kind, drawn.name, reason=drawn.reason)
        try:
            files = write(drawn, store.root / "figures", FORMATS)
            bytes_of = {path.suffix: content for path, content in files.items()}
            if files:
                item = replace(item, svg=bytes_of[".svg"], png=bytes_of[".png"])
        except StoreError as error:
            problems.append(str(error))
            item = replace(item, reason=str(error))
        plates.setdefault(drawn.name.removeprefix(kind), []).append(item)
    return plates


def _rooms(shelf: Shelf, examples: int, rows: Sequence[str], truth: Truth | None) -> list[Room]:
    rooms = []
    for target in shelf.targets:
        for row in rows_shown(shelf, target, rows):
            # what retraining shows of an example is its influence on itself
            known = truth if target == "self" else None
            shown = exhibits(shelf, row, examples, known)
            rooms.append(Room(row.label, target, shown, group_lines(shelf, row)))
    return rooms


def _truth(store: RecordStore, shelf: Shelf, problems: list[str]) -> Truth | None:
    try:
        return find(folders(store.root), shelf.table.data, shelf.table.setting)
    except TruthError as error:
        problems.append(str(error))
        return None


def _album(shelf: Shelf, wanted: bool) -> Album:
    if not wanted:
        return Album(None, "they were not asked for")
    record = next(iter(shelf.records.values()), None)
    options: Any = {} if record is None else record.config.get("task", {})
    if not isinstance(options, Mapping):
        options = {}
    return album(options, shelf.table.data)


def _made_by(shelf: Shelf) -> dict[str, list[Any]]:
    """Distinct values of what describes code and machine, over the table's records."""
    found: dict[str, list[Any]] = {}
    for record in shelf.records.values():
        for name in MADE_BY:
            value = record.environment.get(name)
            if value is not None and value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: sorted(map(str, values)) for name, values in found.items()}


def shelves_of(store: RecordStore, board: Leaderboard) -> list[Shelf]:
    """The shelves of a board's tables."""
    return shelves(store, board, store.scan())
