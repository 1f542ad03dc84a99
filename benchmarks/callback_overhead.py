"""What watching costs: f-INE in-batch against plain Lightning training, paired.

    python benchmarks/callback_overhead.py [--model mlp|cnn|transformer|all] [--steps 400]
        [--pairs 7] [--threads 2] [--settings NAME …] [--json FILE]

Each pair trains the same steps plainly and watched, in alternating order, in this one process;
the printed ratio is the median over pairs, with the smallest and largest pair beside it. Data are
random numbers of MNIST's shape, and of 32 tokens of 1000 for the transformer (time does not depend
on their values); the batch size is 64.

Settings: ``self`` with the exact Gram matrix of the batch (margin, and loss), ``self`` with 16
reference columns of it, ``validation`` with 500 queries whose directions are computed anew every
20 and every 100 steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.data.task import loader
from fine_bench.models import Classifier, cnn, mlp

SHAPE, CLASSES, BATCH, N_QUERY = (1, 28, 28), 10, 64, 500
TOKENS, LENGTH, WIDTH, HEADS, DEPTH = 1000, 32, 64, 4, 4
MODELS = ("mlp", "cnn", "transformer")


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
        self.places = nn.Embedding(LENGTH, WIDTH)
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
    if model == "transformer":
        return Transformer()
    return {"mlp": mlp, "cnn": cnn}[model](SHAPE, CLASSES)


def inputs(model: str, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Random inputs."""
    if model == "transformer":
        return torch.randint(TOKENS, (n, LENGTH), generator=generator)
    return torch.randn(n, *SHAPE, generator=generator)


def seconds(model: str, steps: int, callbacks: list[pl.Callback]) -> float:
    """Wall time of one training run."""
    torch.manual_seed(0)
    n = BATCH * steps
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
    batches = loader(x, y, batch_size=BATCH, generator=torch.Generator(), shuffle=True)
    start = time.perf_counter()
    trainer.fit(module, batches)
    return time.perf_counter() - start


def settings(model: str) -> dict[str, Callable[[], FINECallback]]:
    """What is measured, by name."""
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (N_QUERY,), generator=g)
    queries = TensorDataset(inputs(model, N_QUERY, g), labels)
    return {
        "self, exact Gram, margin": lambda: FINECallback("self"),
        "self, exact Gram, loss": lambda: FINECallback("self", "loss"),
        "self, 16 reference columns": lambda: FINECallback("self", reference_columns=16),
        "validation, refreshed every 20 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=20
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=(*MODELS, "all"), default="mlp")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="*", help="names, or their beginnings; all by default")
    parser.add_argument("--json", type=Path, help="file for every pair's seconds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    kept = []
    for model in MODELS if arguments.model == "all" else (arguments.model,):
        print(
            f"{model}, batch {BATCH}, {arguments.steps} steps, {arguments.pairs} pairs, "
            f"{arguments.threads} threads, torch {torch.__version__}, {platform.machine()}"
        )
        seconds(model, min(50, arguments.steps), [FINECallback("self")])  # warm up
        for name, make in settings(model).items():
            if arguments.settings and not name.startswith(tuple(arguments.settings)):
                continue
            times = measure(model, arguments.steps, arguments.pairs, make)
            plain, watched = times[::2], times[1::2]
            ratios = [w / p for p, w in zip(plain, watched, strict=True)]
            step = 1e3 * statistics.median(plain) / arguments.steps
            print(
                f"  {name:<40} {statistics.median(ratios):.3f} times plain training "
                f"({min(ratios):.3f} to {max(ratios):.3f}; plain step {step:.2f} ms)"
            )
            kept.append({"model": model, "setting": name, "plain": plain, "watched": watched})
    if arguments.json is not None:
        about = {"steps": arguments.steps, "threads": arguments.threads, "batch": BATCH}
        arguments.json.write_text(json.dumps({**about, "seconds": kept}, indent=1))


if __name__ == "__main__":
    main()
