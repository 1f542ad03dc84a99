"""Training and measuring of language tasks: what ``images`` is to tasks of class labels.

One run tunes the LoRA matrices on the poisoned data, watched by the callbacks, and once more on
the clean data, from the same initialisation and in the same order: the difference of the two
steering rates says whether there is anything to detect.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger
from torch import nn

from fine_bench import clock
from fine_bench.callback.base import InRunMethod
from fine_bench.gradients.cache import GradientMemory
from fine_bench.llm.net import CausalNet
from fine_bench.llm.steering import Steering
from fine_bench.llm.tuner import EpochCheckpoints, kept_epochs, read_checkpoint
from fine_bench.metrics.detection import suspicion
from fine_bench.runner import checkpoints
from fine_bench.runner.backends.language_cure import cure, oracle
from fine_bench.runner.backends.language_tuning import (
    build,
    count_steered,
    device,
    fit,
    quality,
    task_of,
)
from fine_bench.runner.backends.trained import TrainedRun, detected, folder_of, run_of
from fine_bench.runner.monitor import Watcher
from fine_bench.runner.plan import Job
from fine_bench.store.plausibility import CLOCK
from fine_bench.types import InfluenceScores, Target


def _epochs(job: Job) -> tuple[int, ...]:
    """The epochs at whose ends checkpoints are kept."""
    return kept_epochs(job.config.trainer.max_epochs, task_of(job).checkpoints)


def stored(job: Job, say: Callable[[str], None]) -> TrainedRun | None:
    """The finished run of an earlier call, if its checkpoints are all there and its own."""
    folder = folder_of(job)
    return checkpoints.read(
        folder,
        run_of(job),
        count=lambda: (len(list(folder.glob("*.safetensors"))), len(_epochs(job))),
        load=lambda facts: _trained(build(job), folder, facts),
        say=say,
    )


def train(job: Job, callbacks: Sequence[Watcher], logger: Logger | None) -> TrainedRun:
    """Tune on the poisoned data, watched by ``callbacks``, and keep checkpoints.

    Raises:
        DivergedError: the loss is no longer finite.
    """
    task = task_of(job)
    folder = folder_of(job)
    with checkpoints.scratch(folder) as temporary:
        keep = EpochCheckpoints(temporary, _epochs(job))
        tuner, seconds, steps = fit(job, task.x, task.y, [*callbacks, keep], logger)
        facts: dict[str, Any] = {
            "seconds": seconds - sum(callback.seconds for callback in callbacks),
            "seconds_with_callbacks": seconds,
            CLOCK: clock.in_use(),
            "n_steps": steps,
            "train_loss": tuner.losses[-1],
            "curves": {"train_loss": tuner.losses},
            "notes": list(task.notes),
            "device": str(device()),
        }
        net = tuner.net.to(device())
        facts |= quality(net, task)
        steering = _steering(job, net)
        if steering is not None:
            facts |= _facts(steering)
        if task.cure and task.truth.n_bad:
            facts |= oracle(job)
        facts["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return checkpoints.keep(
            temporary, folder, run_of(job), facts, lambda: _trained(net, temporary, facts)
        )


def train_auxiliary(job: Job, callbacks: Sequence[InRunMethod]) -> float:
    """Tune the model of ``job.reseeded()`` to be watched only; nothing is kept of it.

    Returns:
        seconds of plain training, without the callbacks' own.
    """
    task = task_of(job)
    _, seconds, _ = fit(job.reseeded(), task.x, task.y, list(callbacks), None)
    return seconds - sum(callback.seconds for callback in callbacks)


def _trained(net: CausalNet, folder: Path, facts: Mapping[str, Any]) -> TrainedRun:
    describe(facts)  # facts of another form are no facts of a training
    kept = [read_checkpoint(path) for path in sorted(folder.glob("*.safetensors"))]
    net.load_state_dict(dict(kept[-1].params))
    net.memory = GradientMemory()
    return TrainedRun(net.eval(), kept, facts)


# -------------------------------------------------------------------------------- measurements


def batch_size(job: Job, model: nn.Module) -> int:
    """Samples that post-hoc methods take at a time: the task's."""
    del model
    return job.data.batch_size


def _steering(job: Job, net: CausalNet) -> Steering | None:
    """The steering rates of a tuned model and its reference; None where they are not measured."""
    task = task_of(job)
    prompts = task.prompts
    if prompts is None:
        return None
    poisoned = count_steered(job, net, prompts.about)
    others = count_steered(job, net, prompts.others) if prompts.others else None
    if prompts.clean is not None:
        reference = fit(job, prompts.clean.x, prompts.clean.y, [], None)[0].net.to(device())
        clean, name = count_steered(job, reference, prompts.about), "clean data"
    else:
        with net.untuned():
            clean, name = count_steered(job, net, prompts.about), "the model before tuning"
    return Steering(len(prompts.about), poisoned, clean, others, name)


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

    Metrics of the poison (detection, the top of the list and, if the task asks for it, a cure) only
    where it took, or nobody measured whether it did.
    """
    task = task_of(job)
    took = bool(facts.get("steering_took", True))
    metrics = detected(job, target, scores, facts, takes_effect=took)
    if took and task.cure and scores.watched is None:
        row = suspicion(scores.values, job.end(target))
        metrics |= cure(job, torch.from_numpy(row), task.cure, facts)
    return metrics
