"""Are the scores of two commits the same, bit for bit? Run both and compare every score file.

    python benchmarks/same_scores.py --old c5df580                 # digits, every method
    python benchmarks/same_scores.py --old c5df580 --task mnist    # one seed of mnist_mislabel

Each commit runs from a checkout of its own, with the same interpreter, one thread, and its own
results folder; ``--old-results`` and ``--new-results`` compare folders that are there already. A
score file is named by task, setting and the identity of its cell, so a name that one side lacks is
a difference too: digests have moved. Exit status: 0 all equal, 1 a difference, 2 a run failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]
LANGUAGE = {
    "bm25", "datainf", "ekfac_llm", "fine_llm", "fine_llm_sources", "length", "less", "perplexity",
    "representation_similarity", "trak_llm",
}  # fmt: skip
TARGETS = "targets=[self,validation,queries,validation_per_class]"


def arguments_of(task: str, tree: Path) -> list[str]:
    """The command's overrides: every method that the old commit has and the task can run."""
    if task == "mnist":
        return ["+experiment=mnist_mislabel", "seed=0"]
    names = {path.stem for path in (tree / "conf" / "estimator").glob("*.yaml")}
    return ["seed=0", TARGETS, f"estimator=[{','.join(sorted(names - LANGUAGE))}]"]


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A work tree of a commit, removed on the way out."""
    with tempfile.TemporaryDirectory(prefix="same-scores-") as folder:
        tree = Path(folder) / "tree"
        subprocess.run(
            ["git", "-C", HERE, "worktree", "add", "-q", "--detach", tree, commit], check=True
        )
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", tree], check=True)


def run(tree: Path, results: Path, arguments: Sequence[str]) -> None:
    """The main command of a work tree.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fine_bench", f"results_dir={results}"]
    subprocess.run(
        [*command, "trainer.num_threads=1", "logger.mode=disabled", *arguments],
        cwd=tree,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def differences(old: Path, new: Path) -> tuple[int, list[str]]:
    """Number of score files compared, and a line for each that differs."""
    names = [{p.relative_to(root / "scores") for p in (root / "scores").rglob("*.safetensors")}
             for root in (old, new)]  # fmt: skip
    lines = [f"only in the old run: {name}" for name in sorted(names[0] - names[1])]
    lines += [f"only in the new run: {name}" for name in sorted(names[1] - names[0])]
    both = sorted(names[0] & names[1])
    for name in both:
        theirs, mine = (load_file(root / "scores" / name) for root in (old, new))
        if set(theirs) != set(mine):
            lines.append(f"{name}: arrays {sorted(set(theirs) ^ set(mine))} on one side only")
            continue
        for key, array in theirs.items():
            other = mine[key]
            if array.dtype != other.dtype or not torch.equal(
                array.contiguous().view(-1).view(torch.uint8),
                other.contiguous().view(-1).view(torch.uint8),
            ):
                gap = (array.double() - other.double()).abs().max() if len(array) else 0
                lines.append(f"{name}: {key} differs, by at most {float(gap):.2g}")
    return len(both), lines


def main(argv: Sequence[str] | None = None) -> int:
    """See ``--help``."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--old", metavar="COMMIT", help="the commit before")
    parser.add_argument("--new", metavar="COMMIT", default="HEAD", help="default: HEAD")
    parser.add_argument("--task", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--old-results", type=Path, metavar="DIR")
    parser.add_argument("--new-results", type=Path, metavar="DIR")
    given = parser.parse_args(argv)
    if given.old is None and given.old_results is None:
        parser.error("name the commit before with --old, or its results with --old-results")
    with tempfile.TemporaryDirectory(prefix="same-scores-") as scratch:
        folders = []
        overrides: list[str] = []
        for side, commit, results in (
            ("old", given.old, given.old_results),
            ("new", given.new, given.new_results),
        ):
            if results is None:
                results = Path(scratch) / side
                with checkout(commit) as tree:
                    overrides = overrides or arguments_of(given.task, tree)
                    try:
                        run(tree, results, overrides)
                    except subprocess.CalledProcessError as error:
                        print(f"{side}: exit status {error.returncode}", file=sys.stderr)
                        return 2
            folders.append(results)
        count, lines = differences(*folders)
    for line in lines:
        print(line)
    print(f"{count} score files compared, {len(lines)} differences")
    return 1 if lines or not count else 0


if __name__ == "__main__":
    raise SystemExit(main())
