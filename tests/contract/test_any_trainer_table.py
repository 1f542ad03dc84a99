"""Every line of the table in docs/any_trainer.md has a test, and tests name lines that exist."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEADING = "## Every setting and layer"
VERDICTS = ("*right*", "*right by*", "*warned*", "*refused*")


def lines() -> dict[str, str]:
    """What happens, by setting or layer."""
    section = (ROOT / "docs" / "any_trainer.md").read_text().split(HEADING)[1].split("\n## ")[0]
    table = section[section.index("| setting or layer |") :].split("\n\n")[0]
    rows = table.splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in rows]
    assert all(len(row) == 2 for row in cells), [row for row in cells if len(row) != 2]
    assert len({first for first, _ in cells}) == len(cells), "a setting stands there twice"
    return {row[0]: row[1] for row in cells}


def marked() -> set[str]:
    """Lines that tests say they show."""
    found = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        if "any_trainer(" not in (text := path.read_text()):
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "any_trainer"
            ):
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_line_has_a_test_and_every_test_a_line() -> None:
    table, shown = set(lines()), marked()
    assert sorted(table - shown) == [], "no test carries pytest.mark.any_trainer(line)"
    assert sorted(shown - table) == [], "no such line in docs/any_trainer.md"


def test_every_line_begins_with_a_verdict() -> None:
    wrong = [name for name, said in lines().items() if not said.startswith(VERDICTS)]
    assert wrong == []
