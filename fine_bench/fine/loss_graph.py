"""The way from a model's outputs to the training loss, read off the graph of the first pass.

With z_i the outputs of example i from which the loss L is computed, one example has a gradient of
its own only if

    ∂²L / ∂z_i ∂z_j = 0    for i ≠ j:

the derivative of the loss by one example's output does not depend on the outputs of others. One
product of that matrix with a vector v shows it, without any knowledge of the loss: where v is zero
outside of half of the examples, so must be the product. Contrast within the batch, statistics of
the batch, and roots or quotients of sums over it fail; weights of classes, label smoothing and
tokens that are left out do not, for there others only set a common factor that does not depend on
what the model says.

The product does not see mixing of which the derivative is constant or cut off: differences of
absolute value one (|z_i − z_j|), what is ``detach``-ed, the choice of the hardest examples.
Broadcasting of an output ``(B, 1)`` against a target ``(B,)`` is of that kind, and shows in the
shapes along the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

NAMES = {
    "MseLossBackward0": "torch.nn.functional.mse_loss",
    "L1LossBackward0": "torch.nn.functional.l1_loss",
    "SmoothL1LossBackward0": "torch.nn.functional.smooth_l1_loss",
    "HuberLossBackward0": "torch.nn.functional.huber_loss",
    "BinaryCrossEntropyBackward0": "torch.nn.functional.binary_cross_entropy",
    "BinaryCrossEntropyWithLogitsBackward0": (
        "torch.nn.functional.binary_cross_entropy_with_logits"
    ),
    "SoftMarginLossBackward0": "torch.nn.functional.soft_margin_loss",
}
"""Losses that leave their name in the graph."""


@dataclass(frozen=True, eq=False)
class Output:
    """What a layer returned in the first pass.

    Attributes:
        name: of the layer.
        edge: where gradients by it are found.
        value: the output itself.
        given: what the layer was given, where that is no layer's output; else None.
    """

    name: str
    edge: GradientEdge
    value: Tensor
    given: Tensor | None


class Outputs:
    """Listens to the layers of a model during one pass.

    Args:
        module: the model.

    Attributes:
        heard: their outputs in order.
    """

    def __init__(self, module: nn.Module) -> None:
        self.heard: list[Output] = []
        self._handles: list[RemovableHandle] = [
            part.register_forward_hook(partial(self._hear, name))
            for name, part in module.named_modules()
            if part._parameters or isinstance(part, _NormBase)
        ]

    def close(self) -> None:
        """Stop listening and let go of what was heard."""
        self.heard = []
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hear(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        given = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        if given is not None and given.requires_grad:
            given = None
        for part in tree_leaves(output):
            if isinstance(part, Tensor) and part.requires_grad and part.ndim:
                edge = get_gradient_edge(part)
                self.heard.append(Output(name, edge, part.detach(), given))


@dataclass(frozen=True, eq=False)
class LossGraph:
    """The part of the graph between the model's outputs and the loss.

    Attributes:
        ends: the outputs from which the loss is computed, no other output in between.
        kinds: names of the operations in between.
        shapes: shapes of what they return, on the way from the outputs alone: a penalty on weights
            has shapes of its own.
    """

    ends: list[Output]
    kinds: list[str]
    shapes: list[tuple[int, ...]]

    @classmethod
    def of(cls, loss: Tensor, heard: Sequence[Output]) -> LossGraph:
        """The graph of a loss that has one."""
        at = {(output.edge.node, output.edge.output_nr): output for output in heard}
        ends: dict[int, Output] = {}
        kinds = []
        shapes: dict[Node, list[tuple[int, ...]]] = {}
        above: dict[Node, list[Node]] = {}
        start = get_gradient_edge(loss)
        waiting: list[tuple[Node, int]] = [(start.node, start.output_nr)]
        seen: set[tuple[Node, int]] = set()
        while waiting:
            place = waiting.pop()
            if place in seen:
                continue
            seen.add(place)
            if place in at:
                ends[id(at[place])] = at[place]
                continue
            node = place[0]
            kinds.append(node.name())
            # no public way leads to the shapes
            shapes[node] = [tuple(part.shape) for part in getattr(node, "_input_metadata", ())]
            following = [(n, number) for n, number in node.next_functions if n is not None]
            for n, _ in following:
                above.setdefault(n, []).append(node)
            waiting += following
        between: set[Node] = set()
        upwards = [node for end in ends.values() for node in above.get(end.edge.node, [])]
        while upwards:
            node = upwards.pop()
            if node not in between:
                between.add(node)
                upwards += above.get(node, [])
        order = {id(output): position for position, output in enumerate(heard)}
        ordered = sorted(ends.values(), key=lambda o: order[id(o)])
        return cls(ordered, kinds, [shape for node in between for shape in shapes.get(node, [])])

    @property
    def loss_name(self) -> str | None:
        """The loss's name in PyTorch, if it is one that tells."""
        return next((NAMES[kind] for kind in self.kinds if kind in NAMES), None)

    def broadcasts(self, m: int) -> Output | None:
        """The one number an example of which the loss makes m numbers an example, if there is."""
        if m < 2 or not any(shape[:2] == (m, m) for shape in self.shapes):
            return None
        single = [end for end in self.ends if end.value.shape in ((m,), (m, 1))]
        return single[0] if single and len(single) == len(self.ends) else None


