"""Intervals of ``fine_paper`` on real runs where there is nothing to find: permuted membership.

    python benchmarks/permuted_groups.py [--seeds 0 1 2 3 4] [--out results]

Trains a small MLP on the digits, watched by the paper's estimator on *validation*. Before each
measured step the members of every group are drawn anew from the training set, so that group names
mean nothing and μ = 0, while samples go together from step to step as ever. Asked of every
interval: does it hold 0? Once with samples taken as independent, once with their correlation from
step to step measured (``fine_bench.theory.serial``). The p-values of the groups are asked whether
they are uniform. (Of members that are drawn once a run, the luck of the draw would leave |μ| of
about 0.06.)
Writes ``permuted_groups.md`` and ``.csv``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from outputs import seeds_and_files
from scipy import stats
from seed_files import job_of
from torch.utils.data import TensorDataset

from fine_bench.callback.paper import PaperFINECallback
from fine_bench.runner.backends import images
from fine_bench.theory.estimation import Method, estimate_mu

SIZES = (8, 30, 300)
N_GROUPS = 40
EVERY = 4
METHODS: tuple[Method, ...] = ("moment", "rank", "two_stage")
OUT = Path("results")


class Permuted(PaperFINECallback):
    """The paper's estimator with members that are drawn anew before each measurement."""

    rng: np.random.Generator

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        """Draw, then measure."""
        assert self._sampler is not None
        subsets = self._sampler.subsets
        self._sampler.subsets = replace(subsets, groups=tuple(
            torch.from_numpy(np.sort(self.rng.choice(subsets.n_train, len(group), replace=False)))
            for group in subsets.groups
        ))  # fmt: skip
        super().on_train_batch_end(trainer, pl_module, *rest)


def samples(seed: int, folder: Path) -> tuple[list[int], list[float], npt.NDArray[np.float64]]:
    """Sizes, p-values, and both arms ``(2, S, n)`` of one run's groups."""
    job = job_of("digits_mislabel", seed, [], folder)
    watcher = Permuted(
        "validation",
        queries=TensorDataset(job.data.query_x, job.data.query_y),
        subsets={
            f"{size}/{number}": list(range(size)) for size in SIZES for number in range(N_GROUPS)
        },
        every_n_steps=EVERY,
        auxiliary=None,
        seed=seed,
    )
    watcher.rng = np.random.default_rng([seed, 7])
    images.train(job, [watcher], None)
    lines = watcher.group_results()
    _, p, q = watcher._accumulator.arms(None)
    values = [line.p_value if line.p_value is not None else float("nan") for line in lines]
    return [line.size for line in lines], values, np.stack([p.numpy(), q.numpy()])


def lag_one(x: npt.NDArray[np.float64]) -> float:
    """Median over groups of the correlation with the step before, ``(S, n)``."""
    d = x - x.mean(1, keepdims=True)
    return float(np.median((d[:, 1:] * d[:, :-1]).sum(1) / (d**2).sum(1)))


def rows(seeds: Sequence[int]) -> Iterator[dict[str, object]]:
    """One line a size."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [samples(seed, Path(folder)) for seed in seeds]
    for size in SIZES:
        line: dict[str, object] = {"size": size, "runs": len(runs)}
        held: dict[str, list[npt.NDArray[np.bool_]]] = {}
        p_values, of_arm, of_gap, given = [], [], [], []
        for sizes, values, arms in runs:
            mine = np.array(sizes) == size
            p, q = arms[:, mine]
            p_values += np.array(values)[mine].tolist()
            of_arm.append(lag_one(p))
            of_gap.append(lag_one(p - q))
            for method in METHODS:
                for correlated in (False, True):
                    one = estimate_mu(p, q, method, correlated=correlated)
                    key = f"{method}_{'measured' if correlated else 'independent'}"
                    held.setdefault(key, []).append((one.lower <= 0.0) & (one.upper >= 0.0))
                    if correlated:
                        given.append(np.isfinite(one.lower) & np.isfinite(one.upper))
        line |= {
            "groups": N_GROUPS * len(runs),
            "samples": runs[0][2].shape[-1],
            "lag_one_arm": float(np.mean(of_arm)),
            "lag_one_difference": float(np.mean(of_gap)),
            **{key: float(np.concatenate(parts).mean()) for key, parts in held.items()},
            "interval_given": float(np.concatenate(given).mean()),
            "p_below_0.05": float((np.array(p_values) <= 0.05).mean()),
            "p_uniform": float(stats.kstest(p_values, "uniform").pvalue),
        }
        yield line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    seeds, files, csv, page = seeds_and_files("permuted_groups", __doc__, 5, OUT, argv)
    torch.set_num_threads(1)
    frame = pd.DataFrame(list(rows(seeds)))
    files.write(csv, frame)
    text = [
        "# Intervals of the paper's estimator under permuted membership",
        "",
        "Made by `python benchmarks/permuted_groups.py`: digits, MLP, *validation*, no auxiliary "
        f"run, a sample every {EVERY} steps. Members are drawn anew before each measurement, so "
        "μ = 0. Share of 95 % intervals that hold 0, with samples taken as independent / with the "
        "correlation from step to step measured. *lag one*: correlation of an arm with "
        "the step before, and of the difference of the arms. *p*: share of p-values up to 0.05, "
        "and the p-value of a test that they are uniform.",
        "",
        "| members | groups | samples | lag one: arm, difference | moment | rank | two-stage | "
        "interval given | p ≤ 0.05 | uniform |",
        f"| ---: |{' ---: |' * 9}",
    ]
    for r in frame.to_dict("records"):
        cells = " | ".join(
            f"{r[f'{m}_independent']:.3f} / **{r[f'{m}_measured']:.3f}**" for m in METHODS
        )
        text.append(
            f"| {r['size']} | {r['groups']} | {r['samples']} | {r['lag_one_arm']:.2f}, "
            f"{r['lag_one_difference']:.2f} | {cells} | {r['interval_given']:.2f} | "
            f"{r['p_below_0.05']:.3f} | {r['p_uniform']:.2f} |"
        )
    files.write(page, "\n".join(text) + "\n")
    print(frame.to_string(index=False))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
