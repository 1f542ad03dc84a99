"""Bring the README's leaderboard rows up to date: ``python benchmarks/readme_rows.py``.

The README shows a choice of rows of ``results/leaderboard.md``. After a rebuild that changes only
marks (``=``, ``†``), each of its rows is replaced by the row of the leaderboard that says the
same but for the marks. A row whose numbers changed is named and left alone.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"


def bare(line: str) -> str:
    """A row without its marks."""
    return re.sub(r" [=†]+ \|", " |", line)


def main() -> int:
    """Rewrite the README; 0 all rows found, 1 some are not in the leaderboard."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    shown, after = rest.split(END)
    lines = (ROOT / "results" / "leaderboard.md").read_text().splitlines()
    rows = {bare(line): line for line in lines if line.startswith("| ")}
    lost = 0
    fresh = []
    for line in shown.split("\n"):
        if line.startswith("| ") and bare(line) not in rows:
            print(f"not in results/leaderboard.md: {line}")
            lost += 1
        fresh.append(rows.get(bare(line), line) if line.startswith("| ") else line)
    readme.write_text(before + START + "\n".join(fresh) + END + after)
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
