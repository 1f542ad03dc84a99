"""Bring the README's leaderboard rows up to date: ``python benchmarks/readme_rows.py``.

The README shows a choice of rows of ``results/published/leaderboard.md``. After a rebuild that
changes only marks (``=``, ``†``), each of its rows is replaced by the row of the leaderboard that
says the same but for the marks. A row whose numbers changed is named and left alone.

The README's short table over tasks is made anew from ``results/published/summary.md``: the means of
some of its columns, *self* first.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- leaderboard:start -->", "<!-- leaderboard:end -->"
SUMMARY = "<!-- summary:start -->", "<!-- summary:end -->"
TASKS = ("mnist_mislabel", "cifar10n", "mnist_asymmetric", "mnist_instance", "mnist_backdoor")


def bare(line: str) -> str:
    """A row without its marks."""
    return re.sub(r" [=†]+ \|", " |", line)


def means(summary: str, tasks: tuple[str, ...] = TASKS) -> str:
    """Markdown: one table a target of ``summary.md``, its means only, the columns of ``tasks``."""
    lines: list[str] = []
    columns: list[int] = []
    for line in summary.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("####"):
            lines += ["", line, ""]
        elif line.startswith("| method"):
            columns = [cells.index(task) for task in tasks if task in cells]
            lines.append("| method | " + " | ".join(cells[i] for i in columns) + " |")
            lines.append("| --- |" + " ---: |" * len(columns))
        elif line.startswith("| ") and "---" not in line:
            chosen = [cells[i].split(" [")[0] for i in columns]
            if set(chosen) != {"–"}:
                lines.append(f"| {cells[0]} | " + " | ".join(chosen) + " |")
    return "\n".join(lines[1:])


def main() -> int:
    """Rewrite the README; 0 all rows found, 1 some are not in the leaderboard."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    shown, after = rest.split(END)
    lines = (ROOT / "results" / "published" / "leaderboard.md").read_text().splitlines()
    rows = {bare(line): line for line in lines if line.startswith("| ")}
    lost = 0
    fresh = []
    for line in shown.split("\n"):
        if line.startswith("| ") and bare(line) not in rows:
            print(f"not in results/published/leaderboard.md: {line}")
            lost += 1
        fresh.append(rows.get(bare(line), line) if line.startswith("| ") else line)
    text = before + START + "\n".join(fresh) + END + after
    table = means((ROOT / "results" / "published" / "summary.md").read_text())
    before, after = text.split(SUMMARY[0])[0], text.split(SUMMARY[1])[1]
    readme.write_text(f"{before}{SUMMARY[0]}\n{table}\n{SUMMARY[1]}{after}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
