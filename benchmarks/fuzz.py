"""Damages files at random and lets the commands read them: everything wrong is named, nothing else.

    python benchmarks/fuzz.py [--mutations 1000] [--seed 0]

A small results folder is made once: three methods and two seeds on the digits with checkpoints,
published records, a bank, the truth condensed from it, somebody's scores, and tables for ``clean``.
Each mutation takes a fresh copy, damages one file (bits, cuts, keys, numbers, types, depth, another
file's content, a pipe, a link, a folder), and runs one command that reads it, in this process:

- it ends, within ``LIMIT`` seconds, with an exit status and without a traceback;
- nothing outside of the results folder changes;
- where no reader can take the file for a whole one (``SURE``), its name is said and the status is
  not 0. Checkpoints are trained again instead, so there the word alone counts.

A flipped bit may leave a valid file that says something else, so it may pass without a word in text
that carries no digest. Prints a line for each broken promise, with what repeats it, and the counts;
exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy
from omegaconf import OmegaConf

from fine_bench.commands import (
    audit,
    clean,
    cure,
    figures,
    leaderboard,
    publish,
    report,
    score,
    summary,
    truth,
    verify,
)
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.design import Model
from fine_bench.retraining.outputs import BankModels
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import plan
from fine_bench.store.environment import environment

LIMIT = 120
N, Q = 40, 4
SMALL_NUMBERS = (0, -1, 1e308, 2**70, True, None, "", "x" * 5000, [], {}, "../../canary")
SURE = {"empty", "nested", "huge number", "pipe", "folder", "foreign", "link"}
"""What no reader can take for a whole file of the kind."""


class HangError(BaseException):
    """A command did not end in time; no ``except Exception`` may catch it."""


@dataclass(frozen=True)
class Kind:
    """Files of one kind: where they lie in the copy, and what reads them."""

    pattern: str
    readers: tuple[str, ...]


METHODS = {
    "mean_loss": "baselines.controls.MeanTrainingLoss",
    "random": "baselines.controls.RandomScores",
    "fine": "fine_bench.callback.FINECallback",
}
TABLES = ("leaderboard", "summary")
KINDS = {
    "record": Kind("results/records/**/*--seed*.json", (*TABLES, "figures", "report", "publish")),
    "verified record": Kind("results/records/**/random*--seed0*.json", ("verify",)),
    "record of scores": Kind("results/records/**/mean_loss*--seed*.json", ("cure",)),
    "audited record": Kind("results/records/**/fine--*--seed*.json", ("audit",)),
    "audited scores": Kind("results/scores/**/fine--*.safetensors", ("audit",)),
    "comparison": Kind("results/records/**/consistency--*.json", TABLES),
    "packed": Kind("results/published/*.jsonl", (*TABLES, "publish")),
    "scores": Kind("results/scores/**/mean_loss*.safetensors", ("report", "cure")),
    "checkpoint": Kind("results/checkpoints/**/*.ckpt", ("train",)),
    "facts": Kind("results/checkpoints/**/*.json", ("train",)),
    "bank": Kind("bank/**/*.safetensors", ("truth",)),
    "manifest": Kind("bank/manifest.json", ("truth",)),
    "truth": Kind("results/ground_truth/*.safetensors", ("score",)),
    "own scores": Kind("mine.safetensors", ("score",)),
    "npz": Kind("data.npz", ("clean npz",)),
    "csv": Kind("data.csv", ("clean csv",)),
}


# ---------------------------------------------------------------------------- a whole folder


def job(results: Path, estimator: str, seed: int) -> Any:
    """A small run on the digits."""
    task = {"_target_": "fine_bench.data.digits.digits_mislabel", "name": "digits_mislabel"}
    config = {
        "seed": seed,
        "task": {**task, "seed": 0, "n_train": N, "n_query": 10},
        "model": {"_target_": "fine_bench.models.networks.mlp", "name": "mlp", "hidden": [8]},
        "trainer": {"max_epochs": 1, "batch_size": 16, "progress": False, "num_threads": 1},
        "targets": ["self"],
        "estimators": {estimator: {"_target_": METHODS[estimator]}},
        "results_dir": str(results),
    }
    return plan(check(OmegaConf.create(config)))


def fill(root: Path) -> None:
    """Make the folder that every mutation begins with."""
    results = root / "results"
    for seed in (0, 1):
        for estimator in METHODS:
            # in a checkout with uncommitted changes nothing could be published
            committed = {**environment(), "dirty": False}
            with mock.patch("fine_bench.runner.write.environment", return_value=committed):
                done = execute(job(results, estimator, seed), "fuzz", say=lambda _: None)
            for written in done:
                if written.record.status != "finished":
                    raise SystemExit(f"the base run failed: {written.record.reason}")
    draw = np.random.default_rng(0)
    identity = {
        "task": "small", "data_sha256": "da7a" * 16, "setting": "5e77" * 16, "n_train": N,
        "n_query": Q, "design": {"seed": 0, "keep": 0.5, "vary": "both"},
    }  # fmt: skip
    bank = Bank.create(root / "bank", identity, list(range(8)))
    for part, subset in (("single", np.arange(60)), ("repeated", np.repeat(np.arange(20), 5))):
        k = len(subset)
        sets = (draw.random((k, N)) < 0.5)[subset]
        margin = draw.normal(size=(k, N)) + 1 + sets * (1 + np.arange(N) % 3)
        query = draw.normal(size=(k, Q)) + sets[:, :Q]
        numbers = [a.astype(np.float32) for a in (margin**2, margin, query**2, query)]
        seeds = np.arange(k, dtype=np.int64)
        models = BankModels(
            members=sets, subset=subset.astype(np.int64), seed=seeds,
            loss=numbers[0], margin=numbers[1], query_loss=numbers[2], query_margin=numbers[3],
        )  # fmt: skip
        bank.add([Model(part, int(s), int(r)) for s, r in zip(subset, seeds, strict=True)], models)  # type: ignore[arg-type]
    x, y = draw.normal(size=(60, 3)), np.arange(60) % 2
    np.savez(root / "data.npz", x=x + y[:, None], y=y)
    rows = [f"{a:.4f},{b:.4f},{c:.4f},{label}" for (a, b, c), label in zip(x, y, strict=True)]
    (root / "data.csv").write_text("\n".join(["a,b,c,label", *rows]) + "\n")
    (root / "trusted.txt").write_text("\n".join(map(str, range(20))))
    mine = {"self": draw.normal(size=N).astype(np.float32)}
    safetensors.numpy.save_file(mine, root / "mine.safetensors")
    (root / "canary").write_text("nobody writes here")
    (root / "empty").mkdir()
    first = next(root.glob(KINDS["verified record"].pattern))
    for reader in (
        "leaderboard",
        "publish",
        "truth",
        "score",
        "summary",
        "cure",
        "verify",
        "clean npz",
        "audit",
        "clean csv",
    ):
        status, text = called(reader, root, first)
        if status != 0:
            raise SystemExit(f"{reader} ends with {status} on the whole folder:\n{text}")


# ------------------------------------------------------------------------------- readers


def called(reader: str, root: Path, path: Path | None) -> tuple[int, str]:
    """Exit status and output of one command on the folder."""
    results = ["--results", str(root / "results")]
    task = ["--task", "digits_mislabel"]
    out = ["--out", str(root / "results" / "flagged.csv"), "--force", "--epochs", "1"]
    trusted = ["--trusted", str(root / "trusted.txt"), *out]
    frozen = ["--name", "small", "--version", "1"]
    truths = ["--output", str(root / "results" / "ground_truth")]
    calls: dict[str, Callable[[], int]] = {
        "leaderboard": lambda: leaderboard.main(results),
        "summary": lambda: summary.main([*results, "--measure", "auroc", "--target", "self"]),
        "figures": lambda: figures.main([*results, "--format", "svg"]),
        "report": lambda: report.main([*results, "--examples", "2"]),
        "publish": lambda: publish.main(results),
        "verify": lambda: verify.main([str(path)]),
        "cure": lambda: cure.main(
            [*results, *task, "--methods", "mean_loss", "--shares", "0.1", "--treatments", "remove"]
        ),
        "audit": lambda: audit.main([*results, *task, "--example", "1"]),
        "score": lambda: score.main([str(root / "mine.safetensors"), "--task", "small", *results]),
        "truth": lambda: truth.main([str(root / "bank"), *frozen, *truths]),
        "clean npz": lambda: clean.main(["--data", str(root / "data.npz"), *trusted]),
        "clean csv": lambda: clean.main(
            ["--data", str(root / "data.csv"), "--label", "label", *trusted]
        ),
        "train": lambda: trained(root / "results"),
    }
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = calls[reader]()
    return status, said.getvalue()


def trained(results: Path) -> int:
    """Both seeds asked again, from their checkpoints where these are whole."""
    shutil.rmtree(results / "records", ignore_errors=True)
    shutil.rmtree(results / "published", ignore_errors=True)
    states = []
    for seed in (0, 1):
        done = execute(job(results, "mean_loss", seed), "fuzz", say=print)
        states += [one.record.status for one in done]
    return 0 if set(states) == {"finished"} else 1


# ------------------------------------------------------------------------------- mutations


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a JSON value with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def mutate_json(path: Path, draw: random.Random) -> str:
    """Change one key of a JSON file, or of one line of a JSONL file."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = draw.randrange(len(lines))
    content = json.loads(lines[at])
    parent, key = draw.choice(list(places(content)))
    what = draw.choice(("removed", "replaced", "swapped", "duplicated", "renamed"))
    if what == "removed":
        del parent[key]
    elif what == "replaced" or not isinstance(parent, dict):
        parent[key] = draw.choice(SMALL_NUMBERS)
    elif what == "swapped":
        other = draw.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    elif what == "renamed":
        parent[f"{key}x"] = parent.pop(key)
    lines[at] = json.dumps(content)
    if what == "duplicated" and isinstance(content, dict):
        first = next(iter(content))
        lines[at] = lines[at][:-1] + f", {json.dumps(first)}: 7}}"
    path.write_text("\n".join(lines))
    return f"{key} {what}"


