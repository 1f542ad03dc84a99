"""benchmarks/which_form.py: the comparison of forms, by hand, from a made-up leaderboard."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from support.benchmarks import BENCHMARKS, loaded


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("which_form")


FIDELITY = {
    ("mnist_mlp", "fine"): 0.95,
    ("mnist_mlp", "fine_loss"): 0.94,
    ("mnist_mlp", "fine_ekfac"): 0.97,
    ("cifar10n_small", "fine"): 0.50,
    ("cifar10n_small", "fine_loss"): 0.60,
    ("cifar10n_small", "trak"): 0.99,
}


def write(results: Path, **changes: object) -> Path:
    lines = [
        {
            "task": task, "estimator": name, "target": "self", "metric": metric, "options": None,
            "limit": False, "mean": mean if metric == "fidelity_of_ceiling" else 2.0,
            "lower": mean - 0.01 if metric == "fidelity_of_ceiling" else None,
            "upper": mean + 0.01 if metric == "fidelity_of_ceiling" else None, "n": 3, **changes,
        }
        for (task, name), mean in FIDELITY.items()
        for metric in ("fidelity_of_ceiling", "fidelity_slope", "consistency_jaccard_top_20")
    ]  # fmt: skip
    path = results / "published" / "leaderboard.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame(lines).to_csv(path, index=False)
    return path


def test_shortfall_is_the_largest_distance_to_the_best_form(
    script: ModuleType, tmp_path: Path
) -> None:
    write(tmp_path)
    assert script.main(["--results", str(tmp_path)]) == 0
    page = (tmp_path / "which_form.md").read_text()
    # by hand: fine is 0.02 behind EK-FAC on the first and 0.10 behind the loss on the second; the
    # loss is 0.03 and 0 behind. TRAK is no form, and sets no mark
    assert "| `fine_loss` | 0.030 | `mnist_mlp` |" in page
    assert "| `fine` | 0.100 | `cifar10n_small` |" in page
    assert page.index("| `fine_loss` | 0.030") < page.index("| `fine` | 0.100")
    missing = "`fine_weighted`, `fine_plain`, `fine_standardised`, `fine_ekfac`"
    assert f"Not on every bank: {missing}." in page
    assert "| `fine_ekfac` | 0.970 [0.960, 0.980] | – |" in page


def test_a_slope_is_given_for_forms_alone(script: ModuleType, tmp_path: Path) -> None:
    write(tmp_path)
    script.main(["--results", str(tmp_path)])
    slopes = (tmp_path / "which_form.md").read_text().split("## slope")[1].split("##")[0]
    assert "`fine`" in slopes
    assert "`trak`" not in slopes


def test_nothing_to_compare_is_said(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="fine-bench publish"):
        script.main(["--results", str(tmp_path)])
    write(tmp_path, target="validation")
    assert script.main(["--results", str(tmp_path)]) == 2
    assert "run the experiments and publish them" in capsys.readouterr().err


def test_two_settings_of_a_task_are_refused(script: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path)
    rows = pd.read_csv(path)
    pd.concat([rows, rows]).to_csv(path, index=False)
    with pytest.raises(SystemExit, match="several rows fine for mnist_mlp; expected one a task"):
        script.main(["--results", str(tmp_path)])
