"""One training run under Lightning, and the checkpoints that it leaves."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import Logger

from fine_bench import clock
from fine_bench import terminal as bars
from fine_bench.callback.base import InRunMethod
from fine_bench.data.batches import loader
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.gradients.batch_size import suitable_batch_size
from fine_bench.models.classifier import Classifier
from fine_bench.models.lr_schedule import lr_at
from fine_bench.retraining.train import epoch_order
from fine_bench.runner import checkpoints
from fine_bench.runner.backends.trained import TrainedRun, detected, folder_of, run_of
from fine_bench.runner.calls import build
from fine_bench.runner.fit import fit
from fine_bench.runner.monitor import Watcher
from fine_bench.runner.plan import Job
from fine_bench.seeds import derive, stream
from fine_bench.store.plausibility import CLOCK
from fine_bench.types import Checkpoint, InfluenceScores, LRSchedule, Target, TrainingSteps

_EVALUATION_BATCH = 1024


class Curves(pl.Callback):
    """Keeps what each epoch reported, for the record."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    # the module reports an epoch's training loss after the callbacks' end-of-epoch hooks, so the
    # numbers are complete when the next epoch starts, or training ends

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the numbers of the epoch before."""
        if trainer.current_epoch > 0:
            self._append(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Append the numbers of the last epoch."""
        self._append(trainer)

    def _append(self, trainer: pl.Trainer) -> None:
        for name in ("train_loss", "test_loss", "test_accuracy"):
            if name in trainer.callback_metrics:
                self.values.setdefault(name, []).append(float(trainer.callback_metrics[name]))


def images_of(job: Job) -> TaskData:
    """The data of a task with one class label an example.

    Raises:
        ConfigError: the task is of another kind.
    """
    if not isinstance(job.data, TaskData):
        raise ConfigError(
            f"task {job.data.name} is one of token sequences; this command takes tasks with "
            "class labels, for instance task=digits_mislabel"
        )
    return job.data


def build_model(job: Job) -> Classifier:
    """A freshly initialised LightningModule of the job's configuration."""
    trainer, data = job.config.trainer, images_of(job)
    seed = job.config.seed if trainer.init_seed is None else trainer.init_seed
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "initialisation"))
        net = build(
            job.config.model, "model", job.packages, tuple(data.x.shape[1:]), data.n_classes
        )
    return Classifier(
        net,
        data.n_classes,
        lr=trainer.lr,
        momentum=trainer.momentum,
        weight_decay=trainer.weight_decay,
        lr_schedule=cast(LRSchedule, trainer.lr_schedule),
    )


def order_seed(job: Job) -> int:
    """The seed that the order of the batches follows."""
    trainer = job.config.trainer
    return job.config.seed if trainer.order_seed is None else trainer.order_seed


def train_loader(job: Job) -> Any:
    """Shuffled batches; the order follows the run seed, or ``trainer.order_seed``."""
    trainer = job.config.trainer
    return loader(
        job.data.x,
        job.data.y,
        batch_size=trainer.batch_size,
        generator=stream(order_seed(job), "order"),
        shuffle=True,
    )


def steps_of(job: Job, net: torch.nn.Module) -> TrainingSteps:
    """What a run of this job does step by step: its seed says it, nothing has to be stored.

    Args:
        job: of the run.
        net: freshly initialised, by ``build_model``.
    """
    trainer, n = job.config.trainer, job.data.n_train
    order = stream(order_seed(job), "order")
    batches = [
        rows
        for _ in range(trainer.max_epochs)
        for rows in torch.split(epoch_order(n, trainer.batch_size, order), trainer.batch_size)
    ]
    schedule = cast(LRSchedule, trainer.lr_schedule)
    return TrainingSteps(
        initial={name: value.clone() for name, value in net.state_dict().items()},
        batches=batches,
        lr=[lr_at(schedule, trainer.lr, step, len(batches)) for step in range(len(batches))],
        optimizer="SGD",
        options={"momentum": trainer.momentum, "weight_decay": trainer.weight_decay},
    )


