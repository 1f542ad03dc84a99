"""The run of a seed, and a file of tensors a seed: what long scripts train, and keep of it.

A seed that has its file, ``WORK/TASK/seed7.safetensors``, is not computed again, so a script that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from torch import Tensor

from fine_bench.runner.config import check
from fine_bench.runner.plan import Job, plan
from fine_bench.runner.schema import config_folder, register


def job_of(experiment: str, seed: int, overrides: Sequence[str], results: Path) -> Job:
    """The experiment's job, with one control instead of its estimators.

    Args:
        experiment: a name in ``conf/experiment``.
        seed: of the run.
        overrides: of Hydra's kind, after all others.
        results: folder of its checkpoints.
    """
    register()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        config = compose(
            "config",
            [
                f"+experiment={experiment}", "estimator=[random]", f"seed={seed}",
                f"results_dir={results}", "trainer.progress=false", *overrides,
            ],
        )  # fmt: skip
    return plan(check(config))


def missing(folder: Path, seeds: Sequence[int]) -> Iterator[tuple[int, Path]]:
    """The seeds without a file in the folder of a task, which is made, each with its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        path = folder / f"seed{seed}.safetensors"
        if not path.exists():
            yield seed, path


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a seed's file, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, temporary, None if about is None else dict(about))
    temporary.rename(path)


def seed_of(path: Path) -> int:
    """The number in its name."""
    return int(path.stem.removeprefix("seed"))


def paths(folder: Path) -> list[Path]:
    """The files of a task, by seed."""
    return sorted(folder.glob("seed*.safetensors"), key=seed_of)


def load(work: Path, script: str) -> dict[str, dict[int, dict[str, Tensor]]]:
    """Task → seed → name → tensor, in the order of names and seeds.

    Raises:
        SystemExit: there are none; says which script makes them.
    """
    folders = sorted({path.parent for path in work.glob("*/seed*.safetensors")})
    if not folders:
        raise SystemExit(f"no runs in {work}; run {script} compute first")
    return {
        folder.name: {seed_of(path): load_file(path) for path in paths(folder)}
        for folder in folders
    }


def add_compute(parser: argparse.ArgumentParser, seeds: Sequence[int]) -> None:
    """The arguments of a command that trains an experiment's seeds."""
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--name", help="of the task in the table; that of the experiment otherwise")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--override", nargs="*", default=[], help="Hydra overrides, as model=cnn")
