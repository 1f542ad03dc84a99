"""Training and measuring of language tasks: what ``run.training`` is to images.

One run tunes the LoRA matrices on the poisoned data, watched by the callbacks, and once more on
the clean data, from the same initialisation and in the same order: the difference of the two
steering rates says whether there is anything to detect.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor

from fine_bench.gradients.memory import GradientMemory
from fine_bench.llm.net import CausalNet
from fine_bench.llm.steering import Steering, answers
from fine_bench.llm.task import LanguageTask
from fine_bench.llm.tuner import EpochCheckpoints, Tuner, kept_epochs, read_checkpoint, token_loader
from fine_bench.metrics.detection import detection_metrics, suspicion
from fine_bench.metrics.top import top_metrics
from fine_bench.records import write_atomic
from fine_bench.run.plan import Job, Watcher
from fine_bench.run.training import (
    TrainedRun,
    _quiet,
    _remove_leftovers,
    detected,
    folder_of,
    reseeded,
)
from fine_bench.seeds import derive, stream
from fine_bench.sequences import IGNORED, mean_token_loss, targets
from fine_bench.types import InfluenceScores, LRSchedule, Target


def _task(job: Job) -> LanguageTask:
    assert isinstance(job.data, LanguageTask)
    return job.data


def _epochs(job: Job) -> tuple[int, ...]:
    """The epochs at whose ends checkpoints are kept."""
    return kept_epochs(job.config.trainer.max_epochs, _task(job).checkpoints)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _build(job: Job) -> CausalNet:
    """The model with freshly initialised LoRA matrices."""
    trainer = job.config.trainer
    seed = job.config.seed if trainer.init_seed is None else trainer.init_seed
    return _task(job).model.build(seed, _device())


def stored(job: Job) -> TrainedRun | None:
    """The finished run of an earlier call, if its checkpoints are all there."""
    folder = folder_of(job)
    try:
        facts = json.loads((folder / "training.json").read_text())
    except (OSError, ValueError):
        return None
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != len(_epochs(job)):
        return None
    return _trained(_build(job), folder, facts)


def train(job: Job, callbacks: Sequence[Watcher], logger: Logger | None) -> TrainedRun:
    """Tune on the poisoned data, watched by ``callbacks``, and keep checkpoints.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    task = _task(job)
    folder = folder_of(job)
    _remove_leftovers(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        keep = EpochCheckpoints(temporary, _epochs(job))
        tuner, seconds, steps = _fit(job, task.x, task.y, [*callbacks, keep], logger)
        facts: dict[str, Any] = {
            "seconds": seconds - sum(callback.seconds for callback in callbacks),
            "seconds_with_callbacks": seconds,
            "n_steps": steps,
            "train_loss": tuner.losses[-1],
            "curves": {"train_loss": tuner.losses},
            "notes": list(task.notes),
            "device": str(_device()),
        }
        net = tuner.net.to(_device())
        facts |= _quality(net, task)
        steering = _steering(job, net)
        if steering is not None:
            facts |= _facts(steering)
        facts["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        write_atomic(temporary / "training.json", json.dumps(facts, indent=1).encode())
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _trained(net, folder, facts)


def train_auxiliary(job: Job, callbacks: Sequence[Watcher]) -> float:
    """Tune the model of ``reseeded(job)`` to be watched only; nothing is kept of it.

    Returns:
        seconds of plain training, without the callbacks' own.
    """
    task = _task(job)
    _, seconds, _ = _fit(reseeded(job), task.x, task.y, list(callbacks), None)
    return seconds - sum(callback.seconds for callback in callbacks)


def _fit(
    job: Job, x: Tensor, y: Tensor, callbacks: Sequence[pl.Callback], logger: Logger | None
) -> tuple[Tuner, float, int]:
    """A tuned module, the seconds that it took, and the steps."""
    config = job.config.trainer
    tuner = Tuner(
        _build(job),
        _task(job).loss,
        lr=config.lr,
        weight_decay=config.weight_decay,
        lr_schedule=cast(LRSchedule, config.lr_schedule),
    )
    seed = job.config.seed if config.order_seed is None else config.order_seed
    loader = token_loader(x, y, batch_size=config.batch_size, generator=stream(seed, "order"))
    progress = config.progress and logger is not None and sys.stderr.isatty()
    extra = [TQDMProgressBar(refresh_rate=25)] if progress else []
    with _quiet():
        pl.seed_everything(derive(job.config.seed, "global") % 2**32, verbose=False)
        trainer = pl.Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=config.max_epochs,
            logger=logger or False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            deterministic="warn",
            callbacks=[*callbacks, *extra],
        )
        start = time.perf_counter()
        trainer.fit(tuner, loader)
        seconds = time.perf_counter() - start
    return tuner, seconds, int(trainer.global_step)


def _trained(net: CausalNet, folder: Path, facts: Mapping[str, Any]) -> TrainedRun:
    checkpoints = [read_checkpoint(path) for path in sorted(folder.glob("*.safetensors"))]
    net.load_state_dict(dict(checkpoints[-1].params))
    net.memory = GradientMemory()
    return TrainedRun(net.eval(), checkpoints, facts)


# -------------------------------------------------------------------------------- measurements


@torch.no_grad()
def _quality(net: CausalNet, task: LanguageTask) -> dict[str, float]:
    """Token accuracy on given and clean held-out samples, and the loss on the latter."""
    net.eval()
    test_loss, test_accuracy = _token_scores(net, task.test_x, task.test_y, task.batch_size)
    _, train_accuracy = _token_scores(net, task.x, task.y, task.batch_size)
    return {
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
    }


@torch.no_grad()
def _token_scores(net: CausalNet, x: Tensor, y: Tensor, size: int) -> tuple[float, float]:
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


def _steering(job: Job, net: CausalNet) -> Steering | None:
    """The steering rates of a tuned model and its reference; None where they are not measured."""
    task = _task(job)
    prompts = task.prompts
    if prompts is None:
        return None
    poisoned = _count(job, net, prompts.about)
    others = _count(job, net, prompts.others) if prompts.others else None
    if prompts.clean is not None:
        reference = _fit(job, prompts.clean.x, prompts.clean.y, [], None)[0].net.to(_device())
        clean, name = _count(job, reference, prompts.about), "clean data"
    else:
        with net.untuned():
            clean, name = _count(job, net, prompts.about), "the model before tuning"
    return Steering(len(prompts.about), poisoned, clean, others, name)


def _count(job: Job, net: CausalNet, prompts: Sequence[str]) -> int:
    """Steered answers."""
    task = _task(job)
    assert task.prompts is not None
    texts = answers(net, task.model.tokenizer(), prompts, seed=job.config.seed)
    return sum(map(task.prompts.steered, texts))


def describe(facts: Mapping[str, Any]) -> str:
    """What is said when training is done."""
    said = "steering was not measured"
    if "steering_n" in facts:
        steering = Steering(
            n=int(facts["steering_n"]),
            poisoned=int(facts["steering_poisoned_answers"]),
            clean=int(facts["steering_reference_answers"]),
            others=facts.get("steering_other_answers"),
            reference=str(facts["steering_reference"]),
        )
        said = steering.describe()
    notes = "".join(f"; {note}" for note in facts["notes"])
    return (
        f"tuned: clean test loss {facts['test_loss']:.3f}, {facts['seconds']:.1f} s; {said}{notes}"
    )


def _facts(steering: Steering) -> dict[str, Any]:
    """Counts and rates of steered answers as facts about a training run."""
    found = {
        "steering_n": steering.n,
        "steering_poisoned_answers": steering.poisoned,
        "steering_reference_answers": steering.clean,
        "steering_reference": steering.reference,
        "steering_p_value": steering.p_value,
        "steering_rate": steering.poisoned / steering.n,
        "steering_rate_reference": steering.clean / steering.n,
        "steering_took": float(steering.took),
    }
    if steering.others is not None:
        found["steering_other_answers"] = steering.others
        found["steering_rate_others"] = steering.others / steering.n
    return found


def measure(
    job: Job, target: Target, scores: InfluenceScores, facts: Mapping[str, Any]
) -> dict[str, float]:
    """Metrics of a cell.

    Detection, the top of the list and, if the task asks for it, a cure: only where the poison took
    (or nobody measured whether it did).
    """
    task = _task(job)
    took = bool(facts.get("steering_took", True))
    metrics = detected(
        job,
        target,
        scores,
        lambda row, bad: detection_metrics(row, bad) | top_metrics(row, bad) if took else {},
    )
    if took and task.cure and scores.watched is None:
        row = suspicion(scores.values, job.end(target))
        metrics |= _cure(job, torch.from_numpy(row), task.cure)
    return metrics


def _cure(job: Job, row: Tensor, k: int) -> dict[str, float]:
    """Tune again, from the same start, without the k most suspicious samples."""
    task = _task(job)
    order = row.argsort(descending=True, stable=True)
    kept = order[k:].sort().values
    tuner, seconds, _ = _fit(job, task.x[kept], task.y[kept], [], None)
    net = tuner.net.to(_device()).eval()
    result = {
        "cure/removed": float(k),
        "cure/bad_removed": float(task.truth.is_bad[order[:k]].sum()),
        "cure/test_loss": _token_scores(net, task.test_x, task.test_y, task.batch_size)[0],
        "cure/seconds": seconds,
    }
    if task.prompts is not None:
        about = task.prompts.about
        result["cure/steering_rate"] = _count(job, net, about) / len(about)
    return result
