"""What watching costs in a plain loop, in Lightning and in Transformers' Trainer: the same steps.

    python benchmarks/loop_overhead.py [--model mlp|cnn|…|lora] [--steps N] [--pairs N]
        [--threads 1] [--out results/loop_overhead]

Networks and batches are those of ``overhead_models.py``, the question is ``self`` with margins. A
run trains the same steps in the same order, plainly and watched, in each of the three ways; the
ways take turns in an order that changes from pair to pair. What watching adds is the difference of
two runs of one way, and stands in units of a step of the plain loop, so that what a trainer itself
costs is in neither. Time is that of this process's processor, which does not count what other
programs take of the machine; ``--wall`` takes the clock on the wall.

``--model lora`` asks about a language model with LoRA under Transformers' Trainer instead: times
plain training, for *self* with the loss.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from outputs import Outputs, add_force
from overhead_models import CLASSES, WORKLOADS, Workload
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fine_bench
from fine_bench.callback import FINECallback
from fine_bench.llm.trainer_callback import FINETrainerCallback
from fine_bench.models.classifier import Classifier

WAYS = ("plain loop", "Lightning", "Transformers")
LR = 0.01


def plain_loop(load: Workload, data: TensorDataset, watched: bool) -> None:
    """A loop in plain PyTorch."""
    net = load.make()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    fine: Any = None
    if watched:
        fine = fine_bench.watch(net, optimizer=optimizer, train_size=len(data))
    for x, y, index in DataLoader(data, batch_size=load.batch):
        if watched:
            fine.batch(index)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    if watched:
        fine.finish()
        fine.scores()


def lightning(load: Workload, data: TensorDataset, watched: bool) -> None:
    """A Lightning Trainer."""
    callback = FINECallback()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if watched else [],
    )
    module = Classifier(load.make(), CLASSES, lr=LR)
    trainer.fit(module, DataLoader(data, batch_size=load.batch))
    if watched:
        callback.scores()


class Named(Dataset[dict[str, Tensor]]):
    """The examples by name."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y, _ = self.data[i]
        return {"x": x, "labels": y}


class Model(nn.Module):
    """A network in the manner of Transformers."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Ordered(Trainer):  # type: ignore[misc]
    """Does not shuffle."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments_of(folder: str, batch: int, **options: Any) -> TrainingArguments:
    """One epoch of plain SGD."""
    return TrainingArguments(
        folder,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        **options,
    )


def transformers(load: Workload, data: TensorDataset, watched: bool) -> None:
    """A Trainer of Transformers."""
    callback = FINETrainerCallback(observable="margin")
    with tempfile.TemporaryDirectory() as folder:
        Ordered(
            Model(load.make()),
            arguments_of(folder, load.batch),
            train_dataset=Named(data),
            callbacks=[callback] if watched else [],
        ).train()
    if watched:
        callback.scores()


class Texts(Dataset[dict[str, Tensor]]):
    """Random sequences, every token of which is trained on."""

    def __init__(self, n: int, length: int, vocabulary: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocabulary, (n, length), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def language_model(steps: int, watched: bool, *, batch: int = 8, length: int = 64) -> None:
    """LoRA matrices of rank 8 in every linear layer of a small Llama, two batches a step."""
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
    callback = FINETrainerCallback()
    with tempfile.TemporaryDirectory() as folder:
        Ordered(
            get_peft_model(LlamaForCausalLM(config), lora),
            arguments_of(folder, batch, gradient_accumulation_steps=2),
            train_dataset=Texts(2 * batch * steps, length, config.vocab_size),
            callbacks=[callback] if watched else [],
        ).train()
    if watched:
        callback.scores()


def compare_language_model(steps: int, pairs: int, clock: Callable[[], float]) -> None:
    """Print what watching adds to the training of a language model."""
    ratios = []
    for pair in range(-1, pairs):  # the first one warms up
        seconds = {}
        for watched in (False, True) if pair % 2 else (True, False):
            torch.manual_seed(0)
            start = clock()
            language_model(steps if pair >= 0 else 2, watched)
            seconds[watched] = clock() - start
        if pair >= 0:
            ratios.append(seconds[True] / seconds[False])
    print(
        f"{statistics.median(ratios):.3f} times plain training "
        f"({min(ratios):.3f} to {max(ratios):.3f}), a step of {seconds[False] / steps:.2f} s"
    )


RUNS: dict[str, Callable[[Workload, TensorDataset, bool], None]] = dict(
    zip(WAYS, (plain_loop, lightning, transformers), strict=True)
)


def measure(load: Workload, steps: int, pairs: int, clock: Callable[[], float]) -> pd.DataFrame:
    """Seconds of every run."""
    g = torch.Generator().manual_seed(0)
    n = load.batch * steps
    labels = torch.randint(CLASSES, (n,), generator=g)
    data = TensorDataset(load.inputs(n, g), labels, torch.arange(n))
    lines = []
    for pair in range(-1, pairs):  # the first one warms up
        turns = [(way, watched) for way in WAYS for watched in (False, True)]
        turns = turns[2 * (pair % 3) :] + turns[: 2 * (pair % 3)]
        for way, watched in turns if pair % 2 else turns[::-1]:
            torch.manual_seed(0)
            start = clock()
            RUNS[way](load, data, watched)
            if pair >= 0:
                lines.append({"pair": pair, "way": way, "watched": watched, "s": clock() - start})
    return pd.DataFrame(lines)


def summary(frame: pd.DataFrame, steps: int) -> pd.DataFrame:
    """What watching adds, pair by pair, in units of a step of the plain loop."""
    wide = frame.pivot(index="pair", columns=["way", "watched"], values="s")
    step = statistics.median(wide[WAYS[0], False]) / steps
    rows = []
    for way in WAYS:
        extra = (wide[way, True] - wide[way, False]) / steps / step
        behind = extra - (wide["Lightning", True] - wide["Lightning", False]) / steps / step
        rows.append(
            {
                "way": way,
                "plain step, ms": 1e3 * statistics.median(wide[way, False]) / steps,
                "watching adds, steps": extra.median(),
                "least": extra.min(),
                "most": extra.max(),
                "beyond Lightning's callback": behind.median(),
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*WORKLOADS, "lora"), default="mlp")
    parser.add_argument("--steps", type=int, help="of a run; by default the workload's own number")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true", help="time on the wall")
    parser.add_argument("--out", type=Path, help="for a CSV, without ending")
    add_force(parser)
    arguments = parser.parse_args()
    tables = [] if arguments.out is None else [arguments.out.with_suffix(".csv")]
    files = Outputs(tables, force=arguments.force)
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    clock = time.perf_counter if arguments.wall else time.process_time
    if arguments.model == "lora":
        compare_language_model(arguments.steps or 20, arguments.pairs, clock)
        return
    load = WORKLOADS[arguments.model]
    steps = arguments.steps or load.steps
    print(
        f"{arguments.model}, batch {load.batch}, {steps} steps, {arguments.pairs} pairs, "
        f"{arguments.threads} CPU threads, torch {torch.__version__}, {platform.machine()}, "
        f"{'wall' if arguments.wall else 'processor'} time",
        flush=True,
    )
    frame = measure(load, steps, arguments.pairs, clock)
    print(summary(frame, steps).to_string(index=False, float_format="{:.3f}".format))
    if tables:
        files.write(tables[0], frame)


if __name__ == "__main__":
    main()
