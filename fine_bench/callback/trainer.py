"""What f-INE's callback asks of a Lightning Trainer, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.utils.data import Dataset

from fine_bench.callback.packages import is_a
from fine_bench.fine.aside import beside_training
from fine_bench.fine.batch_adapter import BatchAdapter
from fine_bench.fine.short_steps import refuse_short_steps
from fine_bench.fine.training_data import TrainingData
from fine_bench.types import UnsupportedProblemError

if TYPE_CHECKING:
    import pytorch_lightning as pl

NO_BACKWARD = (
    "no backward pass was seen; under manual optimisation call self.manual_backward(loss) instead "
    "of loss.backward(), and let training_step return a loss otherwise"
)
AROUND = (
    "the optimiser's steps go around Lightning, which announces none of them; take them through "
    "opt = self.optimizers(); opt.step(), without use_pl_optimizer=False, optimisers of your own, "
    "updates by hand or an optimizer_step of your own that does not hand on its closure"
)


@dataclass
class Events:
    """What Lightning told of an epoch so far.

    Attributes:
        batches, backwards, steps: that began, that ended, and that were announced.
        observed, around: steps before the epoch that were observed, and that were not announced.
    """

    batches: int = 0
    backwards: int = 0
    steps: int = 0
    observed: int = 0
    around: int = 0

    def reason(self, observed: int, around: int) -> str:
        """Why nothing, or not all of it, could be observed; empty if Lightning told of it.

        Args:
            observed, around: as in the attributes, now.
        """
        if not self.batches or (observed > self.observed and around == self.around):
            return ""
        if not self.backwards:
            return NO_BACKWARD
        return AROUND if not self.steps or around > self.around else ""


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse ways of spreading a model over processes in which no process holds its gradients.

    Raises:
        UnsupportedProblemError: another strategy than one device or distributed data parallel.
    """
    strategy = trainer.strategy
    one = is_a(strategy, "SingleDeviceStrategy")
    data_parallel = is_a(strategy, "DDPStrategy") and not is_a(strategy, "DeepSpeedStrategy")
    if not one and not data_parallel:
        raise UnsupportedProblemError(
            f"the strategy {type(strategy).__name__} is not supported: where parameters are "
            "spread over processes (FSDP, DeepSpeed, model parallelism), no process holds a "
            "layer's whole inputs, gradients and optimiser state, from which f-INE takes its "
            'products; use strategy="ddp" or one device'
        )


def refuse_optimizers(trainer: pl.Trainer) -> None:
    """Refuse runs without the one optimiser whose steps are observed.

    Raises:
        UnsupportedProblemError: none, or several.
    """
    n = len(trainer.optimizers)
    if n != 1:
        raise UnsupportedProblemError(
            f"f-INE observes the steps of one optimiser, this run has {n}; let "
            "configure_optimizers return one, with parameter groups if need be"
        )


def training_set(trainer: pl.Trainer, who: str) -> Dataset[Any]:
    """The data set behind the training loader.

    Args:
        who: the callback's name, for the error.

    Raises:
        ValueError: there are several loaders, or one without a data set.
    """
    loader = trainer.train_dataloader
    dataset: Dataset[Any] | None = getattr(loader, "dataset", None)
    if dataset is None:
        raise ValueError(
            f"{who} needs one DataLoader over a map-style dataset as the training data, got "
            f"{type(loader).__name__}"
        )
    return dataset


def training_data(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    who: str,
    adapter: BatchAdapter | None = None,
    n: int | None = None,
) -> TrainingData:
    """The training examples by position, as the module takes them.

    Args:
        trainer: of the run.
        module: the model.
        who: the callback's name, for errors.
        adapter: reads batches.
        n: number of training examples, where the data set does not tell.

    Raises:
        TypeError: nobody says how many examples there are.
        ValueError: there are several loaders, or one without a data set.
    """
    return TrainingData(
        training_set(trainer, who),
        getattr(trainer.train_dataloader, "collate_fn", None),
        n=n,
        device=module.device,
        dtype=next(module.parameters()).dtype,
        adapter=adapter,
    )


def refuse_short_batches(trainer: pl.Trainer, n_train: int) -> None:
    """Refuse a run whose steps are too short for any example to be observed in-batch.

    Args:
        trainer: of the run.
        n_train: number of training examples.

    Raises:
        UnsupportedProblemError: they are.
    """
    loader = trainer.train_dataloader
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    known = isinstance(size, int) and trainer.lightning_module.automatic_optimization
    # a GradientAccumulationScheduler has other numbers for later epochs
    later = [getattr(callback, "scheduling", {}) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    accumulates = [n for schedule in later for n in schedule.values()]
    parts = max([trainer.accumulate_grad_batches, *accumulates]) * trainer.world_size
    refuse_short_steps(size if known else None, parts, n_train)


def loss_scale(trainer: pl.Trainer) -> float:
    """The factor by which 16-bit precision multiplies the loss before the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def step_is_taken(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Whether the optimiser will step: 16-bit precision leaves out what is not finite."""
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return True
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return all(bool(torch.isfinite(g).all()) for g in grads if g is not None)


__all__ = [
    "AROUND",
    "Events",
    "beside_training",
    "loss_scale",
    "refuse_optimizers",
    "refuse_short_batches",
    "refuse_strategy",
    "step_is_taken",
    "training_data",
    "training_set",
]
