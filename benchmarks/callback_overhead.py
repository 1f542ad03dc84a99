"""What watching costs: f-INE in-batch against plain Lightning training, paired.

    python benchmarks/callback_overhead.py [--model mlp|cnn] [--steps 400] [--pairs 7] [--threads 2]

Each pair trains the same steps plainly and watched, in alternating order, in this one process;
the printed ratio is the median over pairs, with the smallest and largest pair beside it. Data are
random numbers of MNIST's shape (time does not depend on their values); the batch size is 64.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.data.task import loader
from fine_bench.models import Classifier, cnn, mlp

SHAPE, CLASSES, BATCH, N_QUERY = (1, 28, 28), 10, 64, 500


def seconds(model: str, steps: int, callbacks: list[pl.Callback]) -> float:
    """Wall time of one training run."""
    torch.manual_seed(0)
    n = BATCH * steps
    x, y = torch.randn(n, *SHAPE), torch.randint(CLASSES, (n,))
    net = {"mlp": mlp, "cnn": cnn}[model](SHAPE, CLASSES)
    module = Classifier(net, CLASSES, lr=0.01)
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    g = torch.Generator().manual_seed(1)
    queries = TensorDataset(
        torch.randn(N_QUERY, *SHAPE, generator=g), torch.randint(CLASSES, (N_QUERY,), generator=g)
    )
    watched: dict[str, Callable[[], FINECallback]] = {
        "self, margin": lambda: FINECallback("self"),
        "self, loss": lambda: FINECallback("self", "loss"),
        "validation, refreshed every 20 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=20
        ),
        "validation, refreshed every 100 steps": lambda: FINECallback(
            "validation", queries=queries, refresh_every=100
        ),
    }
    print(
        f"{arguments.model}, batch {BATCH}, {arguments.steps} steps, {arguments.pairs} pairs, "
        f"{arguments.threads} threads, torch {torch.__version__}, {platform.machine()}"
    )
    seconds(arguments.model, 50, [FINECallback("self")])  # warm up
    for name, make in watched.items():
        ratios, plain_times = [], []
        for pair in range(arguments.pairs):
            order = [None, make] if pair % 2 == 0 else [make, None]
            times = {
                kind is None: seconds(arguments.model, arguments.steps, [kind()] if kind else [])
                for kind in order
            }
            ratios.append(times[False] / times[True])
            plain_times.append(times[True])
        step = 1e3 * statistics.median(plain_times) / arguments.steps
        print(
            f"  {name:<40} {statistics.median(ratios):.3f} times plain training "
            f"({min(ratios):.3f} to {max(ratios):.3f}; plain step {step:.2f} ms)"
        )


if __name__ == "__main__":
    main()
