"""What watching costs: f-INE in-batch against plain Lightning training, paired.

    python benchmarks/callback_overhead.py [--model mlp|cnn|transformer|resnet9-bn|all|…]
        [--steps N] [--pairs N] [--threads 2] [--accelerator cpu] [--clock wall|cpu]
        [--settings NAME …] [--out results/overhead]

Each pair trains the same steps plainly and watched, in alternating order, in this one process;
the printed ratio is the median over pairs, with the smallest and largest pair beside it. What it
has above 1 is in two parts. *Arithmetic* is what f-INE's formulas ask for, timed on its own within
the watched run: the products of the steps' gradients, the queries' directions, the sketches, and
the effects and sums that follow. *Overhead* is the rest, by difference: hooks, Lightning's events,
Python, copies, and a training that finds its caches used. ``--clock cpu`` takes the process's CPU
seconds, which say more on a machine that others use too. Data are
random numbers and tokens (time does not depend on their values); networks and batches are those of
``overhead_models.py``: 64 images for ``mlp`` and ``cnn``, 64 sequences of 32 tokens for
``transformer``, 16 of 128 for ``transformer-long``, four layers both, 64 photographs of 32 × 32 for
``resnet9-bn``, whose batch normalisation is read by rows; ``resnet18`` and ``transformer-100m`` are
for ``--accelerator gpu``. ``--out`` writes every pair's seconds to a CSV and a Markdown table of
the ratios.

Settings: ``self`` with the exact Gram matrix of the batch (margin, and loss), with 16 reference
columns of it (8 in batches of 16), and with the exact one at every fourth step; from sketches of 16
at every step and every second one (the ``mlp`` has no layer that is sketched); ``validation`` with
500 queries (128 and 64 for the long transformers) whose directions are computed anew every 20, 50
and 100 steps.

Arithmetic bounds the exact Gram matrix from below. For a linear layer with P weights, a batch of B
sequences of T tokens costs 3 B T P multiplications in training; forming each example's gradient
costs B T P and the Gram matrix B² P, together (T + B)/(3 T) of it. With images in a linear layer
(T = 1) it follows from the layer's inputs instead, B² (I + O) for I inputs and O outputs. A sketch
of k takes B T k (I + O + k).
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytorch_lightning as pl
import torch
from outputs import Outputs, add_force
from overhead_models import CLASSES, SMALL, WORKLOADS, Workload
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.data.batches import loader
from fine_bench.fine.statistic import Statistic
from fine_bench.fine.step_queue import StepQueue
from fine_bench.gradients.projection.sketch import Sketch
from fine_bench.models.classifier import Classifier

Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}

FORMULAS = (
    (Statistic, ("of_step", "of_steps", "of_rows", "renew_directions")),
    (StepQueue, ("take",)),
    (Sketch, ("__call__", "sum")),
)
"""Where f-INE's arithmetic is done; none of them calls another one."""


class Seconds(NamedTuple):
    """Of one training run.

    Attributes:
        all: of the run.
        arithmetic: in ``FORMULAS``.
    """

    all: float
    arithmetic: float


@contextmanager
def timed_formulas(clock: Clock) -> Iterator[list[float]]:
    """Meanwhile, what each call of ``FORMULAS`` takes is added to the list."""
    found: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            start = clock()
            result = function(*args, **named)
            found.append(clock() - start)
            return result

        return call

    before = [(kind, name, vars(kind)[name]) for kind, names in FORMULAS for name in names]
    for kind, name, function in before:
        setattr(kind, name, timed(function))
    try:
        yield found
    finally:
        for kind, name, function in before:
            setattr(kind, name, function)


