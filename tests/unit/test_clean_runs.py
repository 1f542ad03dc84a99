"""Runs of ``clean``: who is scored by whom, the scores beside slow twins, what is kept."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from fine_bench.errors import UserError
from fine_bench.metrics.error_rate import flag
from fine_bench.models.classifier import Classifier
from fine_bench.models.networks import mlp
from fine_bench.runner.clean import check as checking
from fine_bench.runner.clean.cleaning import clean
from fine_bench.runner.clean.features import features
from fine_bench.runner.clean.fold_store import FoldStore, as_bytes, key_of, read_fold
from fine_bench.runner.clean.inputs.items import Items
from fine_bench.runner.clean.inputs.recognise import load
from fine_bench.runner.clean.issues import exact_groups, find_issues, summary
from fine_bench.runner.clean.probabilities import given_runs
from fine_bench.runner.clean.recipe import Recipe, build, own_recipe, recipe_for
from fine_bench.runner.clean.scoring import (
    blended,
    mu_interval,
    n_suspects,
    ranking,
    score_of,
    stable_share,
    suspected,
    suspects,
)
from fine_bench.runner.clean.training import (
    Run,
    folds_of,
    joined,
    logits_of,
    train_model,
    train_run,
    whole_batches,
)
from fine_bench.runner.clean.verify_first import draw_to_verify

N, K = 240, 3


def clouds(n: int = N, flipped: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three clouds, labels of which some are wrong, and which."""
    rng = np.random.default_rng(0)
    right = np.arange(n) % K
    x = rng.normal(size=(n, 4)) + 4.0 * np.eye(K, 4)[right]
    y = right.copy()
    rows = rng.permutation(n)[:flipped]
    y[rows] = (right[rows] + 1) % K
    return x, y, y != right


@pytest.fixture(scope="module")
def items() -> Items:
    x, y, _ = clouds()
    return load((x, y))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return replace(recipe_for("arrays", (4,)), epochs=5, lr=0.2)


@pytest.fixture(scope="module")
def runs(items: Items, recipe: Recipe) -> list[Run]:
    x, y = features(items), torch.from_numpy(items.y)
    return [train_run(x, y, K, recipe, seed=seed) for seed in (0, 1, 2)]


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_parts_of_each_class(folds: int) -> None:
    y = np.array([0] * 10 + [1] * 7 + [2] * 2)
    fold = folds_of(y, folds, 0)
    for label, n in ((0, 10), (1, 7), (2, 2)):
        counts = np.bincount(fold[y == label], minlength=folds)
        assert counts.sum() == n
        assert counts.max() - counts.min() <= 1
    assert (folds_of(y, folds, 0) == fold).all()
    assert any((folds_of(y, folds, seed) != fold).any() for seed in (1, 2))


def test_no_model_scores_what_it_was_trained_on(items: Items, recipe: Recipe) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    trained = np.arange(0, N, 2)
    run = train_model(x, y, K, trained, recipe, seed=0)
    unseen = ~np.isnan(run.probabilities[:, 0])
    assert unseen[1::2].all()
    assert unseen[trained].sum() == 20  # a tenth is 12, at least 20 are held out
    assert (np.isnan(run.own[:, 0]) == unseen).all()
    assert (np.isnan(run.mu) == unseen).all()
    assert run.probabilities[unseen].sum(axis=1) == pytest.approx(1.0)
    assert run.own[~unseen].sum(axis=1) == pytest.approx(1.0)
    assert run.examples == run.epochs[0] * 100
    # labels of rows that are not trained on change nothing but what stopping sees
    other = y.clone()
    other[1::2] = (other[1::2] + 1) % K
    again = train_model(x, other, K, trained, recipe, seed=0)
    assert (again.probabilities[1::2] == run.probabilities[1::2]).all()