def mixes(loss: Tensor, ends: Sequence[Output], m: int) -> bool:
    """Whether the derivative of the loss by one example's outputs depends on other examples'.

    Args:
        loss: of the batch, with its graph, which stays.
        ends: the outputs from which it is computed.
        m: number of examples. They are sought in every dimension of this length, and among rows
            of which every example has several; all of these have to look mixed.
    """
    edges = [end.edge for end in ends]
    if m < 2 or not edges:
        return False
    try:
        grads = torch.autograd.grad(loss, edges, create_graph=True, allow_unused=True)
    except RuntimeError:  # an operation without a second derivative
        return False
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(end.value.shape, generator=draw).to(end.value) for end in ends]
    ways = [list(_ways(tuple(end.value.shape), m)) for end in ends]
    if not all(ways):
        return False
    places = torch.arange(m)
    for way in range(max(map(len, ways))):
        kinds = [found[min(way, len(found) - 1)] for found in ways]
        if not any(
            _leaks(grads, edges, noise, [_spread(half, kind) for kind in kinds])
            for half in (places < m // 2, places % 2 == 0)
        ):
            return False
    return True


def _leaks(
    grads: Sequence[Tensor | None],
    edges: Sequence[GradientEdge],
    noise: Sequence[Tensor],
    masks: Sequence[Tensor],
) -> bool:
    """Whether H v is not zero where v is."""
    parts = [
        (g * v * mask.to(v)).sum()
        for g, v, mask in zip(grads, noise, masks, strict=True)
        if g is not None and g.requires_grad
    ]
    if not parts:
        return False
    total = torch.stack([part.double() for part in parts]).sum()
    try:
        second = torch.autograd.grad(total, edges, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return False
    inside = outside = 0.0
    for h, mask in zip(second, masks, strict=True):
        if h is not None:
            squares = h.detach().double().square()
            inside += float((squares * mask.to(squares)).sum())
            outside += float((squares * (~mask).to(squares)).sum())
    eps = max(torch.finfo(v.dtype).eps for v in noise)
    return outside > (16 * eps) ** 2 * (inside + outside)


def _ways(shape: tuple[int, ...], m: int) -> Iterator[tuple[str, int, int]]:
    """Where the examples may be in a tensor: ``(kind, place, ndim)``."""
    found = [d for d, length in enumerate(shape) if length == m]
    for d in found:
        yield "axis", d, len(shape)
    if not found and shape[0] and shape[0] % m == 0:
        yield "runs", shape[0] // m, len(shape)
        yield "turns", shape[0] // m, len(shape)


def _spread(half: Tensor, way: tuple[str, int, int]) -> Tensor:
    """A mask of examples ``(m,)`` as one that goes with a tensor."""
    kind, place, ndim = way
    if kind == "axis":
        return half.view([-1 if d == place else 1 for d in range(ndim)])
    rows = half.repeat_interleave(place) if kind == "runs" else half.repeat(place)
    return rows.view([-1] + [1] * (ndim - 1))


__all__ = ["LossGraph", "Output", "Outputs", "mixes"]
