"""Is f-INE's σ_q the spread of a query's margin over runs, and do its intervals hold other runs?

    python benchmarks/query_spread.py --task mnist_mlp [--results results]
    python benchmarks/query_spread.py --task mnist_mlp --truth-alone

Reads the scores of the row ``fine_queries`` that runs of several seeds have left in the working
store, and the ground truth; nothing is trained. Of the *development* half, means over the seeds:

- *rank*, *slope*: Spearman's correlation of ``extras["spread"]`` with the measured deviation of a
  query's margin between runs (``metrics.outcome_spread``), and the measured one on the other,
  through the origin;
- *effect*: the subsets' margins on the sum of Δ = μσ over their members, both about their means
  over the subsets, through the origin, all queries together.

Of the truth alone, without any scores (``--truth-alone``): the range of σ_q over the queries,
how well the two halves of the subsets agree on it, and how much of the distance between two
subsets' outcomes their widths make up (``metrics.outcome_spread.mean_share``).

Of the runs alone: how often ± z ``std_error`` of one run holds the mean μ of the others, all pairs
of a query and an example, and the fifth of them with the smallest and the largest mean |μ|.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from fine_bench.metrics.outcome_spread import mean_share
from fine_bench.metrics.reliability import spearman
from fine_bench.retraining.truth import HALVES, SubsetTruth
from fine_bench.retraining.truth_files import find, folders, named
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)


def against_truth(scores: InfluenceScores, subsets: SubsetTruth) -> dict[str, float]:
    """*rank*, *slope* and *effect* of one run, and the medians of both spreads."""
    own = subsets.of("development")
    told = scores.extras["spread"].double().numpy()
    measured = subsets.spread("development")
    change = (scores.values.double() * scores.extras["spread"].double()[:, None]).numpy()
    predicted = subsets.members[own].astype(float) @ change.T
    margin = subsets.margin[own].astype(float)
    predicted, margin = predicted - predicted.mean(0), margin - margin.mean(0)
    return {
        "rank": spearman(told, measured),
        "slope": float((told * measured).sum() / (told**2).sum()),
        "median told": float(np.median(told)),
        "median measured": float(np.median(measured)),
        "effect": float((predicted * margin).sum() / (predicted**2).sum()),
    }


def of_truth(subsets: SubsetTruth) -> str:
    """What the margins of the subsets say of the spread between runs."""
    first, second = (subsets.spread(half) for half in HALVES)
    lines = [f"σ_q: rank correlation of the halves over {len(first)} queries, "
             f"{spearman(first, second):.3f}"]  # fmt: skip
    for half in HALVES:
        sigma, own = subsets.spread(half), subsets.of(half)
        ends = ", ".join(f"{x:.3f}" for x in np.quantile(sigma, (0, 0.1, 0.9, 1)))
        share = mean_share(subsets.margin_first[own], subsets.margin_second[own], subsets.n_seeds)
        lines.append(
            f"{half}: least, 10 %, 90 %, largest σ_q: {ends} logits; widths make up "
            f"{1 - share.mean:.2%} of the squared distance between outcomes"
        )
    return "\n".join(lines)


def coverage(mu: Tensor, error: Tensor) -> dict[float, list[float]]:
    """Level → share of all, of the smallest and of the largest fifth of |μ| that is covered.

    Args:
        mu, error: ``(S, pairs)``, S ≥ 2 runs.
    """
    gap = (mu - (mu.sum(0) - mu) / (len(mu) - 1)).abs()
    fifth = mu.abs().mean(0).argsort().argsort() * 5 // mu.shape[1]
    found = {}
    for level in LEVELS:
        held = (gap <= NormalDist().inv_cdf((1 + level) / 2) * error).double()
        parts = (held, held[:, fifth == 0], held[:, fifth == 4])
        found[level] = [float(part.mean()) for part in parts]
    return found


def main() -> None:
    """Read, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--truth-alone", action="store_true", help="read no scores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.truth_alone:
        known = named(arguments.task, folders(arguments.results))
        if known.subsets is None:
            raise SystemExit(f"the ground truth {known.name} has no subsets with several seeds")
        print(of_truth(known.subsets))
        return
    store = RecordStore(arguments.results)
    asked = (arguments.task, "fine_queries", "queries", "finished")
    records = [
        r
        for r in store.scan().records
        if (r.task, r.estimator, r.target, r.status) == asked and r.scores_file
    ]
    newest = {r.seed: r for r in sorted(records, key=lambda r: r.revision)}
    if len(newest) < 2:
        raise SystemExit(
            f"found {len(newest)} seeds of fine_queries on {arguments.task} in "
            f"{arguments.results}; at least 2 are needed: "
            f"python -m fine_bench +experiment={arguments.task} "
            "'targets=[queries]' 'estimator=[fine_queries]' -m seed=0,1,2,3,4,5"
        )
    runs = [store.load_scores(newest[seed]) for seed in sorted(newest)]
    record = next(iter(newest.values()))
    truth = find(folders(arguments.results), record.data_sha256, record.setting)
    if truth is not None and truth.subsets is not None:
        each = [against_truth(run, truth.subsets) for run in runs]
        for name in each[0]:
            values = [one[name] for one in each]
            print(
                f"{name:<16} {np.mean(values):.3f}  (seeds: {min(values):.3f} to {max(values):.3f})"
            )
    mu = torch.stack([run.values.flatten().double() for run in runs])
    error = torch.stack(
        [run.std_error.flatten().double() for run in runs if run.std_error is not None]
    )
    print(f"\n{len(runs)} seeds, nominal: covered; smallest, largest fifth of |μ|")
    for level, shares in coverage(mu, error).items():
        print(f"{level:.2f}  " + "  ".join(f"{share:.3f}" for share in shares))


if __name__ == "__main__":
    main()