def test_words_on_its_own_rows_in_passing_or_at_the_best_epoch(
    items: Items, recipe: Recipe
) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    trained = np.arange(0, N, 2)
    passing, best = (
        train_model(x, y, K, trained, replace(recipe, own_rows=which), seed=0, influence=False)
        for which in ("epochs", "best")
    )
    assert np.array_equal(passing.probabilities, best.probabilities, equal_nan=True)
    assert passing.examples == best.examples
    own = ~np.isnan(best.own[:, 0])
    assert (own == np.isnan(best.probabilities[:, 0])).all()
    # the same model on the same rows as rows that nobody was trained on
    twice = torch.cat([x, x])
    again = train_model(
        twice, torch.cat([y, y]), K, trained, replace(recipe, own_rows="best"), seed=0,
        influence=False,
    )  # fmt: skip
    assert again.probabilities[N:][own] == pytest.approx(best.own[own], abs=1e-6)
    assert np.abs(passing.own[own] - best.own[own]).max() > 0.01


@pytest.mark.parametrize("folds", [2, 3])
def test_a_run_trains_on_all_folds_but_one(items: Items, recipe: Recipe, folds: int) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    parts: list[Run] = []

    def noted(number: int, make: Any) -> Run:
        assert number == len(parts)
        parts.append(make())
        return parts[-1]

    run = train_run(x, y, K, replace(recipe, folds=folds), seed=1, keep=noted)
    fold = folds_of(items.y, folds, 1)
    assert len(parts) == len(run.epochs) == folds
    for number, part in enumerate(parts):
        left = fold == (number + 1) % folds
        assert not np.isnan(part.probabilities[left]).any()
        assert np.isnan(part.own[left]).all()
        seen = ~np.isnan(part.own[:, 0])
        assert seen.sum() == (~left).sum() - 20  # held out: a tenth, at least 20
        assert np.isnan(part.probabilities[seen]).all()
    assert not np.isnan(run.probabilities).any()
    several = np.stack([part.mu for part in parts])
    both = (~np.isnan(several)).sum(axis=0) == folds - 1
    assert run.mu[both] == pytest.approx(np.nanmean(several[:, both], axis=0))


def test_watching_changes_no_probability(items: Items, recipe: Recipe) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    with_mu = train_run(x, y, K, recipe, seed=3)
    without = train_run(x, y, K, recipe, seed=3, influence=False)
    assert (with_mu.probabilities == without.probabilities).all()
    assert np.isnan(without.mu).all()
    assert np.isfinite(with_mu.probabilities).all()


def test_training_stops_when_held_out_rows_say_so() -> None:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.normal(size=(120, 3)).astype(np.float32))
    y = torch.from_numpy(rng.integers(0, 2, 120))  # noise: nothing to be learnt
    recipe = replace(recipe_for("arrays", (3,)), epochs=60, lr=0.5)
    run = train_model(x, y, 2, np.arange(120), recipe, seed=0, influence=False)
    assert run.epochs[0] < 30


def test_the_mean_over_the_steps_of_an_epoch_scores(items: Items, recipe: Recipe) -> None:
    steps: list[dict[str, torch.Tensor]] = []

    class Noted(Classifier):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            state = {k: v.detach().double().clone() for k, v in self.state_dict().items()}
            steps.append(state)

    def make(in_shape: Any, n_classes: int) -> Noted:
        return Noted(mlp(in_shape, n_classes), n_classes, lr=0.5)

    x, y = features(items), torch.from_numpy(items.y)
    trained = np.arange(0, N, 2)
    one = replace(recipe, make=make, epochs=1, batch_size=16)
    run = train_model(x, y, K, trained, one, seed=0, influence=False)
    assert len(steps) == 7
    twin = make((4,), K).double()
    twin.load_state_dict({k: sum(s[k] for s in steps) / 7 for k in steps[0]})
    expected = torch.softmax(twin(x[1::2].double()), 1).detach().numpy()
    assert run.probabilities[1::2] == pytest.approx(expected, abs=1e-5)
    twin.load_state_dict(steps[-1])
    last = torch.softmax(twin(x[1::2].double()), 1).detach().numpy()
    assert np.abs(run.probabilities[1::2] - last).max() > 1e-3


