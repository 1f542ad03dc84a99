"""Hooks that keep, for each layer, its input and the gradient at its output.

Recording reads what the forward and the backward pass hold anyway; it changes no value in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fine_bench import clock
from fine_bench.gradients.attention import ProjectionKind, listen, stop_listening
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.coverage import chosen_modules, covered_blocks, other_layers, remedy
from fine_bench.gradients.layers import LayerKind
from fine_bench.gradients.layout import FIRST, SHARED, Layouts, Pass, repeated
from fine_bench.gradients.recorded_call import Call, factors, in_backward_pass, last_of
from fine_bench.gradients.sum_check import disagreeing
from fine_bench.gradients.training_pass import Totals, TrainingPass
from fine_bench.gradients.uncovered import Uncovered
from fine_bench.types import UnsupportedProblemError

OTHER_PARAMETERS = "other parameters"
"""Name of the block of trained parameters that belong to no recorded layer."""


class BlockReduction(Protocol):
    """Makes of a block what is wanted of it, as soon as its layer's gradient is there."""

    def __call__(self, block: Block) -> Block:
        """What to keep of one application of a layer; linear in the gradient."""
        ...

    def sum(self, blocks: Sequence[Block]) -> Block:
        """The gradient of a layer's several applications, from what was kept of each."""
        ...


