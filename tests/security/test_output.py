"""What the user names with ``--out``: nothing is destroyed or replaced without ``--force``."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from fine_bench.commands import clean, report
from fine_bench.store.files import (
    OutputError,
    StoreError,
    check_output,
    write_atomic,
    write_output,
)
from support.benchmarks import loaded


def test_the_target_of_a_link_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "folder" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    write_output(link, b"new", force=True)
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_link_to_nothing_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_output(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_text() == "new"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(mode)
    write_output(path, b"new", force=True)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    write_atomic(path, b"newer")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_file_is_replaced_only_with_force(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"already there.*--force"):
        write_output(path, b"new")
    assert path.read_text() == "old"


def test_a_terminal_is_written_into_and_stays() -> None:
    reader, writer = os.openpty()
    try:
        path = Path(os.ttyname(writer))
        write_output(path, b"shown")
        assert os.read(reader, 5) == b"shown"
        assert stat.S_ISCHR(path.stat().st_mode)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_pipe_that_somebody_reads(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(StoreError, match="could not write into"):  # nobody reads: no waiting
        write_output(path, b"x")
    content, reader = b"x" * 300_000, os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    found = bytearray()

    def read() -> None:  # nothing comes before somebody writes, and that is no end of it
        while len(found) < len(content):
            with contextlib.suppress(BlockingIOError):
                found.extend(os.read(reader, 1 << 16))
            time.sleep(0.001)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    write_output(path, content)
    thread.join(30)
    os.close(reader)
    assert found == content
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_what_no_table_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "is a folder"),
        (tmp_path / "loop", "names no file"),
        (tmp_path / "a\0b", "names no file"),
        (tmp_path / ("x" * 300), "names no file"),
        (tmp_path / "file" / "x", "no file"),
    ):
        with pytest.raises(OutputError, match=words):
            check_output(path, force=True)
    with socket.socket(socket.AF_UNIX) as server:
        name = os.path.relpath(tmp_path / "s")
        server.bind(name)
        with pytest.raises(OutputError, match="is a socket"):
            check_output(tmp_path / "s", force=True)


def test_a_results_folder_leads_no_table_elsewhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "leaderboard.md").symlink_to(secret)
    write_atomic(tmp_path / "leaderboard.md", b"table")
    assert secret.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError, match="it is a pipe"):
        write_atomic(tmp_path / "pipe", b"table")


@pytest.mark.parametrize("command", ["clean", "report"])
def test_a_folder_is_refused_before_any_work(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # neither the data nor the records exist: the refusal of --out comes first
    arguments = {
        "clean": ["--data", str(tmp_path / "no.npz"), "--trusted", "no"],
        "report": ["--results", str(tmp_path / "no")],
    }[command]
    main = {"clean": clean.main, "report": report.main}[command]
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "mine").write_text("old")
    assert main([*arguments, "--out", str(tmp_path / "mine")]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "old"


def test_scripts_refuse_before_the_work_and_replace_nothing_unasked(tmp_path: Path) -> None:
    outputs = loaded("outputs").Outputs
    mine, link = tmp_path / "mine.csv", tmp_path / "link.csv"
    mine.write_text("old")
    link.symlink_to(mine)
    for path in (mine, link):
        with pytest.raises(SystemExit, match=r"already there.*--force"):
            outputs([tmp_path / "new.md", path])
    with pytest.raises(SystemExit, match="is a folder"):
        outputs([tmp_path], force=True)
    files = outputs([tmp_path / "below" / "new.md", link], force=True)
    files.write(link, pd.DataFrame({"name": ["=1+1"], "x": [1 / 3]}))
    assert link.is_symlink()
    assert mine.read_text() == "name,x\n'=1+1,0.3333\n"
    with pytest.raises(ValueError, match="announce it"):
        files.write(mine, "x")
    # a script that writes as its work goes on replaces what it has written itself
    files = outputs([tmp_path / "new.md"])
    for text in ("one", "two"):
        files.write(tmp_path / "new.md", text)
    assert (tmp_path / "new.md").read_text() == "two"
    # at its own place in a results folder it rebuilds, and follows no link of somebody else
    outputs([link], default=True).write(link, "table")
    assert (link.read_text(), mine.read_text()[:4]) == ("table", "name")
    assert not link.is_symlink()