def test_a_model_with_a_shared_weight_is_scored_by_its_mean() -> None:
    class Shared(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(x).relu())
            return out

    module, x = Shared(), torch.randn(4, 3)
    state = {name: 2 * value.clone() for name, value in module.state_dict().items()}
    found = logits_of(module, x, state)
    module.load_state_dict(state)
    assert torch.equal(found, logits_of(module, x))


def test_joined_runs_are_means_of_what_is_known() -> None:
    def part(value: float, rows: list[int]) -> Run:
        p = np.full((3, 2), np.nan)
        p[rows] = [value, 1 - value]
        mu = np.where(np.isin(np.arange(3), rows), value, np.nan)
        return Run(p, p, mu, mu, (4,), 10)

    whole = joined([part(0.2, [0, 1]), part(0.6, [1])])
    assert whole.probabilities[:2, 0] == pytest.approx([0.2, 0.4])
    assert np.isnan(whole.probabilities[2]).all()
    assert whole.mu[:2] == pytest.approx([0.2, 0.4])
    assert whole.epochs == (4, 4)
    assert whole.examples == 20


def test_no_last_batch_of_one_or_two() -> None:
    for n in range(3, 400):
        size = whole_batches(n, 64)
        assert n % size not in (1, 2), n
        assert size >= 3
    assert whole_batches(258, 64) == 63
    assert whole_batches(5, 64) == 5


def test_wrong_labels_are_found_and_runs_agree(items: Items, runs: list[Run]) -> None:
    _, _, bad = clouds()
    table = ranking(items, runs, "doubt", None)
    assert bad[table["row"].to_numpy()[:24]].mean() > 0.9
    assert table["rank"].tolist() == list(range(1, N + 1))
    assert (np.diff(table["score"]) <= 0).all()
    assert set(table["runs"]) == {3}
    found = suspected(table)
    assert bad[found["row"].to_numpy()].mean() > 0.8
    assert stable_share(runs, items.y, "doubt") > 0.5
    assert math.isnan(stable_share(runs[:1], items.y, "doubt"))


# ------------------------------------------------------------------------------------- scores


def test_scores_beside_their_formulas(items: Items, runs: list[Run]) -> None:
    run = runs[0]
    p = blended(run)
    for score in ("doubt", "p_label", "margin"):
        values = score_of(run, items.y, score)
        for row in range(0, N, 17):
            y = int(items.y[row])
            out = [float(v) for v in run.probabilities[row]]
            both = [
                a if math.isnan(b) else 0.7 * a + 0.3 * b
                for a, b in zip(out, run.own[row].tolist(), strict=True)
            ]
            twin = {
                "doubt": 0.5 * math.log(max(v for k, v in enumerate(both) if k != y))
                - math.log(both[y]),
                "p_label": 1 - out[y],
                "margin": max(v for k, v in enumerate(out) if k != y) - out[y],
            }[score]
            assert values[row] == pytest.approx(twin, rel=1e-12), (score, row)
            assert p[row] == pytest.approx(both)
    mu = score_of(run, items.y, "mu")
    known = ~np.isnan(run.mu)
    assert (mu[known] == run.mu[known]).all()
    assert (mu[~known] == np.median(run.mu[known])).all()


def test_probabilities_of_nothing_and_one_have_a_score() -> None:
    p = np.array([[1.0, 0.0], [0.0, 1.0]])
    run = Run(p, np.full((2, 2), np.nan), np.full(2, np.nan), np.full(2, np.nan), (), 0)
    values = score_of(run, np.array([0, 0]), "doubt")
    assert np.isfinite(values).all()
    assert values[1] > values[0]
    with pytest.raises(UserError, match="--score mu needs f-INE"):
        score_of(run, np.array([0, 0]), "mu")


