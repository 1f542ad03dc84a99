"""``python -m fine_bench.truth``: freeze a bank into a ground-truth file."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fine_bench.report.evidence import write_evidence
from fine_bench.retraining.bank import Bank, load_bank
from fine_bench.retraining.truth import HALVES, Truth
from fine_bench.retraining.truth_files import save
from fine_bench.store.files import StoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Freeze a bank; 0 done, 2 impossible (the reason is printed)."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_bench.truth",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Condense a retraining bank into a small ground-truth file, by which methods "
        "are scored without\nretraining (python -m fine_bench.score) and from which the runner's "
        "records get their fidelity.\nA published truth never changes: other content needs a "
        "higher version.",
        epilog="Exit status: 0 written, or an equal file was there; 2 impossible (the reason is "
        "printed).\n\nExample: python -m fine_bench.truth results/banks/mnist_mlp --name mnist_mlp "
        "--version 1",
    )
    parser.add_argument(
        "bank", metavar="BANK_FOLDER", type=Path, help="a folder below results/banks"
    )
    parser.add_argument("--name", required=True, help="of the ground truth, for instance mnist_mlp")
    parser.add_argument("--version", type=int, required=True, help="1; higher after any change")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("results/ground_truth"),
        help="default: results/ground_truth",
    )
    parser.add_argument(
        "--evidence",
        metavar="DIR",
        type=Path,
        help="a results folder: write what the bank shows there instead of freezing it "
        "(ground_truth/definition--NAME.csv; figures/retraining_curves--NAME and "
        "definition--NAME)",
    )
    arguments = parser.parse_args(argv)
    try:
        bank = load_bank(arguments.bank)
        truth = of_bank(bank, arguments.name, arguments.version)
        if arguments.evidence is not None:
            written = write_evidence(bank, arguments.name, arguments.evidence)
            print(report(truth))
            print("\n".join(f"written: {path}" for path in written), file=sys.stderr)
            return 0
        path = save(truth, arguments.output)
    except (StoreError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report(truth))
    print(f"written: {path} ({path.stat().st_size / 2**20:.2f} MiB)", file=sys.stderr)
    return 0


def of_bank(bank: Bank, name: str, version: int) -> Truth:
    """The ground truth of a bank's folder.

    Raises:
        StoreError: the bank is damaged.
        ValueError: too few models, or a bank whose models do not vary as the benchmark's runs do.
    """
    about = bank.manifest
    vary = about.get("design", {}).get("vary", "both")
    if vary != "both":
        raise ValueError(
            f"the models of {bank.folder} differ in {vary} alone; the runs that are scored by a "
            "truth differ in initialisation and order. Train a bank with bank.vary=both"
        )
    single = bank.part("single")
    if single is None:
        raise ValueError(
            f"{bank.folder} has no models of the part 'single'; train some with "
            "python -m fine_bench.bank bank.models=512"
        )
    return Truth.from_bank(
        single,
        bank.part("repeated"),
        bank.part("definition"),
        name=name,
        task=about["task"],
        version=version,
        data_sha256=about["data_sha256"],
        setting=about["setting"],
        is_bad=np.isin(np.arange(single.n_train), about["bad"]),
    )


def report(truth: Truth) -> str:
    """What a truth is made of, for the terminal."""
    lines = [
        f"{truth.name} version {truth.version}: task {truth.task}, {truth.n_train:,} examples, "
        f"{int(truth.is_bad.sum()):,} bad, subsets of {truth.keep:.0%}"
    ]
    for half in HALVES:
        part = truth.half(half)
        line = (
            f"  {half:<12} {part.n_models} models, ceiling {part.ceiling:.3f}, within clean "
            f"{part.ceiling_clean:.3f}"
        )
        if truth.subsets is not None:
            n = len(truth.subsets.members[truth.subsets.of(half)])
            line += (
                f"; LDS: {n} subsets, {truth.subsets.n_seeds} seeds, {truth.n_query} queries, "
                f"ceiling {part.lds_ceiling:.3f}"
            )
        lines.append(line)
    lines += [
        f"  {name:<44} {value:.4g}"
        for name, value in sorted(truth.facts.items())
        if not math.isnan(value)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
