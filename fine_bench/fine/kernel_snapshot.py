"""The schedule ``snapshot`` in ``geometry="kernel"``: what is read when, and when all is solved.

A snapshot costs a forward pass over training examples and queries; kernels are taken and the
regression solved when training ends, or when scores are asked for before. The formulas stand in
``fine_bench.fine.kernel_scores``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fine_bench.fine.example_labels import hard_labels
from fine_bench.fine.kernel_scores import KernelAccumulator
from fine_bench.fine.kernel_states import (
    State,
    is_due,
    landmarks_of,
    state_of,
    take_kernels,
    too_many,
)
from fine_bench.fine.observable import say_loss
from fine_bench.fine.options import Options
from fine_bench.fine.passes import Passes, warn_of_gradients
from fine_bench.fine.snapshot import SnapshotSchedule
from fine_bench.fine.snapshot_accumulator import SnapshotInterval
from fine_bench.fine.training_time import curvature
from fine_bench.fine.window import Window
from fine_bench.gradients.curvature.products import output_gradient
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.input_kernel import input_kernel
from fine_bench.gradients.margin import negative_margin, one_minus_probability
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.tangent_kernel import Probe
from fine_bench.types import UnsupportedProblemError

READ_AT_ONCE = 512
"""Examples in a pass. It changes memory, no score."""


class KernelSchedule(SnapshotSchedule):
    """Keeps residuals, slopes and parameters of the run, and solves the regression at its end.

    Args:
        options, passes, total_steps, window: see ``SnapshotSchedule``.

    Raises:
        UnsupportedProblemError: too many examples; no class logits and labels.
    """

    accumulator: KernelAccumulator  # type: ignore[assignment]

    def __init__(
        self,
        options: Options,
        passes: Passes,
        total_steps: float,
        window: Window[tuple[int, float]] | None = None,
    ) -> None:
        queries = passes.queries
        assert queries is not None
        if (reason := too_many(passes.data.n, len(queries))) is not None:
            raise UnsupportedProblemError(f'geometry="kernel": {reason}')
        with passes.aside():
            x, y = passes.data.read(torch.zeros(1, dtype=torch.int64))
            alike = all(
                passes.engine.has_margin(*some) for some in ((x, y), (queries.x, queries.y))
            )
        if not alike:
            raise UnsupportedProblemError(
                'geometry="kernel" is a regression on class labels: it needs class logits '
                "(batch, classes) and integer labels (batch,) of training examples and queries; "
                'use geometry="euclidean" or, with class logits, labels that are not soft'
            )
        if options.input_share and not (isinstance(x, Tensor) and x.is_floating_point()):
            raise UnsupportedProblemError(
                f"input_share={options.input_share} takes distances of inputs, which have to be "
                f"real-valued tensors, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
                "; use input_share=0"
            )
        super().__init__(options, passes, total_steps, window)
        if queries.observable is None:
            queries.observable = "margin"
        if queries.observable == "loss" and options.observable is None:
            say_loss()
        self._kept: list[State] = [state_of(passes.engine.model)]

    def _new_accumulator(self, n: int, watched: Tensor | None) -> Any:
        queries, options = self.passes.queries, self.options
        assert queries is not None
        return KernelAccumulator(
            n,
            queries.groups,
            queries.weighting,
            options.contrast,
            options.ridge,
            options.errors,
        )

    def _observe(self, step: int, epoch: int) -> None:
        """Residuals of all training examples and slopes of all queries, at these parameters."""
        passes = self.passes
        assert passes.queries is not None
        with passes.aside(), torch.no_grad(), passes.engine.recorder.alone():
            train = [self._read(x, y) for _, x, y in passes.data.batches(self.index, READ_AT_ONCE)]
            logits, y = (torch.cat(parts) for parts in zip(*train, strict=True))
            z = passes.engine.forward(passes.queries.x)
        loss = negative_margin if passes.queries.observable == "margin" else passes.engine.loss
        residual = -output_gradient(passes.engine.loss, logits, y)
        slope = -output_gradient(loss, z.detach(), passes.queries.y)
        weight = self._interval.lr * float(one_minus_probability(logits, y).double().mean())
        if all(bool(torch.isfinite(part).all()) for part in (residual, slope)):
            labels = hard_labels(y, len(y))
            assert labels is not None
            self.labels.note(self.index, labels)
            time = self._interval.reach * curvature(logits)
            self.accumulator.observe(weight, residual, slope, logits, y, time)
            self.accumulator.n_steps += self._interval.steps
            if is_due(self.accumulator.n_snapshots):
                self._kept.append(state_of(passes.engine.model))
        else:
            if not self.n_not_finite:
                warn_of_gradients(f"in the snapshot after step {step}", "this snapshot")
            self.n_not_finite += 1
        self._interval = SnapshotInterval()

    def _read(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.passes.engine.forward(x).detach(), y

    def training_ends(self, step: int) -> None:
        """The last snapshot, and the regression."""
        super().training_ends(step)
        self.flush()

    def flush(self) -> None:
        """Solve the regression for what was observed, unless that is done."""
        accumulator = self.accumulator
        if accumulator.found is not None or not sum(accumulator.weight):
            return
        assert accumulator.residual is not None
        passes, options, probe = self.passes, self.options, Probe()
        assert passes.queries is not None
        model, forward = passes.engine.model, passes.engine.forward
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        n, n_query = passes.data.n, len(passes.queries)
        landmarks = landmarks_of(options.n_landmarks, n, n_query, options.seed)
        with passes.aside():
            engine = GradientEngine(model, probe, options.layers, forward)
            try:
                kernels, scales = take_kernels(
                    model,
                    self._kept,
                    trained,
                    probe,
                    lambda start: self._gradients(engine, start),
                    n_train=n,
                    n_query=n_query,
                    n_classes=accumulator.residual.shape[2],
                    n_initialisations=options.n_initialisations,
                    seed=options.seed,
                    landmarks=landmarks,
                    some=lambda: self._at_landmarks(engine, landmarks),
                    of_inputs=self._of_inputs(landmarks) if options.input_share else None,
                    input_share=options.input_share,
                )
            finally:
                engine.close()
        accumulator.solve(kernels, scales, landmarks)

    def _gradients(
        self, engine: GradientEngine, start: int
    ) -> Iterator[tuple[slice, PerExampleGradients]]:
        """Of training examples, then queries; batches that end by ``start`` are passed over."""
        passes, n = self.passes, self.passes.data.n
        assert passes.queries is not None
        for first in range(0, n, READ_AT_ONCE):
            rows = slice(first, min(first + READ_AT_ONCE, n))
            if rows.stop > start:
                passes.evaluations += rows.stop - first
                yield rows, engine(*passes.data.read(self.index[rows]))
        for first in range(0, len(passes.queries), READ_AT_ONCE):
            x, y = passes.queries.part(slice(first, first + READ_AT_ONCE))
            rows = slice(n + first, n + first + len(y))
            if rows.stop > start:
                passes.evaluations += len(y)
                yield rows, engine(x, y)

    def _of_inputs(self, landmarks: Tensor | None) -> Tensor:
        """The kernel of the inputs, of all rows or of the landmarks'."""
        passes = self.passes
        assert passes.queries is not None
        parts = [x for _, x, _ in passes.data.batches(self.index, READ_AT_ONCE)]
        return input_kernel(torch.cat([*parts, passes.queries.x]), passes.data.n, landmarks)

    def _at_landmarks(
        self, engine: GradientEngine, landmarks: Tensor | None
    ) -> Iterator[tuple[slice, PerExampleGradients]]:
        """Of the training examples among them, then of all queries."""
        assert landmarks is not None
        own = landmarks[landmarks < self.passes.data.n]
        first = 0
        for part in torch.split(own, READ_AT_ONCE):
            self.passes.evaluations += len(part)
            yield slice(first, first + len(part)), engine(*self.passes.data.read(self.index[part]))
            first += len(part)
        for rows, gradients in self._gradients(engine, self.passes.data.n):
            first = len(own) - self.passes.data.n
            yield slice(rows.start + first, rows.stop + first), gradients

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        if self._before_end is not None:
            return self._before_end
        return {**super().state_dict(), "kept": list(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``."""
        super().load_state_dict(state)
        self._kept = list(state["kept"])
