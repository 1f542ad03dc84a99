"""Per-example gradients of ``nn.MultiheadAttention``, whose projections are linear maps.

``torch.nn.functional.multi_head_attention_forward`` projects by its own calls of ``linear`` and
never calls the module ``out_proj``, so hooks of modules hear neither. While such an attention runs,
the name ``linear`` in ``torch.nn.functional`` stands for one that also tells which weight was
applied to what; the numbers are those of the function itself.

    in_proj_weight (3E, E)         one map, or one of the queries and one of keys and values, or
                                   three: some rows of the weight, with inputs of their own
    q_, k_, v_proj_weight          three maps, where keys or values have other widths (kdim, vdim)
    in_proj_bias (3E,)             rows as above
    out_proj                       a map of its own, on (T·B, E)

A map by some rows has zero gradients at the outputs of the other rows, so all maps together are one
linear layer [W|b] whose positions are those of all inputs, side by side.

Shapes: B examples, T positions, E width of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fine_bench.gradients.blocks.linear import FactorBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.layers import LayerKind, is_trained
from fine_bench.gradients.layout import Layout

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
SEQUENCE_FIRST = Layout(1)
TOKENS = Layout(0, None, 1)
"""What the output is projected from: (T·B, E), position after position."""

Take = Callable[[str, nn.Module, LayerKind, Tensor, Tensor], Tensor | None]
"""Takes note of a call of a block: its name, layer, kind, input and output."""


class ProjectionKind(LayerKind):
    """Some of an attention's maps, as one linear layer.

    Args:
        attention: whose maps they are.
        weight, bias: names of its parameters, below the attention's; empty where the block has
            none.
        rows: of all outputs, those of one call: the first, and how many there are in all.
    """

    layout = SEQUENCE_FIRST

    def __init__(
        self,
        attention: nn.MultiheadAttention,
        weight: str,
        bias: str,
        rows: tuple[int, int] | None = None,
    ) -> None:
        self.attention = attention
        self.weight, self.bias = weight, bias
        self.rows = rows

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """Its own code has the sequence first."""
        return range(1, 2)

    def applied(self, weight: Tensor) -> LayerKind | None:
        """The kind of a call that applies this weight; None where it is not of this block."""
        whole = self.attention._parameters["in_proj_weight"]
        if whole is None:
            parts = [self.attention._parameters[name] for name in SEPARATE]
            found = [k for k, part in enumerate(parts) if part is weight]
            if not found or (self.weight and parts[found[0]] is not self._parameter(self.weight)):
                return None
            width, size = self.attention.embed_dim, 3 * self.attention.embed_dim
            rows = (0, width) if self.weight else (found[0] * width, size)
        else:
            if weight.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                return None
            if weight.shape[1:] != whole.shape[1:]:
                return None
            first = (weight.storage_offset() - whole.storage_offset()) // whole.shape[1]
            rows = (first, len(whole))
        return ProjectionKind(self.attention, self.weight, self.bias, rows)

    def _parameter(self, name: str) -> nn.Parameter | None:
        return self.attention._parameters[name]

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``(B, T, I)``; one number a position where there is no weight to know them for."""
        x = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)
        return x if self.weight else x[:, :, :1]

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """``(B, T, O)``, with zeros for the rows that were not applied."""
        assert self.rows is not None
        grad = grad.unsqueeze(1) if grad.ndim == 2 else grad.flatten(1, -2)
        first, size = self.rows
        return F.pad(grad, (first, size - first - grad.shape[2]))

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        """See ``LayerKind``."""
        trained = [
            bool(part) and is_trained(self.attention, part) for part in (self.weight, self.bias)
        ]
        return FactorBlock(name, a, b, *trained)


class OutputKind(ProjectionKind):
    """The map of the output, by the weight of a module that nobody calls."""

    layout = TOKENS

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__(attention, "", "")

    def dimensions(self, layer: nn.Module, x: Tensor) -> range:
        """Its own code has positions and examples in one."""
        return range(1)

    def applied(self, weight: Tensor) -> LayerKind | None:
        """See ``ProjectionKind``."""
        return self if weight is self.attention.out_proj._parameters["weight"] else None

    def features(self, layer: nn.Module, x: Tensor) -> Tensor:
        """``(B, T, E)``."""
        return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)

    def positions(self, layer: nn.Module, grad: Tensor) -> Tensor:
        """``(B, T, E)``."""
        return self.features(layer, grad)

    def block_of(self, name: str, layer: nn.Module, a: Any, b: Tensor) -> Block:
        """See ``LayerKind``."""
        out = self.attention.out_proj
        return FactorBlock(name, a, b, is_trained(out, "weight"), is_trained(out, "bias"))


