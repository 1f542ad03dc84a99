"""What a watched loop is refused for, in words."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from fine_bench.fine.options import Options
from fine_bench.types import UnsupportedProblemError

SPREAD = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")
"""Wrappers that spread a batch or a model over devices."""

OVER = (
    "this watch is over: call fine.batch(…) inside of the with block, or open another one with "
    "fine_bench.watch(…)"
)

TWO_BATCHES = (
    "fine.batch(…) was called twice without a backward pass in between: announce each batch "
    "once, right before its forward pass, and call backward on its loss before the next one; "
    "where the loop leaves a batch out, call fine.skip()"
)

NO_BATCH = "fine.loss(…) came before fine.batch(index): announce the batch first"

UNSEEN = (
    "a batch was trained on without a call of the model that watch() was given, so nothing of its "
    "first batch could be looked at: write model(x), not model.forward(x) or parts of the model "
    "one by one"
)
NO_INDEX = (
    "a backward pass came on a batch whose index was not given: call fine.batch(index) before "
    "the forward pass of every batch that is trained on; gradients for other purposes are taken"
    " by torch.autograd.grad(…), which leaves the parameters alone"
)

TWO_BACKWARDS = (
    "there was more than one backward pass on one batch, so the gradient of one example's loss "
    "is not in any of them; add losses up before one backward pass, and call fine.batch(index) "
    "before the forward pass of each batch"
)

CLOSURE = (
    "optimizer.step(closure) takes its gradients inside of the step, where f-INE cannot tell "
    "whose they are: call loss.backward() and then optimizer.step()"
)

NO_BACKWARD = (
    "optimizer.step() came without a backward pass on a batch of which f-INE knows: call "
    "fine.batch(index), then the forward pass, then loss.backward()"
)

NO_STEP = (
    "the optimizer that was given to watch took no step; give the one that trains the model, and "
    "let the loop step inside of the with block"
)


OTHER_OPTIMISER = (
    "another optimiser ({other}) steps parameters of the watched model that the one given to watch "
    "({given}) does not hold, so their part of each step would count for nothing: give one "
    "optimiser with parameter groups, which may have step sizes of their own"
)


def refuse_other_optimisers(model: nn.Module, optimizer: Optimizer) -> RemovableHandle:
    """From now on refuse steps of other optimisers that move what the given one does not.

    Args:
        model, optimizer: as ``watch`` gets them.

    Returns:
        What takes it back.
    """

    def held(by: Optimizer) -> set[int]:
        return {id(p) for group in by.param_groups for p in group["params"]}

    def look(other: Optimizer, args: Any, kwargs: Any) -> None:
        if other is optimizer:
            return
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        if held(other) & trained - held(optimizer):
            names = {"other": type(other).__name__, "given": type(optimizer).__name__}
            raise UnsupportedProblemError(OTHER_OPTIMISER.format(**names))

    return register_optimizer_step_pre_hook(look)


def refuse_unseen(looked: bool) -> None:
    """Refuse passes that go around the model's own call.

    Args:
        looked: whether the first batch was seen on its way into the model.

    Raises:
        RuntimeError: it was not.
    """
    if not looked:
        raise RuntimeError(UNSEEN)


def refuse_setting(model: nn.Module, optimizer: Any, accumulate: int) -> None:
    """Refuse what a plain loop cannot watch.

    Args:
        model, optimizer, accumulate: as ``watch`` gets them.

    Raises:
        UnsupportedProblemError: a model that is spread over devices.
        TypeError, ValueError: another optimizer than this model's; a number that is none.
    """
    kinds = {kind.__name__ for kind in type(model).__mro__}
    if spread := sorted(kinds & set(SPREAD)):
        raise UnsupportedProblemError(
            f"the model is wrapped in {spread[0]}, which spreads a batch or the parameters "
            "over devices, so that no process of a plain loop holds a step's examples; train "
            'on one device, or with FINECallback under Lightning\'s strategy="ddp"'
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer must be the torch.optim.Optimizer that the loop steps, got "
            f"{type(optimizer).__name__}"
        )
    mine = {id(p) for p in model.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer has none of the model's parameters: pass the one that trains this "
            "model, made after the model was moved to its device"
        )
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"accumulate must be a whole number ≥ 1, got {accumulate!r}")


def refuse_unknown_length(options: Options, total_steps: int | None) -> None:
    """Refuse snapshots that are spaced over a run whose length nobody tells.

    Raises:
        ValueError: they are.
    """
    if options.n_snapshots is not None and total_steps is None:
        raise ValueError(
            f"n_snapshots={options.n_snapshots} spaces snapshots over the run, whose length a "
            "loop does not tell: pass total_steps=…, or use every_n_steps=…"
        )


def too_many_parts(accumulate: int) -> RuntimeError:
    """More batches went backward than make up a step.

    Args:
        accumulate: how many the loop said.
    """
    return RuntimeError(
        f"{accumulate} batch{'es' if accumulate > 1 else ''} went backward since "
        f"the last step (accumulate={accumulate}), and a further one comes before the optimizer "
        "that was given to watch has stepped. If gradients of k batches are accumulated for a "
        "step, divide each batch's mean loss by k and pass accumulate=k; if another optimizer "
        "steps, give that one; a torch.amp.GradScaler, which may keep steps back, goes to "
        "scaler=…; where gradients are thrown away, call fine.skip() after zero_grad()"
    )


def unknown_loss_error(options: Options) -> RuntimeError:
    """Nobody handed on the loss.

    Args:
        options: what is measured.
    """
    return RuntimeError(
        f"with target={options.target!r}, observable={options.observable!r} and schedule="
        f"{options.schedule!r} the gradients alone do not show whether the loss is a mean of one "
        "loss an example: hand it on before its backward pass, fine.loss(loss).backward(). It is "
        "looked at in the first batch"
    )


def refuse_unknown_epochs(options: Options, seen: int) -> None:
    """Refuse to wait for the end of an epoch of which nobody tells.

    Args:
        options: what is measured.
        seen: examples since the last epoch's end.

    Raises:
        RuntimeError: something is done once an epoch.
    """
    if options.schedule == "snapshot":
        once, other = "a snapshot is taken", "every_n_steps=… or n_snapshots=…"
        wanted = options.every_n_steps is None and options.n_snapshots is None
    else:
        once, other = "the geometry is fitted", "refit_every=…"
        wanted = options.geometry == "ekfac" and options.refit_every is None
    if wanted:
        raise RuntimeError(
            f"{once} once an epoch, and {seen} examples have been seen without a "
            "word of an epoch's end: call fine.epoch_ends() after the last step of each "
            f"epoch, or say when by {other}"
        )
