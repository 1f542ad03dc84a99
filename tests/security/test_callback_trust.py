"""Attacks on the callbacks: steps around Lightning, other queries and data, wrong indices."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from baselines.in_run_shapley import InRunShapleyCallback
from fine_bench.callback import FINECallback
from fine_bench.callback.base import InRunMethod
from fine_bench.callback.paper import PaperFINECallback
from fine_bench.fine.window import Window
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N, CLASSES = 24, 3


def data(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, 4, generator=g),
        torch.randint(CLASSES, (N,), generator=g),
        torch.arange(N),
    )


def queries(seed: int) -> TensorDataset:
    return TensorDataset(*data(seed)[:2])


class Module(pl.LightningModule):
    """Plain SGD; ``way`` says how its steps are taken."""

    def __init__(self, way: str = "automatic") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, CLASSES))
        self.way = way
        self.automatic_optimization = way in ("automatic", "own step", "permuted", "renamed")
        self.held = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, y = batch[:2]
        if self.way == "permuted":
            order = torch.arange(len(y)).roll(1)
            x, y = x[order], y[order]
        if self.way == "renamed":
            y = (y + 1) % CLASSES
        loss = F.cross_entropy(self(x), y)
        if self.automatic_optimization:
            return loss
        raw = self.optimizers(use_pl_optimizer=False)
        raw.zero_grad()
        if self.way == "no backward":
            loss.backward()
            self.optimizers().step()
            return None
        self.manual_backward(loss)
        if self.way == "wrapper":
            self.optimizers().step()
        elif self.way == "raw":
            raw.step()
        else:
            with torch.no_grad():
                for p in self.parameters():
                    p.data -= 0.1 * p.grad
        return None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None
    ) -> None:
        if self.way == "own step":
            closure()
            optimizer.optimizer.step()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MostHeld(pl.Callback):
    """The longest window that a callback held."""

    def __init__(self, callback: FINECallback) -> None:
        self.callback, self.most = callback, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.most = max(self.most, len(self.callback._schedule.window._parts))


def train(
    callbacks: list[pl.Callback],
    module: Module | None = None,
    *,
    epochs: int = 1,
    loader: DataLoader[Any] | None = None,
    resume: Path | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    loader = loader or DataLoader(TensorDataset(*data()), batch_size=6)
    weights_only = None if resume is None else False
    trainer.fit(module or Module(), loader, ckpt_path=resume, weights_only=weights_only)
    return trainer


# ------------------------------------------------------------------ steps around Lightning


@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
@pytest.mark.parametrize("way", ["raw", "by hand", "own step"])
def test_steps_around_lightning_hold_no_memory_and_are_named(way: str, schedule: Any) -> None:
    callback = FINECallback(schedule=schedule)
    held = MostHeld(callback)
    with pytest.warns(UserWarning, match="the optimiser's steps go around Lightning"):
        train([callback, held], Module(way), epochs=3)
    assert held.most == 1
    assert not callback.scores().values.any()


def test_a_backward_pass_around_lightning_is_named() -> None:
    callback = FINECallback()
    with pytest.warns(UserWarning, match=r"self\.manual_backward\(loss\)"):
        train([callback], Module("no backward"))


def test_it_is_said_once_a_run() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train([FINECallback()], Module("raw"), epochs=3)
    assert sum("observed nothing" in str(line.message) for line in said) == 1


@pytest.mark.parametrize(
    "callback",
    [
        lambda: PaperFINECallback("self", sample=4, auxiliary=None, members=1, every_n_steps=1),
        lambda: InRunShapleyCallback("validation", queries=queries(2)),
    ],
)
def test_other_in_run_methods_say_so_too(callback: Any) -> None:
    with pytest.warns(UserWarning, match="go around Lightning"):
        train([callback()], Module("raw"))


@pytest.mark.parametrize("way", ["automatic", "wrapper"])
def test_ordinary_steps_are_observed_without_a_word(way: str) -> None:
    callback = FINECallback()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train([callback], Module(way), epochs=2)
    assert not [line for line in said if "observed nothing" in str(line.message)]
    assert callback.scores().values.any()


def test_small_batches_are_the_reason() -> None:
    with pytest.raises(UnsupportedProblemError, match="batch_size=2 gives steps of 2"):
        train([FINECallback()], loader=DataLoader(TensorDataset(*data()), batch_size=2))


def test_a_window_waits_for_accumulated_gradients() -> None:
    window: Window[int] = Window()
    for part in range(3):
        window.add(part, accumulates=3)
    assert window.take() == [0, 1, 2]
    assert window.n_around == 0
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    manual: Window[int] = Window(layer.parameters)
    manual.add(0, 1)
    manual.add(1, 1)
    assert manual.take() == [0, 1]


# ------------------------------------------------------------------ another question


def saved(tmp_path: Path, *callbacks: pl.Callback) -> Path:
    trainer = train(list(callbacks))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def test_two_callbacks_with_other_queries_work_in_one_trainer(tmp_path: Path) -> None:
    def both() -> list[FINECallback]:
        return [FINECallback("validation", queries=queries(seed)) for seed in (2, 3)]

    path = saved(tmp_path, *both())
    resumed, whole = both(), both()
    train(list(resumed), epochs=2, resume=path)
    train(list(whole), epochs=2)
    for a, b in zip(resumed, whole, strict=True):
        torch.testing.assert_close(a.scores().values, b.scores().values)
    assert not torch.equal(whole[0].scores().values, whole[1].scores().values)


@pytest.mark.parametrize(
    "other",
    [
        {"target": "validation", "queries": queries(3)},
        {"target": "validation", "queries": queries(2), "layers": ["net.2"]},
    ],
)
def test_resuming_with_another_question_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    path = saved(tmp_path, FINECallback("validation", queries=queries(2)))
    with pytest.raises(ValueError, match="saved for other queries or layers"):
        train([FINECallback(**other)], epochs=2, resume=path)


def test_resuming_with_other_layers_is_refused_where_there_are_no_queries(tmp_path: Path) -> None:
    path = saved(tmp_path, FINECallback())
    with pytest.raises(ValueError, match="saved for other queries or layers"):
        train([FINECallback(layers=["net.2"])], epochs=2, resume=path)
    path = saved(tmp_path, FINECallback(layers=["net.2"]))
    with pytest.raises(ValueError, match="saved for other queries or layers"):
        train([FINECallback()], epochs=2, resume=path)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: PaperFINECallback(
            "validation", queries=queries(seed), sample=4, auxiliary=None, members=1
        ),
        lambda seed: InRunShapleyCallback("validation", queries=queries(seed)),
    ],
)
def test_other_in_run_methods_tell_queries_apart(tmp_path: Path, make: Any) -> None:
    path = saved(tmp_path, make(2), make(3))
    train([make(3), make(2)], epochs=2, resume=path)
    with pytest.raises(ValueError, match="saved for other queries or layers"):
        train([make(4)], epochs=2, resume=path)


@pytest.mark.parametrize("schedule", ["in_batch", "snapshot"])
def test_resuming_with_other_data_is_refused(tmp_path: Path, schedule: Any) -> None:
    path = saved(tmp_path, FINECallback(schedule=schedule))
    other = DataLoader(TensorDataset(*data(5)), batch_size=6)
    with pytest.raises(ValueError, match="needs the data of its checkpoint"):
        train([FINECallback(schedule=schedule)], epochs=2, resume=path, loader=other)


def test_a_checkpoint_of_before_the_digest_still_resumes(tmp_path: Path) -> None:
    def make() -> FINECallback:
        return FINECallback("validation", queries=queries(2))

    path = saved(tmp_path, make())
    checkpoint = torch.load(path, weights_only=False)
    ((key, state),) = [
        (key, state) for key, state in checkpoint["callbacks"].items() if "FINE" in key
    ]
    del checkpoint["callbacks"][key], state["question"], state["labels"]
    checkpoint["callbacks"][make()._plain_key] = state
    torch.save(checkpoint, path)
    resumed, whole = make(), make()
    train([resumed], epochs=2, resume=path)
    train([whole], epochs=2)
    torch.testing.assert_close(resumed.scores().values, whole.scores().values)


def test_an_ordinary_callback_keeps_its_key() -> None:
    callback: InRunMethod = FINECallback()
    assert callback.state_key == callback._plain_key
    again = [FINECallback("validation", queries=queries(seed)) for seed in (2, 2, 3)]
    assert again[0].state_key == again[1].state_key != again[2].state_key


def test_the_digest_leaves_the_random_state_alone() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return torch.randn(4), self.tensors[1][index]

    before = torch.get_rng_state()
    keys = {FINECallback("validation", queries=Noisy(*data(2)[:2])).state_key for _ in range(2)}
    assert torch.equal(before, torch.get_rng_state())
    assert len(keys) == 1


# ------------------------------------------------------------------ positions of something else


def test_an_index_that_repeats_across_batches_is_refused() -> None:
    x, y, _ = data()
    loader = DataLoader(TensorDataset(x, y, torch.arange(N) % 6), batch_size=6)
    with pytest.raises(ValueError, match="must be the position of each example"):
        train([FINECallback()], loader=loader)


@pytest.mark.parametrize("observable", ["margin", "loss"])
def test_examples_permuted_in_training_step_are_refused(observable: Any) -> None:
    with pytest.raises(ValueError, match="labels in another order"):
        train([FINECallback(observable=observable)], Module("permuted"), epochs=3)


@pytest.mark.parametrize("way", ["automatic", "renamed"])
def test_labels_of_the_module_s_own_are_no_change_of_order(way: str) -> None:
    callback = FINECallback()
    loader = DataLoader(TensorDataset(*data()), batch_size=6, shuffle=True)
    train([callback], Module(way), epochs=3, loader=loader)
    assert callback.scores().values.any()


# ------------------------------------------------------------------ null groups


@pytest.mark.parametrize(
    "subsets", [{None: [1]}, {"a": [1], None: [2]}, [1, 2], {"a": None}, {"a": [1, None]}, "a"]
)
def test_groups_that_are_none_are_refused_in_words(subsets: Any) -> None:
    with pytest.raises(ValueError, match=r"subset(s| 'a') must be .*positions"):
        train([PaperFINECallback("self", subsets=subsets, auxiliary=None, members=1)])
