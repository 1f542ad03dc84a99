"""f-INE in anybody's Trainer. This file translates Lightning's events; formulas are in ``fine``.

callback = FINECallback(target="self")
Trainer(callbacks=[callback]).fit(module, loader)      # batches (x, y, index)
callback.scores().values                               # (1, n_train)
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from fine_bench import fine
from fine_bench.fine import (
    Composition,
    Contrast,
    FineAccumulator,
    Observable,
    StepBuffer,
    choose,
)
from fine_bench.gradients.blocks import Direction, PerExampleGradients
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.recorder import LayerRecorder, refuse_batch_coupling
from fine_bench.types import (
    InfluenceScores,
    Loss,
    QueryWeighting,
    Reduce,
    Target,
    UnsupportedProblemError,
    dataset_size,
)
from fine_bench.weighting import check_weighting, query_groups, query_weights

ScheduleName: TypeAlias = Literal["in_batch", "snapshot"]
Geometry: TypeAlias = Literal["euclidean", "ekfac"]

_REDUCE: Mapping[Target, Reduce] = {
    "queries": None,
    "validation": "mean",
    "validation_per_class": "class",
}


class FINECallback(pl.Callback):
    """Scores every training example while the model trains.

    The training pass already holds each layer's inputs and output gradients; per-example gradients
    are read off them. Nothing in the run changes: the weights are bit-identical with and without.

    Args:
        target: ``"self"`` (how well the run memorised each example), ``"queries"`` (one row a
            query), ``"validation"`` (one row for the whole query set) or
            ``"validation_per_class"``.
        observable: ``"margin"``, h = −log(p/(1−p)), for softmax cross-entropy on the output of
            the last layer; or ``"loss"``.
        composition: ``"accumulated"`` or ``"standardised"``; see ``fine_bench.fine``.
        schedule: ``"in_batch"``: an example is observed when it is in the batch.
        geometry: ``"euclidean"``.
        contrast: ``"substitution"`` (against an average example) or ``"removal"``.
        queries: dataset of ``(x, y)`` for every target but ``"self"``.
        query_weighting: how queries are weighted in a mean: ``"noise"`` (the spread of each
            query's statistic over the batch), ``"norm"`` or None.
        refresh_every: steps between two computations of the queries' gradients, ≥ 1.
        layers: names of modules to watch; None for all.
        forward: ``forward(module, x) -> logits`` for the queries; ``module(x)`` by default.
        loss: loss of the queries; must be the training loss, per example.

    The loss that the run minimises must be the *mean* of the per-example losses of a batch.

    Raises:
        UnsupportedProblemError: the run has no per-example gradients (batch normalisation, layers
            without factors), or the margin does not exist for its loss.
        ValueError: bad arguments; batches without usable indices.
    """

    name = "fine"
    version = fine.VERSION

    def __init__(
        self,
        target: Target = "self",
        observable: Observable = "margin",
        composition: Composition = "accumulated",
        schedule: ScheduleName = "in_batch",
        geometry: Geometry = "euclidean",
        *,
        contrast: Contrast = "substitution",
        queries: Dataset[Any] | None = None,
        query_weighting: QueryWeighting = "noise",
        refresh_every: int = 20,
        layers: Sequence[str] | None = None,
        forward: Callable[[pl.LightningModule, Tensor], Tensor] | None = None,
        loss: Loss = F.cross_entropy,
    ) -> None:
        choose(target, Target, "target")
        choose(observable, Observable, "observable")
        choose(composition, Composition, "composition")
        choose(schedule, ScheduleName, "schedule")
        choose(geometry, Geometry, "geometry")
        choose(contrast, Contrast, "contrast")
        check_weighting(query_weighting)
        if schedule != "in_batch":
            raise NotImplementedError(
                f'schedule={schedule!r} is not available yet; use schedule="in_batch"'
            )
        if geometry != "euclidean":
            raise NotImplementedError(
                f'geometry={geometry!r} is not available yet; use geometry="euclidean"'
            )
        if (queries is None) != (target == "self"):
            raise ValueError(
                f"target={target!r} "
                + ("takes no queries; leave them out" if target == "self" else "needs queries=…")
            )
        if queries is not None:
            dataset_size(queries, "queries")
        if refresh_every < 1:
            raise ValueError(f"refresh_every must be at least 1, got {refresh_every}")
        self.target: Target = target
        self.observable: Observable = observable
        self.composition: Composition = composition
        self.contrast: Contrast = contrast
        self.queries = queries
        self.query_weighting: QueryWeighting = query_weighting
        self.refresh_every = refresh_every
        self.layers = layers
        self.forward = forward or (lambda module, x: module(x))
        self.loss = loss
        self.seconds = 0.0
        self.gradient_evaluations = 0
        self._accumulator: FineAccumulator | None = None
        self._buffer: StepBuffer | None = None
        self._saved: Mapping[str, Any] | None = None
        self._recorder: LayerRecorder | None = None
        self._engine: GradientEngine | None = None
        self._index: Tensor | None = None
        self._direction: Direction | None = None
        self._query_batch: tuple[Tensor, Tensor] | None = None
        self._steps_seen = 0
        self._checked_epoch = -1

    # ------------------------------------------------------------------ results

    def scores(self) -> InfluenceScores:
        """The scores so far, ``(n_query, n_train)``; see ``FineAccumulator.scores``."""
        if self._accumulator is None:
            raise RuntimeError(
                "no run has been observed; pass the callback to Trainer(callbacks=[…]) and fit"
            )
        self._flush()
        return self._accumulator.scores(self.name, self.target)

    @property
    def n_not_finite(self) -> int:
        """Steps left out because of NaN or infinite gradients."""
        self._flush()
        return 0 if self._buffer is None else self._buffer.n_not_finite

    # ------------------------------------------------------------------ Lightning events

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach the hooks."""
        if trainer.accumulate_grad_batches != 1:
            raise UnsupportedProblemError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches} is not supported yet; "
                "use 1 and a larger batch"
            )
        if trainer.world_size != 1:
            raise UnsupportedProblemError(
                f"training on {trainer.world_size} processes is not supported yet; use devices=1"
            )
        self._close()
        recorder = LayerRecorder(pl_module, self.layers, tap=True)
        if recorder.leftover:
            recorder.close()
            raise UnsupportedProblemError(
                f"the layers of {recorder.leftover} have no per-example factors yet; watch the "
                f"others with layers={list(recorder.layers)}"
            )
        self._recorder = recorder
        self.seconds, self.gradient_evaluations, self._steps_seen = 0.0, 0, 0
        self._checked_epoch = -1
        self._accumulator = self._buffer = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Size the sums by the training set and the queries."""
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if dataset is None:
            raise ValueError(
                "FINECallback needs one DataLoader over a map-style dataset as the training data, "
                f"got {type(trainer.train_dataloader).__name__}"
            )
        n_rows = 1
        if self.queries is not None:
            n = dataset_size(self.queries, "queries")
            xq, yq, *_ = default_collate([self.queries[i] for i in range(n)])
            self._query_batch = (xq.to(pl_module.device), yq.to(pl_module.device))
            groups = query_groups(yq, _REDUCE[self.target])
            n_rows = len(groups)
            self._groups = groups.to(pl_module.device)
            self._engine = GradientEngine(
                pl_module, self.loss, self.layers, lambda x: self.forward(pl_module, x)
            )
        self._accumulator = FineAccumulator(
            dataset_size(dataset, "the training set"), n_rows, self.composition
        )
        self._buffer = StepBuffer(self._accumulator, self.contrast, is_gram=self.target == "self")
        if self._saved is not None:
            self._accumulator.load_state_dict(self._saved["accumulator"])
            self._direction = None
            self._steps_seen = 0
            self._saved = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers that mix the examples of a batch, in the modes they train in."""
        refuse_batch_coupling(pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note who is in the batch and record its pass."""
        start = time.perf_counter()
        assert self._recorder is not None
        assert self._accumulator is not None
        self._index = batch_index(batch, self._accumulator.n_train)
        # the margin is read off the last layer's gradient, which is checked once an epoch
        self._recorder.keep_outputs = (
            self.target == "self"
            and self.observable == "margin"
            and trainer.current_epoch != self._checked_epoch
        )
        self._recorder.start()
        self.seconds += time.perf_counter() - start

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """The backward pass is done and the parameters are still θ_t: observe."""
        start = time.perf_counter()
        recorder, buffer, index = self._recorder, self._buffer, self._index
        if recorder is None or buffer is None or index is None:
            return
        recorder.stop()
        m = len(index)
        if m < fine.MIN_BATCH:
            buffer.accumulator.skip_short_batch()
        else:
            gradients = PerExampleGradients(recorder.blocks(m, scale=float(m)))
            statistic, complement = self._statistic(trainer, pl_module, gradients)
            step = trainer.global_step
            buffer.add(index, statistic, complement, step_size(optimizer), step)
        recorder.clear()
        self._index = None
        self.seconds += time.perf_counter() - start

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach the hooks."""
        self._flush()
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Detach the hooks; the scores so far stay."""
        self._close()

    @property
    def state_key(self) -> str:
        """Two callbacks of different targets keep their states apart."""
        return self._generate_state_key(
            target=self.target, observable=self.observable, composition=self.composition
        )

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoints."""
        if self._accumulator is None:
            return {}
        self._flush()
        return {"accumulator": self._accumulator.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after an interruption."""
        self._saved = state_dict or None

    # ------------------------------------------------------------------ one step

    def _statistic(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: PerExampleGradients
    ) -> tuple[Tensor, Tensor | None]:
        """What the buffer takes: the Gram matrix and 1 − p, or products with the directions."""
        if self.target == "self":
            complement = None
            if self.observable == "margin":
                check = trainer.current_epoch != self._checked_epoch
                self._checked_epoch = trainer.current_epoch
                complement = self._complement(check=check)
            return gradients.gram(), complement
        if self._direction is None or self._steps_seen % self.refresh_every == 0:
            self._refresh(pl_module, gradients)
        self._steps_seen += 1
        assert self._direction is not None
        return gradients.contract(self._direction), None

    def _complement(self, *, check: bool) -> Tensor:
        """1 − p of the batch, from the layer that ran last."""
        assert self._recorder is not None
        call = self._recorder.calls[-1]
        assert call.grad is not None
        grad = call.grad * len(call.grad)
        if check:
            assert call.output is not None
            refuse_other_losses(call.output, grad)
        return complement_from_logit_gradients(grad)

    def _refresh(self, pl_module: pl.LightningModule, reference: PerExampleGradients) -> None:
        """The queries' direction at the present parameters."""
        assert self._engine is not None
        assert self._query_batch is not None
        modes = [(module, module.training) for module in pl_module.modules()]
        pl_module.eval()
        try:
            with torch.random.fork_rng():
                queries = self._engine(*self._query_batch, self.observable)
        finally:
            for module, mode in modes:
                module.training = mode
        self.gradient_evaluations += len(queries)
        # a single query's row is a test of its own: weights belong to means over queries
        weighting = None if self.target == "queries" else self.query_weighting
        weights = query_weights(queries, reference, weighting)
        self._direction = queries.weighted_sum(self._groups.to(weights) * weights)

    def _flush(self) -> None:
        buffer = self._buffer
        if buffer is None:
            return
        known = buffer.first_not_finite is not None
        buffer.flush()
        if buffer.first_not_finite is not None and not known:
            warnings.warn(
                f"NaN or infinite gradients at step {buffer.first_not_finite}: this step and later "
                "ones like it are left out of the f-INE scores; lower the learning rate or clip "
                "the gradients",
                stacklevel=3,
            )

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def batch_index(batch: Any, n_train: int) -> Tensor:
    """The positions of a batch's examples in the training set, ``(m,)``.

    Raises:
        ValueError: no index in the batch, repeated or out of range.
    """
    if isinstance(batch, Mapping):
        index = batch.get("index")
    else:
        index = batch[2] if isinstance(batch, Sequence) and len(batch) > 2 else None
    if index is None:
        raise ValueError(
            'the batch carries no example indices: yield (x, y, index) or a mapping with "index", '
            "the position of each example in the training set"
        )
    index = torch.as_tensor(index)
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"the batch's index must be integers of shape (batch,), got {index.dtype} of shape "
            f"{tuple(index.shape)}"
        )
    # plain integers: on a few dozen numbers faster than three tensor operations
    positions = index.tolist()
    low, high = min(positions), max(positions)
    if low < 0 or high >= n_train:
        raise ValueError(
            f"the batch's index runs from {low} to {high}, but the training set has {n_train} "
            "examples; index must be the position in that set"
        )
    if len(set(positions)) != len(positions):
        raise ValueError("the batch's index repeats an example; draw batches without replacement")
    return index


def step_size(optimizer: Any) -> float:
    """The optimiser's present step size η_t.

    Raises:
        UnsupportedProblemError: parameter groups with different step sizes.
    """
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    if len(rates) != 1:
        raise UnsupportedProblemError(
            f"the optimiser's parameter groups have different step sizes {sorted(rates)}; f-INE "
            "needs one step size a step"
        )
    return rates.pop()


def complement_from_logit_gradients(grad: Tensor) -> Tensor:
    """1 − p_i from the cross-entropy's gradient at the logits ``(m, classes)``, ``(m,)``.

    That gradient is p − onehot(y), so its positive entries sum to Σ_{k≠y} p_k = 1 − p_y: a sum of
    positive numbers, without cancellation.
    """
    return grad.clamp_min(0.0).sum(1)


def refuse_other_losses(logits: Tensor, grad: Tensor) -> None:
    """Refuse a run whose loss is not the mean softmax cross-entropy of its last layer's output.

    Args:
        logits: output of the layer that ran last.
        grad: gradient of each example's own loss there; p − onehot(y) if all is as it should be.

    Raises:
        UnsupportedProblemError: it is not, so the margin's gradient cannot be read off.
    """
    valid = grad.ndim == 2
    if valid:
        p = torch.softmax(logits.to(grad.dtype), 1)
        label = (p - grad).argmax(1, keepdim=True)
        expected = p.scatter_add(1, label, torch.full_like(p[:, :1], -1.0))
        valid = bool(((grad - expected).abs() <= 1e-3).all())
    if not valid:
        raise UnsupportedProblemError(
            'observable="margin" needs the mean softmax cross-entropy of hard labels on the output '
            "of the last layer; the gradients at that output are not of this form. Use "
            'observable="loss"'
        )


__all__ = ["FINECallback"]
