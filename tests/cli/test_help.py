"""Every command explains itself: what it does, its exit status, an example, within 100 columns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import fine_bench

# modules that are commands: fine_bench/<name>.py with a main, or fine_bench/<name>/__main__.py;
# those of Hydra (the runner and the bank) are asked in their own tests
HYDRA = {"__main__", "bank"}
ROOT = Path(fine_bench.__file__).parent


def commands() -> list[str]:
    found = {path.parent.name for path in ROOT.glob("*/__main__.py")}
    found |= {
        path.stem for path in ROOT.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    return sorted(found - HYDRA)


def test_all_commands_are_found() -> None:
    wanted = {"leaderboard", "figures", "report", "audit", "score", "clean", "cure", "truth",
              "verify"}  # fmt: skip
    assert wanted <= set(commands())


@pytest.mark.parametrize("name", commands())
def test_help_is_useful(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    path = ROOT / name / "__main__.py"
    module = importlib.import_module(
        f"fine_bench.{name}.__main__" if path.is_file() else f"fine_bench.{name}"
    )
    monkeypatch.setattr(sys, "argv", [f"python -m fine_bench.{name}", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m fine_bench.{name}" in text
    assert "Exit status" in text
    assert f"python -m fine_bench.{name}" in text.split("usage:", 1)[1].split("options:")[1]
    assert max(map(len, text.splitlines())) <= 100
