"""Every command explains itself: what it does, its exit status, an example, within 100 columns."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fine_bench
from support.commands import Commands

# the commands of Hydra, whose help is the configuration itself
HYDRA = {"", "bank"}
ROOT = Path(fine_bench.__file__).parent


def commands() -> list[str]:
    """What may stand behind ``python -m fine_bench.``; "" is the package itself."""
    found = set()
    for path in ROOT.rglob("*.py"):
        if 'if __name__ == "__main__"' in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.add(".".join(parts[:-1] if parts[-1] == "__main__" else parts))
    return sorted(found)


def test_all_commands_are_found() -> None:
    wanted = {"leaderboard", "figures", "report", "audit", "score", "clean", "cure", "truth",
              "verify", "summary"} | HYDRA  # fmt: skip
    assert wanted <= set(commands())


def module_of(name: str) -> ModuleType:
    path = ROOT.joinpath(*name.split("."), "__main__.py")
    module = ".".join(filter(None, ("fine_bench", name)))
    return importlib.import_module(f"{module}.__main__" if path.is_file() else module)


@pytest.mark.parametrize("name", sorted(set(commands()) - HYDRA))
def test_help_is_useful(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    module = module_of(name)
    monkeypatch.setattr(sys, "argv", [f"python -m fine_bench.{name}", "--help"])
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: python -m fine_bench.{name}" in text
    assert "Exit status" in text
    assert f"python -m fine_bench.{name}" in text.split("usage:", 1)[1].split("options:")[1]
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", sorted(HYDRA))
def test_help_of_a_hydra_command_is_useful(cli: Commands, name: str) -> None:
    # in a process of its own: Hydra sets up the logging of the whole process, pytest's included
    ended = cli.run(".".join(filter(None, ("fine_bench", name))), "--help")
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout
    call = f"python -m fine_bench.{name}".rstrip(".")
    assert text.startswith(call)
    assert "Exit status" in text
    assert text.count(f"  {call} ") >= 2
    assert "Configuration groups" in text
    assert "launcher: basic, joblib" in text
    assert "experiment: cifar10n, " in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_the_bank_shows_its_options(cli: Commands) -> None:
    """As typed: Python starts afresh."""
    ended = cli.typed("fine_bench.bank", "--help")
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert said.startswith("python -m fine_bench.bank: train the models of a retraining bank")
    for part in ("bank.definition.singles=100", "task: ", "seeds_per_subset: 5"):
        assert part in said
