"""Data sets that tell each example's position, and what a batch may have for an index."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    random_split,
)

import fine_bench
from fine_bench.callback import BatchAdapter, FINECallback
from fine_bench.fine.training_data import TrainingData, as_positions
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N = 12


class Items(Dataset[Any]):
    """Items of any kind; ``__getitems__`` where it is asked for."""

    classes = ("a", "b")

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


class Module(pl.LightningModule):
    """Takes whatever comes first and second in a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(n: int = N) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)


def scores(dataset: Any, loader: DataLoader[Any] | None = None, **options: Any) -> Tensor:
    callback = FINECallback("self", **options)
    loader = loader or DataLoader(dataset, batch_size=4)
    pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(Module(), loader)
    return callback.scores().values


def plain() -> Tensor:
    return scores(TensorDataset(*data(), torch.arange(N)))


def test_each_kind_of_item_gets_its_position() -> None:
    pairs = fine_bench.with_index(Items([("x", 0), ["y", 1]]))
    assert pairs[0] == ("x", 0, 0)
    assert pairs[1] == ("y", 1, 1)
    assert pairs[-1] == ("y", 1, 1)
    assert fine_bench.with_index(Items([{"x": 5}]))[0] == {"x": 5, "index": 0}
    assert fine_bench.with_index(Items([torch.ones(2), 7]))[1] == (7, 1)
    assert pairs.__getitems__([1, 0]) == [("y", 1, 1), ("x", 0, 0)]
    assert len(pairs) == 2
    assert pairs.classes == ("a", "b")
    again = pickle.loads(pickle.dumps(pairs))
    assert again[1] == ("y", 1, 1)


def test_a_set_that_reads_several_at_once_goes_on_doing_so() -> None:
    class Batched(Items):
        def __getitems__(self, positions: list[int]) -> list[Any]:
            return [(i * 10, 1) for i in positions]

    assert fine_bench.with_index(Batched([0, 0, 0])).__getitems__([2, 0]) == [
        (20, 1, 2),
        (0, 1, 0),
    ]


def test_what_has_no_positions_or_others_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with pytest.raises(TypeError, match="map-style dataset"):
        fine_bench.with_index(Stream())
    with pytest.raises(ValueError, match="rename or drop that field"):
        fine_bench.with_index(Items([{"index": 3}]))[0]


@pytest.mark.any_trainer("a data set without indices")
@pytest.mark.parametrize("kind", ["tuple", "mapping", "weighted", "subset", "concatenated"])
def test_scores_are_those_of_a_set_that_has_the_index(kind: str) -> None:
    x, y = data()
    dataset: Dataset[Any] = TensorDataset(x, y)
    if kind == "mapping":
        dataset = Items([{"x": x[i], "y": y[i]} for i in range(N)])
    if kind == "weighted":  # whole numbers where the index is looked for otherwise
        dataset = TensorDataset(x, y, torch.full((N,), 3))
    if kind == "subset":
        order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
        dataset = Subset(TensorDataset(x[order.argsort()], y[order.argsort()]), order.tolist())
    if kind == "concatenated":
        dataset = ConcatDataset([TensorDataset(x[:5], y[:5]), TensorDataset(x[5:], y[5:])])
    assert torch.equal(scores(fine_bench.with_index(dataset)), plain())


@pytest.mark.any_trainer("a data set without indices")
def test_snapshots_and_workers_read_it_too() -> None:
    dataset = fine_bench.with_index(TensorDataset(*data()))
    expected = scores(TensorDataset(*data(), torch.arange(N)), schedule="snapshot")
    assert torch.equal(scores(dataset, schedule="snapshot"), expected)
    loader = DataLoader(dataset, batch_size=4, num_workers=1)
    assert torch.equal(scores(dataset, loader), plain())


@pytest.mark.any_trainer("indices of another integer type")
@pytest.mark.parametrize(
    "index",
    [
        torch.arange(N, dtype=torch.uint8),
        torch.arange(N, dtype=torch.int8),
        torch.arange(N, dtype=torch.int16),
        torch.arange(N, dtype=torch.int32),
    ],
)
def test_the_type_of_the_integers_does_not_matter(index: Tensor) -> None:
    assert torch.equal(scores(TensorDataset(*data(), index)), plain())


