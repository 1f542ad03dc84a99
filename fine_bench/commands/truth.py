"""``fine-bench truth``: freeze a bank into a ground-truth file."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fine_bench.commands import common
from fine_bench.errors import ConfigError, UserError


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = common.parser(
        "truth",
        "Condense a retraining bank into a small ground-truth file, by which methods are scored "
        "without retraining (fine-bench score) and from which the runner's records get their "
        "fidelity. A published truth never changes: other content needs a higher version.",
        statuses={
            0: "written, or an equal file was there",
            2: "impossible (the reason is printed)",
        },
        examples=[
            "results/banks/mnist_mlp --name mnist_mlp --version 1",
            "results/banks/more --name mnist_cnn --version 2 --extend mnist_cnn.safetensors",
        ],
    )
    made.add_argument("bank", metavar="BANK_FOLDER", type=Path, help="a folder below results/banks")
    made.add_argument("--name", required=True, help="of the ground truth, for instance mnist_mlp")
    made.add_argument("--version", type=int, required=True, help="1; higher after any change")
    made.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="default: results/ground_truth",
    )
    made.add_argument(
        "--extend",
        metavar="FILE",
        type=Path,
        help="a frozen truth without subsets: keep all that it says and add the bank's subsets "
        "with several seeds (bank.subsets), by which queries get an LDS",
    )
    made.add_argument(
        "--evidence",
        metavar="DIR",
        type=Path,
        help="a results folder: write what the bank shows there instead of freezing it "
        "(ground_truth/definition--NAME.csv; figures/retraining_curves--NAME and "
        "definition--NAME)",
    )
    return made


@common.command(parser)
def main(arguments: argparse.Namespace) -> int:
    """Freeze a bank; 0 done, 2 impossible (the reason is printed)."""
    from functools import partial

    from fine_bench.report.bank_evidence import write_evidence
    from fine_bench.retraining.bank import Bank
    from fine_bench.retraining.condense import truth_of, with_subsets
    from fine_bench.retraining.truth_files import load, save
    from fine_bench.store.files import check_output, write_atomic, write_output

    if arguments.extend is not None and arguments.evidence is not None:
        raise ConfigError(
            "--extend and --evidence do not go together: what a bank shows takes its single "
            "models, which --extend does without; leave out one of them"
        )
    folder = arguments.output or Path("results/ground_truth")
    if arguments.output is not None:
        check_output(folder / f"{arguments.name}.safetensors", force=True)
    write = write_atomic if arguments.output is None else partial(write_output, force=True)
    try:
        bank = Bank.open(arguments.bank)
        if arguments.extend is None:
            truth = truth_of(bank, arguments.name, arguments.version)
        else:
            frozen = replace(load(arguments.extend), name=arguments.name)
            truth = with_subsets(frozen, bank, arguments.version)
        if arguments.evidence is None:
            written = [save(truth, folder, write)]
        else:
            written = write_evidence(bank, arguments.name, arguments.evidence)
    except UserError:
        raise
    except ValueError as error:  # too few models, or a name that names no file
        raise ConfigError(str(error)) from error
    common.say(truth.summary())
    for path in written:
        common.say(f"written: {path} ({path.stat().st_size / 2**20:.2f} MiB)", error=True)
    return common.DONE
