"""A training run as f-INE observes it: what a trainer or a loop tells, handed on to the schedule.

Whoever knows the run (``fine_bench.callback`` a Lightning Trainer, ``fine_bench.fine.loop`` a loop
of the user's own) tells of six moments, and nothing else decides what is measured:

    batch_starts → before_backward → backward_ends → …
    before_step → batch_ends → … → training_ends
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fine_bench.fine.distributed import Processes
from fine_bench.fine.first_batch import FirstBatch
from fine_bench.fine.in_batch import InBatchSchedule
from fine_bench.fine.kernel_snapshot import KernelSchedule
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Aside
from fine_bench.fine.setup import make_first_batch, make_passes, refuse_compiled
from fine_bench.fine.snapshot import SnapshotSchedule
from fine_bench.fine.standard_error import inflation
from fine_bench.fine.step_sizes import step_sizes
from fine_bench.fine.trained_parameters import TrainedParameters
from fine_bench.fine.training_data import TrainingData
from fine_bench.fine.window import Window
from fine_bench.gradients.batch_norm import (
    coupling_layers,
    refuse_batch_coupling,
    refuse_synchronised,
    refuse_without_statistics,
    say_reading,
)
from fine_bench.gradients.recorder import LayerRecorder
from fine_bench.types import InfluenceScores


class Observation:
    """One run that is observed.

    Args:
        options: what to measure.
        module: the model.
        recorder: its layers; see ``setup.make_recorder``. Snapshots close it.
        data: the training examples by position.
        optimizers: of the run.
        aside: see ``passes.Aside``.
        processes: of the run; one by default.
        total_steps: of the run, for ``n_snapshots``; infinite if unknown.
        parameters: the trained parameters, where nobody says how many micro-batches make a step;
            see ``Window``.

    Attributes:
        schedule: the sums.
        layers_are_new: whether other layers are trained from the batch on that was announced last.
    """

    def __init__(
        self,
        options: Options,
        module: nn.Module,
        recorder: LayerRecorder,
        data: TrainingData,
        optimizers: Sequence[Optimizer],
        aside: Aside,
        *,
        processes: Processes | None = None,
        total_steps: float = float("inf"),
        parameters: Callable[[], Iterable[nn.Parameter]] | None = None,
    ) -> None:
        self.options = options
        self.module = module
        self._compiled = refuse_compiled(module, options.schedule)
        self._trained = TrainedParameters(module)
        self._said_rows = False
        # what was frozen or let go of since the recorder was made
        recorder.watch()
        with aside():
            data.refuse_parts_alike()
        passes = make_passes(
            options, module, data, recorder, optimizers, aside, processes or Processes()
        )
        self._first: FirstBatch | None = make_first_batch(options, module, data, aside, recorder)
        self._looks = self._first
        self.layers_are_new = False
        self.schedule: InBatchSchedule | SnapshotSchedule
        if options.schedule == "in_batch":
            self.schedule = InBatchSchedule(options, passes, recorder, Window(parameters))
        else:
            recorder.close()
            kind = KernelSchedule if options.geometry == "kernel" else SnapshotSchedule
            self.schedule = kind(options, passes, total_steps, Window(parameters))

    @property
    def asks_for_loss(self) -> bool:
        """Whether ``batch_ends`` is to be told the loss: that of the first batch is looked at."""
        return self._first is not None and self._first.asks_for_loss

    @property
    def looks(self) -> bool:
        """Whether the first batch is still looked at: ``before_backward`` does nothing else."""
        return self._first is not None

    @property
    def hears_batch_ends(self) -> bool:
        """Whether ``batch_ends`` does anything: in-batch it only ends the look."""
        return self._first is not None or not isinstance(self.schedule, InBatchSchedule)

    def wants(self, batch: Any) -> bool:
        """Whether the look at the first batch goes on with this one: see ``FirstBatch``."""
        return self._first is not None and self._first.wants(batch)

    def epoch_starts(self) -> None:
        """Look at layers that normalise by their batch, in the modes they train in.

        Raises:
            UnsupportedProblemError: they are to be refused, or have no reading.
        """
        processes = self.schedule.passes.processes
        if self.options.batch_norm == "refuse":
            refuse_batch_coupling(self.module)
        if self.options.needs_engine:
            refuse_without_statistics(self.module)
        if self.options.schedule == "in_batch":
            refuse_synchronised(self.module, processes.count)
        if not self._said_rows and (layers := coupling_layers(self.module)):
            self._said_rows = True
            say_reading(layers, "f-INE", in_batch=self.options.schedule == "in_batch")

    def epochs_are_told(self, told: bool) -> None:
        """Whether the numbers of epochs are those of the run, or of n examples each."""
        if isinstance(self.schedule, InBatchSchedule):
            self.schedule.draws.told = told

    def batch_starts(self, batch: Any, step: int, epoch: int, *, look: bool = True) -> None:
        """A batch is about to go through the model.

        Args:
            batch: as the options' adapter reads it.
            step: number of steps taken so far.
            epoch: number of epochs so far.
            look: whether the batch tells what the model will get; otherwise ``look`` is called.
        """
        changed = self._trained.change(epoch)
        if changed:
            self._layers_change()
        if look and self.wants(batch):
            self.look(batch)
        elif look and changed:
            self.look_again(batch)
        self.layers_are_new = changed
        self.schedule.batch_starts(batch, step, epoch)
        if look:
            self.listen()

    def before_backward(self, loss: Tensor, accumulates: int = 1) -> None:
        """The loss of a batch is there, and its backward pass is not: the first one is looked at.

        Args:
            loss: as the backward pass will take it, with its graph.
            accumulates: into how many equal parts the step's loss is divided, ≥ 1.

        Raises:
            UnsupportedProblemError: see ``FirstBatch.before_backward``.
        """
        if self._first is not None:
            self._first.before_backward(loss, accumulates)
            if isinstance(self.schedule, InBatchSchedule):
                self.schedule.ends_are(self._first.ends_of_loss)

    def look(self, batch: Any, first: FirstBatch | None = None) -> None:
        """Look at the first batch, before its pass.

        Args:
            batch: as above; one that is wanted.
            first: who looks, where it is another than the options say.

        Raises:
            UnsupportedProblemError: see ``FirstBatch``.
        """
        self._first = first or self._first
        self._looks = self._first or self._looks
        if self._first is not None:
            self._first.starts(batch)

    def listen(self) -> None:
        """The training's own pass of the batch that was looked at is the next one."""
        if self._first is not None and not self._compiled:
            self._first.listens()

    def look_again(self, batch: Any) -> None:
        """Look at layers that are trained from this batch on, before its pass."""
        if self._looks is not None:
            self._looks.starts(batch)
            self._looks.close()

    def loss_is(self, loss: float) -> None:
        """The mean loss of the first batch that was looked at."""
        first = self._first
        if first is not None:
            if first.settled:
                self._first = None
            first.ends(loss)

    def backward_ends(self, epoch: int, *, accumulates: float, loss_scale: float) -> None:
        """The gradients of a batch, or of a micro-batch, are there.

        Args:
            epoch: as above.
            accumulates: into how many equal parts the step's loss was divided, ≥ 1.
            loss_scale: further factor on the loss, of 16-bit precision.
        """
        if self._first is not None:
            self._first.backward_ends()
        if self._trained.change(epoch):
            self._layers_change(in_pass=True)
        self.schedule.backward_ends(epoch, accumulates=accumulates, loss_scale=loss_scale)

    def before_step(self, optimizer: Any, step: int, epoch: int, *, taken: bool) -> None:
        """The step's gradient is complete and the parameters are still θ_t.

        Args:
            optimizer: that steps.
            step, epoch: as above.
            taken: whether it will take the step; see ``InBatchSchedule.before_step``.
        """
        self.schedule.before_step(step_sizes(optimizer), step, epoch, taken=taken)

    def batch_ends(
        self, step: int, epoch: int, *, epoch_ends: bool, loss: float | None = None
    ) -> None:
        """A batch is done with, and its step is taken if it had one.

        Args:
            step, epoch: as above.
            epoch_ends: whether it was the epoch's last.
            loss: the mean loss of the batch, where it is asked for and known.
        """
        if loss is not None:
            self.loss_is(loss)
        if self._first is not None and not self._first.settled:
            self._first.close()  # the next batch may show more
        else:
            self.close()
        self.schedule.batch_ends(step, epoch, epoch_ends=epoch_ends)

    def close(self) -> None:
        """Stop looking at the first batch; the sums stay."""
        if self._first is not None:
            self._first.close()
        self._first = None

    def _layers_change(self, *, in_pass: bool = False) -> None:
        """Watch the layers that are trained now.

        Raises:
            UnsupportedProblemError: one of them cannot be watched.
        """
        self.schedule.layers_change(in_pass=in_pass)

    def scores(self, name: str) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``; see ``FineAccumulator.scores``.

        Args:
            name: of the method.
        """
        self.schedule.flush()
        target = self.options.target
        factor = inflation(target, self.options.geometry)
        scores = self.schedule.accumulator.scores(name, target, factor)
        if scores.n_observations is not None and not bool(scores.n_observations.any()):
            reason = self.schedule.reason() or "nothing has been observed yet"
            warnings.warn(
                f"no example has a score, all values are 0 with an infinite std_error: {reason}",
                stacklevel=3,
            )
        return replace(scores, observable=self.schedule.observable)


__all__ = ["Observation"]
