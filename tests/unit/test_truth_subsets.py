"""Subsets with several seeds that come to a frozen truth later, from a bank of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fine_bench.commands.truth import main
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.condense import condense, with_subsets
from fine_bench.retraining.design import Model
from fine_bench.retraining.outputs import BankModels
from fine_bench.retraining.truth import ARRAYS, HALVES, Truth
from fine_bench.retraining.truth_files import load, save

N, Q = 60, 5
IDENTITY: dict[str, Any] = {
    "task": "small",
    "data_sha256": "da7a" * 16,
    "setting": "5e77" * 16,
    "n_train": N,
    "n_query": Q,
    "design": {"seed": 0, "keep": 0.5, "vary": "both"},
}


def models(n_subsets: int, seeds: int, seed: int) -> BankModels:
    """On random halves; a query's margin is a sum over the members and noise."""
    rng = np.random.default_rng(seed)
    halves = np.argsort(rng.random((n_subsets, N)), axis=1) < N // 2
    members = np.repeat(halves, seeds, axis=0)
    effects = np.random.default_rng(1).standard_normal((N, Q))
    margin = members + rng.standard_normal(members.shape)
    query = members @ effects + rng.standard_normal((len(members), Q))
    return BankModels(
        members=members,
        subset=np.repeat(np.arange(n_subsets), seeds),
        seed=np.arange(len(members)),
        loss=np.logaddexp(0.0, -margin).astype(np.float32),
        margin=margin.astype(np.float32),
        query_loss=np.logaddexp(0.0, -query).astype(np.float32),
        query_margin=query.astype(np.float32),
    )


SINGLE, REPEATED = models(160, 1, 2), models(24, 5, 3)


def frozen(repeated: BankModels | None = None, version: int = 1) -> Truth:
    about = {name: IDENTITY[name] for name in ("task", "data_sha256", "setting")}
    return condense(
        SINGLE, repeated, name="small", version=version, is_bad=np.arange(N) < 12, **about
    )


def bank(folder: Path, repeated: BankModels | None = REPEATED, **other: Any) -> Path:
    made = Bank.create(folder, {**IDENTITY, **other}, [*range(12)])
    if repeated is not None:
        runs = np.tile(np.arange(5), len(repeated) // 5).tolist()
        pairs = zip(repeated.subset.tolist(), runs, strict=True)
        made.add([Model("repeated", subset, run) for subset, run in pairs], repeated)
    return folder


def test_it_is_the_truth_of_a_bank_with_both_parts(tmp_path: Path) -> None:
    extended = with_subsets(frozen(), Bank.open(bank(tmp_path / "bank")), 2)
    whole = frozen(REPEATED, version=2)
    assert extended.subsets is not None
    assert whole.subsets is not None
    assert (extended.version, extended.singles) == (2, 1)
    assert extended.facts == whole.facts
    for half in HALVES:
        for name in ARRAYS:
            np.testing.assert_array_equal(
                getattr(extended.half(half), name), getattr(whole.half(half), name)
            )
        assert extended.half(half).lds_ceiling == whole.half(half).lds_ceiling > 0.5
    for name in ("members", "margin", "margin_first", "margin_second"):
        np.testing.assert_array_equal(getattr(extended.subsets, name), getattr(whole.subsets, name))
    assert extended.subsets.n_seeds == 5


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(frozen(), tmp_path / "truths")
    before = load(path)
    arguments = [str(bank(tmp_path / "bank")), "--name", "small", "--extend", str(path)]
    arguments += ["--output", str(path.parent)]
    assert main([*arguments, "--version", "1"]) == 2
    assert "needs --version 2" in capsys.readouterr().err
    assert load(path).subsets is None
    assert main([*arguments, "--version", "2"]) == 0
    assert "LDS: 12 subsets, 5 seeds, 5 queries, ceiling 0." in capsys.readouterr().out
    after = load(path)
    np.testing.assert_array_equal(before.published.mu_margin, after.published.mu_margin)
    assert (after.version, after.singles, after.n_query) == (2, 1, Q)
    assert main([*arguments, "--version", "3"]) == 2
    assert "has 24 subsets already" in capsys.readouterr().err
    assert main([*arguments, "--version", "3", "--evidence", str(tmp_path / "evidence")]) == 2
    assert "do not go together" in capsys.readouterr().err


def test_single_examples_keep_the_version_that_their_truth_has() -> None:
    """Records of before and after the subsets stand in one table: their fidelity is the same."""
    extended = replace(frozen(REPEATED, version=3), singles=1)
    assert extended.version == 3
    scores = np.random.default_rng(4).standard_normal((Q, N))
    found = extended.metrics(scores[:1], "self")
    assert found == frozen().metrics(scores[:1], "self")
    assert found["truth_version"] == 1
    assert extended.metrics(scores, "queries")["truth_version"] == 3
    for singles in (0, 3):
        with pytest.raises(ValueError, match=f"earlier version than 3, or None, got {singles}"):
            replace(extended, singles=singles)


def test_banks_that_do_not_fit(tmp_path: Path) -> None:
    def refused(name: str, message: str, repeated: BankModels | None = None, **other: Any) -> None:
        with pytest.raises(ValueError, match=message):
            with_subsets(frozen(), Bank.open(bank(tmp_path / name, repeated, **other)), 2)

    refused("data", "data_sha256 0000.* there, da7a.* here", data_sha256="0000" * 16)
    refused("recipe", "setting 0000.* there, 5e77.* here", setting="0000" * 16)
    design = {"seed": 0, "keep": 0.5, "vary": "order"}
    refused("order", "differ in order alone", design=design)
    refused("keep", "keep 0.9 there, 0.5 here", design={**design, "vary": "both", "keep": 0.9})
    refused("empty", r"no models of the part 'repeated'.*bank.subsets=20")
    few = REPEATED.take(REPEATED.subset < 12)
    refused("few", "has 12 subsets; 10 are needed in each half, 20 in all", few)


def test_a_name_of_its_own(tmp_path: Path) -> None:
    path = save(replace(frozen(), name="other"), tmp_path)
    arguments = ["--name", "small", "--extend", str(path), "--version", "2"]
    assert main([str(bank(tmp_path / "bank")), *arguments, "--output", str(tmp_path / "new")]) == 0
    assert load(tmp_path / "new" / "small.safetensors").name == "small"
