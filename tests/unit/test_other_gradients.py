"""Loops that do more with a batch than train on it: scores and weights stay those of the training.

Each case begins after the first batch, at which alone sums of gradients are compared. The truth is
the same loop that does nothing else; under ``adversarial`` the gradients of one example at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fine_bench
from fine_bench.callback import FINECallback
from fine_bench.gradients.engine import GradientEngine
from fine_bench.types import UnsupportedProblemError
from support.training import QUIET

N, SIZE, LATE = 24, 6, 2
"""Examples, of a batch, and the first step at which the loop does something else."""

Extra = Callable[[nn.Module, Tensor, Tensor], object]


def examples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (N,), generator=generator)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def nothing(model: nn.Module, x: Tensor, out: Tensor) -> None:
    pass


def saliency(model: nn.Module, x: Tensor, out: Tensor) -> None:
    torch.autograd.grad(out.square().sum(), x, retain_graph=True)


def norms(model: nn.Module, x: Tensor, out: Tensor) -> None:
    torch.autograd.grad(out.square().sum(), list(model.parameters()), retain_graph=True)


def next_batch(model: nn.Module, x: Tensor, out: Tensor) -> None:
    with torch.no_grad():
        x.fill_(9.0)


def attacked(model: nn.Module, x: Tensor) -> Tensor:
    """The inputs of one batch, moved along their gradient."""
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x)
    return (x + 0.1 * grad.sign()).detach()


def scores(
    before: Extra = nothing,
    after: Extra = nothing,
    *,
    late: int = LATE,
    attack: bool = False,
    accumulate: int = 1,
    buffer: bool = False,
    **question: Any,
) -> Tensor:
    """μ of a loop that calls ``before`` and ``after`` around a batch's backward pass."""
    (x, y), model = examples(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    room = torch.empty(SIZE, 5, dtype=torch.float64)
    watch = fine_bench.watch(
        model, optimizer=optimizer, train_size=N, accumulate=accumulate, **question
    )
    with watch as fine:
        for step, index in enumerate(torch.arange(2 * N).remainder(N).split(SIZE)):
            given = room.copy_(x[index]) if buffer else x[index].requires_grad_(not attack)
            fine.batch(index)
            if attack and step >= late:
                given = attacked(model, given)
            out = model(given)
            if step >= late:
                before(model, given, out)
            loss = F.cross_entropy(out, y[index]) / accumulate
            fine.loss(loss).backward(retain_graph=True)
            if step >= late:
                after(model, given, out)
            if (step + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return fine.scores().values


@pytest.mark.parametrize("late", [0, LATE])
@pytest.mark.parametrize("question", [{}, {"observable": "loss"}], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("extra", [saliency, norms])
def test_gradients_of_something_else_are_not_the_training_s(
    extra: Extra, when: str, question: dict[str, Any], late: int
) -> None:
    assert torch.equal(scores(**{when: extra}, late=late, **question), scores(**question))


def test_the_next_batch_may_come_before_the_step() -> None:
    assert torch.equal(scores(after=next_batch, late=0), scores())


def test_a_window_may_have_one_buffer_for_all_its_batches() -> None:
    assert torch.equal(scores(accumulate=2, buffer=True), scores(accumulate=2))


def test_adversarial_examples_are_what_is_trained_on() -> None:
    """A pass that finds them goes through the same layers, and counts nothing."""
    (x, y), model = examples(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    shift, variance = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for step, index in enumerate(torch.arange(2 * N).remainder(N).split(SIZE)):
        given = attacked(model, x[index]) if step >= LATE else x[index]
        losses = F.cross_entropy(model(given), y[index], reduction="none")
        parameters = list(model.parameters())
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        gram = torch.stack([torch.cat([g.flatten() for g in each]) for each in grads])
        gram = gram @ gram.T
        for row, i in enumerate(index.tolist()):
            others = gram[row][torch.arange(SIZE) != row]
            shift[i] += 0.1 * (gram[row, row] - others.mean())
            variance[i] += 0.1**2 * others.var()
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    truth = shift / (N * variance).sqrt()
    found = scores(attack=True, observable="loss")[0].double()
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_a_sketch_that_was_made_of_other_gradients_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match="leave sketch out"):
        scores(before=norms, sketch=4)


class Scaled(pl.LightningModule):
    """Brings its inputs to their range in place, as pixels are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x.div_(2.0))
        return out

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Attacked(Scaled):
    """Looks for adversarial examples, from the second batch on; trains on the plain ones."""

    def __init__(self, *, attacks: bool) -> None:
        super().__init__()
        self.attacks = attacks

    def training_step(self, batch: Any, step: int) -> Tensor:
        if self.attacks and step:
            attacked(self.net, batch[0])
        return F.cross_entropy(self.net(batch[0]), batch[1])


def test_a_trainer_may_take_gradients_of_something_else() -> None:
    def found(*, attacks: bool) -> Tensor:
        callback, data = FINECallback(), TensorDataset(*examples(), torch.arange(N))
        pl.Trainer(max_epochs=2, callbacks=[callback], **QUIET).fit(
            Attacked(attacks=attacks), DataLoader(data, batch_size=SIZE)
        )
        return callback.scores().values

    assert torch.equal(found(attacks=True), found(attacks=False))


@pytest.mark.parametrize("question", [{}, {"schedule": "snapshot"}], ids=str)
def test_a_model_that_writes_into_its_inputs_is_trained_as_without(
    question: dict[str, Any],
) -> None:
    def trained(callbacks: list[Any]) -> Tensor:
        module = Scaled()
        data = TensorDataset(*examples(), torch.arange(N))
        pl.Trainer(max_epochs=1, callbacks=callbacks, **QUIET).fit(
            module, DataLoader(data, batch_size=SIZE)
        )
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    assert torch.equal(trained([FINECallback(**question)]), trained([]))


def test_queries_are_not_written_into_either() -> None:
    (x, y), model = examples(), Scaled()
    engine, given = GradientEngine(model, F.cross_entropy), x.clone()
    engine(given, y)
    assert torch.equal(given, x)


def test_another_optimiser_of_the_same_model_is_refused() -> None:
    (x, y), model = examples(), network()
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.Adam(model[2].parameters(), lr=0.1)
    elsewhere = nn.Linear(2, 2)
    with fine_bench.watch(model, optimizer=first, train_size=N) as fine:
        fine.batch(range(N))
        F.cross_entropy(model(x), y).backward()
        first.step()
        torch.optim.SGD(elsewhere.parameters(), lr=0.1).step()
        with pytest.raises(UnsupportedProblemError, match=r"\(Adam\).*parameter groups"):
            second.step()
    second.step()  # the watch is over