def mutate(path: Path, root: Path, draw: random.Random) -> str:
    """Damage one file; returns how."""
    data = path.read_bytes()
    text = path.suffix in (".json", ".jsonl")
    whats = ["bits", "cut", "empty", "foreign", "pipe", "link", "folder"]
    what = draw.choice([*whats, "json", "json", "json", "nested", "huge number"] if text else whats)
    if what == "json":
        return mutate_json(path, draw)
    if what == "bits":
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
    elif what == "cut":
        path.write_bytes(data[: draw.randrange(1, len(data))])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "foreign":
        path.write_bytes((root / ("mine.safetensors" if text else "canary")).read_bytes())
    elif what == "nested":
        path.write_bytes(b"[" * 200_000)
    elif what == "huge number":
        path.write_bytes(b'{"format": 1' + b"0" * 9000 + b"}")
    else:
        path.unlink()
        if what == "pipe":
            os.mkfifo(path)
        elif what == "link":
            path.symlink_to(root / "canary")
        else:
            path.mkdir()
    return what


def outside(root: Path) -> dict[str, tuple[int, int, int]]:
    """Size, mode and time of change of everything that no command may touch."""
    found = {}
    for path in root.rglob("*"):
        below = path.relative_to(root)
        if below.parts[0] != "results" and not path.is_dir():
            state = path.lstat()
            found[str(below)] = (state.st_size, state.st_mode, state.st_mtime_ns)
    return found


