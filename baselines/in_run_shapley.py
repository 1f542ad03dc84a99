"""In-run data Shapley in anybody's Trainer. Lightning's events only; formulas: ``shapley``.

callback = InRunShapleyCallback("validation", queries=validation_set, order=2)
Trainer(callbacks=[callback]).fit(module, loader)      # batches (x, y, index), plain SGD
callback.scores().values                               # (1, n_train), in units of the loss
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from baselines import shapley
from baselines.shapley import Order, ShapleyAccumulator, ValidationLoss
from fine_bench.callback.base import InRunMethod, WatchedRun
from fine_bench.callback.trainer import AROUND, Events, training_data
from fine_bench.fine.aside import beside_training
from fine_bench.fine.first_batch import FirstBatch
from fine_bench.fine.setup import refuse_private
from fine_bench.fine.trained_parameters import TrainedParameters
from fine_bench.fine.training_data import batch_index, read_queries, step_size
from fine_bench.gradients.batch_norm import (
    coupling_layers,
    refuse_without_statistics,
    say_reading,
)
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import (
    InfluenceScores,
    Loss,
    Target,
    UnsupportedProblemError,
    dataset_size,
)

if TYPE_CHECKING:
    import pytorch_lightning as pl


class InRunShapleyCallback(InRunMethod):
    """Shares the drop of the validation loss among the training examples, step by step.

    The examples' gradients are read off the training pass; the validation gradient is taken at
    every step's parameters. Nothing in the run changes: the weights are bit-identical with and
    without.

    Args:
        target: ``"validation"`` (one row, the mean loss of the queries),
            ``"validation_per_class"`` (one row a class) or ``"queries"`` (one row a query, first
            order only).
        queries: the validation examples, ``(x, y)``.
        order: 1, or 2 with the curvature of the validation loss.
        forward: ``forward(module, x) -> logits``; ``module(x)`` by default.
        loss: validation loss, per example.

    Attributes:
        seconds, gradient_evaluations: cost so far: time in this callback, and gradients of
            validation examples (with curvature, each counts twice).

    Raises:
        UnsupportedProblemError: another target; a run that is not plain SGD (momentum, weight
            decay, clipping, other optimisers, accumulated gradients, several processes, mixed
            precision); a model without per-example gradients.
        ValueError: bad arguments; batches without usable indices.
    """

    name = shapley.NAME
    version = shapley.VERSION

    def __init__(
        self,
        target: Target = "validation",
        *,
        queries: Dataset[Any] | None = None,
        order: Order = 1,
        forward: Callable[[Any, Tensor], Tensor] | None = None,
        loss: Loss = F.cross_entropy,
    ) -> None:
        shapley.check_question(target, order, queries is not None)
        assert queries is not None
        dataset_size(queries, "queries")
        self.target: Target = target
        self.queries = queries
        self.order: Order = order
        self.forward = forward or (lambda module, x: module(x))
        self.loss = loss
        super().__init__(about={"queries": queries}, target=target, order=order)
        self._recorder: LayerRecorder | None = None
        self._first_batch: FirstBatch | None = None
        self._validation: ValidationLoss | None = None
        self._observed: ShapleyAccumulator | None
        self._index: Tensor | None = None
        self._events = Events()
        self._said_rows = False

    @classmethod
    def needs(cls, target: Target, options: Mapping[str, Any], run: WatchedRun) -> dict[str, Any]:
        """The queries; refuses updates that are not −η times a gradient.

        It does so before any training: in the run itself, one refusal stops the other callbacks.

        Raises:
            UnsupportedProblemError: the run is not plain SGD.
        """
        optimizer = {"sgd": "SGD", "adamw": "AdamW"}.get(run.optimizer, run.optimizer)
        shapley.refuse_other_updates(optimizer, run.momentum, run.weight_decay)
        return super().needs(target, options, run)

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The values so far, ``(n_query, n_train)``; see ``ShapleyAccumulator.scores``."""
        return self._accumulator.scores(self.target)

    def drop(self) -> Tensor:
        """What the values add up to, ``(n_query,)``: nearly the drop of each row's loss."""
        return self._accumulator.drop()

    @property
    def n_not_finite(self) -> int:
        """Steps left out because of NaN or infinite values."""
        return 0 if self._observed is None else self._observed.n_not_finite

    @property
    def gradient_evaluations(self) -> int:
        """Gradients of validation examples."""
        return 0 if self._validation is None else self._validation.evaluations

    @property
    def _accumulator(self) -> ShapleyAccumulator:
        accumulator: ShapleyAccumulator = self._require()
        return accumulator

    # ------------------------------------------------------------------ Lightning events

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks."""
        if trainer.accumulate_grad_batches != 1:
            raise UnsupportedProblemError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: in-run Shapley needs "
                "one batch a step; use 1 and a larger batch"
            )
        if trainer.world_size != 1:
            raise UnsupportedProblemError(
                f"training on {trainer.world_size} processes: in-run Shapley needs the whole "
                "batch in one; use devices=1"
            )
        if "mixed" in str(trainer.precision):
            raise UnsupportedProblemError(
                f'precision="{trainer.precision}" mixes precisions in the gradients that in-run '
                'Shapley multiplies, and may scale them; use "32-true"'
            )
        self._forget()
        self._validation = None
        self._recorder = LayerRecorder(pl_module, None, tap=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the optimiser, the data and the queries."""
        refuse_private(pl_module, trainer.optimizers)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                shapley.refuse_other_updates(
                    type(optimizer).__name__,
                    group.get("momentum", 0.0),
                    group.get("weight_decay", 0.0),
                    bool(trainer.gradient_clip_val),
                )
        if len(trainer.optimizers) != 1:
            raise UnsupportedProblemError(
                f"{len(trainer.optimizers)} optimisers: in-run Shapley needs one step a batch"
            )
        refuse_unheld(pl_module, trainer.optimizers[0])
        self._trained = TrainedParameters(pl_module)
        x, y = read_queries(self.queries, pl_module.device)
        self._validation = ValidationLoss(
            pl_module,
            GradientEngine(
                pl_module, self.loss, forward=lambda inputs: self.forward(pl_module, inputs)
            ),
            x,
            y,
            target=self.target,
            order=self.order,
            aside=lambda: beside_training(pl_module),
        )
        data = training_data(trainer, pl_module, "InRunShapleyCallback")
        self._first_batch = FirstBatch(
            pl_module,
            data,
            lambda inputs: self.forward(pl_module, inputs),
            self.loss,
            lambda: beside_training(pl_module),
            self._recorder,
            stated=False,
        )
        self._start_with(ShapleyAccumulator(data.n, self._validation.n_rows))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at layers that normalise by their batch, in the modes they train in."""
        refuse_without_statistics(pl_module)
        if not self._said_rows and (layers := coupling_layers(pl_module)):
            self._said_rows = True
            say_reading(layers, "in-run Shapley")
        self._events = Events()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note who is in the batch and record its pass."""
        assert self._recorder is not None
        self._events.batches += 1
        if self._trained.change(trainer.current_epoch):
            assert self._validation is not None
            refuse_unheld(pl_module, trainer.optimizers[0])
            self._recorder.watch()
            self._validation.watch()
        if self._first_batch is not None:
            self._first_batch.starts(batch)  # and where each layer's input has the examples
            self._first_batch = None
        self._index, _ = batch_index(batch, len(self._accumulator.n_observations))
        self._recorder.start(len(self._index))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The backward pass is done and the parameters are still θ_t."""
        recorder, validation, index = self._recorder, self._validation, self._index
        assert recorder is not None
        assert validation is not None
        assert index is not None
        self._events.steps += 1
        with self._timed():
            recorder.stop()
            shares = PerExampleGradients(recorder.blocks(len(index)))
            values = validation.step_values(shares, step_size(optimizer))
            recorder.clear()
            self._index = None
            if not self._accumulator.observe(index, values):
                self._warn_not_finite(trainer.global_step, "the in-run Shapley values")

    def _nothing_seen(self, trainer: pl.Trainer) -> str:
        return AROUND if self._events.batches and not self._events.steps else ""

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if self._validation is not None:
            self._validation.engine.close()


def refuse_unheld(module: nn.Module, optimizer: Any) -> None:
    """Refuse parameters that have gradients and do not move, so that no step is shared among them.

    Raises:
        UnsupportedProblemError: there are some.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = module.named_parameters()
    missing = [name for name, p in named if p.requires_grad and id(p) not in held]
    if missing:
        raise UnsupportedProblemError(
            f"the optimiser does not hold {missing}, which have gradients all the same: shares of "
            "the gradient would not be shares of the step. Give them to the optimiser or set "
            "requires_grad=False"
        )


__all__ = ["InRunShapleyCallback"]
