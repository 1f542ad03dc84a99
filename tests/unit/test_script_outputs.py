"""benchmarks/outputs.py: what scripts write, and the call that their pages name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from support.benchmarks import loaded


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--cases", nargs="+", choices=("a", "b"), default=["a", "b"])
    made.add_argument("--times", type=int)
    return made


def test_a_page_names_the_options_that_made_it(tmp_path: Path) -> None:
    page_of = loaded("outputs").page_of
    page = tmp_path / "a.md"
    given, outputs, call = page_of("script", parser(), page, [])
    assert call == "python benchmarks/script.py"
    assert outputs.paths == (page,)
    other = tmp_path / "b.md"
    words = ["--cases", "a", "--times", "2", "--output", str(other)]
    given, outputs, call = page_of("script", parser(), page, words)
    assert call == "python benchmarks/script.py --cases a --times 2"
    assert (given.cases, given.times, outputs.paths) == (["a"], 2, (other,))
    # its own page is made anew, another's only with --force
    page.write_text("old")
    other.write_text("old")
    page_of("script", parser(), page, [])
    with pytest.raises(SystemExit, match=r"b\.md"):
        page_of("script", parser(), page, words)
    page_of("script", parser(), page, [*words, "--force"])
