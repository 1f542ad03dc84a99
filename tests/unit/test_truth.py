"""The frozen ground truth: condensed from simulated banks, written, found, and refused."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from scipy import stats

from fine_bench.commands.truth import main
from fine_bench.metrics.lds import lds
from fine_bench.metrics.retraining import retraining_mu
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.condense import condense
from fine_bench.retraining.design import PARTS, Model
from fine_bench.retraining.outputs import BankModels
from fine_bench.retraining.truth import HALVES, Truth
from fine_bench.retraining.truth_files import TruthError, find, folders, known, load, named, save

N, Q = 80, 6
BAD = np.arange(N) < 16


@dataclass
class World:
    """What is true in the simulation, and the parts of a bank that show it."""

    mu: NDArray[np.float64]
    effects: NDArray[np.float64]
    single: BankModels
    repeated: BankModels
    definition: BankModels


def models(
    members: NDArray[np.bool_],
    subset: NDArray[np.int64],
    mu: NDArray[np.float64],
    effects: NDArray[np.float64],
    rng: np.random.Generator,
) -> BankModels:
    """Models whose margins are shifted by μ where the example was seen; the noise is N(0, 1)."""
    k = len(members)
    margin = 1.0 + mu * members + rng.standard_normal((k, members.shape[1]))
    query = members @ effects.T + 2.0 * rng.standard_normal((k, len(effects)))
    return BankModels(
        members=members,
        subset=subset.astype(np.int64),
        seed=np.arange(k, dtype=np.int64),
        loss=np.log1p(np.exp(-margin)).astype(np.float32),
        margin=margin.astype(np.float32),
        query_loss=np.log1p(np.exp(-query)).astype(np.float32),
        query_margin=query.astype(np.float32),
    )


def simulate(n: int = N, q: int = Q, k: int = 160, n_subsets: int = 30, seed: int = 0) -> World:
    rng = np.random.default_rng(seed)
    mu = 0.5 * rng.standard_normal(n) + 2.0 * (np.arange(n) < n // 5)
    effects = rng.standard_normal((q, n))
    many = rng.random((n_subsets, n)) < 0.5
    subset = np.repeat(np.arange(n_subsets), 5)
    sets = [
        *(np.array([i]) for i in range(10, 22)),
        *(np.arange(i, i + 5) for i in range(0, 30, 5)),
    ]
    without = np.ones((len(sets) + 1, n), dtype=np.bool_)
    for row, positions in enumerate(sets, start=1):
        without[row, positions] = False
    which = np.repeat(np.arange(len(without)), 8)
    numbers = 10**18 - np.arange(len(without))  # names, in no order
    numbers[0] = 0
    single = models(rng.random((k, n)) < 0.5, np.arange(k), mu, effects, rng)
    repeated = models(many[subset], subset, mu, effects, rng)
    definition = models(without[which], numbers[which], mu, effects, rng)
    return World(mu, effects, single, repeated, definition)


WORLD = simulate()


def freeze(world: World = WORLD, **changes: Any) -> Truth:
    about: dict[str, Any] = {
        "name": "small_world",
        "task": "small",
        "version": 1,
        "data_sha256": "da7a" * 16,
        "setting": "5e77" * 16,
        "is_bad": BAD,
    }
    parts = {"repeated": world.repeated, "definition": world.definition}
    parts |= {key: changes.pop(key) for key in list(changes) if key in parts}
    return condense(world.single, **parts, **{**about, **changes})


TRUTH = freeze()


# ------------------------------------------------------------------------------- condensing


def test_the_halves_are_those_of_even_and_odd_subsets() -> None:
    for half, start in (("development", 0), ("published", 1)):
        part = WORLD.single.take(np.arange(start, 160, 2))
        truth = TRUTH.half(half)  # type: ignore[arg-type]
        assert truth.n_models == 80
        margin = retraining_mu(part.members, part.margin)
        np.testing.assert_allclose(truth.mu_margin, margin.mu, rtol=1e-6)
        np.testing.assert_allclose(truth.mu_margin_se, margin.std_error, rtol=1e-6)
        for i in (0, 50):
            seen = part.members[:, i]
            loss, own = part.loss[:, i], part.margin[:, i]
            assert truth.effect_loss[i] == pytest.approx(
                loss[seen].mean() - loss[~seen].mean(), rel=1e-4
            )
            assert truth.effect_margin[i] == pytest.approx(
                own[seen].mean() - own[~seen].mean(), rel=1e-4
            )
            assert truth.out_of_sample_margin[i] == pytest.approx(own[~seen].mean(), rel=1e-4)
    # seeing a flipped example helps it: its margin rises, its loss falls
    assert (TRUTH.published.mu_margin[BAD] > 0).all()
    assert (TRUTH.published.mu_loss[BAD] > 0).all()
    assert (TRUTH.published.effect_loss[BAD] < 0).all()


def test_the_order_of_the_models_does_not_matter() -> None:
    shuffled = np.random.default_rng(1).permutation(160)
    other = freeze(replace(WORLD, single=WORLD.single.take(shuffled)))
    np.testing.assert_allclose(
        other.published.mu_margin, TRUTH.published.mu_margin, rtol=1e-4, atol=1e-6
    )


def test_complementary_subsets_stay_in_one_half() -> None:
    rng = np.random.default_rng(0)
    some = rng.random((80, N)) < 0.5
    members = np.stack([some, ~some], axis=1).reshape(160, N)
    single = models(members, np.arange(160), WORLD.mu, WORLD.effects, rng)
    truth = freeze(replace(WORLD, single=single))
    pairs = np.arange(160).reshape(80, 2)
    part = single.take(pairs[1::2].ravel())
    np.testing.assert_allclose(
        truth.published.mu_margin, retraining_mu(part.members, part.margin).mu, rtol=1e-5
    )


def test_ceilings_are_the_correlation_with_what_is_true() -> None:
    world = simulate(n=1500, q=4, k=160, n_subsets=60, seed=3)
    bad = np.arange(1500) < 300
    truth = freeze(world, is_bad=torch.from_numpy(bad), definition=None)
    for half in HALVES:
        part = truth.half(half)
        found = stats.spearmanr(world.mu, part.mu_margin).statistic
        assert part.ceiling == pytest.approx(found, abs=0.02)
        clean = stats.spearmanr(world.mu[~bad], part.mu_margin[~bad]).statistic
        assert part.ceiling_clean == pytest.approx(clean, abs=0.03)
    perfect = truth.metrics(world.mu[None], "self")
    assert perfect["fidelity_of_ceiling"] == pytest.approx(1.0, abs=0.03)
    assert perfect["fidelity_clean_of_ceiling"] == pytest.approx(1.0, abs=0.04)
    assert perfect["fidelity_slope"] == pytest.approx(1.0, abs=0.05)
    assert truth.metrics(world.effects, "queries")["lds_of_ceiling"] == pytest.approx(1.0, abs=0.05)


def test_facts_of_the_bank() -> None:
    facts = TRUTH.facts
    assert facts["n_models"] == 160
    assert facts["halves_spearman"] == pytest.approx(
        stats.spearmanr(TRUTH.development.mu_margin, TRUTH.published.mu_margin).statistic
    )
    assert facts["normality/margin/share_rejected"] < 0.12
    assert facts["normality/loss/share_rejected"] > 0.5 > facts["normality/margin/median_abs_skew"]
    assert facts["definition/examples/n"] == 12
    assert facts["definition/groups/n"] == 6
    assert facts["definition/examples/spearman"] > 0.5
    # a group's mean margin has a fifth of the variance, so its μ is sqrt(5) times the mean μ
    assert 1.7 < facts["definition/groups/slope_through_origin"] < 3.0
    everything = WORLD.definition.take(WORLD.definition.subset == 0)
    assert not any(key.startswith("definition") for key in freeze(definition=everything).facts)
    alone = freeze(repeated=None, definition=None)
    assert not any(key.startswith("definition") for key in alone.facts)
    assert alone.n_query == 0
    assert np.isnan(alone.published.lds_ceiling)


# ----------------------------------------------------------------------------------- metrics


def test_metrics_of_scores() -> None:
    rng = np.random.default_rng(0)
    scores = (WORLD.mu + rng.standard_normal(N))[None]
    for half in HALVES:
        part = TRUTH.half(half)
        found = TRUTH.metrics(torch.from_numpy(scores), "self", half)
        whole = stats.spearmanr(scores[0], part.mu_margin).statistic
        assert found["fidelity"] == pytest.approx(whole)
        assert found["fidelity_of_ceiling"] == pytest.approx(whole / part.ceiling)
        assert found["fidelity_clean"] == pytest.approx(
            stats.spearmanr(scores[0, ~BAD], part.mu_margin[~BAD]).statistic
        )
        assert found["truth_version"] == 1
    assert TRUTH.subsets is not None
    queries = WORLD.effects + rng.standard_normal((Q, N))
    found = TRUTH.metrics(queries, "queries")
    expected = lds(queries, TRUTH.subsets.members[1::2], TRUTH.subsets.margin[1::2]).mean
    assert found["lds"] == expected
    assert found["lds_of_ceiling"] == expected / TRUTH.published.lds_ceiling
    assert 0 < found["lds_error"] < 0.2
    assert np.isnan(found["outcome_spread"])  # these are too few queries
    assert TRUTH.metrics(scores, "validation") == {}
    assert freeze(repeated=None).metrics(queries, "queries") == {}


def test_metrics_of_watched_examples() -> None:
    watched = np.arange(0, N, 2)
    scores = np.zeros((1, N))
    scores[0, watched] = WORLD.mu[watched]
    found = TRUTH.metrics(scores, "self", watched=torch.from_numpy(watched))
    part = TRUTH.published.mu_margin[watched]
    whole = stats.spearmanr(WORLD.mu[watched], part).statistic
    other = stats.spearmanr(TRUTH.development.mu_margin[watched], part).statistic
    assert found["fidelity"] == pytest.approx(whole)
    assert found["fidelity_of_ceiling"] == pytest.approx(whole / np.sqrt(other))
    assert TRUTH.metrics(scores, "self", watched=np.arange(5)) == {}
    assert TRUTH.metrics(np.zeros((Q, N)), "queries", watched=watched) == {}


def test_constant_scores_are_undefined() -> None:
    found = TRUTH.metrics(np.ones((1, N)), "self")
    assert np.isnan(found["fidelity"])
    found = TRUTH.metrics(np.ones((Q, N)), "queries")
    names = ("lds", "lds_error", "outcome_spread", "outcome_spread_of_ceiling")
    assert all(np.isnan(found[name]) for name in names)


# ------------------------------------------------------------------------------------- files


def test_round_trip_is_exact_and_repeatable(tmp_path: Path) -> None:
    path = save(TRUTH, tmp_path)
    assert path == tmp_path / "small_world.safetensors"
    back = load(path)
    for half in HALVES:
        a, b = TRUTH.half(half), back.half(half)
        for name in a.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert TRUTH.subsets is not None
    assert back.subsets is not None
    for name in TRUTH.subsets.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(TRUTH.subsets, name), getattr(back.subsets, name))
    np.testing.assert_array_equal(back.is_bad, BAD)
    assert back.facts == pytest.approx(dict(TRUTH.facts), nan_ok=True)
    assert (back.keep, back.version, back.task) == (TRUTH.keep, 1, "small")
    before = path.read_bytes()
    assert save(back, tmp_path) == path  # the same content again is no change
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_subsets(tmp_path: Path) -> None:
    back = load(save(freeze(repeated=None, definition=None), tmp_path))
    assert back.subsets is None
    assert np.isnan(back.published.lds_ceiling)


def test_a_real_one_is_small(tmp_path: Path) -> None:
    n, q, subsets = 4000, 200, 100
    rng = np.random.default_rng(0)
    part = replace(
        TRUTH.published,
        **{
            name: rng.standard_normal(n).astype(np.float32)
            for name, value in vars(TRUTH.published).items()
            if isinstance(value, np.ndarray)
        },
    )
    assert TRUTH.subsets is not None
    margin = rng.standard_normal((subsets, q)).astype(np.float32)
    truth = replace(
        TRUTH,
        is_bad=np.arange(n) < 800,
        development=part,
        published=part,
        subsets=replace(
            TRUTH.subsets,
            members=rng.random((subsets, n)) < 0.5,
            margin=margin,
            margin_first=margin,
            margin_second=margin,
        ),
    )
    assert save(truth, tmp_path).stat().st_size < 1_000_000


def test_a_published_version_is_never_changed(tmp_path: Path) -> None:
    path = save(TRUTH, tmp_path)
    before = path.read_bytes()
    other = replace(TRUTH, facts={"n_models": 1.0})
    with pytest.raises(TruthError, match=r"holds version 1 with other content.*--version 2"):
        save(other, tmp_path)
    assert path.read_bytes() == before
    save(replace(other, version=2), tmp_path)
    assert load(path).version == 2
    with pytest.raises(TruthError, match="--version 3"):
        save(TRUTH, tmp_path)


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the facts in a file's header."""
    with safetensors.safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["fine_bench_truth"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(about)
    metadata = {"fine_bench_truth": json.dumps(about)}
    path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save(TRUTH, tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for broken in (whole[:-10], whole[:50], b"", bytes(flipped)):
        path.write_bytes(broken)
        with pytest.raises(TruthError, match=r"small_world\.safetensors is damaged"):
            load(path)
    with pytest.raises(TruthError, match="is damaged"):  # nor is it taken for the same content
        save(TRUTH, tmp_path)
    path.write_bytes(whole)
    changed(path, lambda about: about.update(keep=0.7))
    with pytest.raises(TruthError, match="content is not what was written"):
        load(path)
    path.write_bytes(whole)
    changed(path, lambda about: about.pop("setting"))
    with pytest.raises(TruthError, match="the header lacks setting"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TruthError, match="there is no ground-truth file"):
        load(tmp_path / "none.safetensors")
    path = tmp_path / "scores.safetensors"
    path.write_bytes(safetensors.numpy.save({"self": np.zeros(3)}))
    with pytest.raises(TruthError, match="is no ground truth of fine_bench"):
        load(path)
    path = save(TRUTH, tmp_path)
    changed(path, lambda about: about.update(format=2))
    with pytest.raises(TruthError, match="has format 2, this fine_bench reads format 1"):
        load(path)


def test_find_needs_both_digests(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    save(TRUTH, second)
    save(replace(TRUTH, name="other_recipe", setting="0" * 64), second)
    places = [first, second]  # the first does not exist
    found = find(places, TRUTH.data_sha256, TRUTH.setting)
    assert found is not None
    assert found.name == "small_world"
    assert find(places, TRUTH.data_sha256, "1" * 64) is None
    assert find(places, "1" * 64, TRUTH.setting) is None
    save(replace(TRUTH, version=7), first)
    nearer = find(places, TRUTH.data_sha256, TRUTH.setting)
    assert nearer is not None
    assert nearer.version == 7
    save(replace(TRUTH, name="twin"), second)
    with pytest.raises(TruthError, match="are truths of the same data and setting; keep one"):
        find(second, TRUTH.data_sha256, TRUTH.setting)


def test_named(tmp_path: Path) -> None:
    places = folders(tmp_path)
    assert places[0] == tmp_path / "ground_truth"
    save(TRUTH, places[0])
    assert named("small_world", places).task == "small"
    assert "small_world" in known(places)
    with pytest.raises(TruthError, match=r"no ground truth 'mnist'; there are: .*small_world"):
        named("mnist", places)
    with pytest.raises(TruthError, match="there is none at all"):
        named("mnist", [tmp_path / "empty"])


# ----------------------------------------------------------------------------------- command


def stored(folder: Path, vary: str = "both", parts: tuple[str, ...] = PARTS) -> Path:
    """The simulated bank as the bank's own store writes it."""
    identity = {
        "task": "small",
        "data_sha256": "da7a" * 16,
        "setting": "5e77" * 16,
        "n_train": N,
        "n_query": Q,
        "design": {"seed": 0, "keep": 0.5, "vary": vary},
    }
    bank = Bank.create(folder, identity, np.flatnonzero(BAD).tolist())
    for part in parts:
        values: BankModels = getattr(WORLD, part)
        run = np.arange(len(values))
        bank.add(
            [
                Model(part, int(s), int(r))  # type: ignore[arg-type]
                for s, r in zip(values.subset, run, strict=True)
            ],
            values,
        )
    return folder


def test_freezing_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = stored(tmp_path / "bank")
    arguments = [str(bank), "--name", "small_world", "--output", str(tmp_path / "truths")]
    assert main([*arguments, "--version", "1"]) == 0
    printed = capsys.readouterr()
    path = tmp_path / "truths" / "small_world.safetensors"
    assert str(path) in printed.err
    assert "published    80 models, ceiling 0." in printed.out
    assert "15 subsets, 5 seeds, 6 queries" in printed.out
    assert "definition/examples/slope_through_origin" in printed.out
    found = load(path)
    np.testing.assert_array_equal(found.published.mu_margin, TRUTH.published.mu_margin)
    np.testing.assert_array_equal(found.is_bad, BAD)
    assert (found.task, found.data_sha256, found.setting) == ("small", "da7a" * 16, "5e77" * 16)
    assert main([*arguments, "--version", "1"]) == 0  # the same again
    assert main([*arguments, "--version", "0"]) == 2
    assert "version counts from 1" in capsys.readouterr().err

    # a link in the folder that the user names is followed, and stays
    elsewhere = path.rename(tmp_path / "elsewhere")
    elsewhere.chmod(0o600)
    path.symlink_to(elsewhere)
    assert main([*arguments, "--version", "2"]) == 0
    assert path.is_symlink()
    assert (load(elsewhere).version, stat.S_IMODE(elsewhere.stat().st_mode)) == (2, 0o600)
    # what cannot be written is refused before the bank is opened
    no_bank = [str(tmp_path / "no bank"), *arguments[1:-1], str(elsewhere), "--version", "1"]
    capsys.readouterr()
    assert main(no_bank) == 2
    assert "no file can be made in" in capsys.readouterr().err


def test_evidence_of_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bank = stored(tmp_path / "bank")
    results = tmp_path / "results"
    arguments = [str(bank), "--name", "small_world", "--version", "1", "--evidence", str(results)]
    assert main(arguments) == 0
    assert "definition/examples/spearman" in capsys.readouterr().out
    assert {str(path.relative_to(results)) for path in results.rglob("*.*")} == {
        "ground_truth/definition--small_world.csv",
        *(
            f"figures/{name}--small_world.{kind}"
            for name in ("definition", "retraining_curves")
            for kind in ("png", "svg")
        ),
    }  # and no frozen truth
    table = pd.read_csv(results / "ground_truth" / "definition--small_world.csv")
    assert table["bank_mu"].is_monotonic_decreasing
    assert len(table) == 18
    assert set(table["size"]) == {1, 5}
    assert set(table["runs_without"]) == {8}
    row = table[table["set"] == "set_of_13"].iloc[0]  # sets without a name in the bank's folder
    margin, inside = WORLD.definition.margin[:, 13], WORLD.definition.members
    p, q = margin[inside.all(axis=1)], margin[~inside[:, 13] & (inside.sum(axis=1) == N - 1)]
    pooled = np.sqrt((p.var(ddof=1) + q.var(ddof=1)) / 2)
    assert row["definition_mu"] == pytest.approx((p.mean() - q.mean()) / pooled, rel=1e-3)
    assert row["n_bad"] == 1
    assert row["runs_with"] == 8
    found = retraining_mu(WORLD.single.members, WORLD.single.margin)
    assert row["bank_mu"] == pytest.approx(found.mu[13], rel=1e-3)
    assert row["bank_std_error"] == pytest.approx(found.std_error[13], rel=1e-3)
    groups = table[table["size"] == 5]
    assert groups["bank_std_error"].isna().all()

    without = stored(tmp_path / "no definition", parts=("single",))
    assert main([str(without), *arguments[1:-1], str(tmp_path / "other")]) == 0
    names = {path.name for path in (tmp_path / "other").rglob("*.*")}
    assert names == {f"retraining_curves--small_world.{kind}" for kind in ("png", "svg")}


def test_banks_that_cannot_be_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(folder: Path) -> str:
        arguments = ["--name", "x", "--version", "1", "--output", str(tmp_path / "truths")]
        assert main([str(folder), *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no bank" in refusal(tmp_path)
    assert "differ in order alone" in refusal(stored(tmp_path / "order", "order", ()))
    assert "no models of the part 'single'" in refusal(stored(tmp_path / "empty", parts=()))
    assert not (tmp_path / "truths").exists()


# ---------------------------------------------------------------------------------- refusals


def test_banks_that_are_refused() -> None:
    few = replace(WORLD, single=WORLD.single.take(np.arange(30)))
    with pytest.raises(
        ValueError, match=r"each half of the bank's 30 single models.*for both halves about \d+"
    ):
        freeze(few)
    with pytest.raises(ValueError, match=r"is_bad has shape \(3,\), the bank 80 examples"):
        freeze(is_bad=np.zeros(3, dtype=np.bool_))
    twice = WORLD.single.take(np.append(np.arange(160), 0))
    with pytest.raises(ValueError, match="must hold one model a subset"):
        freeze(replace(WORLD, single=twice))
    with pytest.raises(ValueError, match="has 12 subsets; 10 are needed in each half, 20 in all"):
        freeze(repeated=WORLD.repeated.take(WORLD.repeated.subset < 12))
    with pytest.raises(ValueError, match="the repeated part has 10 examples, the single part 80"):
        freeze(repeated=narrow(WORLD.repeated, 10))
    first = WORLD.definition.subset == 10**18 - 1
    wrong = replace(WORLD.definition, subset=np.where(first, 0, WORLD.definition.subset))
    with pytest.raises(ValueError, match="must be trained on all data"):
        freeze(definition=wrong)
    with pytest.raises(ValueError, match="must be trained on all data"):
        freeze(definition=WORLD.definition.take(WORLD.definition.subset > 0))


def narrow(part: BankModels, n: int) -> BankModels:
    """The same models over fewer examples."""
    cut = {name: getattr(part, name)[:, :n] for name in ("members", "loss", "margin")}
    return replace(part, **cut)


def test_truths_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"name must consist of letters.*got '\.\./x'"):
        replace(TRUTH, name="../x")
    with pytest.raises(ValueError, match="version counts from 1, got 0"):
        replace(TRUTH, version=0)
    with pytest.raises(ValueError, match="is_bad must be boolean"):
        replace(TRUTH, is_bad=BAD.astype(float))
    with pytest.raises(ValueError, match=r"published\.mu_loss must have shape \(80,\)"):
        replace(TRUTH, published=replace(TRUTH.published, mu_loss=np.zeros(3, np.float32)))
    nan = np.where(BAD, np.nan, TRUTH.published.mu_margin).astype(np.float32)
    with pytest.raises(ValueError, match="mu_margin is not finite for 16 examples"):
        replace(TRUTH, published=replace(TRUTH.published, mu_margin=nan))
    assert TRUTH.subsets is not None
    with pytest.raises(ValueError, match=r"subsets\.members must have 80 columns"):
        replace(TRUTH, subsets=replace(TRUTH.subsets, members=TRUTH.subsets.members[:, 1:]))
    with pytest.raises(ValueError, match=r"subsets\.margin_first must be finite and have shape"):
        replace(TRUTH, subsets=replace(TRUTH.subsets, margin_first=np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match="half must be one of"):
        TRUTH.half("both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scores have shape \(1, 79\); the truth small_world has"):
        TRUTH.metrics(np.zeros((1, 79)), "self")
    with pytest.raises(ValueError, match="one row, got 2"):
        TRUTH.metrics(np.zeros((2, 80)), "self")
    with pytest.raises(ValueError, match="have 5 rows; the truth small_world has 6 queries"):
        TRUTH.metrics(np.zeros((5, 80)), "queries")
