"""Checkpoint folders: whole or absent, also when several processes train one run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fine_bench.runner import checkpoints

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fine_bench.runner.checkpoints"])
FILES = 5
RUN = {"task": "digits", "seed": 0}


def leave(temporary: Path, mark: str) -> None:
    for number in range(FILES):
        (temporary / f"{number}.ckpt").write_text(mark)
    (temporary / checkpoints.FACTS).write_text(json.dumps({"mark": mark}))
    checkpoints.seal(temporary, RUN)


def load(folder: Path) -> Callable[[dict[str, Any]], tuple[str, set[str]]]:
    return lambda facts: (
        facts["mark"],
        {path.read_text() for path in sorted(folder.glob("*.ckpt"))},
    )


def read(folder: Path) -> tuple[str, set[str]] | None:
    return checkpoints.read(
        folder, RUN, lambda: (len(list(folder.glob("*.ckpt"))), FILES), load(folder)
    )


def publish_many(folder: Path, times: int) -> None:
    for number in range(times):
        with checkpoints.scratch(folder) as temporary:
            leave(temporary, f"{os.getpid()}-{number}")
            checkpoints.publish(temporary, folder)


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "seed0"
    assert read(folder) is None

    def fail() -> None:
        with checkpoints.scratch(folder) as temporary:
            leave(temporary, "lost")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(folder.parent.iterdir()) == []
    for mark in ("first", "second"):
        with checkpoints.scratch(folder) as temporary:
            leave(temporary, mark)
            checkpoints.publish(temporary, folder)
        assert read(folder) == (mark, {mark})
    assert list(folder.parent.iterdir()) == [folder]
    (folder / "0.ckpt").unlink()
    assert read(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["seed0.unused-1"]


def test_a_folder_that_is_replaced_or_goes_while_it_is_read_counts_as_absent(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "seed0"
    publish_many(folder, 1)

    def replaced(facts: dict[str, Any]) -> str:
        with checkpoints.scratch(folder) as temporary:
            leave(temporary, "another")
            checkpoints.publish(temporary, folder)
        return "old"

    def gone(facts: dict[str, Any]) -> str:
        shutil.rmtree(folder)
        return (folder / "0.ckpt").read_text()

    assert checkpoints.read(folder, RUN, lambda: (FILES, FILES), replaced) is None
    assert checkpoints.read(folder, RUN, lambda: (FILES, FILES), gone) is None
    assert list(tmp_path.iterdir()) == []


def test_processes_that_train_one_run_at_once(tmp_path: Path) -> None:
    """Three processes replace one folder over and over; a fourth never reads a mixture."""
    folder = tmp_path / "seed0"
    publish_many(folder, 1)
    processes = [
        CONTEXT.Process(target=publish_many, args=(folder, 150), daemon=True) for _ in range(3)
    ]
    for process in processes:
        process.start()
    seen = set()
    while any(process.is_alive() for process in processes):
        found = read(folder)
        if found is not None:
            mark, contents = found
            assert contents == {mark}
            seen.add(mark)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(seen) > 3
    assert read(folder) is not None
    assert list(tmp_path.iterdir()) == [folder]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "seed0"
    dead = CONTEXT.Process(target=int)
    dead.start()
    dead.join()
    here, there = checkpoints._host(), "0" * 8
    gone = [f"{here}-{dead.pid}", f"{here}-old-{dead.pid}", f"{here}-{os.getpid()}", f"{dead.pid}"]
    stay = [f"{here}-{os.getppid()}", f"{there}-{dead.pid}", f"{there}-old-{dead.pid}", "1"]
    old = f"{there}-{dead.pid}1"
    for name in (*gone, *stay, old):
        (tmp_path / f"seed0.tmp-{name}").mkdir()
    os.utime(tmp_path / f"seed0.tmp-{old}", (time.time() - 8 * 86400,) * 2)
    other = tmp_path / f"seed01.tmp-{here}-{dead.pid}"
    other.mkdir()
    checkpoints.remove_leftovers(folder)
    left = {path.name.removeprefix("seed0.tmp-") for path in tmp_path.glob("seed0.tmp-*")}
    assert left == set(stay)
    assert other.exists()
    monkeypatch.setattr(checkpoints.platform, "node", lambda: "another machine")
    checkpoints.remove_leftovers(folder)
    assert (tmp_path / f"seed0.tmp-{stay[0]}").exists()


def test_what_the_disk_refuses_is_raised(tmp_path: Path) -> None:
    (tmp_path / "seed0").write_text("a file")
    temporary = tmp_path / "new"
    temporary.mkdir()
    with pytest.raises(NotADirectoryError):
        checkpoints.publish(temporary, tmp_path / "seed0")
