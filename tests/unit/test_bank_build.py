"""Filling a bank: what is trained, by whom, and what a kill leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from fine_bench.gradients.margin import margins
from fine_bench.retraining import build as building
from fine_bench.retraining.build import (
    Retraining,
    WorkerError,
    build,
    default_processes,
    missing,
    stacks,
)
from fine_bench.retraining.design import Design, definition_models, repeated_models, single_models
from fine_bench.retraining.train import DivergedModelError, train_one
from fine_bench.seeds import stream
from support.bank_networks import (
    DESIGN,
    RECIPE,
    RETRAINING,
    N,
    Small,
    examples,
    new_bank,
)
from support.commands import environment

MODELS = [
    *single_models(7),
    *repeated_models(1, 5),
    *definition_models({"a": [3], "b": [9], "c": [1, 2]}, 3, 2),
]


def chunks(folder: Path) -> list[str]:
    """Names hold digests: the same names are the same bytes."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.safetensors"))


def test_models_are_those_of_the_reference(tmp_path: Path) -> None:
    bank, data = new_bank(tmp_path), examples()
    build(bank, MODELS, RETRAINING, data)
    for part in ("single", "repeated", "definition"):
        found = bank.load(part)  # type: ignore[arg-type]
        own = sorted((m for m in MODELS if m.part == part), key=lambda m: m.key)
        assert len(found) == len(own)
        for k, model in enumerate(own):
            positions = DESIGN.positions(model, N)
            assert np.array_equal(np.flatnonzero(found.members[k]), positions.numpy())
            seed = DESIGN.run_seed(model)
            assert (found.subset[k], found.seed[k]) == (model.subset, seed)
            net = Small()(seed)
            train_one(net, data.x, data.y, positions, stream(seed, "order"), RECIPE)
            for x, y, loss, margin in (
                (data.x, data.y, found.loss[k], found.margin[k]),
                (data.query_x, data.query_y, found.query_loss[k], found.query_margin[k]),
            ):
                logits = net(x).detach()
                expected = nn.functional.cross_entropy(logits, y, reduction="none")
                np.testing.assert_allclose(loss, expected.numpy(), rtol=1e-3, atol=1e-5)
                np.testing.assert_allclose(margin, margins(logits, y), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vary", ["initialisation", "order"])
def test_one_source_of_randomness(vary: Any, tmp_path: Path) -> None:
    """Without training, models differ in their initialisation alone."""
    recipe = replace(RECIPE, lr=1e-30)
    retraining = replace(RETRAINING, recipe=recipe, design=Design(vary=vary))
    models = definition_models({}, 3, 0)
    found = retraining.train(models, examples())
    assert (np.ptp(found.margin, axis=0).max() > 0) == (vary == "initialisation")
    trained = replace(retraining, recipe=RECIPE).train(models, examples())
    assert np.ptp(trained.margin, axis=0).max() > 1e-3


def test_only_what_is_missing_is_trained(tmp_path: Path) -> None:
    bank, reports = new_bank(tmp_path), []
    first = build(bank, MODELS[:5], RETRAINING, examples())
    assert (first.trained, first.processes) == (5, 1)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    second = build(bank, MODELS, RETRAINING, examples(), report=reports.append)
    assert second.trained == sum(reports) == len(MODELS) - 5
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert build(bank, MODELS, RETRAINING, examples()).trained == 0
    assert missing(bank, [*MODELS, *single_models(9)]) == single_models(9)[7:]


def test_stacks_have_one_size_each_and_do_not_shift() -> None:
    found = stacks(MODELS, DESIGN, N, 3)
    assert sorted(m.key for s in found for m in s) == sorted(m.key for m in MODELS)
    for stack in found:
        assert len(stack) <= 3
        assert len({(m.part, DESIGN.size_of(m, N)) for m in stack}) == 1
    # "a" and "b" leave out one example each: they are trained together
    assert [len(s) for s in found] == [3, 3, 1, 3, 2, 3, 3, 1, 2]
    for lost in range(len(found)):
        left = [s for k, s in enumerate(found) if k != lost]
        assert stacks([m for s in left for m in s], DESIGN, N, 3) == left


def test_a_model_that_diverges_is_named_and_the_others_stay(tmp_path: Path) -> None:
    bank = new_bank(tmp_path)
    build(bank, MODELS[:4], RETRAINING, examples())
    wild = replace(RETRAINING, recipe=replace(RECIPE, lr=3e38))
    with pytest.raises(DivergedModelError, match=r"model single/4/0 diverged.*trainer\.lr=3e\+37"):
        build(bank, MODELS, wild, examples())
    assert bank.present("single") == {(k, 0) for k in range(4)}


def test_few_cheap_models_are_trained_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(building, "missing", lambda bank, wanted: list(wanted))
    monkeypatch.setattr(building, "default_processes", lambda device: 4)
    monkeypatch.setattr(building, "_here", lambda *_: used.append(1))
    monkeypatch.setattr(building, "_in_workers", lambda *a: used.append(a[-1]))

    class Folder:
        def remove_leftovers(self) -> None: ...

    def processes(retraining: Retraining, **options: Any) -> int:
        build(Folder(), single_models(64), retraining, examples(), **options)  # type: ignore[arg-type]
        return used.pop()

    assert processes(RETRAINING) == 1
    assert processes(RETRAINING, processes=3) == 3
    long = replace(RETRAINING, recipe=replace(RECIPE, max_epochs=10**8))
    assert processes(long) == 4
    assert processes(long, processes=1) == 1
    assert processes(long, at_once=32) == 2  # no more workers than stacks


def test_default_processes() -> None:
    assert default_processes("cpu") == len(os.sched_getaffinity(0))
    assert default_processes("cuda") == 1


# ------------------------------------------------------------------------------- workers

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from support.bank_networks import RECIPE, RETRAINING, examples, new_bank
from fine_bench.retraining.build import build
from fine_bench.retraining.design import single_models
if __name__ == "__main__":
    retraining = replace(RETRAINING, recipe=replace(RECIPE, max_epochs=int(sys.argv[2])))
    models = single_models(int(sys.argv[3]))
    build(new_bank(Path(sys.argv[1])), models, retraining, examples(), processes=2, at_once=2)
"""


def children(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(path.parent.name))
    return found


def wait_until(condition: Any, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_and_run_again_is_as_uninterrupted(tmp_path: Path) -> None:
    epochs, count = 150, 40
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    folder = tmp_path / "killed"
    command = [sys.executable, str(script), str(folder), str(epochs), str(count)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
    wait_until(lambda: len(chunks(folder)) >= 2 or process.poll() is not None)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers
    # the workers end with it
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers))
    left = chunks(folder)
    assert 2 <= len(left) < count // 2, "the run ended before it was killed"
    retraining = replace(RETRAINING, recipe=replace(RECIPE, max_epochs=epochs))
    build(new_bank(folder), single_models(count), retraining, examples(), processes=1, at_once=2)
    whole = tmp_path / "whole"
    build(new_bank(whole), single_models(count), retraining, examples(), processes=1, at_once=2)
    assert chunks(folder) == chunks(whole)
    assert set(left) < set(chunks(whole))


class Ending(Small):
    """Ends the worker that builds it."""

    def __call__(self, seed: int) -> nn.Module:
        if seed:
            os._exit(9)
        return super().__call__(seed)


class Failing(Small):
    """Cannot be built in a worker."""

    def __call__(self, seed: int) -> nn.Module:
        if seed:
            raise KeyError("no such layer")
        return super().__call__(seed)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (Ending(), WorkerError, r"ended from outside.*bank\.processes=1"),
        (Failing(), KeyError, "no such layer"),
    ],
)
def test_failing_workers(make: Any, error: Any, message: str, tmp_path: Path) -> None:
    before = children(os.getpid())
    retraining = replace(RETRAINING, make=make)
    with pytest.raises(error, match=message):
        build(new_bank(tmp_path), single_models(4), retraining, examples(), processes=2, at_once=1)
    assert not bank_is_started(tmp_path)
    wait_until(lambda: len(children(os.getpid())) <= len(before) + 1)  # Python's own tracker


def bank_is_started(folder: Path) -> bool:
    return bool(chunks(folder))