Blocks: TypeAlias = dict[nn.Module, list[tuple[str, ProjectionKind, dict[str, nn.Parameter]]]]
"""Of each module its blocks: name, kind and trained parameters."""


def projections(model: nn.Module, chosen: Mapping[str, nn.Module]) -> Blocks:
    """The blocks of attentions: for each module their names, kinds and trained parameters.

    Args:
        model: all of it.
        chosen: modules by their name in the model; an ``out_proj`` by itself counts too.
    """
    found: Blocks = {}
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    known = [m for m in attentions if _is_plain(m)]
    outputs = {m.out_proj: m for m in known}
    # nobody calls them, whatever they are
    found.update({m.out_proj: [] for m in attentions if m not in known})
    for name, module in chosen.items():
        kinds: list[tuple[str, ProjectionKind, nn.Module]] = []
        if module in outputs:
            kinds = [(name, OutputKind(outputs[module]), module)]
            parts = [("weight", "bias")]
        elif isinstance(module, nn.MultiheadAttention) and module in known:
            parts = _parts(module)
            kinds = [
                (
                    name if weight == "in_proj_weight" else f"{name}.{weight or bias}".lstrip("."),
                    ProjectionKind(module, weight, bias),
                    module,
                )
                for weight, bias in parts
            ]
        for (block, kind, owner), names in zip(kinds, parts if kinds else [], strict=True):
            own = {
                f"{name}.{part}" if name else part: p
                for part in names
                if part and (p := owner._parameters.get(part)) is not None and p.requires_grad
            }
            if own:
                found.setdefault(module, []).append((block, kind, own))
    return found


def _is_plain(module: nn.MultiheadAttention) -> bool:
    """Whether it is an attention whose weights are parameters of its own, with its own forward."""
    return (
        type(module).forward is nn.MultiheadAttention.forward
        and "in_proj_weight" in module._parameters
        and type(module.out_proj).forward is nn.Linear.forward
        and "weight" in module.out_proj._parameters
    )


def _parts(attention: nn.MultiheadAttention) -> list[tuple[str, str]]:
    """Weight and bias of each block below the attention's own name."""
    if attention._parameters["in_proj_weight"] is not None:
        return [("in_proj_weight", "in_proj_bias")]
    return [*((name, "") for name in SEPARATE), ("", "in_proj_bias")]


# ---------------------------------------------------------------------- hearing them


_LISTENERS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []
_BEFORE: list[Callable[..., Tensor]] = []
"""What ``F.linear`` was when the first listener came: it may be another library's."""


def _heard_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output: Tensor = _BEFORE[0](input, weight, bias)
    for listener in tuple(_LISTENERS):
        output = listener(input, weight, output)
    return output


def stop_listening() -> None:
    """Put ``F.linear`` back after an interrupt within an attention, which runs no hook."""
    _LISTENERS.clear()
    if _BEFORE:
        F.linear = _BEFORE.pop()


def listen(
    attention: nn.MultiheadAttention,
    kinds: Mapping[str, ProjectionKind],
    take: Take,
    hears: Callable[[], bool],
) -> Iterator[RemovableHandle]:
    """Hooks that tell of an attention's maps while it runs.

    Args:
        attention: the module.
        kinds: of its blocks, by name.
        take: is told of each call; what it returns, if anything, is given on instead.
        hears: whether anybody wants to know.
    """

    def told(x: Tensor, weight: Tensor, output: Tensor) -> Tensor:
        for name, kind in kinds.items():
            applied = kind.applied(weight)
            if applied is not None:
                instead = take(name, attention, applied, x, output)
                output = output if instead is None else instead
        return output

    def starts(*_: Any) -> None:
        if hears():
            if not _LISTENERS:
                _BEFORE[:] = [F.linear]
                F.linear = _heard_linear
            _LISTENERS.append(told)

    def ends(*_: Any) -> None:
        if told in _LISTENERS:
            _LISTENERS.remove(told)
            if not _LISTENERS:
                F.linear = _BEFORE.pop()

    yield attention.register_forward_pre_hook(starts)
    yield attention.register_forward_hook(ends, always_call=True)
