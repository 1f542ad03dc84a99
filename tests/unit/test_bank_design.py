"""Which models a bank holds: random subsets, seeds, and growth that only appends."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from fine_bench.retraining.design import (
    Design,
    Model,
    choose_singles,
    definition_models,
    repeated_models,
    set_number,
    single_models,
)

N = 41


@pytest.mark.parametrize(("keep", "size"), [(0.5, 20), (0.9, 37), (0.001, 1), (0.999, 40)])
def test_every_random_subset_has_exactly_its_share(keep: float, size: int) -> None:
    design = Design(keep=keep)
    for model in [*single_models(5), *repeated_models(2, 5)]:
        positions = design.positions(model, N)
        assert positions.dtype == torch.int64
        assert len(positions) == size == design.size(N) == design.size_of(model, N)
        assert (positions.diff() > 0).all()
        assert positions[0] >= 0
        assert positions[-1] < N


def test_subsets_are_uniform() -> None:
    count, keep = 2000, 0.9
    inside = np.zeros((count, N))
    for k, model in enumerate(single_models(count)):
        inside[k, Design(seed=3, keep=keep).positions(model, N).numpy()] = 1
    share = 37 / N
    spread = math.sqrt(share * (1 - share) / count)
    assert np.abs(inside.mean(0) - share).max() < 4.5 * spread
    # without replacement: slightly negative correlation −1/(N − 1) of two examples
    correlation = np.corrcoef(inside.T)[np.triu_indices(N, 1)]
    assert correlation.mean() == pytest.approx(-1 / (N - 1), abs=0.003)


def test_a_model_follows_from_the_seed_and_its_own_place() -> None:
    design = Design(seed=1)
    assert single_models(9)[:4] == single_models(4)
    few, many = repeated_models(2, 5), repeated_models(3, 7)
    assert set(few) < set(many)
    places = [*single_models(4), *many, *definition_models({"a": [1], "b": [2, 3]}, 3, 2)]
    assert len({design.run_seed(model) for model in places}) == len(places)
    assert all(design.run_seed(m) != Design(seed=2).run_seed(m) for m in places)
    assert design.run_seed(places[0]) == Design(seed=1, keep=0.9, vary="order").run_seed(places[0])
    first, second = single_models(2)
    assert not torch.equal(design.positions(first, N), design.positions(second, N))
    other = design.positions(Model("repeated", 0, 0), N)
    assert not torch.equal(design.positions(first, N), other)


def test_seeds_of_one_subset_share_it() -> None:
    design = Design()
    models = repeated_models(2, 5)
    assert [m.subset for m in models] == [0] * 5 + [1] * 5
    subsets = [design.positions(m, N).tolist() for m in models]
    assert subsets[0] == subsets[4] != subsets[5]
    assert len({design.run_seed(m) for m in models}) == 10


@pytest.mark.parametrize("vary", ["both", "initialisation", "order"])
def test_what_varies(vary: Any) -> None:
    design = Design(vary=vary)
    models = [*single_models(3), *repeated_models(1, 5), *definition_models({"a": [1]}, 2, 2)]
    init = {design.init_seed(m) for m in models}
    order = {design.order_seed(m) for m in models}
    assert len(init) == (1 if vary == "order" else len(models))
    assert len(order) == (1 if vary == "initialisation" else len(models))
    if vary == "both":
        assert all(
            design.init_seed(m) == design.order_seed(m) == design.run_seed(m) for m in models
        )
    else:
        assert not init & order


def test_the_definition_leaves_sets_out() -> None:
    design = Design()
    sets = {"one": [7], "group": [5, 3, 11]}
    models = definition_models(sets, 3, 2)
    assert [m.run for m in models] == [0, 1, 2, 0, 1, 0, 1]
    everything, single, group = models[0], models[3], models[5]
    assert design.positions(everything, N).tolist() == list(range(N))
    assert design.positions(single, N).tolist() == [i for i in range(N) if i != 7]
    assert design.positions(group, N).tolist() == [i for i in range(N) if i not in (3, 5, 11)]
    assert [design.size_of(m, N) for m in (everything, single, group)] == [N, N - 1, N - 3]
    assert everything.subset == 0
    assert group.subset == set_number([11, 5, 3]) != single.subset
    # more runs of either kind, and more sets, change no model that was there
    assert set(models) < set(definition_models({"new": [0], **sets}, 5, 4))


def test_names() -> None:
    assert Model("repeated", 3, 1).name == "model repeated/3/1"
    assert Model("repeated", 3, 1).key == (3, 1)


def test_singles_are_spread_over_the_ranks() -> None:
    rng = np.random.default_rng(0)
    score = rng.standard_cauchy(1000)
    ranks = np.argsort(np.argsort(score))
    chosen = choose_singles(score, 100, seed=0)
    assert np.array_equal(np.sort(ranks[chosen] // 10), np.arange(100))
    assert np.array_equal(chosen, np.sort(chosen))
    assert np.array_equal(chosen, choose_singles(score, 100, seed=0))
    assert not np.array_equal(chosen, choose_singles(score, 100, seed=1))
    assert len(choose_singles(score, 1000, seed=0)) == 1000
    assert len(choose_singles(score, 0, seed=0)) == 0


def test_more_singles_keep_those_chosen_earlier() -> None:
    score = np.random.default_rng(0).normal(size=200)
    few = choose_singles(score, 20, seed=0)
    many = choose_singles(score, 50, seed=0, chosen=few.tolist())
    assert len(many) == 50
    assert set(few) < set(many)
    strata = np.argsort(np.argsort(score))[many] // 4
    assert len(set(strata)) >= 50 - len(few) // 2  # the new ones went where none was
    assert np.array_equal(choose_singles(score, 5, seed=0, chosen=few.tolist()), few)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Design(seed=-1), "seed=-1 is negative; take seed=0"),
        (lambda: Design(keep=0.0), "keep=0.0 must lie strictly between 0 and 1"),
        (lambda: Design(keep=1.0), "keep=1.0 must lie strictly between 0 and 1"),
        (lambda: Design(keep=math.nan), "keep=nan must lie strictly between 0 and 1"),
        (lambda: Design(vary="none"), "vary=none is unknown; take vary=both"),  # type: ignore[arg-type]
        (lambda: repeated_models(3, 4), "seeds_per_subset=4: .* at least 5"),
        (lambda: choose_singles(np.zeros(3), 4, 0), "4 examples cannot be chosen from 3"),
        (lambda: choose_singles(np.array([0.0, np.nan]), 1, 0), "finite numbers"),
    ],
)
def test_impossible_designs(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.compile(message)):
        make()
