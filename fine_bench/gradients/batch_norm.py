"""Batch normalisation: what of a step's gradient is a row's own, and where an example has its own.

In training such a layer normalises each channel by the mean and the variance of the batch,
x̂ = (x − mean) / √(var + ε), so an example's loss depends on every row of the batch, and an example
has no gradient of its own. The step that the batch causes is a sum over its rows all the same. With
L the *whole* loss and δ_i = ∂L/∂(output of a layer) at row i,

    a weight   Σ_t δ_it a_itᵀ          a scale   Σ_t δ_it x̂_it          a shift   Σ_t δ_it

are the row's contributions: they add up exactly to ∂L/∂θ, because each parameter acts on one row at
a time. Through the batch's statistics δ_i also holds what row i does to the losses of the others.
Where nothing couples, it is the example's own gradient. A pass holds all of it already; only x̂ is
computed again, with the statistics that the pass took.

In evaluation the layer normalises by its running statistics, which are constants: there an example
has a gradient of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fine_bench.types import UnsupportedProblemError

log = logging.getLogger(__name__)


def couples(layer: nn.Module) -> bool:
    """Whether a layer normalises by its batch in its present mode."""
    return isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)


def coupling_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """Layers that normalise by their batch in their present mode, by name."""
    return {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, _BatchNorm) and couples(part)
    }


def batch_coupling_reason(layer: nn.Module) -> str:
    """Why a batch normalisation has no per-example gradients."""
    frozen = (
        "freeze it with .eval()"
        if getattr(layer, "running_mean", None) is not None
        else "give it running statistics (track_running_stats=True) and freeze it with .eval()"
    )
    return (
        f"{type(layer).__name__} mixes the examples of a batch, so one example has no gradient of "
        f"its own; replace it by torch.nn.GroupNorm, or {frozen}"
    )


def refuse_batch_coupling(model: nn.Module) -> None:
    """Refuse layers that mix the examples of a batch in their present mode.

    Raises:
        UnsupportedProblemError: the gradient of one example does not exist there, since each
            output depends on every input of the batch.
    """
    for name, layer in coupling_layers(model).items():
        raise UnsupportedProblemError(f"{name}: {batch_coupling_reason(layer)}")


def refuse_synchronised(model: nn.Module, processes: int) -> None:
    """Refuse statistics over the batches of several processes.

    Raises:
        UnsupportedProblemError: rows would need the statistics of all processes, which no test
            here can show to be right: the layer runs on GPUs alone.
    """
    for name, layer in coupling_layers(model).items():
        if isinstance(layer, nn.SyncBatchNorm) and processes > 1:
            raise UnsupportedProblemError(
                f"{name}: SyncBatchNorm takes its statistics over {processes} processes, where "
                "rows have not been shown to add up to the step; use sync_batchnorm=False (each "
                "process then normalises by its own batch), or one process"
            )


def refuse_without_statistics(model: nn.Module) -> None:
    """Refuse layers that normalise by their batch in evaluation too, where passes take place.

    Raises:
        UnsupportedProblemError: a query's gradient would depend on the other queries.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is None:
            raise UnsupportedProblemError(
                f"{name}: {type(layer).__name__} has no running statistics, so in evaluation it "
                "mixes the examples of a pass, and a query has no gradient of its own; use "
                'track_running_stats=True, or in-batch target="self" in the Euclidean geometry, '
                "which needs no such pass"
            )


def say_reading(layers: Mapping[str, nn.Module], method: str, *, in_batch: bool = True) -> None:
    """Tell in one line how a method reads a run with batch normalisation; of the first process.

    Args:
        layers: those that normalise by their batch, at least one.
        method: its name.
        in_batch: whether it reads the training's own passes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return
    first, *others = layers
    where = first if not others else f"{first} and {len(others)} more"
    log.warning(
        "%s: batch normalisation in %s: %s",
        method,
        where,
        "an example counts with what its row contributes to the step; queries, if any, are read "
        "with the running statistics"
        if in_batch
        else "snapshots are read with the running statistics",
    )


def by_running_statistics(layer: nn.Module, x: Tensor) -> Tensor:
    """x̂ of a layer whose statistics are fixed."""
    assert isinstance(layer, _BatchNorm)
    return F.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)


def by_batch_statistics(layer: nn.Module, x: Tensor) -> Tensor:
    """x̂ of a layer that normalises by its batch; the running statistics stay as they are."""
    assert isinstance(layer, _BatchNorm)
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return F.batch_norm(x, None, None, training=True, eps=layer.eps)


@contextmanager
def as_in_training(layers: Iterable[nn.Module]) -> Iterator[None]:
    """These layers are in training mode inside; their running statistics move with each pass."""
    modes = [(layer, layer.training) for layer in layers]
    try:
        for layer, _ in modes:
            layer.training = True
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def fixed_statistics(model: nn.Module) -> Iterator[None]:
    """Layers without running statistics normalise by mean 0 and variance 1 inside.

    In evaluation mode no batch normalisation couples examples then, so that what still does is
    something else.
    """
    layers = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    layers = [part for part in layers if part.running_mean is None]
    for layer in layers:
        like = next(model.parameters()).detach()
        layer.running_mean = like.new_zeros(layer.num_features)
        layer.running_var = like.new_ones(layer.num_features)
    try:
        yield
    finally:
        for layer in layers:
            layer.running_mean = layer.running_var = None


__all__ = [
    "as_in_training",
    "batch_coupling_reason",
    "by_batch_statistics",
    "by_running_statistics",
    "couples",
    "coupling_layers",
    "fixed_statistics",
    "refuse_batch_coupling",
    "refuse_synchronised",
    "refuse_without_statistics",
    "say_reading",
]
