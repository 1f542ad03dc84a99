"""Structured label noise: who is flipped, to what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fine_bench.data import reference_model, structured
from fine_bench.data.corruption import (
    apportion,
    flip_confusions,
    flip_least_sure,
    flip_transition,
    least_sure,
)
from fine_bench.data.digits import digits_mislabel
from fine_bench.data.image_sets import load_source
from fine_bench.data.mnist import mnist_mislabel
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream

IDENTITY = np.eye(10).tolist()
TASKS: dict[str, Callable[..., TaskData]] = {
    "uniform": structured.uniform,
    "asymmetric": structured.asymmetric,
    "transition": partial(structured.transition, matrix=np.full((10, 10), 0.1).tolist()),
    "instance": partial(structured.instance, n_model=300),
    "long_tail": structured.long_tail,
}


digits_source = partial(load_source, "digits", data_dir=None, download=False)

# --- the tasks that were there before


def test_the_uniform_tasks_are_what_they_were() -> None:
    task = digits_mislabel(seed=0)
    assert task.sha256 == "fc8f6fae38645084ba01b870c121dd0a068912e3ee6c9d874fc2dd48df3b8e33"
    assert structured.uniform(data="digits", seed=0).sha256 == task.sha256
    assert structured.uniform(data="digits", seed=0).name == "digits_mislabel"


def test_the_uniform_mnist_task_is_what_it_was(mnist_dir: Path) -> None:
    options: dict[str, Any] = {"n_train": 4000, "n_query": 200, "data_dir": str(mnist_dir)}
    task = mnist_mislabel(seed=0, **options)
    assert task.sha256 == "c637cb9cc8f2352166652200ce929477f477dc25c57330ef99c9dcf36a5d1412"
    assert structured.uniform(data="mnist", seed=0, **options).sha256 == task.sha256


# --- what all have in common


@pytest.mark.parametrize("name", list(TASKS))
def test_the_truth_is_what_was_flipped(name: str) -> None:
    task = TASKS[name](data="digits", seed=2)
    source = digits_source(seed=2)
    true = dict(zip(source.ids.tolist(), source.labels.tolist(), strict=True))
    assert task.clean_y.tolist() == [true[i] for i in task.train_ids.tolist()]
    assert torch.equal(task.truth.is_bad, task.y != task.clean_y)
    assert 0 < task.truth.n_bad < task.n_train
    assert task.truth.kind == "flipped label"
    raw = source.images[np.searchsorted(source.ids, task.train_ids.numpy())]
    assert torch.equal(task.x, source.to_input(raw))
    for group in task.groups.values():
        assert len(group) < task.n_train
    flips = next(iter(task.groups))
    assert flips.startswith("flips_")
    assert bool(task.truth.is_bad[task.groups[flips]].all())


@pytest.mark.parametrize("name", list(TASKS))
def test_seeds_and_nesting(name: str) -> None:
    small = TASKS[name](data="digits", seed=1, n_train=200, n_query=50)
    again = TASKS[name](data="digits", seed=1, n_train=200, n_query=50)
    assert small.sha256 == again.sha256
    assert TASKS[name](data="digits", seed=5, n_train=200, n_query=50).sha256 != small.sha256
    large = TASKS[name](data="digits", seed=1, n_train=300, n_query=80)
    assert small.n_train == 200
    assert set(small.train_ids.tolist()) < set(large.train_ids.tolist())
    assert torch.equal(large.query_x[:50], small.query_x)
    assert torch.equal(large.query_y[:50], small.query_y)
    # the same queries as in the uniform task, whatever the noise
    assert torch.equal(digits_mislabel(seed=1, n_query=50).query_x, small.query_x)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for build in TASKS.values():
        build(data="digits", seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# --- asymmetric


def test_confusions_flip_the_named_classes_only() -> None:
    task = structured.asymmetric(data="digits", seed=0, confusions=[(4, 9), (7, 1)], noise_rate=0.3)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((task.clean_y, task.y), torch.tensor(1), accumulate=True)
    sizes = torch.bincount(task.clean_y)
    expected = torch.diag(sizes)
    for a, b in ((4, 9), (7, 1)):
        moved = round(0.3 * int(sizes[a]))
        expected[a, a] -= moved
        expected[a, b] += moved
    assert torch.equal(counts, expected)


def test_confusions_do_not_chain_and_have_no_order() -> None:
    labels = torch.arange(300) % 3
    flip = partial(flip_confusions, labels, rate=0.5, n_classes=3)
    y, flipped = flip([(0, 1), (1, 2)], generator=stream(0, "flips"))
    other, _ = flip([(1, 2), (0, 1)], generator=stream(0, "flips"))
    assert torch.equal(y, other)
    # a 0 that became a 1 does not go on to become a 2
    assert not bool(((labels == 0) & (y == 2)).any())
    assert int(flipped.sum()) == 100
    swapped, _ = flip([(0, 1), (1, 0)], generator=stream(0, "flips"))
    assert torch.bincount(swapped).tolist() == [100, 100, 100]


@pytest.mark.parametrize(
    ("confusions", "message"),
    [
        ([], "is empty, so nothing would be flipped"),
        ([(4, 4)], r"got \[4, 4\]"),
        ([(4, 10)], r"from 0 … 9; got \[4, 10\]"),
        ([(-1, 4)], r"got \[-1, 4\]"),
        ([(1, 2, 3)], r"got \[1, 2, 3\]"),
        ([(4, 9), (4, 7)], "sends class 4 to several classes.*task=digits_transition"),
    ],
)
def test_confusions_that_cannot_be(confusions: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        structured.asymmetric(data="digits", seed=0, confusions=confusions)
    assert "task.confusions=[[4,9],[7,1]]" in str(caught.value)


# --- transition


def by_hand(weights: list[float], total: int) -> list[int]:
    """Sainte-Laguë, one place after the other."""
    counts = [0] * len(weights)
    for _ in range(total):
        quotients = [w / (c + 0.5) for w, c in zip(weights, counts, strict=True)]
        counts[quotients.index(max(quotients))] += 1
    return counts


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any), st.integers(0, 60))
def test_apportionment(weights: list[int], total: int) -> None:
    counts = apportion(torch.tensor(weights), total)
    assert counts.tolist() == by_hand([float(w) for w in weights], total)
    assert bool((apportion(torch.tensor(weights), total + 1) >= counts).all())
    share = torch.tensor(weights, dtype=torch.float64) * total / sum(weights)
    assert bool(((counts - share).abs() < len(weights)).all())
    assert not bool(counts[share == 0].any())


def test_a_transition_matrix_is_met_class_by_class() -> None:
    matrix = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.1, 0.9, 0.0]]
    labels = torch.tensor([0] * 40 + [1] * 7 + [2] * 20)[torch.randperm(67)]
    y, flipped = flip_transition(labels, matrix, 3, stream(0, "flips"))
    table = [[int(((labels == a) & (y == b)).sum()) for b in range(3)] for a in range(3)]
    assert table == [[20, 10, 10], [0, 7, 0], [2, 18, 0]]
    assert torch.equal(flipped, y != labels)


def test_which_examples_a_transition_flips_is_random() -> None:
    labels = torch.zeros(4000, dtype=torch.int64)
    y, _ = flip_transition(labels, [[0.5, 0.5], [0.0, 1.0]], 2, stream(0, "flips"))
    halves = y[:2000].sum(), y[2000:].sum()
    assert abs(int(halves[0]) - int(halves[1])) < 200  # 5 standard deviations of ± 32
    other, _ = flip_transition(labels, [[0.5, 0.5], [0.0, 1.0]], 2, stream(1, "flips"))
    assert not torch.equal(y, other)


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (IDENTITY[:9], "must have 10 rows of 10 numbers, got 9 rows of 10"),
        ([[1.0]] * 10, "got 10 rows of 1 numbers"),
        ([], "got 0 rows of no numbers"),
        ([*IDENTITY[:4], [0.1] * 9 + [0.05], *IDENTITY[5:]], "row 4 .* sums to 0.95.*by 0.05"),
        ([*IDENTITY[:2], [1.5, -0.5] + [0.0] * 8, *IDENTITY[3:]], r"row 2 .* outside of 0 … 1"),
        ([[float("nan")] * 10, *IDENTITY[1:]], r"row 0 .* outside of 0 … 1"),
    ],
)
def test_matrices_that_cannot_be(matrix: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structured.transition(data="digits", seed=0, matrix=matrix)


# --- instance-dependent


def test_the_least_sure_are_flipped_to_their_second_choice() -> None:
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.3, 0.1, 0.6]]
    )
    labels = torch.tensor([0, 1, 2, 2, 0])
    y, flipped = flip_least_sure(labels, probabilities, 0.6)
    # confidences .7 .3 .3 .8 .3: the three of .3; each gets the most probable other class
    assert flipped.tolist() == [False, True, True, False, True]
    assert y.tolist() == [0, 2, 1, 2, 2]
    assert least_sure(labels, probabilities, 2).tolist() == [1, 2]  # of equal ones the first


def test_a_higher_rate_flips_the_same_and_more() -> None:
    few, many = (
        structured.instance(data="digits", seed=0, n_model=300, noise_rate=rate)
        for rate in (0.1, 0.25)
    )
    assert few.truth.n_bad == round(0.1 * few.n_train)
    assert bool(many.truth.is_bad[few.truth.is_bad].all())
    assert torch.equal(many.y[few.truth.is_bad], few.y[few.truth.is_bad])


def test_the_simple_model_is_independent_and_solved() -> None:
    task = structured.instance(data="digits", seed=3, n_model=300)
    source = digits_source(seed=3)
    model, others = reference_model.set_aside(source, 300, 3)
    assert sorted(torch.cat([model, others]).tolist()) == list(range(len(source.labels)))
    assert set(task.train_ids.tolist()) == set(source.ids[others.numpy()].tolist())
    more, _ = reference_model.set_aside(source, 400, 3)
    assert set(model.tolist()) < set(more.tolist())
    # the same model at scikit-learn's own tolerance finds nearly the same images hard
    x = source.to_input(source.images).flatten(1).numpy()
    regression = LogisticRegression(C=reference_model.INVERSE_PENALTY, max_iter=1000)
    regression.fit(x[model.numpy()], source.labels[model.numpy()])
    rough = torch.from_numpy(regression.predict_proba(x[others.numpy()]))
    fine = reference_model.class_probabilities(source, model, task.x)
    assert float((rough - fine).abs().max()) < 1e-3
    assert float((fine.argmax(1) == task.clean_y).double().mean()) > 0.85
    own = fine.gather(1, task.clean_y[:, None])[:, 0]
    assert float(own[task.truth.is_bad].max()) <= float(own[~task.truth.is_bad].min())


# --- long tail


def test_class_sizes_fall_off_geometrically() -> None:
    task = structured.long_tail(data="digits", seed=0, imbalance=8.0, n_train=300, noise_rate=0.1)
    counts = torch.bincount(task.clean_y, minlength=10).sort(descending=True).values
    weights = [8.0 ** (-k / 9) for k in range(10)]
    ideal = torch.tensor(weights) * 300 / sum(weights)
    assert int(counts.sum()) == 300
    assert float((counts - ideal).abs().max()) <= 1
    assert task.truth.n_bad == 30
    order = torch.bincount(task.clean_y).argsort(descending=True).tolist()
    other = structured.long_tail(data="digits", seed=1, imbalance=8.0, n_train=300)
    assert order != torch.bincount(other.clean_y).argsort(descending=True).tolist()


def test_no_tail_is_balanced_and_null_takes_the_most() -> None:
    source = digits_source(seed=0)
    available = np.bincount(source.labels)
    flat = structured.long_tail(data="digits", seed=0, imbalance=1.0)
    counts = torch.bincount(flat.clean_y)
    assert int(counts.max() - counts.min()) <= 1
    assert int(counts.min()) == available.min()  # the smallest class is used up
    for imbalance in (3.0, 20.0):
        task = structured.long_tail(data="digits", seed=0, imbalance=imbalance)
        assert (torch.bincount(task.clean_y).numpy() <= available).all()
        with pytest.raises(ConfigError, match=rf"enough for 10 to {task.n_train} in total"):
            structured.long_tail(
                data="digits", seed=0, imbalance=imbalance, n_train=task.n_train + 1
            )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"imbalance": 0.5}, r"got 0\.5\. Type for instance task\.imbalance=10"),
        ({"imbalance": float("nan")}, r"got nan\. Type"),
        ({"imbalance": float("inf")}, r"got inf\. Type"),
        ({"imbalance": 1000.0, "n_train": 100}, r"leaves class \d without an image.*larger"),
        ({"n_train": 9}, r"task\.n_train=9, but"),
        ({"noise_rate": 1.0}, r"Type for instance task\.noise_rate=0\.2"),
    ],
)
def test_tails_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structured.long_tail(**{"data": "digits", "seed": 0, **arguments})


# --- what all refuse


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"Type for instance task\.seed=0"),
        ({"n_query": 450}, r"450 test images"),
        ({"n_query": 0}, r"task\.n_query=0"),
        ({"n_train": 2000}, r"task\.n_train=2000, but"),
        ({"n_train": 3}, r"task\.n_train=3"),
        ({"data": "imagenet"}, r"task\.data=imagenet is unknown; type task\.data=digits, mnist or"),
    ],
)
def test_impossible_requests(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TASKS[name](**{"data": "digits", "seed": 0, **arguments})


@pytest.mark.parametrize("name", ["uniform", "asymmetric", "instance"])
def test_impossible_rates(name: str) -> None:
    with pytest.raises(ConfigError, match=r"Type for instance task\.noise_rate=0\.2"):
        TASKS[name](data="digits", seed=0, noise_rate=1.0)


@pytest.mark.parametrize(
    ("n_model", "message"),
    [
        (9, r"type a number from 10 to 1337, for instance task\.n_model=269"),
        (1338, "type a number from 10 to 1337"),
        (10, r"too few for the simple model: none of them is of class \d"),
    ],
)
def test_parts_for_the_simple_model_that_cannot_be(n_model: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structured.instance(data="digits", seed=0, n_model=n_model)


def test_sources_are_the_data_sets_of_the_older_tasks() -> None:
    task, source = digits_mislabel(seed=4), digits_source(seed=4)
    assert task.train_ids.tolist() == source.ids.tolist()
    held_out: Tensor = source.to_input(source.test_images)
    both = torch.cat([task.query_x, task.test_x])
    assert sorted(row.numpy().tobytes() for row in both) == sorted(
        row.numpy().tobytes() for row in held_out
    )
