"""Hooks that keep, for each layer, its input and the gradient at its output.

Recording reads what the forward and the backward pass hold anyway; it changes no value in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fine_bench.gradients.blocks import Block, DenseBlock, FactorBlock
from fine_bench.types import UnsupportedProblemError

FACTOR_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)
"""Layers whose per-example gradients have factors."""

_BATCH_COUPLED = (nn.modules.batchnorm._BatchNorm,)


@dataclass(eq=False)
class Call:
    """One application of a layer during a forward pass."""

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor | None = None
    edge: GradientEdge | None = None
    grad: Tensor | None = None


class LayerRecorder:
    """Records the layers of a model that have factors.

    Args:
        model: the network (or a LightningModule around it).
        layers: names of modules to watch, as in ``model.named_modules()``; a container stands for
            all layers in it. None watches every layer.
        tap: keep the gradients of whatever backward pass comes (the training's own). Otherwise
            the calls only hold the edges at which ``torch.autograd.grad`` can be asked for them.

    Attributes:
        leftover: names of trained parameters that no recorded layer covers.
        keep_outputs: whether a tapped pass also keeps the layers' outputs.
    """

    # While an engine sends its own examples through a model, only the engine's recorder listens:
    # another one may be recording a training step of the same model.
    _exclusive: ClassVar[LayerRecorder | None] = None

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | None = None, *, tap: bool = False
    ) -> None:
        self.tap = tap
        self.calls: list[Call] = []
        self.armed = False
        self.keep_outputs = False
        self._handles: list[RemovableHandle] = []
        self.model = model
        chosen = _select(model, layers)
        # a parameter that two modules share has one gradient, the sum over both: factors of each
        # module alone would be wrong, so such parameters are left to torch.func
        uses = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self.layers: dict[str, nn.Module] = {}
        covered: set[int] = set()
        for name, module in chosen.items():
            own = [p for p in module._parameters.values() if p is not None and p.requires_grad]
            if not own or not _has_factors(module) or any(uses[id(p)] > 1 for p in own):
                continue
            self.layers[name] = module
            covered |= {id(p) for p in own}
        wanted = {id(p) for m in chosen.values() for p in m._parameters.values() if p is not None}
        self.leftover = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) in wanted and id(p) not in covered
        ]
        if not self.layers and not self.leftover:
            raise UnsupportedProblemError(
                "the model has no trained parameters to take gradients of"
                + ("" if layers is None else f" in layers={list(layers)}")
            )
        for name, module in self.layers.items():
            self._handles.append(module.register_forward_hook(partial(self._record, name)))

    def start(self) -> None:
        """Forget the last pass and record the next one."""
        self.calls = []
        self.armed = True

    def stop(self) -> None:
        """Stop recording; what was recorded stays."""
        self.armed = False

    def clear(self) -> None:
        """Release the recorded tensors."""
        self.armed = False
        self.calls = []

    def close(self) -> None:
        """Remove every hook."""
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _record(self, name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not self.armed or not torch.is_grad_enabled() or not output.requires_grad:
            return
        if LayerRecorder._exclusive is not None and LayerRecorder._exclusive is not self:
            return
        call = Call(name, layer, inputs[0].detach())
        self.calls.append(call)
        # hook and edge are taken now: an in-place activation may change the output tensor later
        if self.tap:
            output.register_hook(partial(_keep, call))  # type: ignore[no-untyped-call]
            if self.keep_outputs:
                call.output = output.detach()
        else:
            call.edge = get_gradient_edge(output)

    @contextmanager
    def exclusively(self) -> Iterator[None]:
        """Record a pass that no other recorder hears."""
        before, LayerRecorder._exclusive = LayerRecorder._exclusive, self
        self.start()
        try:
            yield
        finally:
            self.stop()
            LayerRecorder._exclusive = before

    def edges(self) -> list[GradientEdge]:
        """Where ``torch.autograd.grad`` finds the recorded outputs, in the order of the calls."""
        return [call.edge for call in self.calls if call.edge is not None]

    def blocks(self, batch_size: int, scale: float = 1.0) -> list[Block]:
        """The blocks of the recorded pass, in the order of the layers' definition.

        Args:
            batch_size: number of examples B; the first dimension of every recorded tensor.
            scale: factor on the gradients; B turns the gradients of a mean loss into those of
                each example's own loss.
        """
        by_layer: dict[str, list[Call]] = {name: [] for name in self.layers}
        for call in self.calls:
            by_layer[call.name].append(call)
        blocks: list[Block] = []
        for name, layer in self.layers.items():
            parts = [_factors(c, batch_size, scale) for c in by_layer[name] if c.grad is not None]
            if not parts:
                raise UnsupportedProblemError(
                    f"layer {name!r} took no part in the loss, so its per-example gradients are "
                    f"unknown; leave it out with layers=[...] or set requires_grad=False"
                )
            # a layer used several times sums its gradients: its uses are further positions
            a = parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts], 1)
            b = parts[0][1] if len(parts) == 1 else torch.cat([p[1] for p in parts], 1)
            blocks.append(_block(name, layer, a, b))
        return blocks


def refuse_batch_coupling(model: nn.Module) -> None:
    """Refuse layers in training mode that mix the examples of a batch.

    Raises:
        UnsupportedProblemError: the gradient of one example does not exist there, since each
            output depends on every input of the batch.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BATCH_COUPLED) and module.training:
            raise UnsupportedProblemError(
                f"{name} ({type(module).__name__}) mixes the examples of a batch, so one example "
                "has no gradient of its own; replace it by torch.nn.GroupNorm, or freeze it with "
                ".eval()"
            )