def test_number_of_suspects_beside_a_slow_twin() -> None:
    rng = np.random.default_rng(2)
    p = rng.dirichlet([0.5] * 4, 200)
    y = rng.integers(0, 3, 200)  # class 3 has no row
    threshold = [float(np.mean([p[i, k] for i in range(200) if y[i] == k])) if (y == k).any()
                 else math.inf for k in range(4)]  # fmt: skip
    twin = 0
    for i in range(200):
        sure = [k for k in range(4) if p[i, k] >= threshold[k]]
        twin += bool(sure) and max(sure, key=lambda k: p[i, k]) != y[i]
    assert n_suspects(p, y) == twin
    assert 0 < twin < 200


def test_suspects_are_the_highest_scores(items: Items, runs: list[Run]) -> None:
    mask = suspects(runs[0], items.y, "doubt")
    values = score_of(runs[0], items.y, "doubt")
    assert mask.sum() == n_suspects(runs[0].probabilities, items.y)
    assert values[mask].min() >= values[~mask].max()


def of_mu(mu: Any, error: Any) -> Run:
    nothing = np.full((len(mu), 2), 0.5)
    return Run(nothing, nothing, np.asarray(mu, float), np.asarray(error, float), (), 0)


def test_intervals_of_mu_cover_and_follow_their_formula() -> None:
    rng = np.random.default_rng(3)
    n, runs = 4000, 3
    truth, own = rng.normal(size=n), rng.uniform(0.1, 0.5, n)
    # the runs' own errors are half of what they should be
    parts = [of_mu(truth + 2 * own * rng.normal(size=n), own) for _ in range(runs)]
    mean, low, high = mu_interval(parts)
    assert ((low <= truth) & (truth <= high)).mean() == pytest.approx(0.95, abs=0.015)
    mu = np.stack([part.mu for part in parts])
    scale = np.mean(mu.var(axis=0, ddof=1)) / np.mean(own**2)
    row = 7
    half = 1.959964 * math.sqrt(scale * own[row] ** 2 / runs)
    assert (mean[row], high[row] - mean[row]) == pytest.approx((mu[:, row].mean(), half), rel=1e-5)


def test_intervals_of_mu_with_one_run_or_none() -> None:
    mean, low, high = mu_interval([of_mu([1.0, np.nan], [0.1, np.nan])])
    assert (mean[0], high[0] - mean[0]) == pytest.approx((1.0, 0.1959964), rel=1e-5)
    assert np.isnan([mean[1], low[1], high[1]]).all()
    # rows of one run among those of two count by themselves
    mean, low, _ = mu_interval([of_mu([1.0, 2.0], [0.1, 0.1]), of_mu([1.2, np.nan], [0.1, np.nan])])
    assert mean == pytest.approx([1.1, 2.0])
    assert (mean - low)[1] == pytest.approx((mean - low)[0] * math.sqrt(2))


def test_a_trusted_list_gives_p_values(items: Items, runs: list[Run]) -> None:
    _, _, bad = clouds()
    trusted = np.flatnonzero(~bad)[:120]
    flags = flag(score_of(joined(runs), items.y, "doubt"), trusted, 0.1)
    table = ranking(items, runs, "doubt", flags)
    assert table["trusted"].sum() == 120
    assert table["p_value"].isna().sum() == 120
    assert bad[table["row"][table["covered"]].to_numpy()].mean() > 0.8


# ------------------------------------------------------------------------- what to verify first


