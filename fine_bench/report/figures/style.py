"""One look for every figure: colours for the colour-blind, shapes for print in grey.

A figure is drawn and saved under ``STYLE`` alone, whatever the user's Matplotlib configuration
says, and holds no date, version or random identifier: the same data give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from textwrap import wrap
from typing import Any, NamedTuple, ParamSpec

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter

from fine_bench.terminal import visible_lines

FORMATS = ("png", "svg")

STYLE: Mapping[str, Any] = {
    "figure.dpi": 160,
    "savefig.dpi": "figure",
    "svg.hashsalt": "fine_bench",
    # letters as text: a third of the bytes of outlines, found by a search, read aloud
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "figure.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 6,
    "hatch.linewidth": 0.6,
}

# Okabe and Ito (2008), without the yellow that vanishes on white
BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
VERMILLION, PURPLE, SKY, BLACK = "#D55E00", "#CC79A7", "#56B4E9", "#000000"
GREY, PALE = "#6e6e6e", "#b5b5b5"

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

_FAMILY_COLOURS = {
    "f-INE": BLUE,
    "f-INE (paper)": BLACK,
    "tracin": VERMILLION,
    "trak": GREEN,
    "influence_functions": ORANGE,
    "gradient_similarity": PURPLE,
}
_INKS = {ORANGE: "#8a5f00", SKY: "#1f6f9f", PURPLE: "#9c4a75"}
_OTHER_COLOURS = (SKY, "#8c564b", "#5e3c99", "#4d4d00")

P = ParamSpec("P")


class Kind(NamedTuple):
    """What decides the look of a method: its family, and whether it is a mere control."""

    family: str
    control: bool


@dataclass(frozen=True)
class Look:
    """How a method is drawn, the same in all figures of a table."""

    colour: str
    marker: str
    line: Any
    control: bool
    family: str = ""

    @property
    def ink(self) -> str:
        """Colour of its name: dark enough to be read on white."""
        return _INKS.get(self.colour, self.colour)

    @property
    def face(self) -> str:
        """Filling of the marker: controls are hollow."""
        return "white" if self.control else self.colour


def looks(methods: Mapping[str, Kind]) -> dict[str, Look]:
    """A look for every method, by its label; independent of the order of ``methods``.

    The family decides the colour, the place in the family the marker and the line; controls are
    grey, hollow and dotted.
    """
    colours = dict(_FAMILY_COLOURS)
    others = sorted({k.family for k in methods.values() if not k.control} - colours.keys())
    for i, family in enumerate(others):
        colours[family] = _OTHER_COLOURS[i % len(_OTHER_COLOURS)]
    seen: dict[str, int] = {}
    first = {family: i for i, family in enumerate(colours)}
    found = {}
    for label, kind in sorted(methods.items()):
        family = "control" if kind.control else kind.family
        i = seen.get(family, 0)
        seen[family] = i + 1
        marker = MARKERS[(i + 2 * first.get(family, 0)) % len(MARKERS)]
        if kind.control:
            line = (0, (1, 1.5 + i))
            found[label] = Look(GREY, MARKERS[i % len(MARKERS)], line, True, "control")
        else:
            line = LINES[i % len(LINES)]
            found[label] = Look(colours[family], marker, line, False, family)
    return found


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let a drawing function work under ``STYLE`` and nothing else, and settle the layout.

    A layout that was computed anew for each file would depend on the files written before.
    """

    @wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style.context(["default", dict(STYLE)]):
            figure = draw(*args, **kwargs)
            settle(figure)
            return figure

    return wrapped


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches, that belongs to no window and to no global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Take all text for text, break what is too long, compute the layout once and keep it."""
    _take_for_text(figure)
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        if _break_long(figure):  # more lines want more room
            figure.draw_without_rendering()
        figure.set_layout_engine("none")


def _break_long(figure: Figure) -> bool:
    """Break titles and labels of panels that would leave the figure or run into the next panel."""
    found = False
    panels = [axes for axes in figure.axes if axes.axison]
    for axes in panels:
        box, edge = axes.bbox, 3.0 * figure.dpi / 72.0
        beside = [o.bbox for o in panels if o.bbox.y0 < box.y1 and o.bbox.y1 > box.y0]
        left = max([edge, *(b.x1 for b in beside if b.x1 <= box.x0)])
        right = min([figure.bbox.width - edge, *(b.x0 - edge for b in beside if b.x0 >= box.x1)])
        middle = (box.x0 + box.x1) / 2
        across = 2 * min(middle - left, right - middle)
        for text, room in (
            (axes._left_title, right - box.x0),  # type: ignore[attr-defined]
            (axes.title, across),
            (axes.xaxis.label, across),
            (axes.yaxis.label, 1.15 * box.height),
        ):
            found |= _broken(text, room)
    return found


def _broken(text: Text, room: float) -> bool:
    """Whether a text was longer than its room, in pixels, and got more lines."""

    def length() -> float:
        box = text.get_window_extent()
        return max(box.width, box.height)  # it may stand upright

    lines = text.get_text().split("\n")
    most = max(map(len, lines))
    if not text.get_visible() or not most or length() <= room:
        return False
    for width in range(most - 1, 11, -1):
        parts = (
            wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in lines
        )
        text.set_text("\n".join("\n".join(part) for part in parts))
        if length() <= room:
            break
    return text.get_text().count("\n") >= len(lines)


def _take_for_text(figure: Figure) -> None:
    """No formulas and no control characters: names in a figure may be anybody's.

    Matplotlib's own formulas, the powers along a logarithmic axis, stay.
    """
    powers = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
                if isinstance(formatter, FuncFormatter):  # names along an axis are one too
                    formatter.func = _shown(formatter.func)
            labels = [*axis.get_majorticklabels(), *axis.get_minorticklabels()]
            if isinstance(axis.get_major_formatter(), LogFormatter):
                powers |= set(map(id, labels))
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if id(text) in powers:
            continue
        text.set_parse_math(False)
        if (shown := visible_lines(text.get_text())) != text.get_text():
            text.set_text(shown)


def _shown(label: Callable[..., str]) -> Callable[..., str]:
    """The same labels, with control characters written out."""
    return lambda *place: visible_lines(label(*place))


def to_bytes(figure: Figure, kind: str) -> bytes:
    """The file of a figure: ``kind`` is one of ``FORMATS``."""
    if kind not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
    # a date or a version in the file would change its bytes from run to run
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    file = io.BytesIO()
    with style.context(["default", dict(STYLE)]):
        if isinstance(figure.get_layout_engine(), PlaceHolderLayoutEngine):
            # with one, savefig draws once more to find a layout that is settled
            figure.set_layout_engine(None)
        figure.savefig(file, format=kind, metadata=metadata)
    return file.getvalue()


def span(values: Iterable[int]) -> str:
    """``3`` for equal numbers, ``2–3`` for others."""
    numbers = sorted(set(values))
    return "–".join(str(n) for n in dict.fromkeys((numbers[0], numbers[-1]))) if numbers else "0"
