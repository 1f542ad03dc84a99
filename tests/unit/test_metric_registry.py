"""A metric is one file: it is found, measured, kept and shown without being listed anywhere."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fine_bench.commands.leaderboard import main
from fine_bench.metrics.detection import detection_metrics
from fine_bench.metrics.registry import Given, Metric, columns, known, measure, metric, named
from fine_bench.metrics.top import top_metrics
from fine_bench.runner.conclusion import conclude
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import config_folder, register

ROOT = Path(__file__).parents[2]
OWN = "metrics_of_one_file"
FILE = '''
"""How many bad examples stand at the very top."""

import numpy as np

from fine_bench.metrics.registry import Given, Metric, metric


@metric(
    Metric("first_five", "bad in first 5", better="higher", unit="examples", digits=1,
           note="First 5: of those a person looks at first."),
    needs=["bad", "self"],
)
def first_five(given: Given) -> float:
    """Number of bad examples among the five most suspicious."""
    return float(given.bad[np.argsort(-given.suspicion, kind="stable")[:5]].sum())
'''


def write_package(root: Path, text: str) -> None:
    """A package whose ``metrics`` holds one file."""
    home = root / OWN / "metrics"
    home.mkdir(parents=True)
    for folder in (root / OWN, home):
        (folder / "__init__.py").touch()
    (home / "first.py").write_text(text)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path, for packages that are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == OWN]:
        del sys.modules[name]


def given(n_bad: int = 6, kind: str = "images", target: str = "self") -> Given:
    draw = torch.Generator().manual_seed(3)
    bad = torch.arange(30) < n_bad
    values = torch.randn(1, 30, generator=draw, dtype=torch.float64) + 2.0 * bad
    return Given(values, target, "high", bad, kind)


# ---------------------------------------------------------------------------------- extension


def test_a_metric_of_ones_own_is_one_file(written: Path, tmp_path: Path) -> None:
    write_package(written, FILE)
    results = tmp_path / "results"
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        jobs = [
            plan(
                check(
                    compose(
                        "config",
                        [
                            "task.n_train=60", "task.n_query=10", "trainer.max_epochs=2",
                            "trainer.batch_size=16", "trainer.progress=false",
                            "trainer.num_threads=1", "targets=[self,validation]",
                            "estimator=[mean_loss,random]", "logger.mode=disabled",
                            f"allow_packages=[{OWN}]", f"results_dir={results}", f"seed={seed}",
                        ],
                    )
                )
            )
            for seed in (0, 1)
        ]  # fmt: skip
    GlobalHydra.instance().clear()
    for job in jobs:
        outcomes = execute(job, "sweep", say=lambda _: None)
        found = {(o.cell.estimator, o.cell.target): o.record.metrics for o in outcomes}
        assert 0 <= found["mean_loss", "self"]["first_five"] <= 5
        assert "first_five" not in found["random", "validation"]  # it asked for the target self
    assert conclude(jobs, "sweep") == 0

    text = (results / "leaderboard.md").read_text()
    assert "### further metrics" in text
    assert "| target | estimator | n | bad in first 5 ↑ |" in text
    assert "First 5: of those a person looks at first." in text
    table = pd.read_csv(results / "leaderboard.csv").set_index(["estimator", "target", "metric"])
    row = table.loc["mean_loss", "self", "first_five"]
    assert (row.label, row.unit, row.direction) == ("bad in first 5", "examples", "higher")
    assert (row.n, row.seeds) == (2, "0 1")
    # later the same tables come from the records, and without the file its number has its name
    before = (results / "leaderboard.md").read_bytes()
    assert main(["--results", str(results), "--allow-packages", OWN]) == 0
    assert (results / "leaderboard.md").read_bytes() == before
    assert main(["--results", str(results)]) == 0
    assert "bad in first 5" not in (results / "leaderboard.md").read_text()
    assert "first_five,first_five" in (results / "leaderboard.csv").read_text()


def test_two_metrics_of_one_name_are_refused(written: Path) -> None:
    write_package(written, FILE.replace('"first_five"', '"auroc"'))
    with pytest.raises(ValueError, match=r"auroc, in fine_bench.metrics.detection and in metrics_"):
        known([OWN])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 1 / 0", "first.first_five: ZeroDivisionError"),
        ("    return {'other': 1.0}", "first.first_five returned other, which it does not declare"),
    ],
)
def test_a_metric_that_fails_is_named(written: Path, body: str, message: str) -> None:
    write_package(written, FILE[: FILE.index("    return float")] + body + "\n")
    with pytest.raises(ValueError, match=message):
        measure(given(), [OWN])


def test_packages_without_metrics_have_none() -> None:
    assert known(["baselines", "no_such_package", "json"]) == known()


# ------------------------------------------------------------------------------- declarations


def test_what_is_measured_of_images_and_of_language() -> None:
    one = given()
    assert measure(one) == detection_metrics(one.suspicion, one.bad)
    text = given(kind="language")
    assert measure(text) == measure(one) | top_metrics(one.suspicion, one.bad)
    for nothing in (given(0), given(30)):
        assert measure(nothing) == {}


def test_what_a_metric_may_ask_for() -> None:
    assert given().has == {"bad", "self", "images"}
    mu = Given(torch.ones(1, 2), "queries", "low", None, "language", mu=np.zeros(2))
    assert mu.has == {"mu", "queries", "language"}
    with pytest.raises(ValueError, match="nobody knows the bad examples"):
        _ = mu.bad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metric("", "label"), "needs a name and a label"),
        (lambda: Metric("name", "label", better="up"), 'must be "higher", "lower" or ""'),  # type: ignore[arg-type]
        (lambda: metric(), "declares nothing"),
    ],
)
def test_refusals(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_columns_are_declared_and_named() -> None:
    assert {one.key for one in columns()} <= {one.key for one in known()}
    assert named("auroc").in_full == "AUROC"
    assert named("average_precision").in_full == "average precision"
    assert named("group/x/mu").label == "group/x/mu"