def _keep(call: Call, grad: Tensor) -> None:
    call.grad = grad.detach()


def _has_factors(module: nn.Module) -> bool:
    # a subclass that computes something else in forward() does not have these factors
    return any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in FACTOR_LAYERS
    )


def _select(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    if layers is None:
        return modules
    if isinstance(layers, str):
        raise TypeError(f'layers must be a list of names, got the string {layers!r}; use ["…"]')
    unknown = [name for name in layers if name not in modules]
    if unknown:
        known = ", ".join(n for n in modules if n)
        raise ValueError(f"layers {unknown} are not in the model; it has: {known}")
    return {
        name: module
        for name, module in modules.items()
        if any(name == chosen or name.startswith(chosen + ".") for chosen in layers)
    }


def _factors(call: Call, batch_size: int, scale: float) -> tuple[Tensor, Tensor]:
    """Factors ``(B, T, I)`` and ``(B, T, O)`` of one call."""
    assert call.grad is not None
    a, b = call.input, call.grad
    if a.shape[0] != batch_size:
        raise UnsupportedProblemError(
            f"layer {call.name!r} got an input of shape {tuple(a.shape)} in a batch of "
            f"{batch_size}: the first dimension must be the examples"
        )
    if scale != 1.0:
        b = b * scale
    if isinstance(call.layer, nn.Conv2d):
        return _patches(call.layer, a), b.flatten(2).transpose(1, 2)
    if a.ndim == 2:
        return a.unsqueeze(1), b.unsqueeze(1)
    return a.flatten(1, -2), b.flatten(1, -2)


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Every receptive field of a convolution, ``(B, T, C·kh·kw)``.

    A strided view of the padded input, copied once; ``torch.nn.functional.unfold`` does the same
    at several times the cost on a CPU.
    """
    pad = conv._reversed_padding_repeated_twice
    if any(pad):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, pad, mode=mode)
    n, channels, height, width = x.shape
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    out_h = (height - dh * (kh - 1) - 1) // sh + 1
    out_w = (width - dw * (kw - 1) - 1) // sw + 1
    s_n, s_c, s_h, s_w = x.stride()
    view = x.as_strided(
        (n, out_h, out_w, channels, kh, kw),
        (s_n, s_h * sh, s_w * sw, s_c, s_h * dh, s_w * dw),
    )
    return view.reshape(n, out_h * out_w, channels * kh * kw)


def _block(name: str, layer: nn.Module, a: Tensor, b: Tensor) -> Block:
    weight = bool(layer.weight.requires_grad)
    bias = layer.bias is not None and bool(layer.bias.requires_grad)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    if groups == 1:
        return FactorBlock(name, a, b, weight, bias)
    # each group of outputs sees its own inputs: its weight gradient is small, so it is formed
    n, t, _ = a.shape
    a = a.view(n, t, groups, -1)
    grouped = b.reshape(n, t, groups, -1)
    parts = []
    if weight:
        parts.append(torch.einsum("ntgo,ntgi->ngoi", grouped, a).flatten(1))
    if bias:
        parts.append(b.sum(1))
    return DenseBlock(name, torch.cat(parts, 1))
