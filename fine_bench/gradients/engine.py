"""Per-example gradients of any model at its present parameters, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from fine_bench.gradients.batch_norm import refuse_batch_coupling
from fine_bench.gradients.blocks.dense import DenseBlock
from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.layout import copied, fewer_or_twice, layers_called, resized
from fine_bench.gradients.margin import negative_margin, one_minus_probability
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.recorder import OTHER_PARAMETERS, LayerRecorder
from fine_bench.gradients.recurrent import unrolled_recurrence
from fine_bench.gradients.reevaluation import each_example
from fine_bench.gradients.sum_check import disagreeing, unequal_weights
from fine_bench.types import Loss, UnsupportedProblemError


class GradientEngine:
    """Gradients of each example's own loss: ``engine(x, y)``.

    Layers of a known kind (``layers.py``) are read off one forward and one backward pass that
    stops at the layers' outputs, so no parameter gradient is formed and no ``.grad`` is touched.
    Other trained parameters go through ``torch.func`` (``vmap(grad)``), in full; where that cannot
    map a model, one example after the other.

    The first batch is checked once, at the cost of a second backward pass: the examples' gradients
    must add up to the batch's (``sum_check.py``). Layers that fail it (a weight that also acts
    elsewhere, positions that all examples share) go through ``torch.func`` from then on; what
    fails even there mixes the examples of a batch and is refused.

    Args:
        model: the network. Its mode is respected; put it in ``eval()`` to leave out dropout.
        loss: ``loss(logits, y, reduction="none") -> (batch,)``.
        layers: names of modules to differentiate; None for all trained parameters.
        forward: how to get logits from ``x``; calling the model by default.

    Attributes:
        recorder: its layers are the blocks, in order; parameters of no layer follow as one block.
        in_full: layers that go through ``torch.func``, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        layers: Sequence[str] | None = None,
        forward: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.loss = loss
        call: Callable[[Any], Tensor] = forward or model
        # a copy: queries go through many passes, and the training goes on with its batch
        self.forward: Callable[[Any], Tensor] = lambda x: call(copied(x))
        self.recorder = LayerRecorder(model, layers)
        self.in_full: dict[str, str] = {}
        self._whole = _Whole(model, self.forward)
        # whether a batch has been checked; one of a single example cannot show everything
        self._checked: Literal["no", "one example", "yes"] = "no"

    def close(self) -> None:
        """Remove the hooks from the model."""
        self.recorder.close()

    def watch(self) -> None:
        """Take gradients in the parameters that are trained now."""
        self.recorder.watch(required=False)
        self.in_full, self._checked = {}, "no"

    def __call__(
        self, x: Any, y: Tensor, observable: Literal["loss", "margin"] = "loss"
    ) -> PerExampleGradients:
        """Gradients at the present parameters.

        Args:
            x, y: a batch, examples first. x may be any nest of tensors that ``forward`` takes.
            observable: ``"loss"`` gives g_i = ∇ℓ_i; ``"margin"`` gives ∇(−log(p/(1−p))), which is
                g_i/(1 − p_i) for softmax cross-entropy.
        """
        refuse_batch_coupling(self.model)
        recorder = self.recorder
        with torch.enable_grad(), recorder.alone():
            with recorder.exclusively(len(y)):
                logits = self.forward(x)
            classes = _are_classes(logits, y)
            if observable == "loss":
                losses = per_example_loss(self.loss, logits, y)
            elif classes:
                # differentiated itself: dividing the loss gradient by 1 − p would have lost the
                # digits that cancel in p − 1
                losses = negative_margin(logits, y)
            else:
                raise UnsupportedProblemError(
                    'observable="margin" needs class logits (batch, classes) and integer labels '
                    '(batch,); use observable="loss"'
                )
            check = self._checked == "no" or (self._checked == "one example" and len(y) > 1)
            if recorder.calls:
                grads = torch.autograd.grad(
                    losses.sum(), recorder.edges(), retain_graph=check, allow_unused=True
                )
                for call, value in zip(recorder.calls, grads, strict=True):
                    call.grad = value
            loss = self.loss if observable == "loss" else negative_margin

            def in_full(names: Sequence[str]) -> dict[str, Tensor]:
                return self._in_full(names, x, y, loss)

            if check:
                checked = self._check(losses, in_full)
                if checked is None:  # with layouts that the next pass knows
                    self._find_layouts(x, len(y))
                    return self(x, y, observable)
                blocks = checked
            else:
                names = self.names_in_full
                blocks = self.blocks(len(y), in_full(names) if names else {})
        recorder.clear()
        complement = one_minus_probability(logits.detach(), y) if classes else None
        return PerExampleGradients(blocks, losses.detach(), complement)

    def has_margin(self, x: Any, y: Tensor) -> bool:
        """Whether there are class logits and labels, of which the margin can be taken."""
        with torch.no_grad(), self.recorder.alone():
            return _are_classes(self.forward(x), y)

    @property
    def names_in_full(self) -> list[str]:
        """Names of the parameters that go through ``torch.func``."""
        names = [name for layer in self.in_full for name in self.recorder.parameter_names(layer)]
        return names + self.recorder.leftover

    def blocks(self, batch_size: int, in_full: Mapping[str, Tensor]) -> list[Block]:
        """The blocks of the recorded pass and of gradients ``(B, …)`` that ``torch.func`` took."""
        result: list[Block] = []
        for layer in self.recorder.layers:
            if layer in self.in_full:
                result.append(_dense(layer, self.recorder.parameter_names(layer), in_full))
            else:
                result.append(self.recorder.block(layer, batch_size))
        if self.recorder.leftover:
            result.append(_dense(OTHER_PARAMETERS, self.recorder.leftover, in_full))
        return result

    def functional(self, values: Mapping[str, Tensor], x: Any) -> Tensor:
        """The model's output with some of its parameters replaced."""
        inner = {f"model.{name}": value for name, value in values.items()}
        output: Tensor = functional_call(self._whole, inner, (x,))
        return output

    def ensure_checked(self, x: Any, y: Tensor) -> None:
        """Check on this batch, unless one has been checked, which layers have factors."""
        if self._checked == "no" or (self._checked == "one example" and len(y) > 1):
            self(x, y)

    # ------------------------------------------------------------------ parameters in full

    def _in_full(self, names: Sequence[str], x: Any, y: Tensor, loss: Loss) -> dict[str, Tensor]:
        """Per-example gradients ``(B, *shape)`` by ``torch.func``."""
        params = dict(self.model.named_parameters())
        chosen = {name: params[name].detach() for name in names}

        def one(values: dict[str, Tensor], xi: Any, yi: Tensor) -> Tensor:
            logits = self.functional(values, tree_map(lambda part: part.unsqueeze(0), xi))
            value: Tensor = loss(logits, yi.unsqueeze(0), reduction="none")
            return value.sum()

        def mapped() -> dict[str, Tensor]:
            found = vmap(grad(one), in_dims=(None, 0, 0))(chosen, x, y)
            return {name: value[None] for name, value in found.items()}

        def alone(i: int, values: dict[str, Tensor]) -> Tensor:
            return one(values, tree_map(lambda part: part[i], x), y[i])

        ones = next(iter(chosen.values())).new_ones(1, len(y))
        with self.explained(names), unrolled_recurrence(self.model):
            grads = each_example(mapped, alone, chosen, ones)
        return {name: value[0].detach() for name, value in grads.items()}

    @contextmanager
    def explained(self, names: Sequence[str]) -> Iterator[None]:
        """Say what was tried where ``torch.func`` fails on these parameters.

        Raises:
            UnsupportedProblemError: it did.
        """
        try:
            yield
        except UnsupportedProblemError:
            raise
        except (RuntimeError, ValueError) as error:
            raise UnsupportedProblemError(
                f"the gradients of {', '.join(names)} cannot be read off a pass"
                + "".join(f" ({reason})" for reason in self.in_full.values())
                + f", and torch.func failed on them: {error}. Leave them out with layers=[...]; "
                "where this is about random operations, put the model in eval()"
            ) from error

    # ------------------------------------------------------------------ the check

    def _check(
        self, losses: Tensor, in_full: Callable[[Sequence[str]], dict[str, Tensor]]
    ) -> list[Block] | None:
        """The blocks of the first batch, with layers that fail the check moved to ``in_full``.

        Returns:
            None where there are such layers and nobody has looked yet where their inputs have the
            examples.
        """
        recorder, n = self.recorder, len(losses)
        params = dict(self.model.named_parameters())
        own = {layer: recorder.parameter_names(layer) for layer in recorder.layers}
        names = [name for part in own.values() for name in part] + recorder.leftover
        weights = unequal_weights(n, losses)
        # frozen weights of half precision round what float32 layers above and below them get
        precisions = {p.dtype for p in params.values() if p.is_floating_point()}
        eps = max(
            recorder.rounding(), *(torch.finfo(kind).eps for kind in {losses.dtype, *precisions})
        )
        total: dict[str, Tensor | None] = dict.fromkeys(names)
        if losses.requires_grad:
            grads = torch.autograd.grad(
                (losses * weights).sum(), [params[name] for name in names], allow_unused=True
            )
            total = dict(zip(names, grads, strict=True))

        def totals(parts: Iterable[Sequence[str]]) -> list[list[Tensor]]:
            values = [[(total[name], params[name]) for name in part] for part in parts]
            return [[torch.zeros_like(p) if g is None else g for g, p in part] for part in values]

        found: list[Block] = []
        for layer, part in own.items():
            try:
                found.append(recorder.block(layer, n))
            except UnsupportedProblemError as error:
                if all(total[name] is None for name in part):
                    raise
                self.in_full[layer] = str(error)
        wrong = disagreeing(found, weights, totals(own[block.name] for block in found), eps)
        for layer in wrong or ():
            self.in_full[layer] = (
                f"the gradient of layer {layer!r} is not the sum of its examples' gradients"
            )
        if self.in_full and not recorder.layouts.looked:
            self.in_full = {}
            return None
        blocks, parts = found, list(own.values())
        if self.names_in_full:
            blocks = self.blocks(n, in_full(self.names_in_full))
            if recorder.leftover:
                parts.append(recorder.leftover)
            mixed = disagreeing(blocks, weights, totals(parts), eps)
            if mixed:
                raise UnsupportedProblemError(
                    f"one example at a time, the gradients of {', '.join(mixed)} do not add up "
                    "to those of the batch: the model or the loss mixes the examples of a batch "
                    "(statistics or attention over the batch), so one example has no gradient of "
                    "its own; leave these parameters out with layers=[...]"
                )
        if wrong is not None:
            self._checked = "yes" if n > 1 else "one example"
        return blocks

    def _find_layouts(self, x: Any, n: int) -> None:
        """Look where the layers' inputs have the examples, by a pass over fewer of them."""
        other = fewer_or_twice(n)
        some = tree_map(lambda part: resized(part, other), x)
        with torch.no_grad(), layers_called():
            try:
                self.recorder.find_layouts(
                    [(n, lambda: self.forward(x)), (other, lambda: self.forward(some))]
                )
            except Exception:  # whatever the model says to fewer examples: torch.func is left
                self.recorder.layouts.forget()