def seconds(
    load: Workload,
    steps: int,
    callbacks: list[pl.Callback],
    accelerator: str,
    clock: Clock = time.perf_counter,
) -> Seconds:
    """Time of one training run."""
    torch.manual_seed(0)
    n = load.batch * steps
    x, y = load.inputs(n), torch.randint(CLASSES, (n,))
    module = Classifier(load.make(), CLASSES, lr=0.01)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    batches = loader(x, y, batch_size=load.batch, generator=torch.Generator(), shuffle=True)
    with timed_formulas(clock) as arithmetic:
        start = clock()
        trainer.fit(module, batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Seconds(clock() - start, sum(arithmetic))


def settings(load: Workload) -> dict[str, Callable[[], FINECallback]]:
    """What is measured, by name."""
    columns = min(16, load.batch // 2)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (load.n_query,), generator=g)
    queries = TensorDataset(load.inputs(load.n_query, g), labels)

    def validation(refresh: int) -> Callable[[], FINECallback]:
        return lambda: FINECallback("validation", queries=queries, refresh_every=refresh)

    return {
        "self, exact Gram, margin": lambda: FINECallback("self"),
        "self, exact Gram, loss": lambda: FINECallback("self", "loss"),
        f"self, {columns} reference columns": lambda: FINECallback(
            "self", reference_columns=columns
        ),
        "self, sketch of 16": lambda: FINECallback("self", sketch=16),
        "self, sketch of 16, every 2nd step": lambda: FINECallback(
            "self", sketch=16, observe_every=2
        ),
        "self, exact Gram, every 4th step": lambda: FINECallback("self", observe_every=4),
        **{f"validation, refreshed every {k} steps": validation(k) for k in (20, 50, 100)},
    }


def measure(
    load: Workload,
    steps: int,
    pairs: int,
    make: Callable[[], FINECallback],
    accelerator: str,
    clock: Clock = time.perf_counter,
) -> list[dict[str, float]]:
    """Seconds of each pair: ``plain``, ``watched``, and ``arithmetic`` of the watched run."""
    found = []
    for pair in range(pairs):
        times = {}
        for watched in (False, True) if pair % 2 == 0 else (True, False):
            callbacks: list[pl.Callback] = [make()] if watched else []
            times[watched] = seconds(load, steps, callbacks, accelerator, clock)
        plain, with_it = times[False], times[True]
        found.append({"plain": plain.all, "watched": with_it.all, "arithmetic": with_it.arithmetic})
    return found


def summary(pairs: pd.DataFrame) -> dict[str, float]:
    """Medians over pairs, in units of the plain training: what is above 1, and of what it is."""
    ratio, arithmetic = pairs.watched / pairs.plain, pairs.arithmetic / pairs.plain
    return {
        "ratio": ratio.median(),
        "low": ratio.min(),
        "high": ratio.max(),
        "arithmetic": arithmetic.median(),
        "overhead": (ratio - 1 - arithmetic).median(),
    }


def markdown(frame: pd.DataFrame, command: str, about: str) -> str:
    """The medians of all pairs as a Markdown table."""
    rows = [
        "| model | setting | times plain | of it arithmetic | overhead | pairs | plain step, ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for (model, setting), some in frame.groupby(["model", "setting"], sort=False):
        found = summary(some)
        rows.append(
            f"| {model} | {setting} | {found['ratio']:.2f} ({found['low']:.2f} to "
            f"{found['high']:.2f}) | {found['arithmetic']:.2f} | {found['overhead']:.2f} "
            f"| {len(some)} | {1e3 * (some.plain / some.steps).median():.2f} |"
        )
    text = (
        f"# What watching costs\n\nMade by `{command}` ({about}). Medians of paired runs, with the "
        "smallest and the largest pair. *Times plain* is 1 + arithmetic + overhead, but for the "
        "medians: *arithmetic* is what the formulas ask for (products of gradients, directions, "
        "effects), timed on its own in the watched runs; *overhead* is the rest (hooks, events, "
        "Python, copies). See the script for what is measured.\n\n"
    )
    return text + "\n".join(rows) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*WORKLOADS, "all"), default="mlp")
    parser.add_argument("--steps", type=int, help="of a run; by default the workload's own number")
    parser.add_argument("--pairs", type=int, help="by default the workload's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--settings", nargs="*", help="names, or their beginnings; all by default")
    parser.add_argument("--out", type=Path, help="for a CSV and a Markdown table, without ending")
    add_force(parser)
    arguments = parser.parse_args()
    out: Path | None = arguments.out
    tables = [] if out is None else [out.with_suffix(ending) for ending in (".csv", ".md")]
    files = Outputs(tables, force=arguments.force)
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = f"{arguments.threads} CPU threads"
    if arguments.accelerator != "cpu" and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    about = f"{device}, torch {torch.__version__}, {platform.machine()}"
    about += ", CPU seconds" if arguments.clock == "cpu" else ""
    clock = CLOCKS[arguments.clock]

    # "all" is what a CPU can do
    lines: list[dict[str, str | float]] = []
    for model in SMALL if arguments.model == "all" else (arguments.model,):
        load = WORKLOADS[model]
        steps = arguments.steps or load.steps
        pairs = arguments.pairs or load.pairs
        size = f"batch {load.batch}, {steps} steps"
        print(f"{model}, {size}, {pairs} pairs, {about}", flush=True)
        seconds(load, min(50, steps), [FINECallback("self")], arguments.accelerator)  # warm up
        for name, make in settings(load).items():
            if arguments.settings and not name.startswith(tuple(arguments.settings)):
                continue
            times = measure(load, steps, pairs, make, arguments.accelerator, clock)
            found = summary(pd.DataFrame(times))
            step = 1e3 * statistics.median(pair["plain"] for pair in times) / steps
            print(
                f"  {name:<40} {found['ratio']:.3f} times plain training "
                f"({found['low']:.3f} to {found['high']:.3f}; arithmetic "
                f"{found['arithmetic']:.3f}, overhead {found['overhead']:.3f}; "
                f"plain step {step:.2f} ms)",
                flush=True,
            )
            lines += [{"model": model, "setting": name, "steps": steps} | pair for pair in times]
    if tables:
        command = "python benchmarks/callback_overhead.py"
        command += f" --model {arguments.model}"
        if arguments.pairs:
            command += f" --pairs {arguments.pairs}"
        if arguments.clock != "wall":
            command += f" --clock {arguments.clock}"
        frame = pd.DataFrame(lines)
        files.write(tables[0], frame)
        files.write(tables[1], markdown(frame, command, about))


if __name__ == "__main__":
    main()