@pytest.mark.parametrize(("n_suspected", "level"), [(24, 0.1), (0, 0.1), (100, 0.2), (24, 0.02)])
def test_the_draw_is_large_enough_to_flag_half(
    items: Items, n_suspected: int, level: float
) -> None:
    draw = draw_to_verify(items, n_suspected, level, 0)
    k = max(math.ceil(n_suspected / 2), math.ceil(N / 100))
    assert draw.expected == k
    # the smallest n with 1/(n + 1) ≤ level · k / N, by counting
    n = next(n for n in range(1, 10**6) if 1 / (n + 1) <= level * k / N + 1e-12)
    assert draw.needed == n
    assert draw.enough == (math.ceil(n / max(1 - n_suspected / N, 0.5)) <= N // 2)
    assert len(draw.table) == min(math.ceil(n / max(1 - n_suspected / N, 0.5)), N // 2)
    assert draw.table["row"].is_unique
    again, other = (draw_to_verify(items, n_suspected, level, seed) for seed in (0, 1))
    assert again.table.equals(draw.table)
    assert not other.table.equals(draw.table)


# --------------------------------------------------------------------------------------- issues


def test_texts_of_the_same_words_are_one_group() -> None:
    # equal vectors of different texts
    words = np.array(
        ["ash", "beech", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "yew"]
    )
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 5, replace=False)) for _ in range(60)]
    for k in range(0, 30, 3):
        texts[k + 1] = " ".join(reversed(texts[k].split()))
    items = load(pd.DataFrame({"text": texts, "label": np.arange(60) % 2}))
    table = pd.DataFrame({"runs_found": [0], "runs": [1], "label": [0], "suggested": [1]})
    found = find_issues(items, features(items), table)
    near = found[found["issue"] == "near duplicates"]
    groups = {frozenset(part["row"]) for _, part in near.groupby("group")}
    same: dict[frozenset[str], set[int]] = {}
    for k, text in enumerate(texts):
        same.setdefault(frozenset(text.split()), set()).add(k)
    slow = {frozenset(rows) for rows in same.values() if len(rows) > 1}
    assert groups == slow
    assert len(slow) >= 10


def test_duplicates_outliers_and_confused_classes(runs: list[Run]) -> None:
    x, y, _ = clouds()
    x[10] = x[13]  # same class, exact
    x[20] = x[22]  # across classes, exact
    x[30] = x[33] + 1e-4
    x[40] = 300.0
    items = load((x, y))
    assert exact_groups(items) == [[10, 13], [20, 22]]
    table = ranking(items, runs, "doubt", None)
    found = find_issues(items, features(items), table)
    by = {issue: set(part["row"]) for issue, part in found.groupby("issue")}
    assert by["exact duplicates"] == {10, 13, 20, 22}
    assert by["near duplicates"] == {30, 33}
    assert by["outlier"] == {40}
    assert by["confused classes"] == set(suspected(table)["row"])
    said = summary(found)
    assert said[0] == (
        "exact duplicates: 2 group(s) of 4 rows that are the same, 1 of them across classes"
    )
    assert said[1].startswith("near duplicates: 1 group(s) of 2 rows")
    assert said[2] == "outliers: 1"
    assert re.match(r"confused classes: \d → \d: \d+ rows; ", said[3])
    assert summary(found.iloc[:0])[:3] == [
        "exact duplicates: none", "near duplicates: none", "outliers: none"
    ]  # fmt: skip


