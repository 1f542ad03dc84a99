"""Kills a running sweep at random moments, runs it again, and compares with an undisturbed one.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [override …]

One sweep of the digits task runs undisturbed. Then, ``--kills`` times, the same command is started
on an empty results folder, killed with SIGKILL at a moment drawn evenly over the time that the
undisturbed one took, and started again. After each:

- the command ends with the status 0, every record and score file can be read, nothing temporary
  is left;
- records, but for times, memory and dates, scores bit by bit, and the leaderboard, but for its
  costs, are those of the undisturbed sweep;
- what was finished when the kill came is untouched: the same bytes, the same time of change, no
  second revision, and the second start says that so many were finished earlier.

Prints a line a kill; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fine_bench.store.records import RecordStore

SMALL = (
    "task.n_train=120",
    "task.n_query=20",
    "trainer.max_epochs=3",
    "trainer.batch_size=16",
    "trainer.num_threads=1",
    "logger.mode=disabled",
    "estimator=[fine,tracin,mean_loss,random,constant]",
    "seed=0,1",
)

# what two runs of one command may not agree on
VOLATILE_FIELDS = ("created", "sweep", "cost")
VOLATILE_FACTS = ("seconds", "seconds_with_callbacks", "peak_memory_mb")


def start(folder: Path, overrides: Sequence[str]) -> subprocess.Popen[str]:
    """The command, on its way."""
    return subprocess.Popen(
        [sys.executable, "-m", "fine_bench", f"results_dir={folder}", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder.parent,
        env={**os.environ, "COLUMNS": "200"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and messages; a script that is interrupted leaves no sweep behind."""
    try:
        _, messages = process.communicate()
    finally:
        process.kill()
    return process.returncode, messages


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """What every record says, without what may differ, by the cell it is of."""
    result = {}
    for record in RecordStore(folder).scan().records:
        fields = {k: v for k, v in asdict(record).items() if k not in VOLATILE_FIELDS}
        facts = record.training.items()
        fields["training"] = {k: v for k, v in facts if k not in VOLATILE_FACTS}
        cell = f"{record.estimator}/{record.target} seed {record.seed} revision {record.revision}"
        result[cell] = fields
    return result


def scores(folder: Path) -> dict[str, bytes]:
    """Every score file, bit by bit."""
    paths = sorted((folder / "scores").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def leaderboard(folder: Path) -> list[dict[str, str]]:
    """The table without its costs."""
    with (folder / "leaderboard.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if not any(word in row["metric"] for word in ("cost", "seconds"))]


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every whole record and of the scores that belong to it."""
    store = RecordStore(folder)
    names = {f"scores/{r.scores_file}" for r in store.scan().records if r.scores_file}
    paths = [folder / name for name in names]
    paths += list((folder / "records").rglob("*--seed*.json"))
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in paths}


def differences(found: Path, expected: Path, before: Mapping[str, tuple[bytes, int]]) -> list[str]:
    """What is not as it should be after the second start; empty if all is well."""
    problems = [f"unreadable: {line}" for line in RecordStore(found).scan().problems]
    for what, read in (("record", records), ("scores", scores)):
        ours: Mapping[str, object] = read(found)
        theirs: Mapping[str, object] = read(expected)
        problems += [f"{what} missing: {name}" for name in sorted(set(theirs) - set(ours))]
        problems += [f"{what} too many: {name}" for name in sorted(set(ours) - set(theirs))]
        problems += [
            f"{what} differs: {name}" for name in sorted(ours) if ours[name] != theirs.get(name)
        ]
    if leaderboard(found) != leaderboard(expected):
        problems.append("leaderboard.csv differs")
    after = state(found)
    problems += [
        f"computed again: {name}" for name, was in sorted(before.items()) if after.get(name) != was
    ]
    left = [p for p in found.rglob("*") if ".tmp-" in p.name or p.name.endswith(".tmp")]
    problems += [f"left over: {path.relative_to(found)}" for path in sorted(left)]
    return problems


def kill_once(folder: Path, moment: float, overrides: Sequence[str], expected: Path) -> list[str]:
    """Start, kill after ``moment`` seconds, start again; what differs from ``expected``."""
    process = start(folder, overrides)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    finally:
        process.kill()
    before = state(folder)
    finished = sum(name.startswith("records/") for name in before)
    status, messages = finish(start(folder, overrides))
    print(f"  killed after {moment:5.2f} s, {finished} records finished, then exit {status}")
    if status != 0:
        return [f"exit status {status}: {messages.strip()[-500:]}"]
    problems = differences(folder, expected, before)
    said = re.search(r"\((\d+) finished earlier\)", messages)
    if said is None or int(said[1]) != finished:
        problems.append(f"{finished} were finished, the command said {said and said[0]}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if every kill ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("overrides", nargs="*", help="replace the small digits sweep's own")
    options = parser.parse_args(arguments)
    overrides = options.overrides or SMALL
    moments = random.Random(options.seed)
    failures = 0
    with tempfile.TemporaryDirectory() as parent:
        expected = Path(parent) / "undisturbed"
        begun = time.perf_counter()
        status, messages = finish(start(expected, overrides))
        seconds = time.perf_counter() - begun
        if status != 0:
            print(f"the undisturbed sweep ended with {status}: {messages.strip()[-2000:]}")
            return 1
        print(f"undisturbed: {seconds:.1f} s, {len(records(expected))} records")
        for number in range(options.kills):
            moment = moments.uniform(0, seconds)
            problems = kill_once(Path(parent) / f"killed{number}", moment, overrides, expected)
            failures += bool(problems)
            for problem in problems:
                print(f"    {problem}")
    print(f"{options.kills - failures} of {options.kills} kills ended as if nothing had happened")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