class _Whole(nn.Module):
    """A model called in its own way, so that its parameters can be replaced meanwhile."""

    def __init__(self, model: nn.Module, call: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        # in a list: a module would be registered a second time
        self._call = [call]

    def forward(self, x: Any) -> Tensor:
        output: Tensor = self._call[0](x)
        return output


def _dense(name: str, parameters: Sequence[str], values: Mapping[str, Tensor]) -> DenseBlock:
    parts = [values[key] for key in parameters]
    return DenseBlock(name, torch.cat([part.reshape(len(part), -1) for part in parts], 1))


def _are_classes(logits: Tensor, y: Tensor) -> bool:
    """Whether they are logits ``(batch, classes)`` and labels ``(batch,)`` of classes."""
    several = logits.ndim == 2 and logits.shape[1] > 1
    return several and y.ndim == 1 and not y.is_floating_point()


def per_example_loss(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """``loss(logits, y, reduction="none")``, checked to be one number an example, ``(batch,)``."""
    try:
        losses: Tensor = loss(logits, y, reduction="none")
    except TypeError as error:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model returns a {type(logits).__name__}, of which the loss makes nothing "
                f"({error}); say what its output is by forward=…, for instance forward=lambda "
                "module, x: module(x)[0], or forward=lambda module, x: module(x).logits"
            ) from error
        raise TypeError(
            f'loss could not be called as loss(logits, y, reduction="none"): {error}; wrap it in a '
            "function of that signature"
        ) from error
    if losses.shape == (len(y), 1):  # of losses that PyTorch takes number by number
        return losses[:, 0]
    if losses.ndim != 1 or len(losses) != len(y):
        wrap = (
            "; take the mean over an example's own numbers, for instance loss=lambda output, y, "
            'reduction="mean": F.mse_loss(output, y, reduction=reduction).mean(1)'
        )
        raise UnsupportedProblemError(
            f'loss(logits, y, reduction="none") must return one loss an example, ({len(y)},), got '
            f"shape {tuple(losses.shape)}" + (wrap if losses.ndim > 1 else "")
        )
    return losses
