"""A training loop in plain PyTorch, watched: see ``fine_bench.fine.watch`` for how it looks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from fine_bench.fine import loop_checks as checks
from fine_bench.fine.aside import beside_training
from fine_bench.fine.at_work import AtWork
from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.first_batch import FirstBatch
from fine_bench.fine.loop_batch import (
    AnnouncedBatch,
    Held,
    loop_adapter,
    unknown_loss,
)
from fine_bench.fine.observation import Observation
from fine_bench.fine.options import Options
from fine_bench.fine.question import digest, distinguishing
from fine_bench.fine.setup import make_recorder, refuse_compiled, refuse_private
from fine_bench.fine.training_data import TrainingData, as_positions
from fine_bench.gradients.layout import copied
from fine_bench.types import InfluenceScores, UnsupportedProblemError


class WatchedLoop:
    """A loop that is watched; made by ``watch``, which says what the arguments are.

    Attributes:
        step, epoch: steps and epochs so far.
    """

    name = "fine"

    def __init__(
        self,
        model: nn.Module,
        options: Options,
        *,
        optimizer: Optimizer,
        train: Dataset[Any],
        collate: Callable[[Any], Any] | None = None,
        accumulate: int = 1,
        scaler: Any = None,
        total_steps: int | None = None,
    ) -> None:
        refuse_private(model, [optimizer])
        checks.refuse_setting(model, optimizer, accumulate)
        checks.refuse_unknown_length(options, total_steps)
        compiled = refuse_compiled(model, options.schedule)
        self.options = options
        self.model = model
        self.optimizer = optimizer
        self.accumulate = accumulate
        self.scaler = scaler
        self._work = AtWork()
        self.step = self.epoch = 0
        about = {name: getattr(options, name) for name in ("queries", "layers")}
        self._question = digest({k: value for k, value in about.items() if value is not None})
        parameter = next(model.parameters())

        def aside() -> AbstractContextManager[None]:
            return beside_training(model, compiled)

        self._recorder = make_recorder(options, model)
        self._observation = Observation(
            options,
            model,
            self._recorder,
            TrainingData(
                train,
                collate,
                n=options.train_size,
                device=parameter.device,
                dtype=parameter.dtype,
                adapter=loop_adapter(options.adapter or BatchAdapter()),
            ),
            [optimizer],
            aside,
            total_steps=float("inf") if total_steps is None else float(total_steps),
            parameters=tuple,  # whether a step is missing is looked at here
        )
        self._schedule = self._observation.schedule
        self._announced: AnnouncedBatch | None = None  # a batch whose gradients are not there yet
        self._arrived: set[int] = set()  # parameters that got a gradient from it
        self._parts = 0  # batches with gradients since the last step
        self._in_epoch = 0  # examples since the epoch began
        self._told_epochs = False
        self._begun = False  # whether this epoch has had a batch
        self._looked = self._told_loss = False
        self._closed = False
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._forward_begins, with_kwargs=True),
            optimizer.register_step_pre_hook(self._step_begins),
            optimizer.register_step_post_hook(self._step_ends),
            checks.refuse_other_optimisers(model, optimizer),
        ]
        self._hooked: dict[int, RemovableHandle] = {}
        self._hook_parameters()

    # ------------------------------------------------------------------ what the loop tells

    def batch(self, index: Tensor | Sequence[int], y: Tensor | None = None) -> None:
        """Say who is in the next batch; call it before the batch's forward pass.

        Args:
            index: the position of each example in the training set, ``(batch,)``.
            y: their labels, ``(batch,)``, where you like them to be compared: an index that names
                other labels than before is none.

        Raises:
            RuntimeError: the batch before had no backward pass, or its step has not come.
            ValueError: an index that is none.
        """
        if self._closed:
            raise RuntimeError(checks.OVER)
        with self._work:
            self._settle()
            if self._announced is not None:
                raise RuntimeError(checks.TWO_BATCHES)
            if self._parts >= self.accumulate:
                self._missing_step()
            self._epoch_goes_on()
            announced = AnnouncedBatch(as_positions(index), y)
            self._observation.batch_starts(announced, self.step, self.epoch, look=False)
            # only now: an index that was refused announces nothing
            self._announced = announced
            self._arrived.clear()
            self._in_epoch += len(announced.index)

    def loss(self, loss: Tensor) -> Tensor:
        """Hand on the loss of the batch: ``fine.loss(loss).backward()``.

        The first one is looked at, as the callback does: whether it is a sum of what each example
        adds. Wherever the gradients do not show that by themselves, it must be handed on.

        Args:
            loss: with its graph, as it goes backward, but before a scaler multiplies it.

        Returns:
            The same tensor.

        Raises:
            RuntimeError: no batch was announced.
            UnsupportedProblemError: see ``FirstBatch``.
        """
        if self._announced is None:
            raise RuntimeError(checks.NO_BATCH)
        if self._observation.asks_for_loss and loss.numel() == 1:
            with self._work:
                self._observation.before_backward(loss, self.accumulate)
                self._observation.loss_is(float(loss.detach()) * self.accumulate)
        self._told_loss = True
        return loss

    @property
    def seconds(self) -> float:
        """Time spent here so far."""
        return self._work.seconds

    @property
    def busy(self) -> bool:
        """Whether a pass of f-INE's own is on."""
        return self._work.on

    @property
    def question(self) -> dict[str, Any]:
        """What is asked, as a state names it."""
        return {"question": self._question, "options": distinguishing(self.options)}

    def step_is_over(self) -> None:
        """The optimiser was asked for a step, which a gradient scaler may have kept back."""
        with self._work:
            self._settle()
            if self._parts:
                self._leave_out()

    def skip(self) -> None:
        """Leave out what was announced.

        Before the batch's backward pass: it will have none, and nothing is trained on it. After
        it: the gradients since the last step were thrown away (``optimizer.zero_grad()``).
        """
        if self._announced is None or self._arrived:
            self._schedule.window.take()
            self._parts = 0
        self._announced = None
        self._arrived.clear()
        self._recorder.clear()

    def epoch_ends(self) -> None:
        """An epoch is over: needed where something is done once an epoch."""
        with self._work:
            self._settle()
            self._told_epochs = True
            self._observation.batch_ends(self.step, self.epoch, epoch_ends=True)
            self._next_epoch()

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``; see ``FineAccumulator.scores``."""
        return self._observation.scores(self.name)

    @property
    def n_not_finite(self) -> int:
        """Steps, or snapshots, left out because of NaN or infinite gradients."""
        self._schedule.flush()
        return self._schedule.n_not_finite

    @property
    def gradient_evaluations(self) -> int:
        """Per-example gradients taken beside those of the training."""
        return self._schedule.passes.evaluations

    # ------------------------------------------------------------------ going on

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption, between two steps."""
        return {
            "fine": self._schedule.state_dict(),
            **self.question,
            "loop": (self.step, self.epoch, self._in_epoch, self._told_epochs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; call it before the first batch.

        Raises:
            RuntimeError: the loop has begun.
            ValueError: the state belongs to another question.
        """
        if self.step or self._begun:
            raise RuntimeError("load_state_dict must come before the first fine.batch(…)")
        if any(state[name] != asked for name, asked in self.question.items()):
            raise ValueError(
                f"the state was saved for {state['options']} and its own queries and layers, this "
                f"watch asks {self.question['options']}: going on would add up two different "
                "questions. Resume with the options, queries and layers of the saved run"
            )
        self._schedule.load_state_dict(state["fine"])
        self.step, self.epoch, self._in_epoch, self._told_epochs = state["loop"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def finish(self) -> None:
        """The training is over: account for what is left. The end of a with block calls it."""
        with self._work:
            self._settle()
            if self._parts >= self.accumulate and self.scaler is not None:
                self._leave_out()
            self._schedule.training_ends(self.step)
            self._schedule.flush()
        if self._begun and not self._schedule.n_observed:
            reason = self._schedule.reason() if self.step else checks.NO_STEP
            warnings.warn(f"f-INE observed nothing in this loop: {reason}", stacklevel=3)

    def close(self) -> None:
        """Detach every hook; the scores stay."""
        self._closed = True
        for handle in (*self._handles, *self._hooked.values()):
            handle.remove()
        self._handles, self._hooked = [], {}
        self._recorder.close()
        self._observation.close()
        self._schedule.close()

    # ------------------------------------------------------------------ what shows by itself

    def _forward_begins(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if self._work.on:
            return
        if self._arrived:
            with self._work:  # whatever comes now is no part of the pass that is recorded
                self._settle()
        if self._announced is None or not torch.is_grad_enabled():
            return
        new = not self._looked or self._observation.layers_are_new
        if new or self._observation.wants(self._announced):
            with self._work:
                self._look(self._announced, args, kwargs)

    def _look(self, announced: AnnouncedBatch, args: Any, kwargs: Any) -> None:
        """Look at the first batch, as it is given to the model."""
        armed, self._recorder.armed = self._recorder.armed, False
        try:
            batch = announced.with_inputs(args, kwargs)
            if not self._looked:
                self._observation.look(batch, self._first_batch(known=announced.y is not None))
            elif self._observation.wants(batch):
                self._observation.look(batch)
            else:
                self._observation.look_again(batch)
            self._observation.listen()  # to the pass that is the next one
            self._looked, self._observation.layers_are_new = True, False
        finally:
            self._recorder.armed = armed

    def _first_batch(self, *, known: bool) -> FirstBatch:
        """Who looks at the first batch.

        Args:
            known: whether its labels are, so that its loss can be told.
        """
        options, passes = self.options, self._schedule.passes
        return FirstBatch(
            self.model,
            passes.data,
            self._forward,
            options.loss if known else unknown_loss,
            passes.aside,
            self._recorder,
            stated=known and (options.needs_engine or options.says_loss),
            default=known and options.needs_engine and not options.says_loss,
        )

    def _forward(self, inputs: tuple[Any, Any]) -> Any:
        args, kwargs = tree_map(lambda x: copied(x.value) if isinstance(x, Held) else x, inputs)
        return self.model(*args, **kwargs)

    def _gradient_arrives(self, parameter: Tensor) -> None:
        if self._work.on:
            return
        if self._announced is None:
            raise RuntimeError(checks.NO_INDEX)
        if id(parameter) in self._arrived:
            raise UnsupportedProblemError(checks.TWO_BACKWARDS)
        self._arrived.add(id(parameter))
        self._recorder.training.arrives()

    def _step_begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        with self._work:
            if kwargs.get("closure") is not None or any(callable(a) for a in args[1:]):
                raise UnsupportedProblemError(checks.CLOSURE)
            self._settle()
            if not self._parts:
                raise RuntimeError(checks.NO_BACKWARD)
            self._parts = 0
            found = getattr(optimizer, "found_inf", None)  # a scaler's word to a fused optimiser
            taken = found is None or float(found) == 0.0
            self._observation.before_step(optimizer, self.step, self.epoch, taken=taken)

    def _step_ends(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.step += 1
        if self._observation.hears_batch_ends:
            with self._work:
                self._observation.batch_ends(self.step, self.epoch, epoch_ends=False)

    # ------------------------------------------------------------------ within

    def _settle(self) -> None:
        """Take in the batch whose backward pass is over."""
        if self._announced is None or not self._arrived:
            return
        announced, self._announced = self._announced, None
        self._arrived.clear()
        checks.refuse_unseen(self._looked)
        self._refuse_unknown_loss()
        # what the recorder's hooks did within the backward pass
        self._work.seconds += self._recorder.seconds
        self._recorder.seconds = 0.0
        self._parts += 1
        if self._parts > self.accumulate:
            raise checks.too_many_parts(self.accumulate)
        scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        divided = self._divided_by(announced, scale)
        self._observation.backward_ends(self.epoch, accumulates=divided, loss_scale=scale)

    def _refuse_unknown_loss(self) -> None:
        """Ask for the loss where nothing else shows that it is a mean of one loss an example."""
        options = self.options
        shows = options.schedule == "in_batch" and options.needs_complement
        if not (shows or self._told_loss):
            raise checks.unknown_loss_error(options)

    def _divided_by(self, announced: AnnouncedBatch, scale: float) -> float:
        """What the batch's mean loss was divided by before its backward pass.

        Args:
            announced: the batch.
            scale: what a gradient scaler multiplied it by.
        """
        return self.accumulate

    def _missing_step(self) -> None:
        """A window is full, and the next batch comes."""
        if self.scaler is None:
            raise checks.too_many_parts(self.accumulate)
        self._leave_out()  # the scaler found gradients that are not finite, and kept the step back

    def _leave_out(self) -> None:
        self._parts = 0
        self._observation.before_step(self.optimizer, self.step, self.epoch, taken=False)
        self.step += 1

    def _epoch_goes_on(self) -> None:
        """Count epochs where nobody tells of them, and look at the modes of a new one."""
        if self._in_epoch >= self._schedule.passes.data.n and not self._told_epochs:
            checks.refuse_unknown_epochs(self.options, self._in_epoch)
            self._next_epoch()
        self._observation.epochs_are_told(self._told_epochs)
        if not self._begun:
            self._begun = True
            self._observation.epoch_starts()
            self._hook_parameters()

    def _next_epoch(self) -> None:
        self.epoch += 1
        self._in_epoch = 0
        self._begun = False

    def _hook_parameters(self) -> None:
        """Listen at every parameter that is trained now."""
        for p in self.model.parameters():
            if p.requires_grad and id(p) not in self._hooked:
                hook = p.register_post_accumulate_grad_hook(self._gradient_arrives)  # type: ignore[no-untyped-call]
                self._hooked[id(p)] = hook


__all__ = ["WatchedLoop"]