def test_the_same_text_and_row_is_a_duplicate() -> None:
    texts = pd.DataFrame({"text": [f"one film {k // 2} of many" for k in range(20)],
                          "label": np.arange(20) // 2 % 2})  # fmt: skip
    assert len(exact_groups(load(texts, kind="text", text="text"))) == 10
    rows = pd.DataFrame(
        {"a": np.arange(20) // 2, "b": ["u", None] * 10, "label": np.arange(20) % 2}
    )
    assert exact_groups(load(rows)) == []
    rows["b"] = None
    rows["c"] = np.arange(20) // 2 % 3
    assert len(exact_groups(load(rows))) == 10


# ---------------------------------------------------------------------------------- probabilities


def test_probabilities_that_were_given(items: Items, tmp_path: Path) -> None:
    p = np.random.default_rng(0).dirichlet([1.0] * K, N)
    np.save(tmp_path / "p.npy", p)
    pd.DataFrame(p[:, ::-1], columns=["2", "1", "0"]).to_csv(tmp_path / "p.csv", index=False)
    for given in ([tmp_path / "p.npy"], [tmp_path / "p.csv"], [p], [np.stack([p])]):
        (run,) = given_runs(items, given)
        assert run.probabilities == pytest.approx(p)
    assert len(given_runs(items, [np.stack([p, p])])) == 2
    result = clean(clouds()[:2], probabilities=[p, p])
    assert result.recipe is None
    assert result.table["mu"].isna().all()
    assert set(result.table["runs"]) == {2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((5, K)) / K, "holds float64 of shape (5, 3), but the data have 240 rows and 3"),
        (np.ones((N, K)), "row 0: [1.0, 1.0, 1.0] … are no probabilities (they sum to 3)"),
        (np.full((N, K), "a"), "but the data have"),
        ("p.npy", "cannot be read"),
        ("p.csv", "has no column for the class(es) 2"),
    ],
)
def test_probabilities_that_are_none(
    items: Items, given: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.npy").write_text("no array")
    Path("p.csv").write_text("0,1\n0.5,0.5\n")
    with pytest.raises(UserError) as refused:
        given_runs(items, [given])
    assert message in str(refused.value)


# ------------------------------------------------------------------------------------ own models


class Module(pl.LightningModule):
    """A user's own, with an optimiser of its own."""

    def __init__(self, in_shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        self.net = nn.Linear(in_shape[0], n_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


class Mixing(nn.Module):
    """No per-example gradients: every row sees the others of its batch."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        self.net = nn.Linear(n, k)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x + 0.5 * x.mean(0, keepdim=True))


def test_the_users_own_models(
    items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    base = replace(recipe_for("arrays", (4,)), epochs=3)
    _, _, bad = clouds()
    run = train_run(x, y, K, own_recipe(base, Module, x, K), seed=0)
    assert not np.isnan(run.mu).all()
    values = score_of(run, items.y, "p_label")
    assert values[bad].mean() > values[~bad].mean()
    (tmp_path / "mine_for_clean.py").write_text(
        "from torch import nn\ndef net(shape, k):\n    return nn.Linear(shape[0], k)\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = own_recipe(base, "mine_for_clean:net", x, K)
    assert build(recipe, (4,), K, 0).net.weight.shape == (K, 4)
    assert own_recipe(base, "linear", x, K).name == "linear"


def test_without_per_example_gradients_all_but_mu_is_measured(items: Items) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    base = replace(recipe_for("arrays", (4,)), epochs=2)
    run = train_run(x, y, K, own_recipe(base, lambda s, k: Mixing(s[0], k), x, K), seed=0)
    assert np.isfinite(run.probabilities).all()
    assert np.isnan(run.mu).all()
    assert run.trouble


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing", "neither one of linear, mlp, cnn, gn_cnn nor an import path"),
        ("no_such_package_here:net", "cannot be imported (ModuleNotFoundError"),
        ("math:nothing", "cannot be imported (AttributeError"),
        ("math:pi", "is a float; name a function"),
        ("math:gcd", "does not take inputs of shape (4,) and 3 classes (TypeError"),
        (lambda s, k: 3, "returns a int; it must be a function that takes"),
        (lambda s, k: nn.Linear(s[0], k + 1), "gives (2, 4) for two rows; its output must be"),
        (lambda s, k: nn.Linear(9, k), "does not take inputs of shape (4,)"),
    ],
)
def test_models_that_are_refused(items: Items, model: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        own_recipe(recipe_for("arrays", (4,)), model, features(items), K)
    assert message in str(refused.value)


def test_the_model_for_each_kind() -> None:
    assert recipe_for("images", (3, 32, 32)).name == "gn_cnn"
    assert recipe_for("images", (1, 8, 8)).name == "cnn"
    assert recipe_for("images", (1, 3, 3)).name == "mlp"
    assert recipe_for("table", (9,)).name == "mlp"
    assert recipe_for("text", (9,)).name == "linear"
    photos = recipe_for("images", (3, 32, 32))
    assert (photos.folds, photos.own_rows) == (3, "best")
    x = torch.zeros(2, 3, 32, 32)
    for name, folds, own_rows in (("mlp", 2, "epochs"), ("cnn", 3, "best")):
        other = own_recipe(photos, name, x, K)
        assert (other.folds, other.own_rows) == (folds, own_rows)


# ----------------------------------------------------------------------------------- kept folds


def test_a_fold_of_other_code_is_not_found_again(
    items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    base = recipe_for("arrays", (4,))
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "mine_for_keys.py"
    code = "from torch import nn\ndef net(shape, k):\n    return nn.Linear(shape[0], k)\n"
    path.write_text(code)
    recipe = own_recipe(base, "mine_for_keys:net", x, K)
    first = key_of(x, y, recipe, True)
    assert key_of(x, y, recipe, True) == first
    path.write_text(code + "# changed\n")
    assert key_of(x, y, recipe, True) != first
    made = {
        key_of(x, y, own_recipe(base, net, x, K), True)
        for net in (
            lambda s, k: nn.Linear(s[0], k),
            lambda s, k: nn.Linear(s[0], k, bias=False),
            lambda s, k: nn.Sequential(nn.LazyLinear(5), nn.Linear(5, k)),
        )
    }
    assert len(made) == 3


def test_folds_are_kept_and_found_again(items: Items, recipe: Recipe, tmp_path: Path) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    store = FoldStore(tmp_path, key_of(x, y, recipe, True))
    first = train_run(x, y, K, recipe, seed=0, keep=store.keeper(0))
    assert store.finished([0, 1], 2) == 2

    def never() -> Run:
        raise AssertionError("was trained again")

    again = joined([store.keeper(0)(number, never) for number in (0, 1)])
    assert (again.probabilities == first.probabilities).all()
    assert np.array_equal(again.mu, first.mu, equal_nan=True)
    store.path(0, 1).write_bytes(b"damaged")
    assert read_fold(store.path(0, 1)) is None
    made = store.keeper(0)(1, lambda: first)
    assert read_fold(store.path(0, 1)) is not None
    assert made is first
    assert as_bytes(first) == as_bytes(first)
    keys = {
        key_of(x, y, recipe, True),
        key_of(x, y, recipe, False),
        key_of(x + 1, y, recipe, True),
        key_of(x, (y + 1) % K, recipe, True),
        key_of(x, y, replace(recipe, lr=0.1), True),
    }
    assert len(keys) == 5


# ----------------------------------------------------------------------------------------- check


def test_check_compares_on_rows_that_neither_model_saw(items: Items, recipe: Recipe) -> None:
    x, y = features(items), torch.from_numpy(items.y)
    _, _, bad = clouds()
    trusted = ~bad & (np.arange(N) % 2 == 0)
    found = checking.check(x, y, K, bad, trusted, replace(recipe, epochs=4), seed=0, seeds=2)
    assert found.before.shape == found.after.shape == found.trusted_after.shape == (2,)
    assert 0 < found.removed < bad.sum()
    assert (found.trusted_after >= found.after).all()  # wrong labels cost both models
    assert "2 seeds" in found.lines()[0]
    assert len(found.lines()) == 2
    held = checking.held_out(items.y, 0)
    assert held.sum() == pytest.approx(N / 5, abs=2)


def test_the_interval_of_a_difference() -> None:
    before, after = np.array([0.8, 0.81, 0.79, 0.8, 0.8]), np.array([0.82, 0.83, 0.8, 0.83, 0.82])
    mean, low, high = checking.difference(before, after)
    change = after - before
    half = 2.776445 * change.std(ddof=1) / math.sqrt(5)
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - half, 0.02 + half), rel=1e-5)
    assert math.isnan(checking.difference(before[:1], after[:1])[1])
    for a, word in ((after, "helps"), (2 * before - after, "hurts"), (before, "no measurable")):
        said = checking.Check(before, a, np.zeros(0), np.zeros(0), 3.0).lines()
        assert word in said[0]
