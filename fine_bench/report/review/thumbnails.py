"""What the rows look like: images, texts and cells, the most suspicious first, as many as fit."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from fine_bench.data.views import ImageView, RowView, TextView, View
from fine_bench.terminal import visible_lines

Views = Callable[[Sequence[int]], Sequence[View | None]]
"""From positions in the data to what is seen there; None where nothing can be shown."""

AT_ONCE = 200
"""Rows asked for in one call."""
LARGEST_PNG = 16_000
"""Bytes of an image beyond which a smaller copy is taken."""
SIDE = 160
"""Pixels of the longer side of such a copy."""
LONGEST_TEXT = 2_000
MOST_CELLS = 60
LONGEST_CELL = 200


def gather(rows: Sequence[int], views: Views, budget: int) -> list[Any]:
    """Views of the first rows, until their bytes are spent.

    Args:
        rows: positions in the data, the most suspicious first.
        views: what is seen there. It is asked for ``AT_ONCE`` rows at a time and only for those
            that are needed.
        budget: bytes of the page that may go to them.

    Returns:
        A list for the page, no longer than ``rows``: an image as ``{"i": data}``, a text as
        ``{"t": words}``, cells as ``{"c": [[column, value], …]}``, None for what cannot be shown.

    Raises:
        ValueError: another number of views than of rows.
        TypeError: something that is no view.
    """
    found: list[Any] = []
    spent = 0
    for start in range(0, len(rows), AT_ONCE):
        asked = list(rows[start : start + AT_ONCE])
        got = list(views(asked))
        if len(got) != len(asked):
            raise ValueError(f"views returned {len(got)} views of {len(asked)} rows; one a row")
        for view in got:
            entry = None if view is None else _entry(view)
            spent += len(json.dumps(entry, ensure_ascii=False).encode("utf-8", "replace")) + 1
            if spent > budget:
                return found
            found.append(entry)
    return found


def _entry(view: View) -> dict[str, Any]:
    if isinstance(view, ImageView):
        return {"i": _image(view.png)}
    if isinstance(view, TextView):
        return {"t": _clipped(view.text, LONGEST_TEXT)}
    if isinstance(view, RowView):
        cells = [[_clipped(k, LONGEST_CELL), _cell(v)] for k, v in view.cells.items()]
        more = len(cells) - MOST_CELLS
        if more > 0:
            cells = [*cells[:MOST_CELLS], ["…", f"{more:,} more columns"]]
        return {"c": cells}
    raise TypeError(f"a view is an ImageView, TextView or RowView, got {type(view).__name__}")


def _cell(value: object) -> str:
    if value is None or value != value:
        return "missing"
    if isinstance(value, float):
        return f"{value:.6g}"
    return _clipped(str(value), LONGEST_CELL)


def _clipped(text: str, longest: int) -> str:
    shown = visible_lines(text)
    if len(shown) <= longest:
        return shown
    return f"{shown[:longest]}… ({len(shown):,} characters)"


def _image(png: bytes) -> str:
    """A data address; a large image as a smaller JPEG, or PNG where parts of it are transparent."""
    if len(png) <= LARGEST_PNG:
        return f"data:image/png;base64,{base64.b64encode(png).decode()}"
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        clear = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        small = image.convert("RGBA" if clear else "RGB")
    small.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    if clear:
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=85)
    kind = "png" if clear else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
