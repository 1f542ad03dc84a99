"""benchmarks/clean_speed.py: what was measured before stays, what is measured again replaces it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from support.benchmarks import BENCHMARKS, loaded


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return loaded("clean_speed")


def test_rows_are_measured_one_by_one(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    seconds = iter(range(1, 9))

    def measure(kind: str, n: int) -> Any:
        k = next(seconds)
        return script.Line(kind, n, k + 0.1, k + 0.2, k + 0.3, k + 0.4)

    monkeypatch.setattr(script, "measure", measure)
    script.main(["--kinds", "text", "--rows", "2000", "10000"])
    script.main(["--kinds", "mnist", "--rows", "2000"])
    script.main(["--kinds", "text", "--rows", "2000"])
    table = pd.read_csv(tmp_path / "clean_speed.csv")
    assert table["kind"].tolist() == ["mnist", "text", "text"]
    assert table["rows"].tolist() == [2000, 2000, 10_000]
    assert table["cpu"].tolist() == [3.4, 4.4, 2.4]
    page = (tmp_path / "clean_speed.md").read_text()
    assert "| mnist: images 28 × 28, `--model mlp` | 2,000 | 3 | 3 | 3 | 3 |" in page


def test_another_table_is_no_file_of_the_script(script: Any, tmp_path: Path) -> None:
    (tmp_path / "clean_speed.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="cannot be read as a table of this script"):
        script.recalled(tmp_path / "clean_speed.csv")