def _hangs(*_: object) -> None:
    raise HangError


def broken(base: Path, place: Path, number: int, seed: int) -> tuple[str, str, str]:
    """One mutation. Which kind and reader, how it was damaged, and what was not kept."""
    draw = random.Random(f"{seed}/{number}")
    name = draw.choice(list(KINDS))
    kind = KINDS[name]
    root = place / "copy"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(base, root, symlinks=True)
    path = draw.choice(sorted(p for p in root.glob(kind.pattern) if p.is_file()))
    how = mutate(path, root, draw)
    reader = draw.choice(kind.readers)
    before = outside(root)
    wrong = []
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(LIMIT)
    try:
        status, said = called(reader, root, path)
        flat = re.sub(r"\s", "", said)
        named = any(re.sub(r"\s", "", part) in flat for part in (path.name, path.parent.name))
        if "Traceback" in said:
            wrong.append("a traceback was printed")
        if how in SURE and not named:
            wrong.append(f"not named (status {status}): {said[-300:]!r}")
        if how in SURE and status == 0 and reader != "train":
            wrong.append("status 0")
    except HangError:
        wrong.append(f"no end within {LIMIT} s")
    except (Exception, SystemExit) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        at = "" if last is None else f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}"
        wrong.append(f"{type(error).__name__}: {error!s:.200} at {at}")
    finally:
        signal.alarm(0)
    if outside(root) != before:
        wrong.append("something outside of the results changed")
    return f"{name} / {reader}", f"{how} of {path.name}", "; ".join(wrong)


def fuzz(place: Path, numbers: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Mutations of these numbers: how many of each kind, and the broken promises."""
    base = place / "base"
    base.mkdir()
    counts: Counter[str] = Counter()
    lines = []
    here = Path.cwd()
    fill(base)
    os.chdir(base / "empty")
    try:
        for number in numbers:
            what, how, wrong = broken(base, place, number, seed)
            counts[what.split(" / ")[0]] += 1
            if wrong:
                lines.append(f"{number}: {what}, {how}: {wrong}")
                print(lines[-1], flush=True)
        if list((base / "empty").iterdir()):
            lines.append("something was written into the working folder")
    finally:
        os.chdir(here)
    return counts, lines


def main() -> int:
    """Damage, read, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["COLUMNS"] = "400"
    numbers = range(arguments.first, arguments.first + arguments.mutations)
    with tempfile.TemporaryDirectory() as folder:
        counts, lines = fuzz(Path(folder), numbers, arguments.seed)
    print(", ".join(f"{kind} {n}" for kind, n in sorted(counts.items())))
    print(f"{sum(counts.values())} mutations, {len(lines)} broken promises")
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
