"""The review page as a file: what it holds, what it refuses, and the decisions read back."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fine_bench.data.views import ImageView, RowView, TextView
from fine_bench.errors import DataError
from fine_bench.report.review.content import DIGITS
from fine_bench.report.review.page import write_review_page
from fine_bench.report.review.thumbnails import LARGEST_PNG, LONGEST_TEXT, SIDE
from fine_bench.store.decisions import Decision, read_decisions
from fine_bench.store.files import OutputError
from support.review import CLASSES, png, review_table


class Blocks(HTMLParser):
    """Text of the elements with an id, and all tags."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.blocks: dict[str, str] = {}
        self._open: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.blocks[self._open] = self.blocks.get(self._open, "") + data


def written(path: Path, table: pd.DataFrame, views: Any = None, **options: Any) -> dict[str, Any]:
    """The blocks of a page, read as a browser reads them."""
    options = {"title": "pets", "class_names": CLASSES, **options}
    seen = views or (lambda rows: [TextView(f"text {row}") for row in rows])
    write_review_page(path, table, seen, **options)
    blocks = Blocks(path.read_bytes()).blocks
    return {name: json.loads(text) for name, text in blocks.items()}


def test_the_table_is_in_the_page_by_rank(tmp_path: Path) -> None:
    table = review_table(30)
    content = written(tmp_path / "r.html", table.sample(frac=1, random_state=0))["content"]
    columns = content["columns"]
    assert content["n"] == 30
    assert content["classes"] == list(CLASSES)
    by_rank = table.sort_values("rank")
    assert columns["row"] == by_rank["row"].tolist()
    assert [CLASSES[k] for k in columns["label"]] == by_rank["label"].tolist()
    # what is missing is null, the suggestion that there is not is -1, what is the same stands once
    assert columns["mu"][3] is None
    assert columns["suggested"][4] == -1
    assert columns["runs"] == {"all": 3}
    expected = [float(f"{x:.{DIGITS}g}") for x in by_rank["score"]]
    assert columns["score"] == expected


def test_markup_in_texts_names_and_classes_is_text(tmp_path: Path) -> None:
    table = review_table(12)
    table["name"] = [f"</script><img src=x onerror=alert({i})>" for i in range(12)]
    bad = "</script><script>alert(1)</script><!--\u2028\ud800"
    blocks = written(tmp_path / "r.html", table, lambda rows: [TextView(bad)] * len(rows),
                     title="<h1>&")  # fmt: skip
    page = Blocks((tmp_path / "r.html").read_bytes())
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert blocks["content"]["columns"]["name"][0].startswith("</script><img")
    assert blocks["views"][0]["t"].startswith("</script><script>alert(1)</script><!--")
    assert b"<h1>&lt;h1&gt;&amp;</h1>" in (tmp_path / "r.html").read_bytes()


def test_the_page_may_ask_for_nothing(tmp_path: Path) -> None:
    written(tmp_path / "r.html", review_table(5))
    page = (tmp_path / "r.html").read_text()
    assert "default-src &#x27;none&#x27;; img-src data:" in page
    assert not re.search(r"https?://", page)


