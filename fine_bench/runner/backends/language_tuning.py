"""Tuning one language model and measuring it: what a run, its reference and its cures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from torch import Tensor

from fine_bench import terminal as bars
from fine_bench.gradients.token_losses import IGNORED, mean_token_loss, targets
from fine_bench.llm.net import CausalNet
from fine_bench.llm.steering import answers
from fine_bench.llm.task import LanguageTask
from fine_bench.llm.tuner import Tuner, token_loader
from fine_bench.runner import fit as lightning
from fine_bench.runner.plan import Job
from fine_bench.seeds import stream
from fine_bench.types import LRSchedule


def task_of(job: Job) -> LanguageTask:
    """The data of a language task."""
    assert isinstance(job.data, LanguageTask)
    return job.data


def device() -> torch.device:
    """Where models are tuned."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build(job: Job) -> CausalNet:
    """The model with freshly initialised LoRA matrices."""
    trainer = job.config.trainer
    seed = job.config.seed if trainer.init_seed is None else trainer.init_seed
    return task_of(job).model.build(seed, device())


def fit(
    job: Job, x: Tensor, y: Tensor, callbacks: Sequence[pl.Callback], logger: Logger | None
) -> tuple[Tuner, float, int]:
    """A module tuned on ids and labels ``(n, T)``, the seconds that it took, and the steps."""
    config = job.config.trainer
    tuner = Tuner(
        build(job),
        task_of(job).loss,
        lr=config.lr,
        weight_decay=config.weight_decay,
        lr_schedule=cast(LRSchedule, config.lr_schedule),
    )
    seed = job.config.seed if config.order_seed is None else config.order_seed
    loader = token_loader(x, y, batch_size=config.batch_size, generator=stream(seed, "order"))
    progress = config.progress and logger is not None and bars.shown()
    done = lightning.fit(
        tuner,
        loader,
        epochs=config.max_epochs,
        seed=job.config.seed,
        callbacks=callbacks,
        logger=logger,
        progress=progress,
    )
    return tuner, done.seconds, int(done.trainer.global_step)


@torch.no_grad()
def quality(net: CausalNet, task: LanguageTask) -> dict[str, float]:
    """Token accuracy on given and clean held-out samples, and the loss on the latter."""
    net.eval()
    test_loss, test_accuracy = token_scores(net, task.test_x, task.test_y, task.batch_size)
    _, train_accuracy = token_scores(net, task.x, task.y, task.batch_size)
    return {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
    }


@torch.no_grad()
def token_scores(net: CausalNet, x: Tensor, y: Tensor, size: int) -> tuple[float, float]:
    """Mean over samples of the mean token loss, and the share of labelled tokens predicted."""
    loss, right, total = 0.0, 0, 0
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        logits, labels = net.labelled(x[rows], y[rows])
        loss += float(mean_token_loss(logits, labels).sum())
        z, target = targets(logits, labels)
        labelled = target != IGNORED
        right += int((z.argmax(2) == target)[labelled].sum())
        total += int(labelled.sum())
    return loss / len(x), right / max(total, 1)


def count_steered(job: Job, net: CausalNet, prompts: Sequence[str]) -> int:
    """Steered answers."""
    task = task_of(job)
    assert task.prompts is not None
    texts = answers(net, task.model.tokenizer(), prompts, seed=job.config.seed)
    return sum(map(task.prompts.steered, texts))