class LayerRecorder:
    """Records the layers of a model whose per-example gradients a pass contains.

    Args:
        model: the network (or a LightningModule around it).
        layers: names of modules to watch, as in ``model.named_modules()``; a container stands for
            all layers in it. None watches every layer.
        tap: keep the gradients of whatever backward pass comes (the training's own). Otherwise
            the calls only hold the edges at which ``torch.autograd.grad`` can be asked for them.

    The first tapped pass is checked: the per-example gradients of every parameter must add up to
    its gradient. A first dimension of the right length is taken to be the examples, unless
    ``find_layouts`` has looked.

    Attributes:
        layers: a layer for each block, by the block's name; see ``coverage.py``.
        leftover: names of trained parameters that no recorded layer covers.
        keep_outputs: whether a tapped pass also keeps the layers' outputs.
        reduce: what is made of the block of one application of a layer, as soon as its gradient is
            there; it must be linear in the gradient. The last layer's gradient at the output is
            kept beside it.
        seconds: time spent in ``reduce`` during the passes.
        layouts: where the inputs of the layers have the examples.
        training: which backward pass is the training's.

    Raises:
        UnsupportedProblemError: nothing is trained, or a layer that cannot be watched is.
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
        self.reduce: BlockReduction | None = None
        self.seconds = 0.0
        self._batch_size: int | None = None
        self._handles: list[RemovableHandle] = []
        # gradients of the parameters themselves in the first tapped pass, until they are checked
        self._totals: dict[int, Totals] = {}
        self._total_handles: list[RemovableHandle] = []
        self._uncovered: Uncovered | None = None  # of what no layer covers, in tapped passes
        self.model = model
        self._chosen = layers
        self._last: nn.Module | None = None  # the layer that ran last in a tapped pass
        self._ran_last = ""
        self.layouts, self.training = Layouts(), TrainingPass()
        self.watch()

    def watch(self, *, required: bool = True) -> None:
        """Record the layers that are trained now; those of before no longer.

        Args:
            required: whether there must be any.

        Raises:
            UnsupportedProblemError: as for the class.
        """
        self.close()
        model, layers = self.model, self._chosen
        chosen = chosen_modules(model, layers)
        blocks = covered_blocks(model, chosen)
        self.layers: dict[str, nn.Module] = {name: b.modules[0] for name, b in blocks.items()}
        self._kinds: dict[str, LayerKind] = {name: b.kind for name, b in blocks.items()}
        self._parameters = {name: b.parameters for name, b in blocks.items()}
        covered = {id(p) for b in blocks.values() for p in b.parameters.values()}
        wanted = {id(p) for m in chosen.values() for p in m._parameters.values() if p is not None}
        self.leftover = [
            name
            for name, p in model.named_parameters()
            if p.requires_grad and id(p) in wanted and id(p) not in covered
        ]
        if required and not self.layers and not self.leftover:
            raise UnsupportedProblemError(
                "the model has no trained parameters to take gradients of"
                + ("" if layers is None else f" in layers={list(layers)}")
            )
        attentions: dict[nn.MultiheadAttention, dict[str, ProjectionKind]] = {}
        for name, block in blocks.items():
            if isinstance(block.kind, ProjectionKind):
                attentions.setdefault(block.kind.attention, {})[name] = block.kind
                continue
            hook = partial(self._record, name)
            for module in block.modules:
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for attention, kinds in attentions.items():
            self._handles += listen(attention, kinds, self._take, self._hears)
        hooked = {module for block in blocks.values() for module in block.modules}
        if self._last is not None and self._last not in hooked:
            # frozen meanwhile; the gradient at its output tells 1 − p all the same
            self._handles.append(self._last.register_forward_hook(self._record_last))
        self._unchecked = self.tap
        if self.tap and self.leftover:
            self._uncovered = Uncovered(model, self.leftover, hooked, self._listens, self.remedy)
            self._uncovered.looked = lambda: self.layouts.looked

    @property
    def trains(self) -> bool:
        """Whether any of the watched parameters is trained."""
        return bool(self.layers or self.leftover)

    @property
    def last_call(self) -> Call | None:
        """The call of the layer that ran last; a checkpoint runs others again after it."""
        return last_of(self.training.of(self.calls), self._ran_last)

    def parameter_names(self, name: str) -> list[str]:
        """Names in the model of the trained parameters of a block, in its order."""
        return list(self._parameters[name])

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters behind each block, by the block's name, in the blocks' order."""
        named = dict(self.model.named_parameters())
        found = {name: list(own.values()) for name, own in self._parameters.items()}
        if self.leftover:
            found[OTHER_PARAMETERS] = [named[name] for name in self.leftover]
        return found

    def remedy(self, wrong: Sequence[str]) -> str:
        """What to type where blocks or parameters have no per-example gradients in a pass."""
        return remedy(self.model, self._parameters, self.leftover, wrong)

    def start(self, batch_size: int | None = None) -> None:
        """Forget the last pass and record the next one.

        Args:
            batch_size: number of its examples, where it is known; needed to ``reduce`` early.
        """
        self.clear()
        self._batch_size = batch_size
        self.layouts.starts()
        self.training.starts()
        self.armed = True
        self._totals.clear()
        if self._unchecked and not self._total_handles:
            for own in self._parameters.values():
                for p in own.values():
                    hook = partial(self._keep_total, id(p))
                    self._total_handles.append(p.register_hook(hook))  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        """Stop recording; what was recorded stays."""
        self.armed = False

    def clear(self) -> None:
        """Release the recorded tensors."""
        self.armed = False
        if not self.calls and self._uncovered is None:
            return
        last = self.last_call if self.tap else None
        if last is not None:
            self._last = last.layer
        for call in self.calls:
            call.edge = None  # it leads to the graph, whose hooks lead here: a circle of its own
        self.calls = []
        if self._uncovered is not None:
            self._uncovered.clear()

    def close(self) -> None:
        """Remove every hook."""
        self.clear()
        self._stop_checking()
        if self._uncovered is not None:
            self._uncovered.close()
            self._uncovered = None
        stop_listening()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _listens(self) -> bool:
        return self.armed and LayerRecorder._exclusive in (None, self)

    def _record(
        self,
        name: str,
        layer: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if not self._hears():
            return None
        x = inputs[0] if inputs else next(iter(kwargs.values()))
        return self._take(name, layer, self._kinds[name].at(layer), x, output)

    def _hears(self) -> bool:
        """Whether a layer's call is to be noted."""
        return LayerRecorder._exclusive in (None, self) and (self.armed or self.layouts.looks)

    def _take(
        self, name: str, layer: nn.Module, kind: LayerKind, x: Tensor, output: Tensor
    ) -> Tensor | None:
        """Note a call; what is returned is given on in the place of ``output``."""
        if self.layouts.looks:
            return self.layouts.note(name, x, output)
        again = in_backward_pass()
        if not again:
            self._ran_last = name  # also where a checkpoint records nothing yet
        if not torch.is_grad_enabled() or not output.requires_grad:
            return None
        layout, instead = self.layouts.next(name), None
        if layout is SHARED and self._batch_size is not None:
            layout, x = FIRST, repeated(x, self._batch_size)
            output = instead = repeated(output, self._batch_size)
        # what no operation of this pass made may be the loop's own buffer, for its next batch too
        own = x.detach() if x.grad_fn is not None or not self.tap else x.detach().clone()
        call = Call(name, layer, kind, own, layout, again)
        self.calls.append(call)
        # hook and edge are taken now: an in-place activation may change the output tensor later
        if self.tap:
            output.register_hook(partial(self._keep, call))  # type: ignore[no-untyped-call]
            if self.keep_outputs:
                call.output, call.edge = output.detach(), get_gradient_edge(output)
        else:
            call.edge = get_gradient_edge(output)
        return instead

    def _record_last(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        """A call that is no part of any block, kept for the gradient at its output alone."""
        if self._listens() and output.requires_grad:
            self._ran_last = ""
            call = Call("", layer, None, None, again=in_backward_pass())
            self.calls.append(call)
            output.register_hook(partial(self._keep, call))  # type: ignore[no-untyped-call]
            if self.keep_outputs:
                call.output, call.edge = output.detach(), get_gradient_edge(output)

    def _keep(self, call: Call, grad: Tensor) -> None:
        if self.training.heard_before(call):
            return
        call.grad = grad.detach()
        early = self.reduce is not None and not self._unchecked and self.armed
        if early and self._batch_size is not None and call.kind is not None:
            start = clock.now()
            # now the tensors are in the cache, and afterwards the pass may free them
            self._reduce(call, self._batch_size, 1.0)
            self.seconds += clock.now() - start
            call.input = call.features = None
            if call is not self.calls[-1]:
                call.grad = None

    def _reduce(self, call: Call, batch_size: int, scale: float) -> Block:
        assert self.reduce is not None
        if call.reduced is None:
            with torch.no_grad():
                calls = [self._factors(call, batch_size, scale)]
                block = self._kinds[call.name].block(call.name, call.layer, calls)
                call.reduced = self.reduce(block)
        return call.reduced

    def _keep_total(self, key: int, grad: Tensor) -> None:
        if self._listens():
            self.training.add(self._totals, key, grad)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Let no other recorder hear what happens within."""
        before, LayerRecorder._exclusive = LayerRecorder._exclusive, self
        try:
            yield
        finally:
            LayerRecorder._exclusive = before

    def find_layouts(self, passes: Sequence[Pass]) -> list[Any]:
        """Find out where the layers' inputs have the examples; see ``Layouts.find``.

        To be called without gradients, in a mode in which a pass is not random.
        """
        if self._uncovered is not None:
            passes = self._uncovered.look(passes)
        with self.alone():
            return self.layouts.find(passes, lambda name: self._kinds[name].layout)

    def repeats_alike(self, n: int, run: Callable[[], Any]) -> bool:
        """Whether a training pass is the same with shared inputs repeated; see ``Layouts``.

        Args:
            n: number of examples.
            run: makes the pass, each time with the same random numbers.
        """
        shared = [p for name in self.layouts.shared for p in self._parameters[name].values()]
        if not shared:
            return True
        with self.alone(), torch.enable_grad():
            return self.layouts.same_steps(n, run, shared)

    @contextmanager
    def exclusively(self, batch_size: int | None = None) -> Iterator[None]:
        """Record a pass that no other recorder hears."""
        with self.alone():
            self.start(batch_size)
            try:
                yield
            finally:
                self.stop()

    def edges(self) -> list[GradientEdge]:
        """Where ``torch.autograd.grad`` finds the recorded outputs, in the order of the calls."""
        return [call.edge for call in self.calls if call.edge is not None]

    def blocks(self, batch_size: int, scale: float = 1.0) -> list[Block]:
        """The blocks of the recorded pass, in the order of the layers' definition.

        Args:
            batch_size: number of examples B; the first dimension of every recorded tensor.
            scale: factor on the gradients; B turns the gradients of a mean loss into those of
                each example's own loss.

        Raises:
            UnsupportedProblemError: see ``block``; in the first tapped pass also parameters that
                act outside of their layers.
        """
        by_layer: dict[str, list[Call]] = {name: [] for name in self.layers}
        for call in self.training.of(self.calls):
            by_layer.setdefault(call.name, []).append(call)
        if self._unchecked and self._totals:
            whole = [self._block(name, by_layer[name], batch_size, scale) for name in self.layers]
            self._check(whole, scale)
            if self.reduce is None:
                return whole + self._rest(batch_size, scale, whole)
        make = self._block if self.reduce is None else self._reduced
        found = [make(name, by_layer[name], batch_size, scale) for name in self.layers]
        return found + self._rest(batch_size, scale, found)

    def _rest(self, batch_size: int, scale: float, others: Sequence[Block]) -> list[Block]:
        if self._uncovered is None:
            return []
        rounding = self.rounding()
        block = self._uncovered.block(OTHER_PARAMETERS, batch_size, scale, others, rounding)
        return [block if self.reduce is None else self.reduce(block)]

    def block(self, name: str, batch_size: int) -> Block:
        """The block of one layer.

        Raises:
            UnsupportedProblemError: the layer took no part, or its first dimension is not the
                examples.
        """
        return self._block(name, [c for c in self.calls if c.name == name], batch_size, 1.0)

    def _block(self, name: str, calls: list[Call], batch_size: int, scale: float) -> Block:
        parts = [self._factors(c, batch_size, scale) for c in calls if c.grad is not None]
        if not parts:
            raise self._no_part(name)
        return self._kinds[name].block(name, self.layers[name], parts)

    def _reduced(self, name: str, calls: list[Call], batch_size: int, scale: float) -> Block:
        assert self.reduce is not None
        parts = [
            self._reduce(c, batch_size, scale)
            for c in calls
            if c.grad is not None or c.reduced is not None
        ]
        if not parts:
            raise self._no_part(name)
        return parts[0] if len(parts) == 1 else self.reduce.sum(parts)

    def _no_part(self, name: str) -> UnsupportedProblemError:
        others = other_layers(self.model, self._parameters, self.leftover, [name])
        return UnsupportedProblemError(
            f"layer {name!r} took no part in the loss, so its per-example gradients are unknown; "
            + (f"watch the others with layers={others}, or " if others else "")
            + "set requires_grad=False on it"
        )

    def _factors(self, call: Call, batch_size: int, scale: float) -> tuple[Any, Tensor]:
        return factors(call, batch_size, scale, self.layouts, tap=self.tap)

    def rounding(self) -> float:
        """ε of the least precise gradient that was recorded."""
        grads = [call.grad for call in self.calls if call.grad is not None]
        return max((torch.finfo(grad.dtype).eps for grad in grads), default=0.0)

    def _check(self, blocks: Sequence[Block], scale: float) -> None:
        """Refuse parameters whose gradient is not the sum of the examples' gradients."""
        totals = [
            [self.training.total(self._totals.get(id(p)), p) * scale for p in own.values()]
            for own in self._parameters.values()
        ]
        wrong = disagreeing(blocks, None, totals, self.rounding())
        if wrong is None:  # not finite: look again in the next pass
            return
        if wrong:
            raise UnsupportedProblemError(
                f"the gradients of layers {wrong} are not the sums of their examples' gradients: "
                "their parameters also act outside of the layer (tied weights), or the loss has a "
                "term beyond the mean over examples. Weight decay belongs in the optimiser; f-INE "
                f"takes any use of a weight with {self.remedy(wrong)}"
            )
        self._unchecked = False
        self._stop_checking()

    def _stop_checking(self) -> None:
        self._totals.clear()
        for handle in self._total_handles:
            handle.remove()
        self._total_handles = []