@pytest.mark.any_trainer("indices of another integer type")
def test_positions_may_come_as_numbers_of_another_library() -> None:
    for index in ([1, 0], (1, 0), np.array([1, 0]), np.array([1, 0], dtype=np.int16)):
        found = as_positions(index)
        assert found.dtype == torch.int64
        assert found.tolist() == [1, 0]


@pytest.mark.any_trainer("indices that are names, masks, fractions")
@pytest.mark.parametrize(
    ("index", "said"),
    [
        (["cat.png", "dog.png"], r"names \('cat.png'\).*fine_bench.with_index"),
        ("cat.png", "names"),
        ([b"1"], "names"),
        (torch.tensor([True, False]), "torch.bool"),
        (torch.tensor([0.0, 1.0]), "torch.float32"),
        (torch.tensor([[0], [1]]), r"\(2, 1\)"),
        (torch.tensor([], dtype=torch.int64), r"\(0,\)"),
        ([None], "list"),
    ],
)
def test_what_is_no_position_is_refused(index: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_positions(index)


@pytest.mark.any_trainer("indices that are names, masks, fractions")
def test_file_names_in_a_run_say_what_to_do() -> None:
    x, y = data()
    named = Items([(x[i], y[i], f"{i}.png") for i in range(N)])
    with pytest.raises(ValueError, match=r"0\.png.*fine_bench\.with_index"):
        scores(named)


@pytest.mark.any_trainer("indices outside of the training set")
def test_negative_and_foreign_positions_are_refused_unless_counted() -> None:
    x, y = data()
    for index in (torch.arange(N) - 1, torch.arange(N) + 1):
        with pytest.raises(ValueError, match="train_size"):
            scores(TensorDataset(x, y, index))
    larger = TensorDataset(*data(20), torch.arange(20))
    half, _ = random_split(larger, [N, 20 - N], generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="train_size"):
        scores(half)
    found = scores(half, train_size=20)
    assert found.shape == (1, 20)
    assert int((found != 0).sum()) == N


@pytest.mark.any_trainer("`ConcatDataset` of data sets that each count from 0")
def test_parts_that_count_for_themselves_are_refused() -> None:
    x, y = data()
    parts = [TensorDataset(x[:5], y[:5]), TensorDataset(x[5:], y[5:])]
    alike = ConcatDataset([fine_bench.with_index(part) for part in parts])
    with pytest.raises(ValueError, match="one index names several"):
        scores(alike)
    own = ConcatDataset(
        [
            TensorDataset(*p.tensors, i)
            for p, i in zip(parts, torch.arange(N).split([5, 7]), strict=True)
        ]
    )
    assert torch.equal(scores(own), plain())


class Stream(IterableDataset[Any]):
    """Examples that come by themselves."""

    def __iter__(self) -> Iterator[Any]:
        x, y = data()
        return iter([(x[i], y[i], i) for i in range(N)])


@pytest.mark.any_trainer("`IterableDataset`")
def test_a_stream_is_told_what_to_give_and_then_serves() -> None:
    with pytest.raises(TypeError, match=r"yield \(x, y, index\).*train_size=n"):
        scores(Stream())
    assert torch.equal(scores(Stream(), train_size=N), plain())


@pytest.mark.any_trainer("`IterableDataset`")
@pytest.mark.parametrize("options", [{"schedule": "snapshot"}, {"geometry": "ekfac"}])
def test_a_stream_has_no_positions_to_read(options: dict[str, str]) -> None:
    with pytest.raises(UnsupportedProblemError, match='schedule="in_batch" with'):
        scores(Stream(), train_size=N, **options)


def test_an_adapter_that_says_where_goes_before() -> None:
    dataset = fine_bench.with_index(TensorDataset(*data(), torch.arange(N)))
    data_ = TrainingData(dataset, adapter=BatchAdapter(index=2))
    assert data_.adapter.index == 2
