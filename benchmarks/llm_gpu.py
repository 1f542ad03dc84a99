"""What f-INE costs while a large language model is tuned: tokens per second and peak memory.

    python benchmarks/llm_gpu.py                                  # needs a GPU, about 40 GiB free
    python benchmarks/llm_gpu.py --target validation --batch 8
    python benchmarks/llm_gpu.py --shape miniature --length 64    # runs anywhere

A randomly initialised Llama of exactly the shape of Llama 3.1 8B (bfloat16, gradient checkpointing)
with LoRA matrices, on random tokens of full length, the last half of which are labelled: with f-INE
on and with it off, in turns, each run in a process of its own. The path is that of
``model=llama31_8b``: ``with_lora``, ``Tuner``, ``SequenceFINE``. Aim: at most 1.10 times in both.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import TensorDataset

from fine_bench.gradients.token_losses import IGNORED, mean_token_loss
from fine_bench.llm import hub
from fine_bench.llm.models import Lora, with_lora
from fine_bench.llm.tuner import Tuner, token_loader
from fine_bench.llm.watchers import SequenceFINE

SHAPES: dict[str, dict[str, Any]] = {
    "llama31_8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
    "miniature": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    },
}
AIM = 1.10
N_QUERY = 8


class Clock(pl.Callback):
    """Time from the first step after the warm-up to the end."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.start = self.seconds = 0.0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start once the warm-up is over; only memory of what follows counts."""
        if trainer.global_step == self.warm_up:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self.start


def model_of(shape: str, rank: int, device: torch.device) -> Any:
    """The network with LoRA matrices beside all linear layers of its blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device, hub.quiet():
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)
    model.config.use_cache = False
    return with_lora(model, Lora(rank, 2 * rank), 0, checkpointing=True).to(device)


def measure(options: argparse.Namespace, watched: bool) -> dict[str, float]:
    """One training run: tokens per second after the warm-up and the largest memory, in GiB."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = model_of(options.shape, options.rank, device)
    steps = options.warm_up + options.steps
    generator = torch.Generator().manual_seed(0)
    n = steps * options.batch
    size = SHAPES[options.shape]["vocab_size"]
    x = torch.randint(size, (n + N_QUERY, options.length), generator=generator)
    y = x.clone()
    y[:, : options.length // 2] = IGNORED
    callbacks: list[pl.Callback] = [Clock(options.warm_up)]
    if watched:
        queries = None if options.target == "self" else TensorDataset(x[n:], y[n:])
        callbacks.append(SequenceFINE(options.target, queries=queries, refresh_every=10))
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    loader = token_loader(x[:n], y[:n], batch_size=options.batch, generator=generator)
    trainer.fit(Tuner(net, mean_token_loss, lr=2e-4), loader)
    clock = callbacks[0]
    assert isinstance(clock, Clock)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / hub.GIB
    else:  # ru_maxrss is in KiB on Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / hub.GIB
    if watched:
        fine = callbacks[1]
        assert isinstance(fine, SequenceFINE)
        observed = fine.scores().n_observations
        assert observed is not None
        assert int(observed.sum()) == n, "every sample must have been observed"
    return {
        "tokens_per_second": options.batch * options.length * options.steps / clock.seconds,
        "peak_gib": peak,
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--shape", choices=tuple(SHAPES), default="llama31_8b")
    add("--target", choices=("self", "validation"), default="self")
    add("--length", type=int, default=512, help="tokens of a sample (default: 512)")
    add("--batch", type=int, default=8, help="samples of a step, at least 3 (default: 8)")
    add("--steps", type=int, default=20, help="that are timed (default: 20)")
    add("--warm-up", type=int, default=5, help="steps before them (default: 5)")
    add("--rank", type=int, default=8, help="of the LoRA matrices (default: 8)")
    add("--repeats", type=int, default=3, help="pairs of runs (default: 3)")
    add("--only", choices=("plain", "watched"), help=argparse.SUPPRESS)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run in turns, print every run and the ratios. Exit status 2 where it cannot run."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = parser().parse_args(given)
    if options.batch < 3 or options.steps < 1 or options.repeats < 1 or options.length < 4:
        print(
            f"--batch {options.batch} must be at least 3 (f-INE compares a sample with its batch "
            f"mates), --steps {options.steps} and --repeats {options.repeats} at least 1, --length "
            f"{options.length} at least 4",
            file=sys.stderr,
        )
        return 2
    if options.shape != "miniature" and not torch.cuda.is_available():
        print(
            f"--shape {options.shape} needs a GPU with about 40 GiB of free memory, and there is "
            "none here; type --shape miniature to try the script",
            file=sys.stderr,
        )
        return 2
    if options.only:
        print(json.dumps(measure(options, options.only == "watched")))
        return 0
    found: dict[str, list[dict[str, float]]] = {"plain": [], "watched": []}
    for _ in range(options.repeats):
        for kind, runs in found.items():
            command = [sys.executable, __file__, *given, "--only", kind]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"{kind:<8} {runs[-1]['tokens_per_second']:10,.0f} tokens/s   "
                f"{runs[-1]['peak_gib']:7.2f} GiB"
            )
    pairs = list(zip(found["plain"], found["watched"], strict=True))
    slower = [p["tokens_per_second"] / w["tokens_per_second"] for p, w in pairs]
    larger = [w["peak_gib"] / p["peak_gib"] for p, w in pairs]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{options.shape}, target {options.target}, length {options.length}, batch "
        f"{options.batch}, rank {options.rank}, {where}: f-INE takes "
        f"{statistics.median(slower):.3f} times as long ({min(slower):.3f}–{max(slower):.3f} over "
        f"{options.repeats} pairs) and {statistics.median(larger):.3f} times the memory; aim "
        f"{AIM:.2f} in both"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
