"""The README says what the code does."""

from __future__ import annotations

import contextlib
import io
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from support.benchmarks import loaded

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    assert printed.getvalue().count("torch.Size([1, 600])") == 1


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``benchmarks/readme.py``, which makes parts of the README."""
    return loaded("readme")


def test_the_table_and_the_commands_are_made_by_the_script(script: ModuleType) -> None:
    table = script.table(script.read(script.LEADERBOARD.read_text()))
    assert script.filled(README, {"table": table}) == README
    index = script.INDEX.read_text()
    assert script.filled(index, {"commands": script.commands()}) == index
    rows = table.splitlines()[2:]
    assert 10 <= len(rows) <= 15
    limits = [row for row in rows if row.startswith("| *by retraining:*")]
    assert rows[-len(script.LIMITS) :] == limits  # below every method
    assert not any("=" in row for row in rows)  # no row is named after the value of an option
    published = script.LEADERBOARD.read_text()
    for row in rows:
        for cell in row.split(" | ")[1:]:
            assert cell.strip(" |") == "–" or f"| {cell.strip(' |')} |" in published


def test_a_row_that_the_leaderboard_lacks_is_named(script: ModuleType) -> None:
    text = script.LEADERBOARD.read_text()
    with pytest.raises(ValueError, match=r"not in .*: fine_ekfac"):
        script.table(script.read(text.replace("fine_ekfac", "other")))
    with pytest.raises(ValueError, match=r"not in .*: retraining_mu"):
        script.table(script.read(text.replace("retraining_mu", "other")))
    with pytest.raises(ValueError, match="several settings of mnist_mlp"):
        script.read(text + "\n## mnist_mlp · setting 0000\n")


def test_the_figure_shows_the_rows_of_the_table(script: ModuleType) -> None:
    figure = script.figure(script.read(script.LEADERBOARD.read_text()))
    names = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert names == set(script.METHODS) - {"random"}
    assert script.IMAGE.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in DOCS)])
def test_every_number_with_an_interval_is_published(page: str) -> None:
    texts = [path.read_text() for path in (ROOT / "results").rglob("*.md")]
    published = " ".join(" ".join(texts).split())
    shown = " ".join((ROOT / page).read_text().replace("−", "-").split())
    for number in re.findall(r"(?<![\w.])[-+]?\d+\.\d{3} \[[^\]]+\]", shown):
        assert number in published, number


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "title", "message", "authors"} <= citation.keys()
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"], project["version"], project["license"],
    )  # fmt: skip


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target
