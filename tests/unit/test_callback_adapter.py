"""f-INE on modules and batches of another make."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fine_bench.callback import BatchAdapter, FINECallback
from support.training import QUIET

N, BATCH = 24, 8


class Pairs(Dataset[Any]):
    """Two inputs, a vector to predict, and names: a mapping with keys of its own."""

    def __init__(self, seed: int = 1, n: int = N) -> None:
        g = torch.Generator().manual_seed(seed)
        self.left = torch.randn(n, 4, generator=g, dtype=torch.float64)
        self.right = torch.randn(n, 3, generator=g, dtype=torch.float64)
        self.goal = torch.randn(n, 2, generator=g, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {
            "left": self.left[i],
            "right": self.right[i],
            "goal": self.goal[i],
            "meta": {"row": i, "kind": i % 2},
        }


class Regression(pl.LightningModule):
    """Two towers and the Huber loss; ``forward`` takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(4, 5), nn.Linear(3, 5)
            self.head = nn.Linear(5, 2)
        self.double()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left) + self.right(right)))

    def each(self, batch: Any) -> Tensor:
        given = self(batch["left"], batch["right"])
        return F.huber_loss(given, batch["goal"], reduction="none").mean(1)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.each(batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


class Plain(pl.LightningModule):
    """The same network on one concatenated input, in batches as the contract has them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regression()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[:, :4], x[:, 4:])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return huber(self(batch[0]), batch[1], "mean")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2)


def huber(given: Tensor, goal: Tensor, reduction: str = "none") -> Tensor:
    each = F.huber_loss(given, goal, reduction="none").mean(1)
    return each if reduction == "none" else each.mean()


def adapter() -> BatchAdapter:
    return BatchAdapter(
        index=lambda batch: batch["meta"]["row"],
        y=lambda batch: batch["meta"]["kind"],
        losses=lambda module, batch: module.each(batch),
    )


def fit(callbacks: list[pl.Callback], module: pl.LightningModule, dataset: Dataset[Any]) -> None:
    trainer = pl.Trainer(max_epochs=2, **QUIET, callbacks=callbacks)
    trainer.fit(module, DataLoader(dataset, batch_size=BATCH))


def numbers(callback: FINECallback) -> Tensor:
    callback.scores()
    assert callback._schedule is not None
    return callback._schedule.accumulator.mu()[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target": "validation", "refresh_every": 2},
        {"target": "queries"},
        {"target": "validation_per_class"},
        {"schedule": "snapshot", "target": "validation"},
        {"schedule": "snapshot"},
    ],
    ids=str,
)
def test_a_mapping_of_two_inputs_with_another_loss(options: dict[str, Any]) -> None:
    """The adapter's scores are those of the same network written as the contract has it."""
    asked = options.get("target", "self") != "self"
    made, given = Pairs(), Pairs(2, 6)
    adapted = FINECallback(
        observable="loss", adapter=adapter(), queries=given if asked else None, **options
    )
    fit([adapted], Regression(), made)

    def tensors(d: Pairs) -> TensorDataset:
        return TensorDataset(torch.cat([d.left, d.right], 1), d.goal, torch.arange(len(d)))

    queries: Any = None
    if asked:
        queries = TensorDataset(*tensors(given).tensors[:2])
    per_class = options.get("target") == "validation_per_class"
    if per_class:  # labels are what the plain form cannot give beside a regression target
        rows = []
        for kind in (0, 1):
            of_kind = TensorDataset(*(t[kind::2] for t in queries.tensors))
            plain = FINECallback("validation", "loss", loss=huber, queries=of_kind)
            fit([plain], Plain(), tensors(made))
            rows.append(numbers(plain))
        expected = torch.cat(rows)
    else:
        plain = FINECallback(observable="loss", loss=huber, queries=queries, **options)
        fit([plain], Plain(), tensors(made))
        expected = numbers(plain)
    assert expected.abs().max() > 1e-3
    assert float((numbers(adapted) - expected).abs().max()) < 1e-10 * float(expected.abs().max())


def test_keys_and_places_of_ones_own() -> None:
    class Named(Dataset[Any]):
        def __init__(self, kind: str) -> None:
            self.kind = kind
            g = torch.Generator().manual_seed(3)
            self.x, self.y = torch.randn(N, 4, generator=g), torch.randint(3, (N,), generator=g)

        def __len__(self) -> int:
            return N

        def __getitem__(self, i: int) -> Any:
            if self.kind == "mapping":
                return {"label": self.y[i], "id": i, "pixels": self.x[i]}
            return (i, self.y[i], self.x[i]) if self.kind == "tuple" else (self.x[i], self.y[i], i)

    class Net(pl.LightningModule):
        def __init__(self, read: Any) -> None:
            super().__init__()
            self.read = read
            self.head = nn.Linear(4, 3)
            with torch.no_grad():
                self.head.weight.copy_(torch.linspace(-1, 1, 12).view(3, 4))
                self.head.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = self.read(batch)
            return F.cross_entropy(self(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.2)

    found = []
    for kind, how, read in (
        ("plain", None, lambda b: b[:2]),
        ("tuple", BatchAdapter(index=0, y=1, x=2), lambda b: (b[2], b[1])),
        (
            "mapping",
            BatchAdapter(index="id", y="label", x="pixels"),
            lambda b: (b["pixels"], b["label"]),
        ),
    ):
        queries = Named(kind)
        callback = FINECallback("validation", queries=queries, adapter=how)
        fit([callback], Net(read), Named(kind))
        found.append(numbers(callback))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=r"tell by BatchAdapter\(index=…\) where"):
        fit([FINECallback(observable="loss")], Regression(), Pairs())
    row = BatchAdapter(index=lambda batch: batch["meta"]["row"])
    with pytest.raises(ValueError, match=r"with 'left', 'right', 'goal', 'meta'; or tell by Batch"):
        fit(
            [FINECallback("validation", "loss", queries=Pairs(2), adapter=row)],
            Regression(),
            Pairs(),
        )
    callback = FINECallback(observable="loss", adapter=row)
    with pytest.warns(UserWarning, match="the model cannot be asked by itself"):
        fit([callback], Regression(), Pairs())
    assert numbers(callback).abs().max() > 1e-3
    with pytest.raises(ValueError, match="holds no tensor"):
        BatchAdapter(losses=lambda module, batch: batch).size(["a", "b"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": huber}, ValueError, "leave out forward=… and loss=…"),
        ({"schedule": "snapshot", "observable": "margin"}, ValueError, "gives losses only"),
        ({"geometry": "ekfac"}, ValueError, "needs class logits"),
    ],
)
def test_what_losses_alone_cannot_do(options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        FINECallback(**({"observable": "loss"} | options), adapter=adapter())


def test_bad_adapters() -> None:
    with pytest.raises(TypeError, match="must be a key, a place in a tuple, or a function"):
        BatchAdapter(index=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"losses\(module, batch\)"):
        BatchAdapter(losses="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels of the queries"):
        FINECallback(
            "validation_per_class",
            "loss",
            queries=Pairs(),
            adapter=BatchAdapter(losses=lambda module, batch: module.each(batch)),
        )
