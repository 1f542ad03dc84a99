"""The commands are listed, found, and explain themselves, within 100 columns and at once."""

from __future__ import annotations

import argparse
import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import fine_bench
from fine_bench.commands import COMMANDS, hydra_help
from fine_bench.report.figures.requirements import in_full
from fine_bench.report.figures.style import FORMATS
from fine_bench.retraining.truth import HALVES
from fine_bench.runner.clean import scores as clean
from fine_bench.runner.clean.inputs.items import KINDS as CLEAN_KINDS
from fine_bench.runner.clean.scoring import SCORES as CLEAN_SCORES
from fine_bench.runner.cure import MIN_SEEDS, TREATMENTS, USUAL
from fine_bench.types import TARGETS
from support.commands import Commands

ROOT = Path(fine_bench.__file__).parent
# the commands of Hydra, whose help is the configuration itself
HYDRA = ("run", "bank")
FILES = {path.stem for path in (ROOT / "commands").glob("*.py")}
OWN = sorted(set(COMMANDS) - set(HYDRA))
FORMER = sorted(set(COMMANDS) - {"run", "publish"})
"""Those that were modules of their own, ``python -m fine_bench.NAME``."""


def as_program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``fine-bench ARGUMENTS``; the exit status."""
    monkeypatch.setattr(sys, "argv", ["fine-bench", *arguments])
    with pytest.raises(SystemExit) as end:
        importlib.import_module("fine_bench.__main__").main()
    assert isinstance(end.value.code, int)
    return end.value.code


def as_module(monkeypatch: pytest.MonkeyPatch, module: str, *arguments: str) -> int:
    """``python -m MODULE ARGUMENTS``; the exit status."""
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, "fine_bench.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """Which commands were called with which arguments; all do nothing and end with 7."""
    calls: list[tuple[str, list[str]]] = []

    def replace(name: str) -> None:
        module = importlib.import_module(f"fine_bench.commands.{name}")

        def main(argv: list[str]) -> int:
            calls.append((name, list(argv)))
            return 7

        monkeypatch.setattr(module, "main", main)

    for name in COMMANDS:
        replace(name)
    return calls


def test_every_command_has_a_file_and_every_file_is_listed() -> None:
    assert FILES - {"__init__", "common", "hydra_help"} == set(COMMANDS)
    assert set(HYDRA) == set(hydra_help.CONFIGS)


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_the_program_says_what_there_is(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_program(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert f"  {name} " in shown
        assert line in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert as_program(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fine-bench {fine_bench.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_first_word_picks_a_command(
    name: str, called: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_program(monkeypatch, name, "--a", "b=c") == 7
    assert as_module(monkeypatch, "fine_bench", name, "--a", "b=c") == 7
    assert called == [(name, ["--a", "b=c"])] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["+experiment=mnist_mislabel", "-m", "seed=0,1,2"],
        ["trainer.lr=0.1"],
        ["-m", "seed=0,1"],
        ["--cfg", "job"],
        ["~logger"],
        ["'estimator=[fine]'"],
    ],
)
def test_everything_else_goes_to_hydra(
    arguments: list[str], called: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_program(monkeypatch, *arguments) == 7
    assert as_module(monkeypatch, "fine_bench", *arguments) == 7
    assert called == [("run", arguments)] * 2


@pytest.mark.parametrize("arguments", [[], ["--version"], ["-m", "seed=1"]])
def test_the_module_without_a_command_is_hydras(
    arguments: list[str], called: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_module(monkeypatch, "fine_bench", *arguments) == 7
    assert called == [("run", arguments)]


def test_a_mistyped_command_is_refused(
    called: list[tuple[str, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert as_program(monkeypatch, "leaderbord", "--task", "x") == 2
    assert "no command 'leaderbord'; did you mean leaderboard?" in capsys.readouterr().err
    assert as_module(monkeypatch, "fine_bench", "seed") == 2
    assert "an override of the configuration is written key=value" in capsys.readouterr().err
    assert called == []


@pytest.mark.parametrize("name", FORMER)
def test_the_former_modules_go_on_working(
    name: str, called: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert as_module(monkeypatch, f"fine_bench.{name}", "--results", "there") == 7
    assert called == [(name, ["--results", "there"])]


@pytest.mark.parametrize("name", OWN)
def test_help_is_useful(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"fine_bench.commands.{name}").main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: fine-bench {name} ")
    assert "Exit status:\n  0  " in text
    assert f"Examples:\n  fine-bench {name}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "call"), [((), "python -m fine_bench"), (("bank",), "fine-bench bank")]
)
def test_help_of_a_hydra_command_is_useful(
    cli: Commands, arguments: tuple[str, ...], call: str
) -> None:
    # in a process of its own: Hydra sets up the logging of the whole process, pytest's included
    ended = cli.run("fine_bench", *arguments, "--help")
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout
    assert text.startswith(f"{call}: ")
    assert "Exit status" in text
    assert text.count(f"  {call} ") >= 2
    assert "Configuration groups" in text
    assert "launcher: basic, joblib" in text
    assert "experiment: cifar10n, " in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_the_bank_shows_its_options(cli: Commands) -> None:
    """As typed, by its former name: Python starts afresh."""
    ended = cli.typed("fine_bench.bank", "--help")
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    assert said.startswith("fine-bench bank: train the models of a retraining bank")
    for part in ("bank.definition.singles=100", "task: ", "seeds_per_subset: 5"):
        assert part in said


def test_help_imports_nothing_that_takes_long() -> None:
    code = (
        "import contextlib, importlib, io, sys\n"
        "import fine_bench.__main__ as program\n"
        "program.overview()\n"
        f"for name in {OWN}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        importlib.import_module(f'fine_bench.commands.{name}').main(['--help'])\n"
        "slow = ('torch', 'numpy', 'pandas', 'scipy', 'matplotlib', 'hydra', 'wandb', 'rich')\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", HYDRA)
def test_the_configuration_is_shown_without_what_a_run_needs(name: str) -> None:
    """The help of a Hydra command took 8 s of CPU, most of them for imports; it takes 1."""
    code = (
        "import sys\n"
        "import fine_bench.__main__ as program\n"
        f"status = program.call([{name!r}, 'task.seed=7', '--help'])\n"
        "slow = ('torch', 'numpy', 'pandas', 'scipy', 'matplotlib', 'wandb', 'pytorch_lightning')\n"
        "print([name for name in slow if name in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    shown, _, imported = done.stdout.strip().rpartition("\n")
    assert imported == "[] 0"
    assert "seed: 7" in shown
    assert "== Configuration groups (group=option) ==" in shown


def test_the_callback_imports_little_beside_lightning() -> None:
    """Whoever has Lightning pays for our own files alone: 1.03 times its import when measured."""
    code = (
        "import sys, pytorch_lightning\n"
        "before = set(sys.modules)\n"
        "import fine_bench.callback\n"
        "new = set(sys.modules) - before\n"
        "print(sorted({name.partition('.')[0] for name in new}), 10 * len(new) < len(before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fine_bench'] True"


def choices(name: str, option: str) -> tuple[str, ...]:
    """What a command's option may be."""
    module = importlib.import_module(f"fine_bench.commands.{name}")
    made: argparse.ArgumentParser = module.parser()
    (action,) = [a for a in made._actions if option in a.option_strings]
    assert action.choices is not None
    return tuple(action.choices)


def test_choices_are_those_of_the_code() -> None:
    """They are written out in the commands, which import nothing before they have been parsed."""
    assert choices("audit", "--target") == TARGETS
    assert choices("score", "--half") == HALVES
    assert all(in_full("metrics", name) for name in choices("figures", "--detection"))
    assert all(in_full("consistency", name) for name in choices("figures", "--consistency"))
    assert importlib.import_module("fine_bench.commands.figures").FORMATS == FORMATS
    assert tuple(clean.MODELS) == importlib.import_module("fine_bench.commands.clean").MODELS
    assert choices("clean", "--kind") == CLEAN_KINDS
    assert choices("clean", "--score") == CLEAN_SCORES
    assert choices("clean", "--method") == clean.METHODS
    assert choices("cure", "--treatments") == TREATMENTS
    assert importlib.import_module("fine_bench.commands.cure").USUAL == USUAL
    assert importlib.import_module("fine_bench.commands.cure").MIN_SEEDS == MIN_SEEDS


def test_public_names_are_imported_when_they_are_asked_for() -> None:
    assert set(fine_bench.__all__) <= set(dir(fine_bench))
    for name in fine_bench.__all__:
        assert getattr(fine_bench, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        fine_bench.no_such  # noqa: B018
