"""The commands that README and documentation tell people to type are understood.

Most take minutes or need data, so they are not run here: overrides are composed and checked, for
every job of a sweep, and arguments are parsed. ``.ci/run`` runs the two installations and the main
command for real; Python blocks are run by ``test_readme.py`` and ``test_docs.py``.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from fine_bench.runner import bank_config, launchers
from fine_bench.runner.config import check, explain
from fine_bench.runner.schema import config_folder, register

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# what the reader is told to write just before
OWN_FILES = ("mine", "surprise", "two_clouds")


def commands(text: str) -> Iterator[str]:
    """Every command of the shell blocks, and every one that stands in a sentence."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield from line.split("&&")
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", sentences):
        if re.fullmatch(r"fine-bench\s+[a-z]+", code):
            yield f"{code} --help"  # its name, which is no call
        elif re.match(r"(python|pip|fine-bench)\s", code):
            yield code


def words(command: str) -> list[str]:
    return shlex.split(re.sub(r"<[^>]*>", "NAME", command), comments=True)


FOUND = [
    (page.stem, command)
    for page in PAGES
    for command in commands(page.read_text())
    if words(command) and not re.search(rf"\b({'|'.join(OWN_FILES)})\b", command)
]
# one that stands on several pages is understood on all or on none
ALL = list({tuple(words(command)): (page, command) for page, command in reversed(FOUND)}.values())


class Parsed(Exception):  # noqa: N818
    """The arguments were understood."""


def understand_overrides(name: str, arguments: Sequence[str]) -> int:
    """Check every job; how many there are."""
    given = [a for a in arguments if a not in ("-m", "--cfg", "job")]
    assert not [a for a in given if a.startswith("-")], "an option that this test does not know"
    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        try:
            for overrides in jobs:
                config = compose(name, list(overrides))
                bank_config.check(config) if name == "bank" else check(config)
        except (HydraException, OmegaConfBaseException) as error:
            missing = launchers.explain(error)
            if missing is not None:
                pytest.skip(missing)
            raise AssertionError(explain(error)) from error
        finally:
            GlobalHydra.instance().clear()
    return len(jobs)


def understand_arguments(
    name: str, arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parse the arguments of one command of ``fine-bench``, and no more."""
    assert importlib.util.find_spec(f"fine_bench.commands.{name}") is not None, name
    if list(arguments) == ["--help"]:
        return
    command = importlib.import_module(f"fine_bench.commands.{name}")
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: Any, args: Any = None, namespace: Any = None) -> None:
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        command.main(list(arguments))


def understand_fine_bench(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word names the command; ``run`` and ``bank`` take Hydra's overrides."""
    if not arguments or list(arguments) == ["--help"]:
        return  # the list of commands
    name, *rest = arguments
    if name in ("run", "bank") and rest != ["--help"]:
        if any("llm" in argument for argument in rest):
            pytest.importorskip("transformers", reason="the extra llm is not installed")
        assert understand_overrides("bank" if name == "bank" else "config", rest) >= 1
    elif name != "run":
        understand_arguments(name, rest, monkeypatch)


def understand_installation(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rest = [a for a in arguments[1:] if a != "-q"]
    if rest[0] == "-c":
        assert (ROOT / rest[1]).is_file()
        rest = rest[2:]
    (what,) = rest
    if what in NAMED_PACKAGES:
        return
    found = re.fullmatch(r"(?:\.|fine_bench)(?:\[([\w,]+)\])?", what)
    assert found is not None, what
    for extra in (found[1] or "").split(",") if found[1] else ():
        assert extra in project["optional-dependencies"], extra


NAMED_PACKAGES = {"tensorboard"}
"""Packages of others that pages tell to install by their own name."""


def understand(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail for whatever does not work, and for a kind of command that is not known here."""
    program, *rest = words(command)
    program = program.removeprefix(".venv/bin/")
    if program == "pip":
        understand_installation(rest)
    elif program == "pytest" or (program, rest[:2]) == ("python3", ["-m", "venv"]):
        assert re.search(rf"bin/{program}\b|-m venv", (ROOT / ".ci" / "run").read_text())
    elif program == "fine-bench" or (program == "python" and rest[:2] == ["-m", "fine_bench"]):
        understand_fine_bench(rest if program == "fine-bench" else ["run", *rest[2:]], monkeypatch)
    elif program == "python" and rest[0].startswith("benchmarks/"):
        script = ROOT / rest[0]
        assert script.is_file(), script
        # gain.py has a file of its own for the options of its table; others share theirs
        parts = [*script.parent.glob(f"{script.stem}*.py"), script.with_name("seed_files.py")]
        source = "".join(part.read_text() for part in parts)
        for option in (a for a in rest[1:] if a.startswith("--")):
            assert f'"{option}"' in source, option
    elif program == "wandb":
        assert rest[0] == "sync", command
        import wandb.cli.cli

        assert "sync" in wandb.cli.cli.cli.commands
    else:
        raise AssertionError(f"a kind of command that this test does not know: {command}")


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{p}: {c.strip()[:60]}" for p, c in ALL])
def test_a_command_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    understand(command, monkeypatch)


def test_commands_are_found() -> None:
    readme = [command for page, command in FOUND if page == "README"]
    assert any("fine-bench leaderboard" in command for page, command in FOUND if page != "README")
    assert any("+experiment=mnist_mislabel -m seed=0,1,2" in command for command in readme)
    assert {page for page, _ in FOUND} >= {"README", "sweeps", "verify", "report", "records"}
    text = "```bash\npip x && python y \\\n  z\n```\n`python\n-m z`, `fine-bench bank`"
    assert list(commands(text)) == [
        "pip x ", " python y    z", "python\n-m z", "fine-bench bank --help",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "python -m fine_bench +experiment=no_such",
        "python -m fine_bench trainer.lrr=0.1 seed=0,1",
        "python -m fine_bench seed=0,-1",
        "fine-bench run seed=0,-1",
        "fine-bench bank bank.modles=3",
        "fine-bench audit --tsk mnist",
        "fine-bench audit",
        "fine-bench leaderbord",
        "fine-bench no_such --help",
        "python benchmarks/callback_overhead.py --no-such-option",
        "pip install -c constraints.txt '.[no_such]'",
        "pip install tensorbord",
        "wandb snyc results/wandb/offline-run-*",
        "make all",
    ],
)
def test_a_mistake_is_noticed(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        understand(command, monkeypatch)
