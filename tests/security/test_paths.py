"""Names that are paths, a home folder that no shell has written out, and copies left behind."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest

from fine_bench.commands.common import at_home
from fine_bench.commands.cure import main as cure
from fine_bench.errors import ConfigError
from fine_bench.runner.plan import _data
from fine_bench.store.files import temporary_folder


def test_the_home_folder_in_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ["results_dir=~/x", "+bank.folder=~", "task.name=~/x", "~trainer.lr", "seed=0"]
    assert at_home(given) == [
        "results_dir=/home/me/x", "+bank.folder=/home/me", "task.name=~/x", "~trainer.lr", "seed=0",
    ]  # fmt: skip
    monkeypatch.setenv("HOME", "/home/it's me")
    assert at_home(["results_dir=~/x"]) == [r"results_dir='/home/it\'s me/x'"]


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/b", "", ".hidden", "n" * 300])
def test_the_name_of_a_task_is_no_path(name: str) -> None:
    options = {"_target_": "fine_bench.data.digits.digits_mislabel", "seed": 0, "name": name}
    with pytest.raises(ConfigError, match=r"task.name=.* must consist of"):
        _data(options, ("fine_bench", "baselines"))


@pytest.mark.parametrize("name", ["../outside", "leaderboard", "n" * 300])
def test_the_name_of_a_cure_is_no_path_and_no_other_table(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cure(["--results", str(tmp_path), "--task", "x", "--name", name]) == 2
    assert "--name" in capsys.readouterr().err


def test_copies_of_the_killed_are_removed_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned, other = tmp_path / "fine_bench-bank-1", tmp_path / "somebody-bank-1"
    for folder in (abandoned, other):
        folder.mkdir()
        (folder / "data.safetensors").write_text("private")
    (tmp_path / "fine_bench-bank-link").symlink_to(other)
    old = time.time() - 3600
    with temporary_folder("bank") as used:
        (used / "data.safetensors").write_text("in use")
        for folder in (abandoned, other, used):
            os.utime(folder, (old, old))
        with temporary_folder("bank"):
            assert not abandoned.exists()
            assert (used / "data.safetensors").exists()
    assert not used.exists()
    assert (other / "data.safetensors").exists()
