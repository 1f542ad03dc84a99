"""The scripts behind what one run says of the next, and of a known ε."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from scipy.optimize import brentq
from scipy.signal import fftconvolve
from scipy.stats import norm

from fine_bench.theory.subsampling import subsample
from support.benchmarks import BENCHMARKS, loaded

Array = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def script() -> ModuleType:
    return loaded("next_run")


def test_held_counts_intervals_that_hold_the_other_runs(script: ModuleType) -> None:
    generator = np.random.default_rng(0)
    totals = generator.normal(size=(12, 2000))
    assert script.held(totals, np.ones_like(totals)) == pytest.approx(0.95, abs=0.01)
    assert script.held(totals, np.full_like(totals, 0.5)) == pytest.approx(0.673, abs=0.015)
    # three runs, one group, by hand: gaps 0.5·√(2/3) and so on against 1.96 · 0.3
    by_hand = np.array([[0.0], [0.0], [0.6]])
    assert script.held(by_hand, np.full((3, 1), 0.3)) == 1.0
    assert script.held(by_hand, np.full((3, 1), 0.2)) == pytest.approx(2 / 3)


def saved(folder: Path, seeds: int, n: int = 160, epochs: int = 8) -> None:
    folder.mkdir(parents=True)
    y = torch.arange(n) % 3
    bad = torch.arange(n) % 4 == 0
    mean = torch.where(bad, 1.0, 0.0)
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        parts = 0.1 * torch.randn(epochs, 1, n, generator=generator)
        error = (parts[:, 0].var(0) * epochs).sqrt()
        mu = mean + parts[:, 0].sum(0)
        found = {
            "y": y,
            "is_bad": bad,
            "validation|parts": parts,
            "group|planted": bad.nonzero()[:, 0],
        }
        for target, sign in (("self", 1.0), ("validation", -1.0)):
            found[f"{target}|mu"] = sign * mu
            found[f"{target}|error"] = error.clone()
            found[f"{target}|seen"] = torch.full((n,), epochs)
        save_file(found, folder / f"seed{seed}.safetensors")


def test_tables_of_groups_and_of_flags(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "work" / "toy", 5)
    monkeypatch.setattr(script, "N_GROUPS", 20)
    for name in ("groups", "repeats"):
        asked = ["--work", str(tmp_path / "work"), name, "--out", str(tmp_path)]
        assert script.main(asked) == 0
    pages = [(tmp_path / f"{name}.md").read_text() for name in ("group_coverage", "decisions")]
    assert "| toy | random | 30 | 20 | 5 |" in pages[0]
    assert "| toy | planted | 40 |" in pages[0]
    assert "| toy | self | 20% | 0.05 |" in pages[1]
    rows = list(script.repeat_rows("toy", "self", script.load(tmp_path / "work")["toy"]))
    flagged = {(r["flagged_share"], r["alpha"]): r for r in rows}
    line = flagged[0.2, 0.1]
    assert line["all_flagged"] == 32
    assert line["prior_flagged"] <= 32
    # one run as the truth of another: by hand for the candidates alone
    runs = script.load(tmp_path / "work")["toy"]
    values = [run["self|mu"].double().numpy() for run in runs]
    lost = []
    for s, mine in enumerate(values):
        tau = np.quantile(mine, 0.8)
        lost += [(o[mine >= tau] < tau).mean() for r, o in enumerate(values) if r != s]
    assert line["all_lost"] == pytest.approx(np.mean(lost))
    with pytest.raises(SystemExit, match="compute first"):
        script.load(tmp_path / "nothing")


def test_kinds_of_groups(script: ModuleType, tmp_path: Path) -> None:
    saved(tmp_path / "toy", 1)
    run = script.load(tmp_path)["toy"][0]
    y, bad = run["y"].numpy(), run["is_bad"].numpy()
    for kind in script.KINDS:
        for group in script.drawn(run, kind, 8, seed=0)[:20]:
            assert len(set(group.tolist())) == 8
            assert "class" not in kind or len(set(y[group])) == 1
            assert "flipped" not in kind or bad[group].all()
    assert script.drawn(run, "flipped, one class", 30, seed=0) == []


def test_correlation_with_the_step_before() -> None:
    permuted = loaded("permuted_groups")
    assert permuted.lag_one(np.tile([1.0, -1.0], (2, 50))) == pytest.approx(-0.99)


def test_the_true_epsilon_is_that_of_the_worse_order() -> None:
    """Against losses on a grid, convolved one step after the other, of either order."""
    known = loaded("known_epsilon")
    noise, steps, h = 1.0, 30, 1e-3
    x = np.linspace(-9.0, 10.0, 400_001) * noise
    out = norm.logpdf(x, 0.0, noise)
    inside = np.logaddexp(
        np.log1p(-known.RATE) + out, np.log(known.RATE) + norm.logpdf(x, 1.0, noise)
    )
    found = []
    for a, b in ((inside, out), (out, inside)):
        cell = np.round((a - b) / h).astype(int)
        one = np.bincount(cell - cell.min(), weights=np.exp(a))
        one, total = one / one.sum(), np.ones(1)
        for _ in range(steps):
            total = fftconvolve(total, one)
        loss = h * (steps * cell.min() + np.arange(len(total)))

        def excess(epsilon: float, loss: Array = loss, total: Array = total) -> float:
            told = loss > epsilon
            return float((total[told] * -np.expm1(epsilon - loss[told])).sum()) - known.DELTA

        found.append(brentq(excess, 0.0, 30.0))
    assert found[0] > 1.2 * found[1]
    assert known.true_epsilon(noise, steps) == pytest.approx(max(found), rel=5e-3)
    both = known.compose(subsample(known.GaussianTradeOff(1.0 / noise), known.RATE), steps)
    assert both.trade_off.epsilon(known.DELTA) > 1.01 * max(found)  # a bound


def test_a_noisy_run_stays_below_its_epsilon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = loaded("known_epsilon")
    monkeypatch.setattr(known, "STEPS", 100)
    noise = 4.0
    sums, losses, member = known.train(0, noise)
    assert losses.shape == (known.N,)
    inside = int(member[: known.CANARIES].sum())
    # a step tells about C‖∇h‖/m at most, against noise of σC‖∇h‖/m: k/(σ sqrt(T)) for k of T steps;
    # more only where the average example pulls the other way, or the batch is small
    taken = sums["as taken"]
    mu = taken.mu()[0][0].abs()
    most = taken.n_observations / (noise * 100**0.5)
    ratio = (mu / most)[:inside]
    ratio = ratio[torch.isfinite(ratio)]  # a few were in no batch
    assert 0.5 < float(ratio.median()) < 1.0
    assert float(ratio.max()) < 1.4
    assert float(sums["before"].mu()[0][0, :inside].abs().median()) > 2 * float(
        mu[:inside].median()
    )
    true = known.true_epsilon(noise, 100)
    assert max(known.at_least(taken, range(8), tmp_path)) <= true
    right, made = known.guesses(np.where(member, 0.0, 1.0), member, 50)
    assert (right, made) == (100, 100)


def test_a_seed_that_has_its_file_is_not_computed_again(tmp_path: Path) -> None:
    files = loaded("seed_files")
    folder = tmp_path / "toy"
    for seed, path in files.missing(folder, [10, 2]):
        files.save(path, {"x": torch.full((2, 3), float(seed)).T})
    assert [seed for seed, _ in files.missing(folder, [2, 3, 10])] == [3]
    runs = files.load(tmp_path, "some.py")["toy"]
    assert {seed: float(run["x"][0, 0]) for seed, run in runs.items()} == {2: 2.0, 10: 10.0}
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    with pytest.raises(SystemExit, match=r"run some\.py compute first"):
        files.load(tmp_path / "nothing", "some.py")


def test_numbers_and_intervals_as_text() -> None:
    outputs = loaded("outputs")
    assert outputs.interval_text(0.6084, 0.6, 0.6156) == "0.608 [0.600, 0.616]"
    assert outputs.interval_text(0.6084, float("nan"), float("nan")) == "0.608"
    assert outputs.interval_text(*[float("nan")] * 3) == "–"
    assert outputs.number_text(0.5, 1) == "0.5"
