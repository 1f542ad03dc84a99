"""What watching costs: f-INE in-batch against plain Lightning training, paired.

    python benchmarks/callback_overhead.py [--model mlp|cnn|transformer|transformer-long|all]
        [--steps 400] [--pairs 7] [--threads 2] [--settings NAME …] [--out results/overhead]

Each pair trains the same steps plainly and watched, in alternating order, in this one process;
the printed ratio is the median over pairs, with the smallest and largest pair beside it. Data are
random numbers of MNIST's shape, and tokens of 1000 for the transformers (time does not depend on
their values). Batches: 64 images, 64 sequences of 32 tokens (``transformer``), 16 sequences of 128
(``transformer-long``, the same network). ``--out`` writes every pair's seconds to a CSV and a
Markdown table of the ratios.

Settings: ``self`` with the exact Gram matrix of the batch (margin, and loss), with 16 reference
columns of it, and with the exact one at every fourth step; ``validation`` with 500 queries whose
directions are computed anew every 20, 50 and 100 steps.

Arithmetic bounds the exact Gram matrix from below. For a linear layer with P weights, a batch of B
sequences of T tokens costs 3 B T P multiplications in training; forming each example's gradient
costs B T P and the Gram matrix B² P, together (T + B)/(3 T) of it. With images in a linear layer
(T = 1) it follows from the layer's inputs instead, B² (I + O) for I inputs and O outputs.
"""

from __future__ import annotations

import argparse
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.data.task import loader
from fine_bench.models import Classifier, cnn, mlp

SHAPE, CLASSES, BATCH, N_QUERY = (1, 28, 28), 10, 64, 500
TOKENS, LENGTH, WIDTH, HEADS, DEPTH = 1000, 32, 64, 4, 4
MODELS = ("mlp", "cnn", "transformer", "transformer-long")
LONG_LENGTH, LONG_BATCH = 128, 16


class Attention(nn.Module):
    """Self-attention from linear layers, whose gradients have factors."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.inputs(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / math.sqrt(d // self.heads), -1)
        result: Tensor = self.output((weights @ v).transpose(1, 2).reshape(n, t, d))
        return result


class Layer(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.inner = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        result: Tensor = x + self.inner(self.second(x))
        return result


class Transformer(nn.Module):
    """Classes of token sequences, from the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.places = nn.Embedding(LONG_LENGTH, WIDTH)
        self.layers = nn.Sequential(*(Layer(WIDTH, HEADS) for _ in range(DEPTH)))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        # one row of places an example: then their table has per-example gradients too
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape)
        h = self.layers(self.tokens(x) + self.places(places))
        logits: Tensor = self.last(h.mean(1))
        return logits


def network(model: str) -> nn.Module:
    """A new network."""
    if model in ("transformer", "transformer-long"):
        return Transformer()
    return {"mlp": mlp, "cnn": cnn}[model](SHAPE, CLASSES)


def inputs(model: str, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Random inputs."""
    if model in ("transformer", "transformer-long"):
        length = LENGTH if model == "transformer" else LONG_LENGTH
        return torch.randint(TOKENS, (n, length), generator=generator)
    return torch.randn(n, *SHAPE, generator=generator)


def batch_size(model: str) -> int:
    """Examples in a batch."""
    return LONG_BATCH if model == "transformer-long" else BATCH


def seconds(model: str, steps: int, callbacks: list[pl.Callback]) -> float:
    """Wall time of one training run."""
    torch.manual_seed(0)
    n = batch_size(model) * steps
    x, y = inputs(model, n), torch.randint(CLASSES, (n,))
    module = Classifier(network(model), CLASSES, lr=0.01)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    batches = loader(x, y, batch_size=batch_size(model), generator=torch.Generator(), shuffle=True)
    start = time.perf_counter()
    trainer.fit(module, batches)
    return time.perf_counter() - start


def settings(model: str) -> dict[str, Callable[[], FINECallback]]:
    """What is measured, by name."""
    columns = min(16, batch_size(model) // 2)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (N_QUERY,), generator=g)
    queries = TensorDataset(inputs(model, N_QUERY, g), labels)
    return {
        "self, exact Gram, margin": lambda: FINECallback("self"),
        "self, exact Gram, loss": lambda: FINECallback("self", "loss"),
        f"self, {columns} reference columns": lambda: FINECallback(
            "self", reference_columns=columns
        ),
        "self, exact Gram, every 4th step": lambda: FINECallback("self", observe_every=4),
        "validation, refreshed every 20 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=20
        ),
        "validation, refreshed every 50 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=50
        ),
        "validation, refreshed every 100 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=100
        ),
    }


def measure(model: str, steps: int, pairs: int, make: Callable[[], FINECallback]) -> list[float]:
    """Seconds of each pair: plain and watched, one after the other in the list."""
    found: list[float] = []
    for pair in range(pairs):
        times = {}
        for watched in (False, True) if pair % 2 == 0 else (True, False):
            times[watched] = seconds(model, steps, [make()] if watched else [])
        found += [times[False], times[True]]
    return found


def write(frame: pd.DataFrame, out: Path, command: str, about: str) -> None:
    """Every pair as CSV; the medians as a Markdown table."""
    frame.to_csv(out.with_suffix(".csv"), index=False, float_format="%.4f")
    rows = [
        "| model | setting | times plain | pairs | plain step, ms |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for (model, setting), some in frame.groupby(["model", "setting"], sort=False):
        ratio = some.watched / some.plain
        spread = f"{ratio.median():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        rows.append(
            f"| {model} | {setting} | {spread} | {len(some)} "
            f"| {1e3 * (some.plain / some.steps).median():.2f} |"
        )
    text = (
        f"# What watching costs\n\nMade by `{command}` ({about}). Medians of paired runs, with the "
    )
    text += "smallest and the largest pair; see the script for what is measured.\n\n"
    out.with_suffix(".md").write_text(text + "\n".join(rows) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "all"), default="mlp")
    parser.add_argument("--steps", type=int, help="400, or 100 for the slower models")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="*", help="names, or their beginnings; all by default")
    parser.add_argument("--out", type=Path, help="for a CSV and a Markdown table, without ending")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = f"{arguments.threads} threads, torch {torch.__version__}, {platform.machine()}"

    lines = []
    for model in MODELS if arguments.model == "all" else (arguments.model,):
        steps = arguments.steps or (400 if model == "mlp" else 100)
        print(
            f"{model}, batch {batch_size(model)}, {steps} steps, {arguments.pairs} pairs, {about}"
        )
        seconds(model, min(50, steps), [FINECallback("self")])  # warm up
        for name, make in settings(model).items():
            if arguments.settings and not name.startswith(tuple(arguments.settings)):
                continue
            times = measure(model, steps, arguments.pairs, make)
            plain, watched = times[::2], times[1::2]
            ratios = [w / p for p, w in zip(plain, watched, strict=True)]
            step = 1e3 * statistics.median(plain) / steps
            print(
                f"  {name:<40} {statistics.median(ratios):.3f} times plain training "
                f"({min(ratios):.3f} to {max(ratios):.3f}; plain step {step:.2f} ms)",
                flush=True,
            )
            for p, w in zip(plain, watched, strict=True):
                lines.append(
                    {"model": model, "setting": name, "steps": steps, "plain": p, "watched": w}
                )
    if arguments.out is not None:
        command = "python benchmarks/callback_overhead.py"
        command += f" --model {arguments.model} --pairs {arguments.pairs}"
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write(pd.DataFrame(lines), arguments.out, command, about)


if __name__ == "__main__":
    main()