def test_views_stop_where_the_budget_is_spent_and_the_page_says_so(tmp_path: Path) -> None:
    asked: list[int] = []

    def views(rows: Sequence[int]) -> list[ImageView]:
        asked.extend(rows)
        return [ImageView(png(row)) for row in rows]

    table = review_table(1000)
    made = write_review_page(tmp_path / "r.html", table, views, title="t", class_names=CLASSES,
                             budget=50_000)  # fmt: skip
    shown = json.loads(Blocks((tmp_path / "r.html").read_bytes()).blocks["views"])
    assert 0 < made.n_views == len(shown) < 200
    assert len(json.dumps(shown)) < 51_000
    # the first are the most suspicious, and no more are made than one call's
    assert asked == table.sort_values("rank")["row"].tolist()[:200]
    first = base64.b64decode(shown[0]["i"].split(",")[1])
    assert first == png(asked[0])
    page = (tmp_path / "r.html").read_text()
    assert f"The {made.n_views:,} most suspicious rows have their image" in page
    assert made.size == len((tmp_path / "r.html").read_bytes())


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_image_is_made_smaller(tmp_path: Path, mode: str) -> None:
    shape = (500, 300, len(mode))
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert len(file.getvalue()) > LARGEST_PNG
    views = written(tmp_path / "r.html", review_table(5),
                    lambda rows: [ImageView(file.getvalue()) for _ in rows])["views"]  # fmt: skip
    kind, data = views[0]["i"].split(";base64,")
    assert kind == {"RGB": "data:image/jpeg", "RGBA": "data:image/png"}[mode]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (SIDE * 3 // 5, SIDE)


def test_cells_and_long_texts(tmp_path: Path) -> None:
    def views(rows: Sequence[int]) -> list[Any]:
        cells = {f"c{k}": 1 / 3 for k in range(70)} | {
            "c1": None,
            "c2": float("nan"),
            "c3": "a\x1b",
        }
        return [RowView(cells), TextView("x" * 5000), None, *[TextView("")] * (len(rows) - 3)]

    cells, text, none, *_ = written(tmp_path / "r.html", review_table(5), views)["views"]
    assert cells["c"][:4] == [["c0", "0.333333"], ["c1", "missing"], ["c2", "missing"],
                              ["c3", "a\\x1b"]]  # fmt: skip
    assert cells["c"][-1] == ["…", "10 more columns"]
    assert len(cells["c"]) == 61
    assert text["t"] == "x" * LONGEST_TEXT + "… (5,000 characters)"
    assert none is None


def test_the_digest_is_that_of_the_data_and_not_of_the_scores(tmp_path: Path) -> None:
    table = review_table(20)
    digest = written(tmp_path / "a.html", table)["content"]["digest"]
    other = table.assign(score=1.0, mu=2.0, rank=range(20, 0, -1))
    assert written(tmp_path / "b.html", other)["content"]["digest"] == digest
    moved = table.assign(label=CLASSES[0])
    assert written(tmp_path / "c.html", moved)["content"]["digest"] != digest
    assert written(tmp_path / "d.html", table, digest="abc")["content"]["digest"] == "abc"


def test_a_page_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        written(tmp_path / "r.html", review_table(5))
    written(tmp_path / "r.html", review_table(5), force=True)


def _without(name: str) -> pd.DataFrame:
    return review_table(5).drop(columns=name)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (_without("mu_low"), "lacks mu_low; it has row, name"),
        (review_table(5).iloc[:0], "has no rows"),
        (review_table(5).assign(row=[0, 1, 2, 2, 3]), "row 2 stands in the table more than once"),
        (review_table(5).assign(rank=[1, 2, 3.5, 4, 5]), r"rank must be a whole.* got .*3\.5"),
        (review_table(5).assign(row=[0, 1, 2, 3, -4]), "row must be a whole number"),
        (review_table(5).assign(label="bird"), "label 'bird' of row .* is none of the 3 classes"),
        (review_table(5).assign(suggested="bird"), "suggested 'bird'"),
    ],
)  # fmt: skip
def test_a_table_that_is_not_as_described(tmp_path: Path, table: pd.DataFrame, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        written(tmp_path / "r.html", table)
    assert not (tmp_path / "r.html").exists()


def test_classes_and_views_that_are_not_as_described(tmp_path: Path) -> None:
    path, table = tmp_path / "r.html", review_table(5)
    with pytest.raises(ValueError, match="each class once, got cat more than once"):
        written(path, table, class_names=["cat", "cat"])
    with pytest.raises(ValueError, match="each class once, got none"):
        written(path, table, class_names=[])
    with pytest.raises(ValueError, match="views returned 1 views of 5 rows"):
        written(path, table, lambda rows: [None])
    with pytest.raises(TypeError, match="a view is an ImageView, TextView or RowView, got str"):
        written(path, table, lambda rows: ["text"] * len(rows))
    with pytest.raises(ValueError, match="must be the bytes of a PNG file, got 3 bytes"):
        ImageView(b"GIF")


# ------------------------------------------------------------------------ decisions read back

NAMES = ["a.png", "=b", "c,d", "e"]
SAVED = """row,name,decision,label
3,e,reject,
1,'=b,relabel,'=2+3
2,"c,d",accept,dog
"""


def read(tmp_path: Path, text: str) -> list[Decision]:
    (tmp_path / "d.csv").write_text(text)
    return read_decisions(tmp_path / "d.csv", NAMES, [0, 0, 1, 1], ["cat", "dog", "=2+3"])


def test_decisions_are_read_back(tmp_path: Path) -> None:
    expected = [Decision(1, "relabel", 2), Decision(2, "accept", 1), Decision(3, "reject", None)]
    assert read(tmp_path, SAVED) == expected
    assert read(tmp_path, "\ufeff" + SAVED.replace("\n", "\r\n")) == expected  # by a spreadsheet


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("row,name\n1,=b\n", "has the columns row, name; decisions have row, name, decision"),
        ("", "cannot be read as a csv of decisions"),
        (SAVED + "4,f,accept,dog\n", "line 5: row '4' is none of these data.* rows 0 to 3"),
        (SAVED + "x,f,accept,dog\n", "line 5: row 'x' is none"),
        (SAVED + "0,b.png,accept,cat\n", "row 0 is called a.png in these data and b.png"),
        (SAVED + "0,a.png,maybe,cat\n", "the decision is 'maybe'; write one of accept, reject"),
        (SAVED + "0,a.png,relabel,bird\n", "'bird' is none of the classes cat, dog"),
        (SAVED + "3,e,accept,dog\n", "row 3 was decided as reject further up"),
    ],
)
def test_decisions_about_other_data_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, text)
