"""What watching keeps: a few numbers for each training example, at any number of examples.

    python benchmarks/callback_memory.py [--examples 1200000] [--epochs 1] [--queries 0]

Trains a small linear classifier on synthetic examples, made from their position when they are
asked for, so that the data take no memory, and prints what the callback keeps for each example and
row of scores, and the largest memory of this process in a plain and in a watched run (each in a
process of its own).
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fine_bench.callback import FINECallback
from fine_bench.models.classifier import Classifier

WIDTH, CLASSES, BATCH = 16, 4, 256


class Synthetic(Dataset[Any]):
    """Examples that follow from their positions."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, positions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.tensor(positions)
        x = torch.sin(index[:, None] * torch.arange(1, WIDTH + 1) * 0.37)
        y = (x[:, :CLASSES] + 0.3 * x[:, CLASSES : 2 * CLASSES]).argmax(1)
        return x, y, index

    def __getitem__(self, i: int) -> Any:
        x, y, index = self.__getitems__([i])
        return x[0], y[0], int(index[0])


def run(n: int, epochs: int, n_query: int, watched: bool) -> None:
    """Train once and print what it took."""
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    queries = None
    if n_query:
        queries = TensorDataset(*Synthetic(n_query).__getitems__(list(range(n_query)))[:2])
    callback = FINECallback("queries" if n_query else "self", queries=queries)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback] if watched else [],
    )
    batches = DataLoader(Synthetic(n), batch_size=BATCH, collate_fn=lambda batch: batch)
    trainer.fit(Classifier(nn.Linear(WIDTH, CLASSES), CLASSES, lr=0.1), batches)
    # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    line = f"{'watched' if watched else 'plain':<8} largest memory of the process {peak:.0f} MiB"
    if watched:
        assert callback._schedule is not None
        kept = callback._schedule.accumulator
        rows = max(1, n_query)
        size = kept._sums.nbytes + kept.n_observations.nbytes
        line += (
            f"; the callback keeps {size / 2**20:.0f} MiB: {size / n / rows:.1f} bytes for each of "
            f"{n} examples and {rows} rows"
        )
    print(line)


def main() -> None:
    """Both runs, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1_200_000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--queries", type=int, default=0, help="rows of scores; 0 for self")
    parser.add_argument("--only", choices=("plain", "watched"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run(arguments.examples, arguments.epochs, arguments.queries, arguments.only == "watched")
        return
    for kind in ("plain", "watched"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--only", kind], check=True)


if __name__ == "__main__":
    main()
