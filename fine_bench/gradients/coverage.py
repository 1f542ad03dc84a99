"""Which blocks a model's gradients fall into: which layers, and which parameters of them.

A block is a layer, except where layers share a weight: the shared weight is a block of its own
(``tied.py``), named after the parameter, and what else these layers train are blocks without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fine_bench.gradients.attention import projections
from fine_bench.gradients.layers import LayerKind, kind_of, trained_parameters
from fine_bench.gradients.reparametrised import reparametrised
from fine_bench.gradients.tied import TiedKind, WithoutWeight
from fine_bench.gradients.transposed import transposed_parts
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
    attentions = projections(model, chosen)
    refusals: dict[str, str] = {}
    for name, module in chosen.items():
        if module in attentions:
            for block, projection, trained in attentions[module]:
                if all(len(users[id(p)]) == 1 for p in trained.values()):
                    found[block] = Covered((module,), projection, trained)
            continue
        for block, transposed, trained in transposed_parts(name, module):
            if all(len(users[id(p)]) == 1 for p in trained.values()):
                found[block] = Covered((module,), transposed, trained)
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
            refusals[name] = f"layer {name!r} ({type(module).__name__}): {refusal}"
            continue
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
    if refusals:
        parameters = {name: block.parameters for name, block in found.items()}
        covered = {part for own in parameters.values() for part in own}
        learning = {name for name, p in model.named_parameters() if p.requires_grad}
        leftover = [name for name in learning if name not in covered]
        others = other_layers(model, parameters, leftover, [])
        raise UnsupportedProblemError(
            "; ".join(refusals.values())
            + (f"; or watch others with layers={others}" if others else "")
        )
    return found


def chosen_modules(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules to watch, by name: those named and all below them; all of them for None.

    Raises:
        TypeError: a name in the place of a list of names.
        ValueError: a name that the model does not have.
    """
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


def remedy(
    model: nn.Module,
    blocks: Mapping[str, Mapping[str, nn.Parameter]],
    leftover: Sequence[str],
    wrong: Sequence[str],
) -> str:
    """What to type where some parameters have no per-example gradients in a training pass.

    See ``other_layers``.
    """
    layers = other_layers(model, blocks, leftover, wrong)
    return 'schedule="snapshot"' + (f", or watch others with layers={layers}" if layers else "")


def other_layers(
    model: nn.Module,
    blocks: Mapping[str, Mapping[str, nn.Parameter]],
    leftover: Sequence[str],
    wrong: Sequence[str],
) -> list[str]:
    """Names for ``layers=[…]`` of what can be watched without some parameters.

    Args:
        model: the network.
        blocks: parameters by their name in the model, by block.
        leftover: names of parameters that belong to no block.
        wrong: names of blocks, or of parameters, that have none.
    """
    named, modules = dict(model.named_parameters()), dict(model.named_modules())
    names = [name for block in wrong for name in blocks.get(block, [block])] + list(leftover)
    without = {id(named[name]) for name in names}

    def serves(name: str) -> bool:
        return bool(name) and not any(id(p) in without for p in modules[name].parameters())

    return [name for name in blocks if name in modules and serves(name)]
