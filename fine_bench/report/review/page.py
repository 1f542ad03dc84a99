"""The review page: one file that holds table, thumbnails, style and script."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fine_bench.report.html.markup import Safe, document, join, tag, void
from fine_bench.report.review.content import checked, columns, data_block, digest_of, shown
from fine_bench.report.review.thumbnails import Views, gather
from fine_bench.store.files import write_output

HERE = Path(__file__).parent
BUDGET = 20 * 2**20
"""Bytes of the page that images, texts and cells may take."""

KEYS = (
    ("J, ↓", "next row"),
    ("K, ↑", "row before"),
    ("A", "the label is right"),
    ("X", "remove the row"),
    ("S", "take the suggested label"),
    ("L", "choose another label"),
    ("C", "clear the decision"),
    ("U", "undo the last step"),
    ("N, P", "next page, page before"),
)


@dataclass(frozen=True)
class ReviewPage:
    """What was written.

    Attributes:
        path: the file.
        n_rows: rows that it lists.
        n_views: how many of them, the most suspicious, have an image, text or cells.
        size: bytes.
        digest: of the data that the decisions are about; the browser keeps them under it.
    """

    path: Path
    n_rows: int
    n_views: int
    size: int
    digest: str


def write_review_page(
    path: Path,
    table: pd.DataFrame,
    views: Views,
    *,
    title: str,
    class_names: Sequence[Hashable],
    digest: str | None = None,
    notes: Sequence[str] = (),
    budget: int = BUDGET,
    force: bool = False,
) -> ReviewPage:
    """Write the page on which a person decides about the rows of a data set.

    Every row is listed, by pages; the most suspicious have a thumbnail, text or cells, as many as
    fit into ``budget``, and the page says how many. The csv that it saves has the columns ``row``,
    ``name``, ``decision`` (``accept``: the given label is right, ``reject``: remove the row,
    ``relabel``) and ``label`` (the right one; empty for ``reject``). ``store.decisions`` reads it.

    Args:
        path: of the HTML file.
        table: a line for each row of the data; ``content.checked`` has the columns.
        views: what is seen at positions in the data: ``views(rows)`` returns as many views, None
            for what cannot be shown. Large images are made smaller here.
        title: of the page, for instance the name of the data.
        class_names: all classes, each once.
        digest: of the data; without one, of rows, names and labels.
        notes: sentences for *How to read this page*, for instance what the score is.
        budget: bytes of the page for views.
        force: replace a file that is there.

    Raises:
        ValueError: a table that is not as described.
        OutputError: a file that is there, without ``force``, or that cannot be written.
    """
    rows = checked(table, class_names)
    if digest is None:
        digest = digest_of(rows, class_names)
    seen = gather(rows["row"].tolist(), views, budget)
    content = {
        "digest": digest,
        "n": len(rows),
        "classes": shown(class_names),
        "columns": columns(rows),
    }
    page = document(
        title=f"{title}: review",
        style=(HERE / "review.css").read_text(encoding="utf-8"),
        script=(HERE / "review.js").read_text(encoding="utf-8"),
        body=_body(title, len(rows), len(seen), notes),
        blocks={"content": data_block(content), "views": data_block(seen)},
    )
    write_output(path, page, force)
    return ReviewPage(path, len(rows), len(seen), len(page), digest)


def _body(title: str, n: int, n_views: int, notes: Sequence[str]) -> Safe:
    return join(
        [
            tag("a", "Skip to the rows", href="#rows", class_="skip"),
            tag("header", tag("h1", title), tag("p", f"{n:,} rows, the most suspicious first.")),
            tag("noscript", tag("p", "This page needs JavaScript; it is inside of this file.")),
            _how_to_read(n, n_views, notes),
            _filters(),
            _tools(),
            tag("p", id="warning", class_="warning", role="alert", hidden=True),
            tag(
                "main",
                tag("h2", "Rows", id="rows", tabindex="-1"),
                _pager("above"),
                tag("ol", id="list", class_="rows"),
                _pager("below"),
            ),
            _dialog(),
            tag("p", id="said", class_="unseen", aria_live="polite"),
        ]
    )


def _how_to_read(n: int, n_views: int, notes: Sequence[str]) -> Safe:
    kept = (
        "Every row has its image, text or cells."
        if n_views == n
        else f"The {n_views:,} most suspicious rows have their image, text or cells; the other "
        f"{n - n_views:,} are listed by name, to keep this file small."
    )
    lines = (
        *notes,
        "μ says what training on this row does to what the model predicts for it, with its 95 % "
        "interval.",
        kept,
        "Decisions are kept in this browser, for these data alone. Save them as a csv, and give it "
        "to fine-bench clean --decisions.",
    )
    keys = (tag("div", tag("dt", tag("kbd", k)), tag("dd", does)) for k, does in KEYS)
    return tag(
        "details",
        tag("summary", "How to read this page, and its keys"),
        tag("ul", *(tag("li", line) for line in lines)),
        tag("dl", *keys, class_="keys"),
        class_="how",
    )


def _filters() -> Safe:
    return tag(
        "section",
        tag(
            "div",
            _choice("given", "given label"),
            _choice("suggested", "suggested label"),
            _choice("state", "decision"),
            _choice("sort", "order"),
            tag("label", "name or row", void("input", id="search", type="search")),
            class_="filters",
        ),
        tag("div", id="pairs", class_="pairs", role="group", aria_label="most frequent pairs"),
        aria_label="Filters",
    )


def _tools() -> Safe:
    """Progress, and what is done with all decisions; it stays in sight."""
    file = void("input", id="load", type="file", accept=".csv", class_="unseen")
    return tag(
        "section",
        tag(
            "div",
            tag("progress", id="progress", max="1", value="0", aria_label="rows decided"),
            tag("p", id="counts"),
            class_="done",
        ),
        tag(
            "div",
            _button("undo", "Undo"),
            _button("save", "Save"),
            tag("label", file, "Load", class_="file"),
            _button("forget", "Forget all"),
            tag("label", void("input", id="keys", type="checkbox", checked=True), "keys"),
            class_="buttons",
        ),
        class_="tools",
        aria_label="Decisions",
    )


def _button(name: str, words: str) -> Safe:
    return tag("button", words, id=name, type="button")


def _choice(name: str, words: str) -> Safe:
    return tag("label", words, tag("select", id=name))


def _pager(where: str) -> Safe:
    return tag(
        "nav",
        *(
            tag("button", words, type="button", data_go=go, aria_label=label)
            for go, words, label in (
                ("first", "«", "first page"),
                ("before", "‹", "page before"),
            )
        ),
        tag("span", class_="where"),
        *(
            tag("button", words, type="button", data_go=go, aria_label=label)
            for go, words, label in (("next", "›", "next page"), ("last", "»", "last page"))
        ),
        class_="pager",
        aria_label=f"pages, {where} the rows",
    )


def _dialog() -> Safe:
    return tag(
        "dialog",
        tag(
            "form",
            tag("h2", "Which label is right?", id="asked"),
            tag("label", "label", tag("select", id="chosen")),
            tag(
                "div",
                tag("button", "Take this label", value="take"),
                tag("button", "Cancel", value="", formnovalidate=True),
                class_="buttons",
            ),
            method="dialog",
        ),
        id="relabel",
        aria_labelledby="asked",
    )