def stored(job: Job, say: Callable[[str], None]) -> TrainedRun | None:
    """The finished run of an earlier call, if its checkpoints are all there and its own."""
    folder = folder_of(job)
    trainer = job.config.trainer
    expected = -(-trainer.max_epochs // trainer.checkpoint_every)
    return checkpoints.read(
        folder,
        run_of(job),
        count=lambda: (len(list(folder.glob("*.ckpt"))), expected),
        load=lambda facts: _trained(job, folder, facts),
        say=say,
    )


def train(job: Job, callbacks: Sequence[Watcher], logger: Logger | None) -> TrainedRun:
    """Train one model, watched by ``callbacks``; keep every ``checkpoint_every``-th checkpoint.

    The checkpoints appear under their final name only when the run is complete.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    trainer_config = job.config.trainer
    folder = folder_of(job)
    module = build_model(job)
    test = loader(job.data.test_x, job.data.test_y, batch_size=_EVALUATION_BATCH, shuffle=False)
    # only one progress line a run, and none in a log file
    progress = trainer_config.progress and bars.shown()
    curves = Curves()
    with checkpoints.scratch(folder) as temporary:
        keep = ModelCheckpoint(
            dirpath=temporary,
            filename="{epoch:04d}",
            save_top_k=-1,
            every_n_epochs=1,
            save_weights_only=True,
            save_on_train_epoch_end=True,
        )
        done = fit(
            module,
            train_loader(job),
            epochs=trainer_config.max_epochs,
            seed=job.config.seed,
            callbacks=[*callbacks, curves, keep],
            test=test,
            logger=logger,
            progress=progress,
        )
        trainer = done.trainer
        facts = {
            "seconds": done.seconds - sum(callback.seconds for callback in callbacks),
            "seconds_with_callbacks": done.seconds,
            CLOCK: clock.in_use(),
            "n_steps": trainer.global_step,
            "test_accuracy": float(trainer.callback_metrics["test_accuracy"]),
            "test_loss": float(trainer.callback_metrics["test_loss"]),
            "train_loss": float(trainer.callback_metrics["train_loss"]),
            "curves": curves.values,
            "train_accuracy": accuracy(module, images_of(job)),
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "device": str(trainer.strategy.root_device),
        }
        for epoch, path in enumerate(sorted(temporary.glob("*.ckpt")), start=1):
            if (trainer_config.max_epochs - epoch) % trainer_config.checkpoint_every:
                path.unlink()
        return checkpoints.keep(
            temporary, folder, run_of(job), facts, lambda: _trained(job, temporary, facts)
        )


def train_auxiliary(job: Job, callbacks: Sequence[InRunMethod]) -> float:
    """Train the model of ``job.reseeded()`` to be watched only; nothing is kept of it.

    Returns:
        seconds of plain training, without the callbacks' own.
    """
    job = job.reseeded()
    done = fit(
        build_model(job),
        train_loader(job),
        epochs=job.config.trainer.max_epochs,
        seed=job.config.seed,
        callbacks=callbacks,
    )
    return done.seconds - sum(callback.seconds for callback in callbacks)


@torch.no_grad()
def accuracy(module: Classifier, data: TaskData) -> float:
    """Share of the training examples whose *given* label is predicted."""
    module.eval()
    right = 0
    for start in range(0, data.n_train, _EVALUATION_BATCH):
        rows = slice(start, start + _EVALUATION_BATCH)
        x = data.x[rows].to(module.device)
        right += int((module(x).argmax(1).cpu() == data.y[rows]).sum())
    return right / data.n_train


def describe(facts: Mapping[str, Any]) -> str:
    """What is said when training is done."""
    return (
        f"trained: test accuracy {facts['test_accuracy']:.3f}, given labels "
        f"{facts['train_accuracy']:.3f}, {facts['seconds']:.1f} s"
    )


def batch_size(job: Job, model: torch.nn.Module) -> int:
    """Examples that post-hoc methods take at a time: the task's, or fewer where layers are wide."""
    data = job.data
    return suitable_batch_size(model, data.loss, data.x, data.y, data.batch_size)


def measure(
    job: Job, target: Target, scores: InfluenceScores, facts: Mapping[str, Any]
) -> dict[str, float]:
    """Every declared metric that has what it needs (``metrics.registry``)."""
    return detected(job, target, scores, facts)


def _trained(job: Job, folder: Path, facts: Mapping[str, Any]) -> TrainedRun:
    describe(facts)  # facts of another form are no facts of a training
    kept = []
    for path in sorted(folder.glob("*.ckpt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        params = {
            name.removeprefix("net."): value
            for name, value in content["state_dict"].items()
            if name.startswith("net.")
        }
        kept.append(Checkpoint(params=params, lr=content["lr"], step=int(content["global_step"])))
    net = build_model(job).net
    steps = steps_of(job, net)
    net.load_state_dict(dict(kept[-1].params))
    return TrainedRun(net, kept, facts, steps)
