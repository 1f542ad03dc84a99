"""What f-INE takes for granted of a run, checked on its first batch.

*An example's output is its own.* Half a batch must give the outputs that its examples have in the
whole batch. Passes of a ``GradientEngine`` check that by themselves; where the training's own pass
is all there is, nobody else looks. Batch normalisation has a reading of its own
(``fine_bench.gradients.batch_norm``), so here its statistics are fixed.

*The loss is a mean over examples* (``loss_size``).

Both look through passes beside the training, without gradients and, but for the loss's size, in
evaluation mode, so they cost a few forward passes a run and see what the model's ``forward`` shows.

*The loss is a sum of what each example adds.* Looked at in the graph of the training's own loss
(``loss_graph``), where somebody hands it on before its backward pass.

*A row of the batch is an example*, and no mixture of two (``mixtures``).

*Passes of f-INE's own take the training's loss.* Where nobody says which, they take the
cross-entropy; a run that minimises another loss is asked for it.

A batch without a backward pass shows no loss, and one of a single example neither a mixture nor a
sum: the look goes on with the first batch that does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from fine_bench.fine.aside import own_randomness
from fine_bench.fine.batch_adapter import to_model
from fine_bench.fine.example_labels import hard_labels
from fine_bench.fine.loss_graph import LossGraph, Output, Outputs, mixes
from fine_bench.fine.loss_size import (
    ExpectedLoss,
    cross_entropy_factor,
    dropouts,
    is_sum,
    refuse_sum,
)
from fine_bench.fine.mixtures import mixed_inputs, mixed_labels
from fine_bench.fine.passes import Aside
from fine_bench.fine.training_data import TrainingData
from fine_bench.gradients.batch_norm import (
    as_in_training,
    coupling_layers,
    fixed_statistics,
)
from fine_bench.gradients.layout import Pass, copied, fewer_or_twice, layers_called, resized
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import Loss, UnsupportedProblemError


class FirstBatch:
    """Looks at the first batch of a run.

    Args:
        module: the model.
        data: the training data; reads batches.
        forward: ``forward(x)`` of the callback's passes.
        loss: of these passes.
        aside: see ``passes.Aside``.
        recorder: learns from the same passes where its layers' inputs have the examples.
        stated: whether the user says what the loss is, or passes depend on it; otherwise it may be
            another one than the passes' own.
        default: whether passes depend on the loss and nobody says which it is.

    Attributes:
        ends_of_loss: names of the layers of whose outputs the training's loss is made, once it has
            been looked at.
    """

    def __init__(
        self,
        module: nn.Module,
        data: TrainingData,
        forward: Callable[[Any], Any],
        loss: Loss,
        aside: Aside,
        recorder: LayerRecorder | None = None,
        *,
        stated: bool,
        default: bool = False,
    ) -> None:
        self.module = module
        self.data = data
        # the training's own pass is still to come, with the batch as it is
        self.forward: Callable[[Any], Any] = lambda x: forward(copied(x))
        self.loss = loss
        self.aside = aside
        self.recorder = recorder
        self.stated = stated
        self.default = default
        self._expected: ExpectedLoss | None = None
        self._is_sum: bool | None = None  # as the gradient tells
        self._outputs: Outputs | None = None
        self._begun = self._backward = False
        self._count = 0
        self._batch: Any = None
        self.ends_of_loss: list[str] = []
        self._kinds: list[str] = []  # of the operations between the model's outputs and the loss
        self._shapes = ""  # of output and labels, where cross-entropy makes nothing of them

    def wants(self, batch: Any) -> bool:
        """Whether a batch is to be looked at: the first, and what the first could not show."""
        return not self._begun or (not self.settled and self._size_of(batch) > 1)

    @property
    def asks_for_loss(self) -> bool:
        """Whether the batch's loss is looked at."""
        return self._count != 1

    @property
    def settled(self) -> bool:
        """Whether a batch of several examples has had its backward pass."""
        return self._backward and self._count != 1

    def starts(self, batch: Any) -> None:
        """Before the training's pass.

        Raises:
            UnsupportedProblemError: outputs depend on who else is in the batch.
        """
        self._begun, self._backward = True, False
        self._expected = self._is_sum = None
        self._note(batch)
        buffers = {name: value.clone() for name, value in self.module.named_buffers()}
        normalised, random = coupling_layers(self.module).values(), dropouts(self.module)
        modes = [(part, part.training) for part in self.module.modules()]
        try:
            with self.aside(), fixed_statistics(self.module), torch.no_grad(), layers_called():
                x, y = self.data.adapter.inputs(batch)
                x, y = to_model(x, self.data.device, self.data.dtype), y.to(self.data.device)
                # half of the examples, or a single one twice
                m, other = len(y), fewer_or_twice(len(y))
                some = tree_map(lambda t: resized(t, other), x)
                passes = [(m, lambda: self.forward(x)), (other, lambda: self.forward(some))]
                whole, part = self._passed(passes)
                if self.recorder is not None and not _of_batches(whole, part, m, other):
                    self.recorder.layouts.forget()
                reason = self._difference(whole, part, m, other)
                if reason and self._difference(whole, self.forward(x), m, m):
                    reason = ""  # a model that draws random numbers gives other outputs each time
            with self.aside(), torch.no_grad():
                self._compare_steps(m, lambda: self.forward(x), modes)
            outputs = whole
            if normalised or random:  # the loss is that of outputs as the training has them
                with self.aside(), as_in_training([*normalised, *random]), torch.no_grad():
                    outputs = self.forward(x)
        except Exception as error:
            if self.recorder is not None:
                self.recorder.layouts.forget()
            warnings.warn(
                "f-INE could not look whether the examples of a batch mix, or whether the loss is "
                f"a mean over them, since the model cannot be asked by itself ({error}); tell "
                "how by forward=…, loss=… or adapter=BatchAdapter(…)",
                stacklevel=2,
            )
            return
        finally:
            for name, value in self.module.named_buffers():
                value.copy_(buffers[name])
        if reason:
            raise UnsupportedProblemError(reason)
        if self.default and isinstance(whole, Tensor) and not _classes(whole, y):
            self._shapes = f"output {_said(whole)} and labels {_said(y)}"
            return
        try:
            self._expected = ExpectedLoss.of(self.loss, outputs, y, random=bool(random))
        except Exception:
            if self.stated:
                raise

    def _note(self, batch: Any) -> None:
        """Keep the batch, and count its examples."""
        self._count = self._size_of(batch)
        self._batch = batch if self._count else None

    def _size_of(self, batch: Any) -> int:
        try:
            index = self.data.adapter.example_index(batch)
            return self.data.adapter.size(batch) if index is None else len(index)
        except Exception:  # who reads the batch next says what is wrong with it
            return 0

    def listens(self) -> None:
        """From now on the training's own pass goes through the model."""
        if self._outputs is None and self._batch is not None and self._count > 1:
            self._outputs = Outputs(self.module)

    def backward_ends(self) -> None:
        """The batch has had its backward pass."""
        self._backward = True
        self.close()

    def close(self) -> None:
        """Let go of the pass and the batch."""
        if self._outputs is not None:
            self._outputs.close()
        self._outputs = self._batch = None

    def before_backward(self, loss: Tensor, accumulates: int = 1) -> None:
        """The training's loss is there, with its graph.

        Args:
            loss: of the batch, as its backward pass takes it.
            accumulates: into how many equal parts the step's loss was divided.

        Raises:
            UnsupportedProblemError: examples are mixed in it or before the model, it is their sum,
                or it is another one than passes beside the training would take.
        """
        self._backward = True
        outputs, m = self._outputs, self._count
        if outputs is None or not loss.requires_grad or loss.numel() != 1:
            return
        try:
            graph = LossGraph.of(loss, outputs.heard)
            self._kinds = graph.kinds
            self.ends_of_loss = [end.name for end in graph.ends]
            y = self.data.adapter.label(self._batch)
            self._refuse_broadcast(graph, y)
            with self._unheard():
                mixed = mixes(loss, graph.ends, m)
            if mixed:
                raise UnsupportedProblemError(
                    "the loss of the first batch mixes its examples: its derivative by one "
                    "example's output depends on the outputs of others (contrast within the "
                    "batch, statistics of the batch, a root or a quotient of sums over it), so one "
                    "example has no gradient of its own; train with a mean of one loss an example, "
                    "for instance the squared error in place of its root"
                )
            self._refuse_mixtures(graph, outputs.heard, y)
            self._look_at_gradient(loss, graph, y, accumulates)
            if self.default and graph.loss_name and "LogSoftmaxBackward0" not in graph.kinds:
                self._shapes = self._shapes or f"the numbers of {graph.loss_name}"
            if self._shapes:
                self._refuse_default(graph.loss_name)
        finally:
            self.close()

    @contextmanager
    def _unheard(self) -> Iterator[None]:
        """Nothing is made of gradients that are taken within."""
        armed = self.recorder is not None and self.recorder.armed
        try:
            if self.recorder is not None:
                self.recorder.armed = False
            yield
        finally:
            if self.recorder is not None:
                self.recorder.armed = armed

    def _refuse_broadcast(self, graph: LossGraph, y: Any) -> None:
        end = graph.broadcasts(self._count)
        counted = isinstance(y, Tensor) and not y.is_floating_point()
        if end is None or counted:  # as many thresholds as examples, for instance
            return
        m, shape = self._count, tuple(end.value.shape)
        against = f" against the target {tuple(y.shape)}" if isinstance(y, Tensor) else ""
        raise UnsupportedProblemError(
            f"the loss compares every example with every other: from the output of {end.name!r} "
            f"{shape}{against} it makes numbers of shape {(m, m)} (broadcasting). Give both one "
            "shape, for instance by output.squeeze(1) or target.unsqueeze(1)"
        )

    def _refuse_mixtures(self, graph: LossGraph, heard: list[Output], y: Any) -> None:
        for output in heard:
            if output.given is None or not self._mixture(output.given, y):
                continue
            raise UnsupportedProblemError(
                f"{output.name!r} was given mixtures of the batch's examples (mixup, CutMix), so "
                "a row of the batch is no example; train without mixing"
            )

    def _look_at_gradient(self, loss: Tensor, graph: LossGraph, y: Any, accumulates: int) -> None:
        """Mixed labels, and a sum over examples, show in the gradient at a single output."""
        if len(graph.ends) != 1:
            return
        end, m = graph.ends[0], self._count
        try:
            with self._unheard():
                found = torch.autograd.grad(loss, [end.edge], retain_graph=True, allow_unused=True)
        except RuntimeError:  # a reentrant checkpoint lies in between
            return
        grads: list[Tensor | None] = [*found]
        if grads[0] is None:
            return
        labels, grad = hard_labels(y, m), grads[0] * accumulates
        if labels is not None and mixed_labels(end.value, grad * m, labels):
            raise UnsupportedProblemError(
                "the loss was taken of mixtures of the batch's labels (mixup, also of hidden "
                "layers), so a row of the batch is no example; train without mixing"
            )
        self._is_sum = is_sum(cross_entropy_factor(end.value, grad), m)
        if self._is_sum:
            whole = float(loss.detach()) * accumulates
            refuse_sum(whole, m, whole / m)

    def _mixture(self, given: Tensor, y: Any) -> bool:
        """Whether an input of the model is mixed from examples of the batch."""
        if not given.is_floating_point() or given.ndim < 2 or len(given) != self._count:
            return False
        leaves = [
            part
            for part in tree_leaves(self._batch)
            if isinstance(part, Tensor) and part.shape == given.shape and part.is_floating_point()
        ]
        if any(mixed_inputs(given, part.to(given.device)) for part in leaves):
            return True
        soft = isinstance(y, Tensor) and y.is_floating_point() and y.ndim == 2 and y.shape[1] > 1
        if not soft or not bool(((y.sum(1) - 1.0).abs() < 1e-3).all()):
            return False
        raw = self._items()  # a collate function may have mixed already, labels and all
        return raw is not None and raw.shape == given.shape and mixed_inputs(given, raw)

    def _items(self) -> Tensor | None:
        """The inputs of the batch's examples as the data set has them."""
        try:
            index = self.data.adapter.example_index(self._batch)
            dataset: Any = self.data.dataset
            with self.aside():
                items = default_collate([dataset[int(i)] for i in index])
            return self.data.adapter.parts(items)[0]
        except Exception:
            return None

    def _refuse_default(self, name: str | None) -> None:
        """Ask for the loss.

        Args:
            name: of the training's own, where it is known.
        """
        shapes, self._shapes = self._shapes, ""
        example = name or "torch.nn.functional.mse_loss"
        raise UnsupportedProblemError(
            "passes beside the training (queries, snapshots) take the cross-entropy, "
            f"loss=torch.nn.functional.cross_entropy, unless told otherwise, but {shapes} are no "
            f"classes and class labels; pass loss={example}"
            + (", the training's own" if name else ", or whatever the training's loss is")
        )

    def _passed(self, passes: Sequence[Pass]) -> list[Any]:
        if self.recorder is None:
            return [run() for _, run in passes]
        return self.recorder.find_layouts(passes)

    def _compare_steps(
        self, m: int, run: Callable[[], Any], modes: Sequence[tuple[nn.Module, bool]]
    ) -> None:
        """Let nothing be repeated for each example that would change the training's own pass."""

        def in_training() -> Any:
            with own_randomness():
                return run()

        if self.recorder is not None and self.recorder.layouts.shared:
            for part, mode in modes:
                part.training = mode
            self.recorder.repeats_alike(m, in_training)

    @staticmethod
    def _difference(whole: Any, part: Any, m: int, other: int) -> str:
        """How outputs of m examples differ from those of some of them; empty if they do not."""
        half = min(m, other)
        for a, b in zip(tree_leaves(whole), tree_leaves(part), strict=True):
            if not isinstance(a, Tensor) or a.ndim == 0 or len(a) != m or len(b) != other:
                continue
            if not a.is_floating_point():
                continue
            if a.shape[1:] != b.shape[1:]:  # sequences cut to the longest of their batch
                continue
            a, b = a[:half].double(), b[:half].double()
            eps = torch.finfo(whole.dtype if isinstance(whole, Tensor) else torch.float32).eps
            wrong = (a - b).abs() > eps**0.5 * (1.0 + a.abs())
            if bool(wrong.any()):
                return (
                    "the model's output for an example depends on who else is in its batch (before "
                    "the first step, half of the first batch alone gives other outputs: they "
                    f"differ by up to {float((a - b).abs().max()):.3g}), so one example has no "
                    "gradient of its own; replace what mixes examples (statistics or attention "
                    "over the batch), for instance by torch.nn.LayerNorm or torch.nn.GroupNorm"
                )
        return ""

    def ends(self, loss: float) -> None:
        """After the training's pass.

        Args:
            loss: what ``training_step`` returned.

        Raises:
            UnsupportedProblemError: a sum over examples.
        """
        self.close()
        if self._shapes:
            self._refuse_default(None)
        if self._expected is None:
            return
        if not self.stated and self._kinds and "LogSoftmaxBackward0" not in self._kinds:
            return
        self._expected.compare(loss, stated=self.stated, told=self._is_sum)


def _classes(output: Any, y: Tensor) -> bool:
    """Whether the cross-entropy of an output says anything."""
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[1] < 2:
        return False
    if not y.is_floating_point():
        return True
    return y.shape == output.shape and bool(((y.sum(1) - 1.0).abs() < 1e-3).all())


def _said(x: Any) -> str:
    return f"of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"of {type(x).__name__}"


def _of_batches(whole: Any, part: Any, m: int, other: int) -> bool:
    """Whether one of the outputs has as many examples as its batch."""
    pairs = zip(tree_leaves(whole), tree_leaves(part), strict=True)
    return any(
        isinstance(a, Tensor) and a.ndim > 0 and len(a) == m and len(b) == other for a, b in pairs
    )
