"""Gradients in full of parameters that no layer covers, from what a training pass holds.

A parameter of a module without layers of a known kind below it (``nn.PReLU``, ``nn.GRU``, a layer
of one's own) follows from that module, applied to each example once more. One that stands beside
layers (a class token, positions, a scale behind a residual branch) follows from the operations in
which its module uses it (``function_uses.py``).

Every pass is looked at: the examples' gradients must add up to the parameter's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.function_uses import FunctionUses
from fine_bench.gradients.recurrent import unrolled_recurrence
from fine_bench.gradients.reevaluation import (
    Application,
    Dims,
    NoRuleError,
    Places,
    Seen,
    Values,
    batch_dims,
    matching,
)
from fine_bench.types import UnsupportedProblemError


class Uncovered:
    """Watches what some parameters do in training passes.

    Args:
        model: the network.
        names: of the parameters.
        covered: layers whose gradients are known otherwise.
        listens: whether the present pass is one to watch.
        remedy: what to type where gradients do not follow, for messages.

    Attributes:
        looked: whether anybody has looked where the examples are: then shapes that leave it open
            are refused.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        covered: Collection[nn.Module],
        listens: Callable[[], bool],
        remedy: Callable[[Sequence[str]], str],
    ) -> None:
        self.names = list(names)
        named = dict(model.named_parameters())
        self.parameters: dict[str, nn.Parameter] = {name: named[name] for name in names}
        self._listens = listens
        self._remedy = remedy
        self._applied: list[tuple[_Module, Application]] = []
        self.looked: Callable[[], bool] = lambda: False
        self._depth = 0
        self._looking: list[Seen] | None = None  # in a pass that looks where the examples are
        self._looks: list[tuple[int, tuple[list[Seen], list[Seen]]]] = []
        self._reordered = False
        self._totals: dict[str, Tensor] = {}
        self._size = 0.0
        self._handles: list[RemovableHandle] = []
        modules = dict(model.named_modules())
        layers = {id(m) for m in covered}
        inside: dict[str, dict[str, str]] = {}
        free: dict[str, set[str]] = {}
        for name in names:
            owner = _caller(name, modules)
            below = (m for m in modules[owner].modules() if m is not modules[owner])
            if any(id(m) in layers for m in below):
                free.setdefault(owner, set()).add(name)
            else:
                inside.setdefault(owner, {})[name[len(owner) + 1 if owner else 0 :]] = name
        self._uses = FunctionUses({name: named[name] for part in free.values() for name in part})
        for owner, own in inside.items():
            hook = partial(self._record, _Module(modules[owner], own))
            self._handles.append(modules[owner].register_forward_hook(hook, with_kwargs=True))
        for owner in free:
            module = modules[owner]
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for name, p in self.parameters.items():
            total = partial(self._keep_total, name)
            self._handles.append(p.register_hook(total))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Forget the last pass."""
        self._applied = []
        self._uses.clear()
        self._totals.clear()

    def close(self) -> None:
        """Remove every hook."""
        if self._depth:  # an interrupt came within a module
            self._depth = 0
            self._uses.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._uses.end()
        self.clear()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def look(self, passes: Sequence[tuple[int, Callable[[], Any]]]) -> list[Any]:
        """Passes that look where the examples are, made of passes over two numbers of them."""
        self._looks, self._reordered = [], False

        def made(n: int, run: Callable[[], Any]) -> Callable[[], Any]:
            def look() -> Any:
                self._looking = []
                self._uses.look()
                try:
                    output = run()
                    seen = self._looking, self._uses.looked()
                finally:
                    self._looking = None
                    self._uses.looked()
                self._looks = [(k, s) for k, s in self._looks if k != n] + [(n, seen)]
                self._compare_order()
                return output

            return look

        return [(n, made(n, run)) for n, run in passes]

    def _compare_order(self) -> None:
        """Whether the two passes show the examples in another order than the batch's."""
        if len(self._looks) < 2:
            return
        larger, smaller = sorted(self._looks, key=lambda look: -look[0])
        for first, second in zip(larger[1], smaller[1], strict=True):
            for a, b in zip(first, second, strict=False):
                if a.values and b.values:
                    found = a.reordered(b, (larger[0], smaller[0]))
                    self._reordered = self._reordered or found
                    a.values = b.values = ()

    def _places(self, which: int) -> list[Places | None] | None:
        """Where modules (0) or operations (1) have the examples; None if nobody has looked."""
        if not self._looks:
            return [None] if self.looked() else None  # [None]: shapes must not be ambiguous
        (n, first), (m, second) = self._looks if len(self._looks) == 2 else self._looks * 2
        if n == m or len(first[which]) != len(second[which]):
            return [None]  # as many as there are not
        pairs = zip(first[which], second[which], strict=True)
        return [Places.of(a, b, (n, m)) for a, b in pairs]

    # ------------------------------------------------------------------ hooks

    def _record(self, module: _Module, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._looking is not None:
            self._looking.append(Seen.of((args, kwargs), output))
        elif self._listens() and torch.is_grad_enabled():
            application = Application(module, args, kwargs, output, module.output_dim)
            self._applied.append((module, application))

    def _enter(self, module: nn.Module, args: Any) -> None:
        listens = self._listens() and torch.is_grad_enabled()
        if self._depth or listens or self._looking is not None:
            if not self._depth:
                self._uses.begin(module.buffers())
                self._uses.__enter__()  # type: ignore[no-untyped-call]
            self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._depth:
            self._depth -= 1
            if not self._depth:
                self._uses.__exit__(None, None, None)  # type: ignore[no-untyped-call]
                self._uses.end()

    def _keep_total(self, name: str, grad: Tensor) -> None:
        if self._listens():
            # a copy: until it is looked at, the user may clip or unscale it in place
            before = self._totals.get(name)  # of another part of the pass (checkpoints)
            self._totals[name] = grad.detach().clone() if before is None else before + grad

    # ------------------------------------------------------------------ after the backward pass

    def block(
        self,
        block_name: str,
        batch_size: int,
        scale: float,
        others: Sequence[Block],
        rounding: float,
    ) -> DenseBlock:
        """The gradients, ``(B, P)``, in the order of the names.

        Args:
            block_name: what to call it.
            batch_size: B.
            scale: factor on the gradients.
            others: the model's other blocks.
            rounding: ε, the rounding of one number in the pass.

        Raises:
            UnsupportedProblemError: they do not follow from what was seen.
        """
        if self._reordered:
            raise self._refusal(
                self.names,
                "they meet the examples in another order than the batch has, sorted by length for "
                "instance, so that rows would be taken for other examples: sort in the collate "
                "function, where the index is sorted along",
            )
        with torch.no_grad():
            try:
                found = self._uses.gradients(batch_size, self._places(1))
                applications = [application for _, application in self._applied]
                places = matching(self._places(0), applications, batch_size)
                for (module, application), place in zip(self._applied, places, strict=True):
                    if application.reached:
                        own = module.gradients(application, batch_size, place)
                        for name, value in own.items():
                            found[name] = found[name] + value if name in found else value
            except NoRuleError as error:
                raise self._refusal(self.names, str(error)) from error
            parts = []
            for name, p in self.parameters.items():
                unused = p.new_zeros(()).expand(batch_size, *p.shape)
                value = found.get(name, unused).reshape(batch_size, -1)
                parts.append(value.float() if value.dtype.itemsize < 4 else value)
            block = DenseBlock(block_name, torch.cat(parts, 1))
            if not self._size:  # of all gradients of the model in the first pass
                sizes = [float(b.norm2().sqrt().sum()) for b in [block, *others]]
                self._size = sum(sizes)
            self._check(block, max(rounding, torch.finfo(torch.float32).eps))
            return block if scale == 1.0 else DenseBlock(block_name, block.g * scale)

    def _check(self, block: DenseBlock, eps: float) -> None:
        """Compare the examples' sums with the parameters' gradients, as ``sum_check`` does."""
        slack = min(1000 * eps, eps**0.5) * self._size
        wrong = []
        parts = torch.split(block.g, [p.numel() for p in self.parameters.values()], 1)
        for name, part in zip(self.names, parts, strict=True):
            total = self._totals.get(name)
            summed = part.sum(0)
            difference = float((summed if total is None else summed - total.flatten()).norm())
            if difference > eps**0.5 * float(part.norm(dim=1).sum()) + slack:
                wrong.append(name)
        if wrong:
            raise self._refusal(
                wrong, "their gradients are not the sums of what was seen of the examples"
            )

    def _refusal(self, names: Sequence[str], why: str) -> UnsupportedProblemError:
        return UnsupportedProblemError(
            f"the parameters {list(names)} belong to no layer with per-example factors, and their "
            f"gradients do not follow from the training pass ({why}); use {self._remedy(names)}"
        )


def _caller(parameter: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the module in whose ``forward`` a parameter is used.

    That of a parametrised weight is the layer's, and a list of parameters has none.
    """
    owner = f".{parameter}".partition(".parametrizations.")[0][1:]
    if owner == parameter:
        owner = parameter.rpartition(".")[0]
    while owner and type(modules[owner]).forward is nn.Module.forward:
        owner = owner.rpartition(".")[0]
    return owner


class _Module:
    """A module that is applied to each example once more.

    Args:
        module: without layers of a known kind below it.
        names: of its parameters: the name in the module → the name in the model.
    """

    def __init__(self, module: nn.Module, names: dict[str, str]) -> None:
        self.module = module
        self.names = names
        self._one_by_one = False  # once torch.func has failed

    def __call__(self, values: Values, args: Any, kwargs: Any) -> Any:
        """Its output for other values of the parameters."""
        # what is applied once more must not count twice in running statistics and counters
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        with unrolled_recurrence(self.module), _attributes_kept(self.module):
            return functional_call(self.module, {**buffers, **values}, args, kwargs)

    def output_dim(self, place: int) -> int:
        """Where an output has the examples: recurrent layers have them second."""
        if not isinstance(self.module, nn.RNNBase):
            return 0
        return 0 if place == 0 and self.module.batch_first else 1

    def input_dims(self, leaves: Sequence[Any], batch_size: int) -> list[Dims]:
        """Where the inputs may have them."""
        if not isinstance(self.module, nn.RNNBase):
            return batch_dims(leaves, batch_size)
        first = 0 if self.module.batch_first else 1
        dims = [first if k == 0 else 1 for k in range(len(leaves))]
        fit = all(
            isinstance(x, Tensor) and x.ndim == 3 and x.shape[d] == batch_size
            for x, d in zip(leaves, dims, strict=True)
            if x is not None
        )
        return (
            [[None if x is None else d for x, d in zip(leaves, dims, strict=True)]] if fit else []
        )

    def gradients(self, application: Application, batch_size: int, places: Places | None) -> Values:
        """``(B, *shape)`` of each parameter, by its name in the model.

        Args:
            application: of the module.
            batch_size: B.
            places: where the examples are; None where shapes have to tell.

        Raises:
            NoRuleError: they do not follow.
        """
        named = dict(self.module.named_parameters())
        values = {name: named[name].detach() for name in self.names}
        reason = "none of its inputs has the examples where it should"
        ways = (True,) if self._one_by_one else (False, True)
        outputs = None if places is None else places.outputs
        if places is None:
            may = self.input_dims(application.leaves, batch_size)
        else:
            may = [places.inputs] if places.clear else []
        for dims, one_by_one in product(may, ways):
            try:
                found = application.gradients(values, dims, outputs=outputs, one_by_one=one_by_one)
            except NoRuleError as error:
                reason = str(error)
                continue
            self._one_by_one = one_by_one
            return {self.names[name]: value for name, value in found.items()}
        raise NoRuleError(f"{type(self.module).__name__}: {reason}")


@contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what hooks assign to a module during a pass, as the older normalisations do."""
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes in before:
            m.__dict__.update(attributes)
