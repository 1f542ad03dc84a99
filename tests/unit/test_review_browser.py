"""The review page in a real browser, without a window, with a hundred thousand rows.

Needs Chromium with its driver on the path (Debian: ``chromium chromium-driver``) and selenium; the
tests are skipped where one is missing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fine_bench.data.views import ImageView, RowView, TextView, View
from fine_bench.report.html.markup import BASE
from fine_bench.report.review.content import DIGITS
from fine_bench.report.review.page import write_review_page
from fine_bench.store.decisions import read_decisions
from support.browser import CHROMIUM, DRIVER, MISSING, asked_for, scheme, start, too_wide, width
from support.review import CLASSES, png, review_table

pytest.importorskip("selenium", reason="selenium is not installed (extra: dev)")

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

if CHROMIUM is None or DRIVER is None:
    pytest.skip(MISSING, allow_module_level=True)

N = 100_000
MARKUP = "</script><img src=x onerror=alert(1)>"


def views(rows: Sequence[int]) -> list[View | None]:
    """An image, a text with markup, and cells, in turn."""
    kinds: tuple[View, ...] = (
        ImageView(png(0)),
        TextView(f"{MARKUP} & 'so on'\nnext line"),
        RowView({MARKUP: "<b>1</b>", "b": 2}),
    )
    return [kinds[row % 3] for row in rows]


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    made = review_table(N)
    made.loc[0, "name"] = MARKUP
    made.loc[1, "name"] = "=HYPERLINK(1), @x"
    return made


@pytest.fixture(scope="module")
def page(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("review") / "review.html"
    write_review_page(path, table, views, title=f"pets {MARKUP}", class_names=CLASSES,
                      budget=100_000)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(page: Path, downloads: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start(tmp_path_factory.mktemp("profile"), page, downloads)
    yield driver
    driver.quit()


@pytest.fixture(autouse=True)
def fresh(browser: Any, page: Path) -> None:
    """Each test begins without decisions."""
    browser.execute_script("localStorage.clear()")
    show(browser, page)
    browser.execute_script("localStorage.clear(); document.activeElement.blur()")


def soon(browser: Any, holds: Callable[[], bool]) -> None:
    """Wait for what the page does in its own time, such as reading a file."""
    slow = WebDriverWait(browser, 20, ignored_exceptions=[StaleElementReferenceException])
    slow.until(lambda _: holds())


def show(browser: Any, page: Path) -> None:
    """Open a page and wait for its rows: a large one is unpacked after it has loaded."""
    browser.get(page.as_uri())
    soon(browser, lambda: bool(rows(browser)))


def press(browser: Any, keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def counts(browser: Any) -> str:
    return str(browser.find_element(By.ID, "counts").text)


def rows(browser: Any) -> list[Any]:
    return list(browser.find_elements(By.CSS_SELECTOR, "#list > li.row"))


def decisions(browser: Any) -> list[str]:
    return [str(row.get_attribute("data-decision")) for row in rows(browser)[:6]]


def current(browser: Any) -> str:
    return str(browser.find_element(By.CSS_SELECTOR, "[aria-current] h3").text)


def click(row: Any, kind: str) -> None:
    row.find_element(By.CSS_SELECTOR, f"[data-kind={kind}]").click()


def test_a_hundred_thousand_rows_are_paged(browser: Any) -> None:
    assert len(rows(browser)) == 50
    assert f"0 of {N:,} rows decided" in counts(browser)
    where = browser.find_element(By.CSS_SELECTOR, ".pager .where")
    assert where.text == f"1–50 of {N:,}"
    browser.find_element(By.CSS_SELECTOR, "[data-go=last]").click()
    assert where.text == f"99,951–{N:,} of {N:,}"
    assert "rank 100,000" in rows(browser)[-1].text
    # rows beyond the budget are there without a view
    assert rows(browser)[-1].find_elements(By.CSS_SELECTOR, ".blank")
    browser.find_element(By.CSS_SELECTOR, "[data-go=first]").click()
    assert where.text.startswith("1–50")


def test_keys_decide_move_on_and_undo(browser: Any) -> None:
    press(browser, "jaxs")  # the first key goes to the row that is marked
    assert decisions(browser) == ["accept", "reject", "relabel", "", "", ""]
    assert f"3 of {N:,} rows decided: 1 right, 1 to remove, 1 relabelled" in counts(browser)
    assert "img_3.png" in current(browser)
    press(browser, "kx")
    assert decisions(browser)[2] == "reject"
    press(browser, "u")
    assert decisions(browser)[2] == "relabel"
    press(browser, "uuu")
    assert decisions(browser) == [""] * 6
    said = browser.find_element(By.ID, "said")
    press(browser, "u")
    assert said.get_property("textContent") == "nothing to undo"
    press(browser, "cn")
    assert "img_50.png" in current(browser)
    press(browser, "p" + Keys.ARROW_DOWN + Keys.ARROW_DOWN + Keys.ARROW_UP)
    assert "HYPERLINK" in current(browser)


def test_keys_do_nothing_where_one_types_or_when_they_are_off(browser: Any) -> None:
    browser.find_element(By.ID, "search").send_keys("ax")
    assert decisions(browser) == []  # no name holds it
    browser.find_element(By.ID, "search").send_keys(Keys.BACKSPACE * 2)
    browser.find_element(By.ID, "keys").click()
    rows(browser)[0].find_element(By.TAG_NAME, "h3").click()
    press(browser, "ax")
    assert decisions(browser) == [""] * 6


def test_buttons_decide_and_take_back(browser: Any, table: pd.DataFrame) -> None:
    click(rows(browser)[2], "suggested")
    assert f"decided: relabel to {table.suggested[2]}" in rows(browser)[2].text
    click(rows(browser)[2], "suggested")
    assert decisions(browser) == [""] * 6
    # nothing is suggested for this row
    button = rows(browser)[4].find_element(By.CSS_SELECTOR, "[data-kind=suggested]")
    assert not button.is_enabled()
    assert "nothing suggested" in rows(browser)[4].text


def test_another_label_is_chosen_in_a_dialog(browser: Any, table: pd.DataFrame) -> None:
    label = next(name for name in CLASSES if name not in (table.label[0], table.suggested[0]))
    press(browser, "l")
    dialog = browser.find_element(By.ID, "relabel")
    chosen = Select(dialog.find_element(By.ID, "chosen"))
    assert chosen.first_selected_option.text == table.suggested[0]
    dialog.find_element(By.CSS_SELECTOR, "button[value='']").click()
    assert decisions(browser)[0] == ""
    press(browser, "l")
    chosen.select_by_visible_text(label)
    dialog.find_element(By.CSS_SELECTOR, "button[value=take]").click()
    assert f"decided: relabel to {label}" in rows(browser)[0].text
    # the given label is no new one
    press(browser, "kl")
    chosen.select_by_visible_text(table.label[0])
    dialog.find_element(By.CSS_SELECTOR, "button[value=take]").click()
    assert decisions(browser)[0] == "accept"


def test_decisions_outlive_the_page_and_stay_with_their_data(
    browser: Any, page: Path, table: pd.DataFrame, tmp_path: Path
) -> None:
    press(browser, "jxa")
    show(browser, page)
    assert decisions(browser)[:3] == ["reject", "accept", ""]
    other = tmp_path / "other.html"
    write_review_page(other, table.head(10), views, title="other", class_names=CLASSES)
    show(browser, other)
    assert decisions(browser) == [""] * 6
    show(browser, page)
    browser.find_element(By.ID, "forget").click()
    assert "0 of" in counts(browser)
    browser.find_element(By.ID, "undo").click()
    assert "2 of" in counts(browser)


def test_pages_of_other_rows_of_the_same_data_leave_each_others_decisions(
    browser: Any, table: pd.DataFrame, tmp_path: Path
) -> None:
    pages = [tmp_path / "first.html", tmp_path / "second.html"]
    for path, some in zip(pages, (table.head(5), table.iloc[3:9]), strict=True):
        write_review_page(path, some, views, title="t", class_names=CLASSES, digest="mine")
    show(browser, pages[0])
    press(browser, "jxxxx")  # rows 0 to 3, of which the other page has the last
    show(browser, pages[1])
    assert decisions(browser) == ["reject", "", "", "", "", ""]
    press(browser, "jjjja")
    show(browser, pages[0])
    assert decisions(browser) == ["reject"] * 4 + [""]
    show(browser, pages[1])
    assert [d for d in decisions(browser) if d] == ["reject", "accept"]


def saved(browser: Any, downloads: Path) -> Path:
    path = downloads / "decisions.csv"
    path.unlink(missing_ok=True)
    browser.find_element(By.ID, "save").click()
    until = time.monotonic() + 20
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)
    return path


def test_the_csv_is_saved_read_and_loaded(
    browser: Any, table: pd.DataFrame, downloads: Path, tmp_path: Path
) -> None:
    press(browser, "jaxs")
    path = saved(browser, downloads)
    by_row = table.sort_values("row")
    labels = [CLASSES.index(name) for name in by_row["label"]]
    found = read_decisions(path, by_row["name"].tolist(), labels, CLASSES)
    expected = {
        (table.row[0], "accept", CLASSES.index(table.label[0])),
        (table.row[1], "reject", None),
        (table.row[2], "relabel", CLASSES.index(table.suggested[2])),
    }
    assert {(d.row, d.kind, d.label) for d in found} == expected
    text = path.read_text()
    assert re.search(r"^\d+,\"'=HYPERLINK\(1\), @x\",reject,$", text, re.MULTILINE)
    browser.find_element(By.ID, "forget").click()
    load = browser.find_element(By.ID, "load")
    load.send_keys(str(path))
    soon(browser, lambda: decisions(browser)[:4] == ["accept", "reject", "relabel", ""])
    warning = browser.find_element(By.ID, "warning")
    assert not warning.is_displayed()
    for wrong, said in (
        ("a,b\n1,2\n", "its first line must be row,name,decision,label"),
        (text + f"{table.row[3]},other.png,accept,cat\n", "so it belongs to other data"),
        (text + "200000,x,accept,cat\n", "line 5: these data have no row 200000"),
        (text + f"{table.row[3]},img_3.png,maybe,cat\n", "accept, reject or relabel, not maybe"),
        (text + f"{table.row[3]},img_3.png,relabel,bird\n", "bird is none of the classes"),
        (text + '1,"x', "a quotation mark is not closed"),
    ):
        file = tmp_path / "wrong.csv"
        file.write_text(wrong)
        load.send_keys(str(file))
        soon(browser, lambda said=said: said in warning.text)
    assert decisions(browser)[:4] == ["accept", "reject", "relabel", ""]


def test_filters_by_pair_decision_and_name(browser: Any, table: pd.DataFrame) -> None:
    where = browser.find_element(By.CSS_SELECTOR, ".pager .where")
    pair = browser.find_element(By.CSS_SELECTOR, "#pairs button")
    pair.click()
    counted = table[table.label != table.suggested].groupby(["label", "suggested"]).size()
    first, second = counted.idxmax()
    assert pair.text == f"{first} → {second} ({counted.max():,})"
    assert where.text == f"1–50 of {counted.max():,}"
    assert pair.get_attribute("aria-pressed") == "true"
    assert all(f"given {first} → suggested {second}" in row.text for row in rows(browser)[:3])
    press(browser, "jx")
    pair.click()
    assert where.text.endswith(f"of {N:,}")
    Select(browser.find_element(By.ID, "state")).select_by_visible_text("remove")
    assert where.text == "1–1 of 1"
    Select(browser.find_element(By.ID, "state")).select_by_visible_text("not decided")
    assert where.text.endswith("of 99,999")
    Select(browser.find_element(By.ID, "state")).select_by_visible_text("all")
    Select(browser.find_element(By.ID, "sort")).select_by_visible_text("μ, largest first")
    assert table.name[table.mu.idxmax()] in rows(browser)[0].text
    browser.find_element(By.CSS_SELECTOR, "[data-go=last]").click()
    assert "μ\n–" in rows(browser)[-1].text  # what has none comes last
    Select(browser.find_element(By.ID, "sort")).select_by_visible_text("likeliest to repeat first")
    shown = table.repeats.map(lambda value: float(f"{value:.{DIGITS}g}"))
    alike = table[shown == shown.max()]  # the page knows no further digits; then by rank
    assert alike.name[alike["rank"].idxmin()] in rows(browser)[0].text
    assert "runs; in another with chance over 0.99" in rows(browser)[0].text
    browser.find_element(By.ID, "search").send_keys("img_4321.png")
    assert len(rows(browser)) == 1


def test_markup_is_text(browser: Any) -> None:
    assert MARKUP in browser.find_element(By.TAG_NAME, "h1").text
    assert MARKUP in rows(browser)[0].text
    shown = browser.find_element(By.ID, "list").text
    assert "</script><img src=x onerror=alert(1)> & 'so on'\nnext line" in shown
    assert "<b>1</b>" in shown
    images = browser.find_elements(By.CSS_SELECTOR, "#list img")
    assert len(images) > 5
    assert all(image.get_property("naturalWidth") == 12 for image in images)


@pytest.mark.parametrize("pixels", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Any, pixels: int) -> None:
    with width(browser, pixels):
        assert not too_wide(browser)
        if pixels == 390:  # large enough for a finger
            sizes = [
                button.size for button in rows(browser)[0].find_elements(By.TAG_NAME, "button")
            ]
            assert min(size["height"] for size in sizes) >= 36
        press(browser, "l")
        assert not too_wide(browser)
        browser.find_element(By.CSS_SELECTOR, "#relabel button[value='']").click()


def test_every_control_has_a_name(browser: Any) -> None:
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    kinds = {"button", "combobox", "searchbox", "checkbox", "image", "progressbar", "group", "link"}
    found: dict[str, list[str]] = {}
    for node in nodes:
        kind = node.get("role", {}).get("value", "")
        if kind in kinds and not node.get("ignored"):
            found.setdefault(kind, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "combobox", "checkbox", "image", "progressbar"} <= set(found)
    found.pop("group", None)
    assert {kind: names.count("") for kind, names in found.items() if "" in names} == {}


def luminance(colour: str) -> float:
    """Of WCAG 2: relative luminance of ``#rrggbb``."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_letters_stand_out(which: int) -> None:
    """At least 4.5 to 1 for every pair of colours that letters and paper have."""
    block = re.findall(r":root \{(.*?)\}", BASE.read_text(), re.DOTALL)[which]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", block))
    for ink in ("ink", "dim", "link", "warn"):
        for paper in ("paper", "band"):
            dark, light = sorted(luminance(colours[name]) for name in (ink, paper))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)


def test_the_dark_scheme_is_followed(browser: Any) -> None:
    colours = set()
    for name in ("light", "dark"):
        with scheme(browser, name):
            script = "return getComputedStyle(document.body).backgroundColor"
            colours.add(browser.execute_script(script))
    assert len(colours) == 2


def test_no_errors_and_no_requests(browser: Any) -> None:
    """Last: the logs hold everything that the tests above did."""
    assert browser.get_log("browser") == []
    assert all(url.startswith(("file:", "blob:")) for url in asked_for(browser))
