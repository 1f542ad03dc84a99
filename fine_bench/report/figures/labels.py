"""Names beside the points of a scatter plot: near their point, over nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import BboxBase
from numpy.typing import NDArray

from fine_bench.terminal import visible_lines

Box = tuple[float, float, float, float]
"""left, bottom, right, top in pixels"""

# distances in points and directions, tried in this order: near before far, beside before above
_RADII = (9.0, 15.0, 23.0, 33.0, 45.0, 60.0, 78.0, 98.0, 120.0)
_ANGLES = (0, 180, 30, 150, -30, 210, 60, 120, -60, 240, 90, 270, 15, 165, -15, 195)


@dataclass(frozen=True)
class Name:
    """A text that belongs to a point, in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _crosses(ends: tuple[float, float, float, float], box: Box) -> bool:
    """Whether the line from (x0, y0) to (x1, y1) passes through the box (Liang and Barsky)."""
    x0, y0, x1, y1 = ends
    enter, leave = 0.0, 1.0
    for start, way, low, high in ((x0, x1 - x0, box[0], box[2]), (y0, y1 - y0, box[1], box[3])):
        if way == 0:
            if not low < start < high:
                return False
            continue
        near, far = sorted(((low - start) / way, (high - start) / way))
        enter, leave = max(enter, near), min(leave, far)
    return enter < leave


def _outside(box: Box, window: BboxBase) -> float:
    """What it costs to leave the panel, by how far."""
    far = max(window.x0 - box[0], box[2] - window.x1, window.y0 - box[1], box[3] - window.y1, 0.0)
    return 1000 * (far > 0) + far


def place(axes: Axes, names: Sequence[Name], bars: Sequence[NDArray[np.float64]] = ()) -> list[Box]:
    """Write the names, each near its point, with a thin line to it where it had to move away.

    Greedy: the most crowded point chooses first; every place around a point is charged for what
    it would cover and for its distance, and the cheapest wins. Nothing is random.

    Args:
        axes: with all points drawn and final limits; the figure's layout must be settled.
        names: what to write.
        bars: lines that should stay visible (error bars), each ``(2, 2)``: two points (x, y).

    Returns:
        The boxes of the texts in pixels, in the order of ``names``.
    """
    figure = axes.figure
    assert isinstance(figure.canvas, FigureCanvasAgg)
    renderer = figure.canvas.get_renderer()  # type: ignore[no-untyped-call]
    scale = figure.dpi / 72.0
    points = axes.transData.transform([(n.x, n.y) for n in names]) if names else np.empty((0, 2))
    ends = [tuple(axes.transData.transform(bar).ravel().tolist()) for bar in bars]
    window = axes.get_window_extent(renderer)
    dot = 5.0 * scale
    dots: list[Box] = [(x - dot, y - dot, x + dot, y + dot) for x, y in points.tolist()]
    crowd = [sum(math.dist(p, q) < 60 * scale for q in points) for p in points]
    boxes: dict[int, Box] = {}
    leaders: list[tuple[float, float, float, float]] = []
    for i in sorted(range(len(names)), key=lambda i: (-crowd[i], i)):
        # as ``style.settle`` will take it
        word = visible_lines(names[i].text)
        text = axes.text(0, 0, word, fontsize=8, color=names[i].colour, parse_math=False)
        size = text.get_window_extent(renderer)
        text.remove()
        width, height = size.width + 2 * scale, size.height + 3 * scale
        best: tuple[float, Box, tuple[float, float], float] | None = None
        x, y = points[i].tolist()
        for radius in _RADII:
            for number, angle in enumerate(_ANGLES):
                away = radius * scale
                cx, cy = away * math.cos(math.radians(angle)), away * math.sin(math.radians(angle))
                left = x + cx if cx > 1e-9 else x + cx - width
                if abs(cx) < 0.3 * away:
                    left = x + cx - width / 2
                box = (left, y + cy - height / 2, left + width, y + cy + height / 2)
                near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
                line = (x, y, near[0], near[1])
                area = width * height
                others = boxes.values()
                charges: tuple[Iterator[float], ...] = (
                    (2000 * _overlap(box, other) / area for other in others),
                    (300 * _overlap(box, d) / area for j, d in enumerate(dots) if j != i),
                    (7.0 for bar in ends if _crosses(bar, box)),
                    (60.0 for other in leaders if _crosses(other, box)),
                    (60.0 for other in others if _crosses(line, other)),
                    (25.0 for j, d in enumerate(dots) if j != i and _crosses(line, d)),
                    iter((_outside(box, window),)),
                )
                cost = 0.25 * radius + 0.1 * number
                limit = math.inf if best is None else best[0] - 1e-9
                for charge in charges:
                    if cost >= limit:  # none is negative: most places lose by the first ones
                        break
                    cost += sum(charge)
                if cost < limit:
                    best = (cost, box, near, radius)
        assert best is not None
        _, box, near, radius = best
        boxes[i] = box
        back = axes.transData.inverted().transform
        left, middle = back((box[0] + scale, (box[1] + box[3]) / 2))
        if radius > _RADII[1]:
            leaders.append((x, y, near[0], near[1]))
            line_to = back(near)
            axes.plot(
                [names[i].x, line_to[0]],
                [names[i].y, line_to[1]],
                color=names[i].colour,
                linewidth=0.5,
                zorder=1.5,
                scalex=False,
                scaley=False,
            )
        written = axes.text(
            left, middle, names[i].text, fontsize=8, color=names[i].colour, va="center", zorder=5
        )
        written.set_in_layout(False)
    return [boxes[i] for i in range(len(names))]
