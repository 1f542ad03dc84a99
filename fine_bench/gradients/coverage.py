"""Which blocks a model's gradients fall into: which layers, and which parameters of them.

A block is a layer, except where layers share a weight: the shared weight is a block of its own
(``tied.py``), named after the parameter, and what else these layers train are blocks without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fine_bench.gradients.layers import LayerKind, kind_of, trained_parameters
from fine_bench.gradients.reparametrised import reparametrised
from fine_bench.gradients.tied import TiedKind, WithoutWeight
from fine_bench.types import UnsupportedProblemError


@dataclass(frozen=True, eq=False)
class Covered:
    """One block.

    Attributes:
        modules: whose calls the gradient follows from; the first gives the block its layer.
        kind: how it follows.
        parameters: those that are trained, by their name in the model, in the block's order.
    """

    modules: tuple[nn.Module, ...]
    kind: LayerKind
    parameters: dict[str, nn.Parameter]


def covered_blocks(model: nn.Module, chosen: Mapping[str, nn.Module]) -> dict[str, Covered]:
    """The blocks of the chosen modules, by name, in the order of the modules.

    Args:
        model: all of it: a weight that is shared with a module that is not chosen counts too.
        chosen: modules by their name in the model.

    Raises:
        UnsupportedProblemError: a layer that cannot be trained in a per-example way at all.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                users.setdefault(id(p), []).append(module)
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Covered] = {}
    for name, module in chosen.items():
        kind, own = kind_of(module), trained_parameters(module)
        if kind is None:
            continue
        mapped = reparametrised(module, kind)
        if mapped is not None:
            kind, own = mapped, mapped.parameters(module) | own
        if not own:
            continue
        shared = [p for p in own.values() if len(users[id(p)]) > 1]
        if shared and not (len(shared) == 1 and shared[0] is own.get("weight")):
            continue
        refusal = kind.refusal(module)
        if refusal is not None:
            raise UnsupportedProblemError(
                f"layer {name!r} ({type(module).__name__}): {refusal}; or leave the layer out "
                "with layers=[...]"
            )
        if shared:
            together = tuple(users[id(shared[0])])
            tied = TiedKind.of_layers(together, shared[0])
            if tied is None:
                continue
            found.setdefault(
                names[id(shared[0])], Covered(together, tied, {names[id(shared[0])]: shared[0]})
            )
            own = {part: p for part, p in own.items() if p is not shared[0]}
            kind = WithoutWeight(kind)
        if own:
            full = {f"{name}.{part}" if name else part: p for part, p in own.items()}
            found[name] = Covered((module,), kind, full)
    return found
