"""Label flips, the digits task, TaskData's checks, and reading in batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fine_bench.data import digits
from fine_bench.data.batches import IndexedDataset, loader, whole_batch
from fine_bench.data.corruption import flip_uniform
from fine_bench.data.digits import digits_mislabel
from fine_bench.data.pixels import standardise
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import stream
from fine_bench.types import GroundTruth

# --- flips


@given(
    n=st.integers(0, 200),
    rate=st.floats(0, 1, exclude_max=True),
    n_classes=st.integers(2, 12),
    seed=st.integers(0, 5),
)
def test_flips_are_exact_in_number_and_always_wrong(
    n: int, rate: float, n_classes: int, seed: int
) -> None:
    labels = torch.randint(0, n_classes, (n,), generator=stream(seed, "labels"))
    before = labels.clone()
    flipped, is_flipped = flip_uniform(labels, rate, n_classes, stream(seed, "flips"))
    assert torch.equal(labels, before)
    assert int(is_flipped.sum()) == round(rate * n)
    assert torch.equal(flipped != labels, is_flipped)
    assert flipped.dtype == torch.int64
    assert set(flipped.tolist()) <= set(range(n_classes))
    again, _ = flip_uniform(labels, rate, n_classes, stream(seed, "flips"))
    assert torch.equal(flipped, again)


def test_flips_are_uniform_over_other_classes_and_examples() -> None:
    n, n_classes = 30_000, 5
    labels = torch.arange(n) % n_classes
    flipped, is_flipped = flip_uniform(labels, 0.4, n_classes, stream(0, "flips"))
    pairs = Counter(zip(labels[is_flipped].tolist(), flipped[is_flipped].tolist(), strict=True))
    assert len(pairs) == n_classes * (n_classes - 1)
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3
    by_place = is_flipped.reshape(10, -1).sum(1).numpy()
    assert stats.chisquare(by_place).pvalue > 1e-3


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_impossible_rates_say_what_to_type(rate: float) -> None:
    with pytest.raises(ConfigError, match=rf"got {rate}\. Type for instance task\.noise_rate=0\.2"):
        flip_uniform(torch.zeros(4, dtype=torch.int64), rate, 2, stream(0, "flips"))


def test_flips_need_other_classes_and_valid_labels() -> None:
    with pytest.raises(ValueError, match="at least two classes, got n_classes=1"):
        flip_uniform(torch.zeros(4, dtype=torch.int64), 0.5, 1, stream(0, "flips"))
    with pytest.raises(ValueError, match=r"labels must lie in 0 … 2, got 0 … 3"):
        flip_uniform(torch.arange(4), 0.5, 3, stream(0, "flips"))


# --- images


def test_standardise_is_the_formula_and_refuses_other_levels() -> None:
    images = np.arange(3 * 500 * 5, dtype=np.int64).reshape(1500, 5, 1).astype(np.uint8)
    expected = (images[:, None].astype(np.float64) / 255 - 0.2) / 0.5
    result = standardise(images, white=255, mean=0.2, std=0.5)
    assert result.dtype == torch.float32
    assert result.shape == (1500, 1, 5, 1)
    np.testing.assert_array_equal(result.numpy(), expected.astype(np.float32))
    with pytest.raises(IndexError):
        standardise(images, white=16, mean=0.0, std=1.0)


# --- the digits task


@pytest.fixture(scope="module")
def task() -> TaskData:
    return digits_mislabel(seed=0)


def rows(x: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


def test_digits_defaults(task: TaskData) -> None:
    assert task.name == "digits_mislabel"
    assert task.x.shape == (1347, 1, 8, 8)
    assert task.n_train == 1347
    assert task.n_query == 100
    assert len(task.test_x) == 350
    assert task.truth.n_bad == round(0.2 * 1347)
    assert task.truth.kind == "flipped label"
    assert torch.equal(task.truth.is_bad, task.y != task.clean_y)


def test_digits_constants_are_the_measured_ones() -> None:
    scaled = load_digits().images / 16
    assert round(float(scaled.mean()), 4) == digits.MEAN
    assert round(float(scaled.std()), 4) == digits.STD


def test_digits_parts_are_disjoint_clean_stratified_and_complete(task: TaskData) -> None:
    source = load_digits()
    ids = task.train_ids.numpy()
    np.testing.assert_array_equal(source.target[ids], task.clean_y.numpy())
    held_out = np.setdiff1d(np.arange(1797), ids)
    as_inputs = standardise(source.images.astype(np.uint8), 16, digits.MEAN, digits.STD)
    torch.testing.assert_close(task.x, as_inputs[ids], rtol=0, atol=0)
    # queries and test images together are the held-out part, each image once, with its true label
    labelled = Counter(zip(rows(as_inputs[held_out]), source.target[held_out], strict=True))
    query = Counter(zip(rows(task.query_x), task.query_y.tolist(), strict=True))
    test = Counter(zip(rows(task.test_x), task.test_y.tolist(), strict=True))
    assert query + test == labelled
    share = np.bincount(source.target[held_out]) / np.bincount(source.target)
    assert np.abs(share - 0.25).max() < 0.01


def test_the_same_seed_gives_the_same_task_and_another_another(task: TaskData) -> None:
    assert digits_mislabel(seed=0).sha256 == task.sha256
    assert digits_mislabel(seed=1).sha256 != task.sha256


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    digits_mislabel(seed=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_streams_are_independent(task: TaskData) -> None:
    more = digits_mislabel(seed=0, n_query=200)
    assert torch.equal(more.y, task.y)
    assert torch.equal(more.query_x[:100], task.query_x)
    cleaner = digits_mislabel(seed=0, noise_rate=0.1)
    assert torch.equal(cleaner.x, task.x)
    assert torch.equal(cleaner.query_x, task.query_x)
    smaller = digits_mislabel(seed=0, n_train=300)
    assert torch.equal(smaller.query_x, task.query_x)
    assert set(smaller.train_ids.tolist()) < set(task.train_ids.tolist())
    smallest = digits_mislabel(seed=0, n_train=100)
    assert set(smallest.train_ids.tolist()) < set(smaller.train_ids.tolist())
    assert torch.equal(smaller.train_ids, smaller.train_ids.sort().values)
    full = digits_mislabel(seed=0, n_train=1347)
    assert full.sha256 == task.sha256


def test_flips_and_queries_come_from_their_own_streams(task: TaskData) -> None:
    y, is_flipped = flip_uniform(task.clean_y, 0.2, 10, stream(0, "task/flips"))
    assert torch.equal(task.y, y)
    assert torch.equal(task.truth.is_bad, is_flipped)
    held_out = np.setdiff1d(np.arange(1797), task.train_ids.numpy())
    order = torch.randperm(len(held_out), generator=stream(0, "task/queries"))
    expected = load_digits().target[held_out[order[:100].numpy()]]
    assert task.query_y.tolist() == expected.tolist()


def test_no_noise_is_allowed() -> None:
    assert digits_mislabel(seed=0, noise_rate=0.0).truth.n_bad == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"got -1\. Type for instance task\.seed=0"),
        ({"noise_rate": -0.1}, r"Type for instance task\.noise_rate=0\.2"),
        ({"n_train": 1348}, r"has 1347 training images\. Type task\.n_train=1347 or less"),
        ({"n_train": 9}, r"fewer than the 10 classes\. Type task\.n_train=10 or more"),
        ({"n_query": 450}, r"450 test images.*Type task\.n_query=100, or any .* 1 to 449"),
        ({"n_query": 0}, r"task\.n_query=0"),
        ({"test_share": 0.0}, r"got 0\.0\. Type for instance task\.test_share=0\.25"),
        ({"test_share": 1.0}, r"got 1\.0\. Type for instance task\.test_share=0\.25"),
        ({"test_share": float("nan")}, r"got nan\. Type for instance"),
    ],
)
def test_impossible_requests_say_what_to_type(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits_mislabel(**{"seed": 0, **arguments})


@pytest.mark.parametrize("share", [10 / 1797, 1 - 10 / 1797])
def test_extreme_shares_work(share: float) -> None:
    task = digits_mislabel(seed=0, test_share=share, n_query=1)
    assert task.n_train + task.n_query + len(task.test_x) == 1797


# --- TaskData


def small_task(**changes: Any) -> TaskData:
    y = torch.tensor([0, 1, 2, 1])
    fields: dict[str, Any] = {
        "name": "small",
        "x": torch.arange(12.0).reshape(4, 3),
        "y": y,
        "clean_y": torch.tensor([0, 1, 2, 0]),
        "truth": GroundTruth(torch.tensor([False, False, False, True]), "flipped label"),
        "query_x": torch.ones(2, 3),
        "query_y": torch.tensor([0, 1]),
        "test_x": torch.zeros(1, 3),
        "test_y": torch.tensor([2]),
        "n_classes": 3,
        "train_ids": torch.arange(4),
    }
    return TaskData(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name is empty"),
        ({"n_classes": 1}, "n_classes must be at least 2, got 1"),
        ({"x": torch.zeros(4, 3).double()}, "training inputs must be float32 of shape"),
        ({"x": torch.zeros(4)}, r"must be float32 of shape \(n, \.\.\.\), got torch.float32"),
        ({"test_x": torch.zeros(0, 3)}, "there are no test inputs"),
        ({"query_x": torch.zeros(2, 4)}, r"query inputs have shape \(4,\) each, training .*\(3,\)"),
        ({"x": torch.full((4, 3), float("nan"))}, "training inputs contain values that are not"),
        ({"query_x": torch.full((2, 3), float("inf"))}, "query inputs contain values"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, r"training labels must be int64 of shape \(4,"),
        ({"query_y": torch.zeros(2)}, "query labels must be int64"),
        ({"test_y": torch.tensor([3])}, "test labels must lie in 0 … 2, got 3 … 3"),
        ({"clean_y": torch.tensor([0, -1, 2, 0])}, "clean training labels must lie in 0 … 2"),
        ({"truth": GroundTruth(torch.ones(3) > 0, "x")}, "has 3 entries for 4 training examples"),
        ({"truth": GroundTruth(torch.ones(4) < 0, "x")}, "1 examples have a corrupted .* first at"),
        ({"train_ids": torch.arange(4).int()}, r"train_ids must be int64 of shape \(4,\)"),
        ({"train_ids": torch.tensor([0, 1, 1, 2])}, "train_ids repeat"),
    ],
)
def test_task_data_is_checked_at_birth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_task(**changes)


def test_an_example_may_be_bad_without_a_changed_label() -> None:
    small_task(truth=GroundTruth(torch.tensor([True, False, False, True]), "duplicate"))


def test_digest_sees_what_can_change_a_score_and_nothing_else() -> None:
    base = small_task()
    assert len(base.sha256) == 64
    one_bit = base.x.clone()
    one_bit[0, 0] = torch.nextafter(one_bit[0, 0], torch.tensor(1.0))
    for change in (
        {"x": one_bit},
        {"y": torch.tensor([0, 1, 2, 2])},
        {"query_x": torch.ones(2, 3) * 2},
        {"query_y": torch.tensor([1, 0])},
        {"truth": GroundTruth(torch.tensor([True, False, False, True]), "flipped label")},
        {"x": base.x[:, None], "query_x": base.query_x[:, None], "test_x": base.test_x[:, None]},
    ):
        assert replace(base, **change).sha256 != base.sha256  # type: ignore[arg-type]
    for change in (
        {"name": "other"},
        {"test_x": torch.ones(5, 3), "test_y": torch.zeros(5, dtype=torch.int64)},
        {"x": base.x.T.contiguous().T},
    ):
        assert replace(base, **change).sha256 == base.sha256  # type: ignore[arg-type]


# --- batches

X = torch.randn(23, 1, 3, 3, generator=stream(0, "x"))
Y = torch.arange(23) % 5


def read(batches: DataLoader[Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [tuple(batch) for batch in batches]


def assert_same(a: list[tuple[Tensor, ...]], b: list[tuple[Tensor, ...]]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        for one, other in zip(left, right, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_every_example_once_with_its_index_and_a_short_last_batch() -> None:
    batches = read(loader(X, Y, batch_size=5, generator=stream(0, "order"), shuffle=True))
    assert [len(index) for *_, index in batches] == [5, 5, 5, 5, 3]
    index = torch.cat([index for *_, index in batches])
    assert index.dtype == torch.int64
    assert not torch.equal(index, torch.arange(23))
    assert torch.equal(index.sort().values, torch.arange(23))
    for x, y, index in batches:
        assert torch.equal(x, X[index])
        assert torch.equal(y, Y[index])


def test_index_order_without_shuffle() -> None:
    index = torch.cat([index for *_, index in loader(X, Y, batch_size=7)])
    assert torch.equal(index, torch.arange(23))


@pytest.mark.parametrize("shuffle", [False, True])
def test_workers_change_nothing(shuffle: bool) -> None:
    # two passes: the state of the generator must move alike
    here, there = (
        loader(
            X,
            Y,
            batch_size=5,
            generator=stream(0, "order"),
            shuffle=shuffle,
            num_workers=num_workers,
        )
        for num_workers in (0, 2)
    )
    first, second = read(here), read(here)
    assert_same(first, read(there))
    assert_same(second, read(there))
    if shuffle:
        assert not torch.equal(first[0][2], second[0][2])


def test_reading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(loader(X, Y, batch_size=5, generator=stream(0, "order"), shuffle=True))
    read(loader(X, Y, batch_size=5))
    assert torch.equal(before, torch.get_rng_state())


class Wrapped(Dataset[Any]):
    """A data set that hides ``__getitems__``."""

    def __init__(self, inner: IndexedDataset) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


def test_any_loader_gives_the_same_batches() -> None:
    expected = read(loader(X, Y, batch_size=5))
    dataset = IndexedDataset(X, Y)
    assert_same(expected, read(DataLoader(dataset, batch_size=5)))
    assert_same(expected, read(DataLoader(Wrapped(dataset), batch_size=5, collate_fn=whole_batch)))
    x, y, index = next(iter(DataLoader(Subset(dataset, [4, 2]), batch_size=2)))
    assert index.tolist() == [4, 2]
    assert torch.equal(x, X[[4, 2]])
    assert torch.equal(y, Y[[4, 2]])
    x, y, position = dataset[3]
    assert torch.equal(x, X[3])
    assert (int(y), position) == (3, 3)
    examples = dataset.__getitems__([1, 2, 3])
    assert len(examples) == 3
    assert examples[-1][2] == 3


def test_loader_refusals() -> None:
    with pytest.raises(ValueError, match="shuffle=True needs a generator"):
        loader(X, Y, batch_size=5, shuffle=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        loader(X, Y, batch_size=0)
    with pytest.raises(ValueError, match="x has 23 examples, y 22"):
        loader(X, Y[:22], batch_size=5)


# --- groups


def test_groups_are_what_their_names_say() -> None:
    data = digits_mislabel(seed=3)
    flips, clean, near = data.groups.values()
    pairs = Counter(
        (a, b) for a, b in zip(data.clean_y.tolist(), data.y.tolist(), strict=True) if a != b
    )
    (a, b), count = min(pairs.items(), key=lambda item: (-item[1], item[0]))
    assert list(data.groups) == [f"flips_{a}_to_{b}", "random_clean", "near_duplicates"]
    assert flips.tolist() == ((data.clean_y == a) & (data.y == b)).nonzero()[:, 0].tolist()
    assert len(flips) == count == len(clean)
    assert not data.truth.is_bad[clean].any()
    # near-duplicates: the tightest centre and its neighbours, by brute force
    pixels = data.x.flatten(1).double()
    good = ~data.truth.is_bad
    best, expected = float("inf"), None
    for i in good.nonzero()[:, 0].tolist():
        same = (good & (data.clean_y == data.clean_y[i])).nonzero()[:, 0]
        distance = (pixels[same] - pixels[i]).norm(dim=1)
        if len(same) >= 16 and float(distance.sort().values[15]) < best:
            best = float(distance.sort().values[15])
            expected = same[distance.argsort()[:16]].sort().values
    # 1,000 of the 1,078 correctly labelled examples are candidates for the centre
    assert torch.equal(near, expected)


def test_groups_follow_the_task_seed_alone_and_need_enough_data() -> None:
    one, two = digits_mislabel(seed=1), digits_mislabel(seed=1)
    assert all(torch.equal(one.groups[name], two.groups[name]) for name in one.groups)
    assert list(digits_mislabel(seed=1, noise_rate=0.0).groups) == ["near_duplicates"]
    few = digits_mislabel(seed=1, n_train=12, noise_rate=0.5)
    assert "near_duplicates" not in few.groups


def test_groups_are_no_part_of_the_digest_and_are_checked() -> None:
    data = digits_mislabel(seed=1, n_train=50)
    assert replace(data, groups={}).sha256 == data.sha256
    for bad, message in (
        (torch.arange(50), "positions of some of the 50"),
        (torch.zeros(0, dtype=torch.int64), "positions of some of the 50"),
        (torch.tensor([0.5]), "must hold int64"),
        (torch.tensor([3, 50]), "must ascend within"),
        (torch.tensor([3, 3]), "must ascend within"),
        (torch.tensor([-1, 3]), "must ascend within"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(data, groups={"g": bad})
