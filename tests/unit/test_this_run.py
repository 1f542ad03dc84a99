"""benchmarks/this_run.py: agreement with this run and with the average run, from stored files."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from fine_bench.retraining.same_seed import SameSeed, draw_sets, save
from fine_bench.retraining.truth_files import folders, named
from support.benchmarks import BENCHMARKS, loaded

N, QUERIES = 4000, 3


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports another one."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return loaded("this_run")


def test_both_truths_are_compared(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    work, results = tmp_path / "work", tmp_path / "results"
    right = rng.standard_normal((QUERIES, N)).astype(np.float32)
    for share in script.SHARES:
        sets = draw_sets(N, share, 24, seed=0).numpy().astype(np.int32)
        margin = np.repeat(-right[:, sets].sum(2).T[None], 2, axis=0)
        margin[1] += 1e-3
        whole = np.zeros((2, QUERIES), np.float32)
        about = {"batch_size": 64, "seed": 0}
        path = script.truth_path(results, "64", 0, share)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(SameSeed(sets, margin, whole, N, about), path)
    for seed in (0, 1):
        noise = rng.standard_normal((QUERIES, N)).astype(np.float32)
        script.keep(script.score_path(work, "64", seed, "trak"), torch.from_numpy(noise), 1.0)
    script.keep(script.score_path(work, "64", 0, "unrolled"), torch.from_numpy(right), 1.0)
    arguments = ["table", "--work", str(work), "--results", str(results), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["this_run.py", *arguments])
    script.main()

    frame = pd.read_csv(tmp_path / "this_run.csv")
    ours = frame[frame.truth == "this run, 1% left out"].set_index("method")
    assert ours.lds["unrolled"] == pytest.approx(1.0)
    assert abs(ours.lds["trak"]) < 0.9
    average = frame[frame.truth == "average run"].set_index("method")
    truth = named("mnist_mlp", folders(None))
    assert truth.subsets is not None
    own = truth.subsets.of("published")
    expected = script.lds(
        right, truth.subsets.members[own], truth.subsets.margin[own][:, :QUERIES]
    ).mean
    assert average.lds["unrolled"] == pytest.approx(expected, abs=1e-4)
    assert average.runs["trak"] == 2
    both = frame[frame.truth == script.BETWEEN]
    assert list(both.method) == ["trak"]
    page = (tmp_path / "this_run.md").read_text()
    assert page.index("| unrolled |") < page.index("| trak |")
    assert "| 64 | 0 | 40 | 24 |" in page
    assert (tmp_path / "this_run.png").read_bytes().startswith(b"\x89PNG")


def test_without_scores_it_says_what_to_do(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = ["--work", str(tmp_path), "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["this_run.py", "table", *places])
    with pytest.raises(SystemExit, match="run the commands truth and scores"):
        script.main()
