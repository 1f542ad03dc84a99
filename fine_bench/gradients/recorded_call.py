"""One application of a layer as a pass leaves it, and the factors of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.layers import LayerKind
from fine_bench.gradients.layout import FIRST, Layout, Layouts, regrouped
from fine_bench.types import UnsupportedProblemError


@dataclass(eq=False)
class Call:
    """One application of a layer during a forward pass."""

    name: str
    layer: nn.Module
    kind: LayerKind | None  # None: only the gradient at the output is asked for
    input: Tensor | None
    layout: Layout | None = None
    again: bool = False  # run once more in the backward pass, by a checkpoint
    output: Tensor | None = None
    edge: GradientEdge | None = None
    grad: Tensor | None = None
    features: Any = None
    reduced: Block | None = None
    task: int = -1  # number of the backward pass that brought the gradient


def in_backward_pass() -> bool:
    """Whether a backward pass is on its way, in which checkpoints run layers again."""
    return torch._C._current_graph_task_id() != -1


def last_of(calls: Sequence[Call], name: str) -> Call | None:
    """The last call of a layer, those with a gradient first, and those of checkpoints last."""
    if calls and calls[-1].name == name and calls[-1].grad is not None and not calls[-1].again:
        return calls[-1]  # nearly always
    found = [call for call in calls if call.name == name]
    first = [call for call in found if not call.again] or found
    return next((c for c in reversed(first) if c.grad is not None), None) or (
        first[-1] if first else None
    )


def factors(
    call: Call, batch_size: int, scale: float, layouts: Layouts, *, tap: bool
) -> tuple[Any, Tensor]:
    """Features ``(B, T, ·)`` of one call and gradients at its output ``(B, T, O)``.

    Args:
        call: with the gradient at its output.
        batch_size: number of examples, B.
        scale: factor on the gradients.
        layouts: of the recorder.
        tap: whether the pass was the training's own.

    Raises:
        UnsupportedProblemError: see ``layout_in``, or the layer's kind refuses the input.
    """
    assert call.grad is not None
    assert call.input is not None
    assert call.kind is not None
    x, grad, layer, kind = call.input, call.grad, call.layer, call.kind
    layout = layout_in(call, kind, x, batch_size, layouts, tap=tap)
    first = layout is FIRST or layout == FIRST
    if call.features is None:
        try:
            if first:
                call.features = kind.features(layer, x)
            else:
                rows = layout.examples_first(x, batch_size)
                call.features = regrouped(kind.features(layer, rows), batch_size)
        except UnsupportedProblemError as error:
            raise UnsupportedProblemError(f"layer {call.name!r}: {error}") from error
    a = call.features
    if tap and grad.dtype in (torch.bfloat16, torch.float16):
        grad = grad.float()  # products of a mixed-precision pass are taken in float32
    if scale != 1.0:
        grad = grad * scale
    if first:
        b = kind.positions(layer, grad)
    else:
        rows = layout.examples_first(grad, batch_size)
        b = regrouped(kind.positions(layer, rows), batch_size)
    if a.is_floating_point() and a.dtype != b.dtype:  # mixed precision
        both = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(both), b.to(both)
    return a, b


def layout_in(
    call: Call, kind: LayerKind, x: Tensor, n: int, layouts: Layouts, *, tap: bool
) -> Layout:
    """Where the examples are in the input of a call.

    Raises:
        UnsupportedProblemError: nowhere, or in one of several dimensions and nobody knows in which.
    """
    if call.name in layouts.reordered:
        raise UnsupportedProblemError(
            f"layer {call.name!r} gets the examples in another order than the batch has (sorted by "
            "length?), so its rows would be taken for other examples: sort in the collate "
            'function, where the index is sorted along; or use schedule="snapshot"'
        )
    shared, layout = call.name in layouts.refused, call.layout
    if layout is None and not shared and kind.layout.sizes(x, n) is not None:
        # an engine finds shared positions out by itself
        shared = tap and kind.counts_positions(x)
        sizes = [x.shape[dim] for dim in kind.dimensions(call.layer, x)]
        if layouts.looked and sizes.count(n) > 1:
            raise UnsupportedProblemError(
                f"layer {call.name!r} got an input of shape {tuple(x.shape)} in a batch of "
                f"{n}, of which several dimensions could be the examples, and f-INE could not "
                "look at a pass over fewer: use another batch size, or tell how the model is "
                "called by forward=… or adapter=BatchAdapter(losses=…)"
            )
        layout = kind.layout
    if shared or layout is None or layout.sizes(x, n) is None:
        why = layouts.refused.get(call.name)
        raise UnsupportedProblemError(
            f"layer {call.name!r} got an input of shape {tuple(x.shape)} in a batch of {n}: "
            + ("it is the same for all examples, and " + why + "; " if why else "")
            + f"the first dimension must be the examples{kind.advice}"
            + ('; or use schedule="snapshot", which takes any layer' if tap else "")
        )
    return layout
