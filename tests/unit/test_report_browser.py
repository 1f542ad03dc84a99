"""The report in a real browser, without a window: it renders, sorts, and asks for nothing.

Needs Chromium with its driver on the path (Debian: ``chromium chromium-driver``) and selenium; the
tests are skipped where one is missing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fine_bench.commands.report import main
from fine_bench.retraining.truth_files import save
from support.browser import CHROMIUM, DRIVER, MISSING, asked_for, scheme, start, too_wide, width
from support.report_results import fill, record_of, scores_of, truth

pytest.importorskip("selenium", reason="selenium is not installed (extra: dev)")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

if CHROMIUM is None or DRIVER is None:
    pytest.skip(MISSING, allow_module_level=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser") / "results"
    store = fill(root)
    for seed in (0, 1, 2):
        scores = scores_of("tracin", "self", seed + 7)
        own = record_of("tracin", "self", seed, scores)
        told = {"of": "tracin", "base": own.estimator_hash, "changes": {"every": 2},
                "grid": [{"every": 2}, {"every": 4}]}  # fmt: skip
        config = {**own.config, "sensitivity": told}
        name, sha = "tracin@every=2", "beef" * 16
        store.save(replace(own, estimator=name, estimator_hash=sha, config=config), scores)
    save(truth(), root / "ground_truth")
    assert main(["--results", str(root), "--examples", "6"]) == 0
    return root / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = start(tmp_path_factory.mktemp("profile"), page)
    yield driver
    driver.quit()


def visit(browser: Any, name: str) -> None:
    link = browser.find_element(By.LINK_TEXT, name)
    link.click()
    WebDriverWait(browser, 20).until(lambda _: link.get_attribute("aria-current") == "page")


def column(browser: Any, table: Any, number: int) -> list[str]:
    """The values of a column from top to bottom."""
    script = (
        "return Array.from(arguments[0].tBodies[0].rows, "
        "(row) => row.children[arguments[1]].dataset.value)"
    )
    return list(browser.execute_script(script, table, number))


def head(table: Any, label: str) -> Any:
    for found in table.find_elements(By.CSS_SELECTOR, "th[aria-sort]"):
        if found.find_element(By.CSS_SELECTOR, "button span").text == label:
            return found
    raise AssertionError(label)


def test_pages_are_shown_one_at_a_time(browser: Any) -> None:
    pages = browser.find_elements(By.CSS_SELECTOR, "section.page")
    assert [p.is_displayed() for p in pages] == [True, False]
    visit(browser, "digits_mislabel")
    assert [p.is_displayed() for p in pages] == [False, True]
    current = browser.find_elements(By.CSS_SELECTOR, "nav a[aria-current=page]")
    assert [a.text for a in current] == ["digits_mislabel"]
    visit(browser, "Overview")
    assert [p.is_displayed() for p in pages] == [True, False]


def test_a_click_sorts_and_a_second_one_turns_the_order(browser: Any) -> None:
    visit(browser, "digits_mislabel")
    table = browser.find_element(By.CSS_SELECTOR, "table.board")
    heading = head(table, "AUROC")
    number = int(heading.get_property("cellIndex"))
    # the table comes sorted by it, and says so
    assert heading.get_attribute("aria-sort") == "descending"
    values = [float(x) for x in column(browser, table, number)]
    assert values == sorted(values, reverse=True)
    heading.find_element(By.TAG_NAME, "button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert [float(x) for x in column(browser, table, number)] == sorted(values)
    heading.find_element(By.TAG_NAME, "button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    heading.find_element(By.TAG_NAME, "button").click()
    assert "sorted by AUROC, ascending" in browser.page_source
    # what is undefined or absent stays last in both directions, and costs begin with the lowest
    fidelity = head(table, "fidelity")
    number = int(fidelity.get_property("cellIndex"))
    for _ in range(2):
        fidelity.find_element(By.TAG_NAME, "button").click()
        values_ = column(browser, table, number)
        assert [x == "" for x in values_] == [False, False, True, True]
    assert heading.get_attribute("aria-sort") == "none"
    cost = head(table, "extra s")
    cost.find_element(By.TAG_NAME, "button").click()
    assert cost.get_attribute("aria-sort") == "ascending"


def test_the_keyboard_sorts_too(browser: Any) -> None:
    visit(browser, "digits_mislabel")
    table = browser.find_elements(By.CSS_SELECTOR, "table.board")[1]
    heading = head(table, "estimator")
    heading.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert heading.get_attribute("aria-sort") == "ascending"
    names = column(browser, table, 0)
    assert names == sorted(names)


def test_a_range_of_options_has_its_band_and_no_row(browser: Any) -> None:
    visit(browser, "digits_mislabel")
    table = browser.find_element(By.CSS_SELECTOR, "table.bands")
    assert table.is_displayed()
    assert "6 of 9 cells" in table.text
    assert (
        "tracin · self · every=4, seeds 0, 1, 2: missing: no record"
        in browser.find_element(By.CSS_SELECTOR, "ul.missing").text
    )
    names = column(browser, browser.find_element(By.CSS_SELECTOR, "table.board"), 0)
    assert not [name for name in names if "@" in name]


def test_a_long_table_shows_its_first_rows(browser: Any, page: Path, tmp_path: Path) -> None:
    html = page.read_text()
    row = re.search(r"<tr><th scope=.row.*?</tr>", html.split('<table class="board">')[1])
    assert row is not None
    longer = tmp_path / "longer.html"
    longer.write_text(html.replace(row[0], row[0] * 20, 1))
    try:
        browser.get(longer.as_uri())
        visit(browser, "digits_mislabel")
        lines = browser.find_elements(By.CSS_SELECTOR, "table.board")[0].find_elements(
            By.CSS_SELECTOR, "tbody tr"
        )
        assert len(lines) > 20
        assert sum(line.is_displayed() for line in lines) == 12
        more = browser.find_element(By.CSS_SELECTOR, "button.more")
        assert more.text == f"all {len(lines)} rows"
        more.click()
        assert all(line.is_displayed() for line in lines)
        assert more.text == "the first 12 rows"
        more.click()
        assert sum(line.is_displayed() for line in lines) == 12
    finally:
        asked = asked_for(browser)  # so that the last test sees the page itself alone
        browser.get(page.as_uri())
    assert all(url.startswith("file:") for url in asked)
    assert not browser.find_elements(By.CSS_SELECTOR, "button.more")


def test_names_do_not_break_within_a_word(browser: Any) -> None:
    """On a phone a name takes a new line after an underscore, or none."""
    script = """
        const names = document.querySelectorAll("section:not([hidden]) .board .name");
        return Array.from(names, (name) => {
          const pieces = [];
          for (const node of name.childNodes) {
            if (node.nodeType !== Node.TEXT_NODE) continue;
            const range = document.createRange();
            range.selectNodeContents(node);
            pieces.push(range.getClientRects().length);
          }
          return pieces;
        }).flat();
    """
    with width(browser, 390):
        visit(browser, "digits_mislabel")
        pieces = browser.execute_script(script)
    assert len(pieces) > 6
    assert set(pieces) == {1}


def test_images_are_there(browser: Any) -> None:
    visit(browser, "digits_mislabel")
    script = """
        const done = arguments[arguments.length - 1];
        const images = Array.from(document.querySelectorAll("section:not([hidden]) img"));
        images.forEach((each) => { each.loading = "eager"; });
        // drawings are unpacked when their page is shown
        const there = () => (images.every((each) => each.src)
          ? Promise.all(images.map((each) => each.decode().then(() => each.naturalWidth)))
            .then(done, (error) => done(String(error)))
          : setTimeout(there, 50));
        there();
    """
    widths = browser.execute_async_script(script)
    assert isinstance(widths, list), widths
    assert len(widths) > 18
    assert all(width > 0 for width in widths)


def test_a_link_into_a_page_shows_that_page(browser: Any) -> None:
    visit(browser, "Overview")
    caption = browser.find_elements(By.CSS_SELECTOR, "table.board caption[id]")[1]
    name = caption.get_attribute("id")
    browser.execute_script("location.hash = arguments[0]", name)
    WebDriverWait(browser, 20).until(lambda _: caption.is_displayed())
    assert browser.execute_script("return window.scrollY") > 0
    # an address that is none of the page's shows the overview, and raises nothing
    browser.execute_script("location.hash = '%'")
    overview = browser.find_element(By.ID, "overview")
    WebDriverWait(browser, 20).until(lambda _: overview.is_displayed())
    assert not caption.is_displayed()


@pytest.mark.parametrize("pixels", [1280, 390])
def test_nothing_is_wider_than_the_window(browser: Any, pixels: int) -> None:
    with width(browser, pixels):
        for name in ("Overview", "digits_mislabel"):
            visit(browser, name)
            assert not too_wide(browser), name


def test_captions_stay_in_a_narrow_window(browser: Any) -> None:
    with width(browser, 390):
        visit(browser, "digits_mislabel")
        script = """
            return Array.from(document.querySelectorAll("section:not([hidden]) caption"),
              (each) => each.firstElementChild.getBoundingClientRect().right)
        """
        ends = browser.execute_script(script)
        assert len(ends) > 2
        assert max(ends) <= 390


def test_the_dark_scheme_is_followed(browser: Any) -> None:
    colours = set()
    for name in ("light", "dark"):
        with scheme(browser, name):
            script = "return getComputedStyle(document.body).backgroundColor"
            colours.add(browser.execute_script(script))
    assert len(colours) == 2


def test_no_errors_and_no_requests(browser: Any, page: Path) -> None:
    """Last: the logs hold everything that the tests above did."""
    assert browser.get_log("browser") == []
    asked = asked_for(browser)
    assert page.as_uri() in asked
    # going to a page of the report only changes the fragment
    others = asked - {page.as_uri()}
    assert all(url.startswith(page.as_uri() + "#") for url in others), others
