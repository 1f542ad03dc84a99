"""In-run Shapley as a callback: what it watches, keeps and refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from baselines.shapley import ShapleyAccumulator, loss_derivatives
from fine_bench.callback import FINECallback
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N = 26


class Module(pl.LightningModule):
    def __init__(self, net: nn.Module | None = None, optimizer: Any = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = net or nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.kind, self.options = optimizer or torch.optim.SGD, options

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), **{"lr": 0.1, **self.options})


class TwoOptimizers(Module):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(p, lr=0.1) for p in ([q] for q in self.parameters())]

    def training_step(self, batch: Any, _: int) -> Tensor:
        raise AssertionError("refused before")

    @property
    def automatic_optimization(self) -> bool:
        return False


def tensors(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(3, (n,), generator=g)


def queries() -> TensorDataset:
    return TensorDataset(*tensors(5, 2))


def loader(shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(
        TensorDataset(*tensors(N, 1), torch.arange(N)),
        batch_size=8,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(3),
    )


def trainer(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"max_epochs": 2, **QUIET, **options},
        callbacks=callbacks,
    )


def fit(callbacks: list[pl.Callback], module: Module | None = None, **options: Any) -> Module:
    torch.manual_seed(4)  # dropout
    module = module or Module()
    trainer(callbacks, **options).fit(module, loader())
    return module


@pytest.mark.parametrize("order", [1, 2])
def test_watching_changes_nothing(order: Any) -> None:
    plain = fit([])
    state = torch.get_rng_state()
    alone = FINECallback("self")
    fit([alone])
    beside = FINECallback("self")
    shapley = InRunShapleyCallback(queries=queries(), order=order)
    single = InRunShapleyCallback("queries", queries=queries())
    watched = fit([shapley, beside, single])
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(alone.scores().values, beside.scores().values)
    assert watched.training
    assert not any(m._forward_hooks for m in watched.modules())
    assert shapley.scores().values.shape == (1, N)
    assert shapley.gradient_evaluations == order * 5 * 8
    # the mean over queries of the queries' own values
    if order == 1:
        mean = single.scores().values.mean(0, keepdim=True)
        torch.testing.assert_close(mean, shapley.scores().values, rtol=1e-4, atol=1e-7)


def test_a_resumed_run_gives_the_values_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def start(epochs: int) -> tuple[pl.Trainer, InRunShapleyCallback, Module]:
        module = Module()
        module.body[2] = nn.Identity()  # dropout's random state is not in a checkpoint
        callback = InRunShapleyCallback(queries=queries(), order=2)
        return trainer([callback], max_epochs=epochs), callback, module

    whole, expected, module = start(4)
    whole.fit(module, loader(shuffle=False))
    half, _, module = start(2)
    half.fit(module, loader(shuffle=False))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, found, module = start(4)
    rest.fit(module, loader(shuffle=False), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(expected.scores().values, found.scores().values)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "self"}, UnsupportedProblemError, "no validation loss"),
        ({"target": "queries", "order": 2}, UnsupportedProblemError, "for every query"),
        ({"target": "everything"}, ValueError, "target must be"),
        ({"order": 3}, ValueError, "order must be 1 or 2"),
        ({"target": "validation", "queries": None}, ValueError, "needs queries"),
    ],
)
def test_bad_questions(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InRunShapleyCallback(**{"queries": queries(), **arguments})


def test_a_callback_that_saw_no_run_has_no_scores() -> None:
    callback = InRunShapleyCallback(queries=queries())
    assert callback.n_not_finite == 0
    with pytest.raises(RuntimeError, match="no run has been observed"):
        callback.scores()


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Module(momentum=0.9), {}, r"momentum=0\.9"),
        (Module(weight_decay=0.01), {}, r"weight_decay=0\.01"),
        (Module(optimizer=torch.optim.Adam), {}, "optimiser Adam"),
        (Module(), {"gradient_clip_val": 1.0}, "gradient clipping"),
        (Module(), {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (TwoOptimizers(), {}, "4 optimisers"),
        (
            Module(nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False))),
            {},
            "no running statistics",
        ),
    ],
)
def test_runs_that_cannot_be_shared_are_refused(
    module: Module, options: dict[str, Any], message: str
) -> None:
    module = copy.deepcopy(module)
    with pytest.raises(UnsupportedProblemError, match=message):
        fit([InRunShapleyCallback(queries=queries())], module, **options)
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("state", "message"),
    [({"world_size": 2}, "2 processes"), ({"precision": "16-mixed"}, "may scale them")],
)
def test_settings_that_no_test_machine_has(state: dict[str, Any], message: str) -> None:
    fake: Any = SimpleNamespace(
        **{"accumulate_grad_batches": 1, "world_size": 1, "precision": "32-true", **state}
    )
    with pytest.raises(UnsupportedProblemError, match=message):
        InRunShapleyCallback(queries=queries()).on_fit_start(fake, Module())


class Sentences(nn.Module):
    """Logits of rows of 6 numbers read as 8 tokens; in one of the two orders of dimensions."""

    def __init__(self, *, sequence_first: bool) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.dim = 0 if sequence_first else 1

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, None] * torch.linspace(0.5, 1.5, 8, dtype=x.dtype)[:, None]
        tokens = tokens.transpose(0, 1) if self.dim == 0 else tokens
        return self.last(torch.tanh(self.inner(tokens))).mean(self.dim)


def test_layers_that_get_the_sequence_first() -> None:
    """As many tokens as examples in a batch: shapes do not tell, the first batch's look does."""
    found = []
    for sequence_first in (True, False):
        torch.manual_seed(0)
        callback = InRunShapleyCallback(queries=queries())
        fit([callback], Module(Sentences(sequence_first=sequence_first)))
        found.append(callback.scores().values)
    assert torch.allclose(found[0], found[1], rtol=1e-6)
    assert found[0].std() > 1e-4


def test_streams_are_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(zip(*tensors(N, 1), torch.arange(N), strict=True))

    with pytest.raises(TypeError, match="map-style"):
        trainer([InRunShapleyCallback(queries=queries())]).fit(
            Module(), DataLoader(Stream(), batch_size=8)
        )
    several = {"a": loader(), "b": loader()}
    with pytest.raises(ValueError, match="one DataLoader"):
        trainer([InRunShapleyCallback(queries=queries())]).fit(Module(), several)


def test_what_is_not_finite_is_left_out_and_reported() -> None:
    class Broken(pl.Callback):
        def on_train_batch_start(self, _: Any, pl_module: Any, batch: Any, number: int) -> None:
            if number == 1:
                batch[0][0] = float("nan")

    callback = InRunShapleyCallback(queries=queries())
    with pytest.warns(UserWarning, match="at step 1: this step"):
        fit([Broken(), callback], max_epochs=1)
    # the step itself ruins the parameters, so nothing after it can be used
    assert callback.n_not_finite == 3
    assert int(callback.scores().n_observations.sum()) == 8  # type: ignore[union-attr]


def test_a_linear_loss_has_no_curvature() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = {"w": torch.ones(3, dtype=torch.float64)}

    def loss(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        return z * y

    gradient, product = loss_derivatives(
        lambda p: x @ p["w"], loss, w, torch.ones(4), torch.full((1, 4), 0.25), w
    )
    assert product is not None
    torch.testing.assert_close(gradient, x.mean(0, keepdim=True))
    assert float(product.abs().max()) == 0.0


def test_accumulator_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ShapleyAccumulator(0, 1)
    with pytest.raises(ValueError, match="resume with the same data"):
        ShapleyAccumulator(3, 1).load_state_dict(ShapleyAccumulator(4, 1).state_dict())
