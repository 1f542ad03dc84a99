"""f-INE in anybody's Trainer. This file translates Lightning's events; formulas are in ``fine``.

callback = FINECallback(target="self")
Trainer(callbacks=[callback]).fit(module, loader)      # batches (x, y, index)
callback.scores().values                               # (1, n_train)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fine_bench.callback.base import InRunMethod, Progress, built_from
from fine_bench.callback.trainer import (
    Events,
    loss_scale,
    refuse_optimizers,
    refuse_short_batches,
    refuse_strategy,
    step_is_taken,
    training_data,
)
from fine_bench.fine import accumulator, kernel_scores
from fine_bench.fine.aside import beside_training
from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.distributed import Processes
from fine_bench.fine.in_batch import InBatchSchedule
from fine_bench.fine.observation import Observation
from fine_bench.fine.options import Options
from fine_bench.fine.question import distinguishing
from fine_bench.fine.setup import make_recorder, refuse_compiled, refuse_private
from fine_bench.fine.snapshot import SnapshotSchedule
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import InfluenceScores

if TYPE_CHECKING:
    import pytorch_lightning as pl


class FINECallback(InRunMethod):
    """Scores every training example while the model trains.

    The training pass already holds each layer's inputs and output gradients; per-example gradients
    are read off them. Nothing in the run changes: the weights are bit-identical with and without.

    Its arguments are the fields of ``fine_bench.fine.options.Options``, which says what they mean.

    The loss that the run minimises must be the *mean* of the per-example losses of a batch.

    What the statistic x = ⟨mean gradient of the batch, ∇h⟩ means in other runs than plain SGD:

    - *Accumulated gradients, several processes (DDP).* The batch is everything that one step is
      put together from; the scores are those of one large batch
      (``fine_bench.fine.micro_batches``). What its passes hold is kept until the step, and travels
      to every process.
    - *Clipping.* Gradients are read before it: x is that of the unclipped step. Clipping shortens a
      step for all its examples alike, and μ_i,t does not depend on it; the accumulated μ counts
      the step with its η_t.
    - *Learning-rate schedules.* Each step counts with its own η_t.
    - *Parameter groups.* Each parameter counts with its own η_p (``fine_bench.fine.step_sizes``).
    - *Momentum β.* A gradient moves the parameters by η_t now and by β, β², … of the later step
      sizes afterwards. It counts once, with η_t: where η changes slowly, that is the whole move but
      for the factor 1/(1 − β), which all steps share and μ does not see.
    - *Adam, AdamW.* The step is not along the gradient but along D⁻¹ of a running mean of it. By
      default x stays the plain product; ``preconditioner="optimiser"`` makes it
      ⟨D_t⁻¹ mean gradient, ∇h⟩, to first order what the step does to h, with running means read as
      under momentum. Decoupled weight decay is the same for all examples.
    - *Mixed precision.* Gradients are those of the training's own pass; products are taken in
      float32. Steps that the loss scaler leaves out are left out here too.

    ``scores().std_error`` is meant for other seeds: ± 1.96 ``std_error`` covered the mean μ of nine
    other runs for 90–98 % of the examples (``accumulated``; *self*, *validation* and *queries*;
    in-batch, from sketches, with snapshots, in the EK-FAC geometry; MNIST and digits, plain SGD,
    and momentum until the flips were fitted): ``fine_bench.fine.standard_error.inflation`` has the
    table. For ``standardised`` it covered 74–96 %: do not rely on it there.

    Attributes:
        seconds, gradient_evaluations: cost so far: time in this callback, and per-example
            gradients beyond those of the training itself.

    A run that is interrupted and resumed gives the scores of an uninterrupted one, except in-batch
    for the target ``"queries"``: its directions are too large for a checkpoint, so they are
    computed anew at the first step. (Between two micro-batches of one step Lightning itself
    forgets the gradients so far.)

    Raises:
        UnsupportedProblemError: the run has no per-example gradients (mixing of examples other than
            batch normalisation, layers without factors, a sum for a loss), its Trainer spreads
            parameters over processes or its module is compiled (in-batch), or 1 − p or the Fisher
            matrix do not exist for its loss. Scores so far stay.
        ValueError: bad arguments; batches without usable indices.
    """

    name = "fine"
    version = accumulator.VERSION
    all_examples = True

    @staticmethod
    def version_of(options: Mapping[str, Any]) -> int:
        """Of the scores with these options: each way to compute them has a version of its own."""
        kernel = options.get("geometry") == "kernel"
        return kernel_scores.VERSION if kernel else accumulator.VERSION

    @built_from(Options)
    def __init__(self, options: Options) -> None:
        self.options = options
        about = {"queries": options.queries, "layers": options.layers}
        super().__init__(about=about, **distinguishing(options))
        self._observed: InBatchSchedule | SnapshotSchedule | None
        self._run: Observation | None = None
        self._recorder: LayerRecorder | None = None
        self._compiled = False
        self._events = Events()

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``; see ``FineAccumulator.scores``."""
        self._require()
        return self._watched.scores(self.name)

    def so_far(self) -> Progress | None:
        """μ of the steps that have been accounted for; the few that wait in a queue are not."""
        if self._observed is None or not self._observed.accumulator.n_steps:
            return None
        sums = self._observed.accumulator
        return Progress(sums.mu()[0].float(), sums.n_steps)

    @property
    def n_not_finite(self) -> int:
        """Steps, or snapshots, left out because of NaN or infinite gradients."""
        if self._observed is None:
            return 0
        self._observed.flush()
        return self._observed.n_not_finite

    @property
    def gradient_evaluations(self) -> int:
        """Per-example gradients taken beside those of the training."""
        return 0 if self._observed is None else self._observed.passes.evaluations

    @property
    def _schedule(self) -> InBatchSchedule | SnapshotSchedule:
        schedule: InBatchSchedule | SnapshotSchedule = self._require()
        return schedule

    @property
    def _watched(self) -> Observation:
        assert self._run is not None
        return self._run

    # ------------------------------------------------------------------ Lightning events

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks."""
        refuse_strategy(trainer)
        self._compiled = refuse_compiled(pl_module, self.options.schedule)
        self._forget()
        self._recorder = make_recorder(self.options, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the training data and the queries, and lay out the sums."""
        refuse_optimizers(trainer)
        # not before: configure_optimizers may have made it private
        refuse_private(pl_module, trainer.optimizers)
        assert self._recorder is not None
        options, recorder, device = self.options, self._recorder, pl_module.device
        data = training_data(
            trainer, pl_module, "FINECallback", options.adapter, options.train_size
        )

        if options.schedule == "in_batch":
            refuse_short_batches(trainer, data.n)

        def aside() -> AbstractContextManager[None]:
            return beside_training(pl_module, self._compiled)

        known = options.n_snapshots is not None
        self._run = Observation(
            options,
            pl_module,
            recorder,
            data,
            trainer.optimizers,
            aside,
            processes=Processes(trainer.world_size, device),
            total_steps=trainer.estimated_stepping_batches if known else float("inf"),
            # under manual optimisation nobody says how many micro-batches make a step
            parameters=None if pl_module.automatic_optimization else pl_module.parameters,
        )
        self._start_with(self._run.schedule)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at layers that normalise by their batch, in the modes they train in."""
        self._watched.epoch_starts()
        self._events = Events(
            observed=self._schedule.n_observed, around=self._schedule.window.n_around
        )

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the batch."""
        self._events.batches += 1
        with self._timed():
            self._watched.batch_starts(batch, trainer.global_step, trainer.current_epoch)

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """The loss has its graph: that of the first batch is looked at."""
        if self._recorder is not None:
            self._recorder.training.begins(self._recorder.calls)
        if not self._watched.looks:
            return
        with self._timed():
            self._watched.before_backward(loss, trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The gradients of a batch, or of a micro-batch, are there."""
        self._events.backwards += 1
        if self._recorder is not None:  # what its hooks did within the backward pass
            self.seconds, self._recorder.seconds = self.seconds + self._recorder.seconds, 0.0
        with self._timed():
            self._watched.backward_ends(
                trainer.current_epoch,
                accumulates=trainer.accumulate_grad_batches,
                loss_scale=loss_scale(trainer),
            )

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The backward pass is done and the parameters are still θ_t."""
        self._events.steps += 1
        with self._timed():
            self._watched.before_step(
                optimizer,
                trainer.global_step,
                trainer.current_epoch,
                taken=step_is_taken(trainer, optimizer),
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """The step is done: time for a snapshot?"""
        if not self._watched.hears_batch_ends:
            return
        with self._timed():
            loss = None
            if self._watched.asks_for_loss:
                found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
                if isinstance(found, Tensor) and found.numel() == 1:
                    # Lightning hands on the loss divided
                    loss = float(found) * trainer.accumulate_grad_batches
            self._watched.batch_ends(
                trainer.global_step,
                trainer.current_epoch,
                epoch_ends=trainer.is_last_batch,
                loss=loss,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Account for what is left."""
        with self._timed():
            self._schedule.training_ends(trainer.global_step)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the hooks."""
        if self._observed is not None:
            self._observed.flush()
        super().on_fit_end(trainer, pl_module)

    def _nothing_seen(self, trainer: pl.Trainer) -> str:
        schedule, events = self._schedule, self._events
        schedule.window.drop()
        return events.reason(schedule.n_observed, schedule.window.n_around) or (
            schedule.reason() if events.steps and schedule.n_observed == events.observed else ""
        )

    def _close(self) -> None:
        if self._run is not None:
            self._run.close()
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if self._observed is not None:
            self._observed.close()


__all__ = ["BatchAdapter", "FINECallback"]
