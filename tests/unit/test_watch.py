"""A watched loop in plain PyTorch has the callback's scores bit for bit, or says what is wrong."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from fine_bench.callback import BatchAdapter, FINECallback
from fine_bench.fine.loop import WatchedLoop
from fine_bench.types import UnsupportedProblemError
from support.commands import environment
from support.trainer_setting import BATCHES, N, Net, data
from support.training import QUIET

F32 = torch.float32
QUERIES = data(7, seed=3)

QUESTIONS: dict[str, dict[str, Any]] = {
    "self": {},
    "self, loss": {"observable": "loss"},
    "standardised": {"composition": "standardised", "contrast": "removal"},
    "uncertainty": {"step_weight": "uncertainty"},
    "sketch, thinned": {"sketch": 4, "observe_every": 2},
    "reference columns": {"reference_columns": 4},
    "validation": {"target": "validation", "queries": QUERIES, "refresh_every": 3},
    "queries, loss": {"target": "queries", "queries": QUERIES, "observable": "loss"},
    "ekfac": {"geometry": "ekfac", "noise": "model", "fit_examples": 20},
    "snapshots": {"schedule": "snapshot"},
    "snapshots, every 3 steps": {"schedule": "snapshot", "every_n_steps": 3, "watched": [3, 9]},
    "snapshots, 4": {
        "schedule": "snapshot",
        "n_snapshots": 4,
        "target": "validation",
        "queries": QUERIES,
    },
}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate": 4},
    "clipped": {"clip": 0.05},
    "Adam, accumulated": {"optimizer": "Adam", "accumulate": 3},
    "bf16": {"autocast": True, "dtype": F32},
    "16 bit": {"scale": 2.0**10, "dtype": F32},
}


@dataclass(frozen=True)
class Setting:
    """How a run is trained, by Lightning or by hand."""

    optimizer: str = "SGD"
    accumulate: int = 1
    clip: float | None = None
    autocast: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    epochs: int = 2

    def scaler(self) -> Any:
        if self.scale is None:
            return None
        return torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=3)


def by_lightning(question: dict[str, Any], **setting: Any) -> tuple[FINECallback, Tensor]:
    how, options = Setting(**setting), dict[str, Any]()
    if how.scale is not None:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", how.scaler())]
    if how.autocast:
        options["precision"] = "bf16-mixed"
    callback, module = FINECallback(**question), Net(how.optimizer, how.dtype)
    pl.Trainer(
        max_epochs=how.epochs,
        accumulate_grad_batches=how.accumulate,
        gradient_clip_val=how.clip,
        callbacks=[callback],
        **QUIET,
        **options,
    ).fit(module, DataLoader(data(dtype=how.dtype), batch_size=BATCHES))
    return callback, flat(module)


def by_hand(
    question: dict[str, Any],
    *,
    saved: dict[str, Any] | None = None,
    watched: bool = True,
    stop: int = 0,
    **setting: Any,
) -> tuple[Any, Tensor, dict[str, Any]]:
    """The same run written out; it stops after ``stop`` epochs and says how to go on."""
    how = Setting(**setting)
    net, train = Net(how.optimizer, how.dtype), data(dtype=how.dtype)
    (chosen,), (schedule,) = net.configure_optimizers()
    scheduler, model = schedule["scheduler"], net.net
    amp, accumulate = how.scaler(), how.accumulate
    loader = DataLoader(train, batch_size=BATCHES)
    total = how.epochs * -(-len(loader) // accumulate) if "n_snapshots" in question else None
    watch: Any = nullcontext()
    if watched:
        watch = fine_bench.watch(
            model,
            optimizer=chosen,
            train_set=train,
            accumulate=accumulate,
            scaler=amp,
            total_steps=total,
            **question,
        )
    begin = 0
    if saved is not None:
        begin = saved["epoch"]
        model.load_state_dict(saved["model"])
        chosen.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        watch.load_state_dict(saved["fine"])
    half: dict[str, Any] = {}
    with watch as fine:
        for epoch in range(begin, stop or how.epochs):
            for i, (x, y, index) in enumerate(loader):
                if watched:
                    fine.batch(index, y)
                kind = torch.bfloat16 if how.autocast else torch.float16
                mixed = how.scale is not None or how.autocast
                with torch.autocast("cpu", kind, enabled=mixed):
                    loss = F.cross_entropy(model(x), y) / accumulate
                if watched:
                    loss = fine.loss(loss)
                (loss if amp is None else amp.scale(loss)).backward()
                if (i + 1) % accumulate and i + 1 < len(loader):
                    continue
                if how.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), how.clip)
                if amp is None:
                    chosen.step()
                else:
                    amp.step(chosen)
                    amp.update()
                chosen.zero_grad()
                scheduler.step()
            if watched:
                fine.epoch_ends()
                half = {
                    "epoch": epoch + 1,
                    "model": {k: v.clone() for k, v in model.state_dict().items()},
                    "optimizer": chosen.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "fine": fine.state_dict(),
                }
    return watch, flat(net), half


class Thawing(Net):
    """Its first layer is trained from the second epoch on, its normalisation until then."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.thaw(self.current_epoch)

    def thaw(self, epoch: int) -> None:
        self.net[0].requires_grad_(epoch > 0)
        self.net[2].requires_grad_(epoch == 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("question", [{}, {"schedule": "snapshot"}], ids=str)
def test_layers_that_are_frozen_or_thawed_are_followed(question: dict[str, Any]) -> None:
    callback, module = FINECallback(**question), Thawing()
    loader = DataLoader(data(), batch_size=BATCHES)
    pl.Trainer(max_epochs=3, callbacks=[callback], **QUIET).fit(module, loader)
    net = Thawing()
    optimizer = net.configure_optimizers()
    with fine_bench.watch(net.net, optimizer=optimizer, train_set=data(), **question) as fine:
        for epoch in range(3):
            net.thaw(epoch)
            for x, y, index in loader:
                fine.batch(index, y)
                fine.loss(F.cross_entropy(net.net(x), y)).backward()
                optimizer.step()
                optimizer.zero_grad()
            fine.epoch_ends()
    assert torch.equal(flat(module), flat(net))
    same(callback, fine)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def same(a: Any, b: Any) -> None:
    one, other = a.scores(), b.scores()
    assert torch.equal(one.values, other.values)
    assert torch.equal(one.std_error, other.std_error)
    assert torch.equal(one.n_observations, other.n_observations)
    assert (one.method, one.version, one.target) == (other.method, other.version, other.target)
    assert one.values.abs().max() > 1e-3
    assert a.n_not_finite == b.n_not_finite
    assert a.gradient_evaluations == b.gradient_evaluations


@pytest.mark.any_trainer("a loop in plain PyTorch")
@pytest.mark.parametrize("name", QUESTIONS)
def test_a_loop_has_the_scores_of_the_callback(name: str) -> None:
    callback, weights = by_lightning(QUESTIONS[name])
    loop, own, _ = by_hand(QUESTIONS[name])
    assert torch.equal(weights, own)
    same(callback, loop)


@pytest.mark.any_trainer("a loop in plain PyTorch")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("question", ["self", "validation", "snapshots, every 3 steps"])
def test_so_it_has_in_every_setting(name: str, question: str) -> None:
    asked, setting = QUESTIONS[question], SETTINGS[name]
    if setting.get("dtype") == F32 and "queries" in asked:
        asked = {**asked, "queries": data(7, seed=3, dtype=F32)}
    callback, weights = by_lightning(asked, **setting)
    loop, own, _ = by_hand(asked, **setting)
    assert torch.equal(weights, own)
    same(callback, loop)


def test_watching_changes_no_weight() -> None:
    _, watched, _ = by_hand({})
    _, plain, _ = by_hand({}, watched=False)
    assert torch.equal(watched, plain)


@pytest.mark.any_trainer("a loop in plain PyTorch that goes on after an interruption")
@pytest.mark.parametrize("name", ["self", "validation", "ekfac", "snapshots", "sketch, thinned"])
def test_a_loop_goes_on_from_its_state(name: str) -> None:
    whole, weights, _ = by_hand(QUESTIONS[name], epochs=4, accumulate=3)
    _, _, saved = by_hand(QUESTIONS[name], epochs=4, accumulate=3, stop=2)
    again, own, _ = by_hand(QUESTIONS[name], epochs=4, accumulate=3, saved=saved)
    assert torch.equal(weights, own)
    assert torch.equal(whole.scores().values, again.scores().values)
    other = {**QUESTIONS[name], "contrast": "removal"}
    with pytest.raises(ValueError, match="two different questions"):
        by_hand(other, epochs=4, accumulate=3, saved=saved)


def test_queries_of_another_content_are_another_question() -> None:
    _, _, saved = by_hand(QUESTIONS["validation"], epochs=4, stop=2)
    other = {**QUESTIONS["validation"], "queries": data(7, seed=4)}
    with pytest.raises(ValueError, match="two different questions"):
        by_hand(other, epochs=4, saved=saved)


class Loop:
    """A loop for misuse: a network, its optimiser, one batch."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = options.pop("model", None) or nn.Sequential(
            nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        options = {"optimizer": self.optimizer, "train_size": N, **options}
        self.fine: WatchedLoop = fine_bench.watch(self.model, **options)
        self.x, self.y = torch.randn(8, 6), torch.randint(3, (8,))
        self.index = torch.arange(8)

    def forward(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_an_index_is_all_that_a_loop_needs_to_tell() -> None:
    loop = Loop()
    with loop.fine as fine:
        for _ in range(3):
            fine.batch(range(8))
            loop.forward().backward()
            loop.step()
    scores = fine.scores()
    assert scores.values.shape == (1, N)
    assert scores.n_observations is not None
    assert scores.n_observations.tolist() == [3] * 8 + [0] * (N - 8)
    assert fine.seconds > 0
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in loop.model.modules()]
    assert not any(hooks)
    with pytest.raises(RuntimeError, match="this watch is over"):
        fine.batch(range(8))


def no_index(loop: Loop) -> None:
    loop.forward().backward()


def two_batches(loop: Loop) -> None:
    loop.fine.batch(loop.index)
    loop.forward()
    loop.fine.batch(loop.index)


def no_backward(loop: Loop) -> None:
    loop.fine.batch(loop.index)
    loop.forward()
    loop.step()


def no_step(loop: Loop) -> None:
    for _ in range(2):
        loop.fine.batch(loop.index)
        loop.forward().backward()


def two_backwards(loop: Loop) -> None:
    loop.fine.batch(loop.index)
    loss = loop.forward()
    loss.backward(retain_graph=True)
    loss.backward()


def closure(loop: Loop) -> None:
    loop.fine.batch(loop.index)
    loop.optimizer.step(lambda: float(loop.forward()))


MISUSES: list[tuple[Any, type[Exception], str]] = [
    (no_index, RuntimeError, r"whose index was not given: call fine\.batch"),
    (two_batches, RuntimeError, "was called twice without a backward"),
    (no_backward, RuntimeError, "came without a backward pass on a batch"),
    (no_step, RuntimeError, r"accumulate=1.*pass accumulate=k"),
    (two_backwards, UnsupportedProblemError, "more than one backward pass"),
    (closure, UnsupportedProblemError, "inside of the step"),
]


@pytest.mark.any_trainer("a loop in plain PyTorch that leaves out a batch's index, or a step")
@pytest.mark.parametrize(("misuse", "error", "said"), MISUSES)
def test_what_a_loop_leaves_out_is_said(misuse: Any, error: type[Exception], said: str) -> None:
    loop = Loop()
    with pytest.raises(error, match=said), loop.fine:
        misuse(loop)
    assert not loop.model._forward_pre_hooks


def test_a_loop_without_any_step_is_reported() -> None:
    loop = Loop()
    loop.fine.batch(loop.index)
    loop.forward().backward()
    with pytest.warns(UserWarning, match="the optimizer that was given to watch took no step"):
        loop.fine.finish()


def test_a_batch_may_be_left_out() -> None:
    found = []
    for left_out in (False, True):
        loop = Loop()
        with loop.fine as fine:
            for i in range(4):
                if left_out and i == 1:  # before its backward pass
                    fine.batch(loop.index + 8)
                    loop.forward()
                    fine.skip()
                if left_out and i == 2:  # and after it
                    fine.batch(loop.index + 8)
                    loop.forward().backward()
                    loop.optimizer.zero_grad()
                    fine.skip()
                fine.batch(loop.index)
                loop.forward().backward()
                loop.step()
        found.append(fine.scores().values)
    assert torch.equal(*found)


def test_passes_beside_the_training_do_not_disturb() -> None:
    found = []
    for aside in (False, True):
        loop = Loop()
        with loop.fine as fine:
            for _ in range(3):
                fine.batch(loop.index)
                loop.forward().backward()
                if aside:  # a validation pass with gradients, before the step
                    loop.model(loop.x * 2)
                loop.step()
                if aside:
                    with torch.no_grad():
                        loop.model(loop.x)
                    torch.autograd.grad(loop.forward(), list(loop.model.parameters()))
        found.append(fine.scores().values)
    assert torch.equal(*found)


@pytest.mark.any_trainer("an epoch's end in a loop in plain PyTorch")
def test_epochs_are_counted_unless_something_hangs_on_them() -> None:
    loop = Loop(train_size=16)
    with loop.fine as fine:
        for _ in range(3):
            for start in (0, 8):
                fine.batch(loop.index + start)
                loop.forward().backward()
                loop.step()
        assert fine.epoch == 2
    train = TensorDataset(torch.randn(16, 6), torch.randint(3, (16,)))
    once = {"train_size": None, "train_set": train}
    for options in ({"schedule": "snapshot"}, {"geometry": "ekfac"}):
        with pytest.raises(RuntimeError, match=r"once an epoch.*call fine\.epoch_ends"):
            steps(Loop(**once, **options), 3)


def steps(loop: Loop, count: int, y: Any = None) -> None:
    """So many steps on halves of 16 examples, one after the other."""
    with loop.fine as fine:
        for i in range(count):
            fine.batch(loop.index + 8 * (i % 2), None if y is None else y(i))
            fine.loss(loop.forward()).backward()
            loop.step()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_what_the_callback_refuses_is_refused() -> None:
    mixing = nn.Sequential(nn.Linear(6, 8), Mixing(), nn.Linear(8, 3))
    with pytest.raises(UnsupportedProblemError, match="depends on who else is in its batch"):
        steps(Loop(model=mixing), 1)
    with pytest.raises(ValueError, match="had the label"):
        steps(Loop(), 3, lambda i: torch.full((8,), i))


def test_the_loss_is_looked_at() -> None:
    target = torch.randn(8, 3)
    queries = TensorDataset(torch.randn(5, 6), target[:5])
    loop = Loop(loss=nn.MSELoss(), target="validation", observable="loss", queries=queries)
    loop.fine.batch(loop.index, target)
    loss = nn.MSELoss()(loop.model(loop.x), target) * 8
    with pytest.raises(UnsupportedProblemError, match="is the sum of the losses of the batch's 8"):
        loop.fine.loss(loss)
    loop = Loop(observable="loss")
    loop.fine.batch(loop.index)
    logits = loop.model(loop.x)
    with pytest.raises(UnsupportedProblemError, match="mixes its examples"):
        loop.fine.loss(F.cross_entropy(logits, loop.y) + logits.var(0).sum())


@pytest.mark.any_trainer("a loss in a loop in plain PyTorch that margins do not show")
@pytest.mark.parametrize(
    "options",
    [
        {"observable": "loss"},
        {"schedule": "snapshot", "train_size": None, "train_set": data(dtype=F32)},
        {"target": "validation", "queries": data(5, 2, F32)},
    ],
    ids=["loss", "snapshot", "validation"],
)
def test_a_loss_that_is_not_shown_is_asked_for(options: dict[str, Any]) -> None:
    loop = Loop(**options)
    loop.fine.batch(loop.index)
    loop.forward().backward()
    with pytest.raises(RuntimeError, match=r"fine\.loss\(loss\)\.backward\(\)"):
        loop.step()
    with pytest.raises(RuntimeError, match=r"came before fine\.batch"):
        Loop(**options).fine.loss(torch.zeros(()))


def test_a_loss_module_says_what_is_trained() -> None:
    weights = torch.tensor([1.0, 2.0, 0.5])
    queries = TensorDataset(torch.randn(5, 6), torch.randint(3, (5,)))
    asked = {"target": "validation", "observable": "loss", "queries": queries}
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    found = []
    for loss in (
        smooth,
        lambda z, y, reduction: F.cross_entropy(z, y, label_smoothing=0.1, reduction=reduction),
    ):
        loop = Loop(loss=loss, **asked)
        with loop.fine as fine:
            for _ in range(3):
                fine.batch(loop.index, loop.y)
                fine.loss(smooth(loop.model(loop.x), loop.y)).backward()
                loop.step()
        found.append(fine.scores().values)
    assert torch.equal(*found)
    assert Loop(loss=nn.CrossEntropyLoss()).fine.options.loss is F.cross_entropy
    assert Loop(loss=nn.CrossEntropyLoss(weights), **asked).fine.options.says_loss
    with pytest.raises(ValueError, match="has reduction='sum'"):
        Loop(loss=nn.CrossEntropyLoss(reduction="sum"))


def test_bad_arguments_are_refused() -> None:
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fit = {"optimizer": optimizer, "train_size": 4}
    with pytest.raises(ValueError, match="none of the model's parameters"):
        fine_bench.watch(nn.Linear(6, 3), **fit)
    with pytest.raises(TypeError, match=r"must be the torch.optim.Optimizer"):
        fine_bench.watch(model, optimizer=model, train_size=4)
    with pytest.raises(ValueError, match="pass train_size="):
        fine_bench.watch(model, optimizer=optimizer)
    with pytest.raises(ValueError, match="pass train_set="):
        fine_bench.watch(model, **fit, schedule="snapshot")
    with pytest.raises(ValueError, match="pass total_steps="):
        fine_bench.watch(model, **fit, schedule="snapshot", n_snapshots=2, train_set=data())
    with pytest.raises(ValueError, match="accumulate must be a whole number"):
        fine_bench.watch(model, **fit, accumulate=0)
    with pytest.raises(UnsupportedProblemError, match="wrapped in DataParallel"):
        fine_bench.watch(nn.DataParallel(model), **fit)
    with pytest.raises(UnsupportedProblemError, match=r"went through torch.compile"):
        fine_bench.watch(torch.compile(model), **fit)
    loop = Loop()
    with pytest.raises(ValueError, match="holds names"), loop.fine:
        loop.fine.batch(["a.png", "b.png"])


def test_models_with_other_arguments_are_looked_at_too() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 3), torch.ones(3)

        def forward(self, x: Tensor, *, scale: Tensor, shift: float) -> dict[str, Tensor]:
            return {"logits": self.layer(x) * scale + shift}

    loop = Loop(model=Two(), adapter=BatchAdapter(losses=lambda module, batch: batch))
    with loop.fine as fine:
        fine.batch(loop.index)
        out = loop.model(loop.x, scale=torch.ones(3), shift=0.5)
        fine.loss(F.cross_entropy(out["logits"], loop.y)).backward()
        loop.step()
    assert fine.scores().values.abs().max() > 0


def test_a_loop_needs_no_lightning() -> None:
    code = """
import sys
sys.modules["pytorch_lightning"] = sys.modules["lightning"] = None
import torch, fine_bench
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with fine_bench.watch(model, optimizer=optimizer, train_size=4) as fine:
    fine.batch(range(4))
    y = torch.tensor([0, 1, 0, 1])
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3)), y).backward()
    optimizer.step()
assert fine.scores().values.abs().max() > 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_a_loop_may_write_its_next_batch_into_the_memory_of_this_one() -> None:
    """Steps wait to be accounted for together: nothing of them may lie in the loop's own memory."""

    def scores(*, reuses: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        train = data(24)
        buffers = [part[:4].clone() for part in train.tensors]
        with fine_bench.watch(model, optimizer=optimizer, train_set=train) as fine:
            for _ in range(2):
                for batch in zip(*(part.split(4) for part in train.tensors), strict=True):
                    given = batch
                    if reuses:
                        given = tuple(
                            room.copy_(part) for room, part in zip(buffers, batch, strict=True)
                        )
                    x, y, index = given
                    fine.batch(index, y)
                    fine.loss(F.cross_entropy(model(x), y)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                fine.epoch_ends()
        values: Tensor = fine.scores().values
        return values

    assert torch.equal(scores(reuses=True), scores(reuses=False))
