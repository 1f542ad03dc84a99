"""The documentation: its Python blocks run, its pages are all in the navigation."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from fine_bench.runner import bank_config
from fine_bench.runner.config import check
from fine_bench.runner.schema import config_folder, register

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))

# packages and modules that the API pages leave out, and why
INTERNAL = {
    "fine_bench.runner": "the runner: people meet it as commands and their configuration",
    "fine_bench.commands": "arguments of commands, see their --help",
    "fine_bench.report": "drawing, for commands: fine-bench figures, fine-bench report",
    "fine_bench.terminal": "the progress bar of the commands",
    "fine_bench.clock": "the clock of costs",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, page.name, "exec"), names)
    # what a line is said to print is what it prints
    said = re.findall(r"print\(.*\)  # (.+)", "\n".join(blocks))
    for line in said:
        assert line.replace("(", "").replace(")", "") in re.sub(
            r"torch\.Size|[\[\]()]", "", printed.getvalue()
        )


def test_every_script_stands_on_a_page() -> None:
    scripts = (ROOT / "benchmarks").glob("*.py")
    asked = {f"benchmarks/{s.name}" for s in scripts if "__main__" in s.read_text()}
    results = (ROOT / "results").glob("*.md")  # which name the script that made them
    pages = " ".join(page.read_text() for page in [*PAGES, ROOT / "README.md", *results])
    named = set(re.findall(r"benchmarks/\w+\.py", pages))
    assert asked <= named, sorted(asked - named)
    assert all((ROOT / name).is_file() for name in named)


FILES = [
    (page.stem, *found)
    for page in PAGES
    for found in re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "path", "block"), FILES, ids=lambda value: value[:40])
def test_a_block_that_is_a_file_needs_nothing_of_other_blocks(
    page: str, path: str, block: str
) -> None:
    names: dict[str, object] = {"__name__": page}
    exec(compile(block, path, "exec"), names)
    assert (ROOT / path).parent.is_dir()


def test_extending_shows_four_files() -> None:
    assert [path for page, path, _ in FILES if page == "extending"] == [
        "baselines/surprise.py",
        "baselines/loss_after.py",
        "fine_bench/data/two_clouds.py",
        "fine_bench/metrics/first_ten.py",
    ]


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = {page for entry in nav for page in entry.values()}
    assert named == {page.name for page in PAGES}


def modules() -> set[str]:
    """Every module that is not empty and has no part that begins with an underscore."""
    found = set()
    for package in ("fine_bench", "baselines"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if path.read_text().strip() and not any(part.startswith("_") for part in parts):
                found.add(".".join(parts))
    return found


def named_on_api_pages() -> tuple[list[str], set[str]]:
    """What the API pages name, and which of that they show with all that is below it."""
    text = "\n".join(page.read_text() for page in PAGES if page.stem.startswith("api"))
    blocks = re.findall(r"^::: ([\w.]+)\n((?: +.*\n)*)", text, re.MULTILINE)
    return [name for name, _ in blocks], {
        name for name, options in blocks if "show_submodules: true" in options
    }


def below(module: str, packages: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def test_every_public_module_is_documented_or_internal() -> None:
    named, whole = named_on_api_pages()
    assert len(named) == len(set(named))
    assert {*INTERNAL, *named} <= modules()
    assert whole
    for module in modules():
        homes = [name for name in named if name == module or below(module, {name} & whole)]
        assert len(homes) + below(module, INTERNAL) == 1, module


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
TREE, LAYERS = re.findall(r"```text\n(.*?)```", ARCHITECTURE, re.DOTALL)[:2]


def test_the_tree_is_that_of_the_repository() -> None:
    folders = [ROOT]
    named: set[Path] = set()
    for line in TREE.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.findall(r"\b\w+(?:/|\.py\b|\.yaml\b)", line):
            first = line.lstrip().startswith(name) and name.endswith("/")
            path = folders[depth] / name if first else folders[-1] / name
            if not first and not path.exists():  # files side by side
                path = folders[depth] / name
            assert path.exists(), name
            named.add(path)
            if first:
                folders[depth + 1 :] = [path]
    package = ROOT / "fine_bench"
    parts = {path.parent for path in package.glob("*/__init__.py")} | set(package.glob("*.py"))
    assert parts - named == {package / "__init__.py"}


def test_the_layers_are_those_of_the_contract() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in tool["contracts"] if c["type"] == "layers")
    assert [line.replace("fine_bench.", "") for line in contract["layers"]] == LAYERS.splitlines()


def paths_in(text: str) -> list[str]:
    """Files and folders that sentences name as code; what the reader is to write is in capitals
    or begins with ``my_``."""
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [
        code
        for code in re.findall(r"`([^`\s]+)`", sentences)
        if re.fullmatch(r"(?!my_)[a-z_.][\w./-]*(?:/|\.(?:py|md|csv|yaml|toml|safetensors))", code)
        and not re.search(r"[A-Z]{3}", code)
    ]


# what commands make, what a page tells its reader to write, and files of other programs
NOT_HERE = (
    "ranking.csv", "issues.csv", "left_out.csv", "verify_first.csv", "decisions.csv",
    "clean-photos/", "clean-photos/runs/",
    "results/records/", "results/scores/", "results/checkpoints/", "results/figures/",
    "results/wandb/", "scores/", "checkpoints/",
    "leaderboard.md", "leaderboard.csv", "summary.md", "sensitivity.md", "sensitivity.csv",
    "conf/estimator/surprise.yaml", "conf/task/two_clouds.yaml",
)  # fmt: skip


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "baselines" / "README.md", *PAGES], ids=lambda p: p.stem
)
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    places = (ROOT, ROOT / "fine_bench", ROOT / "baselines", ROOT / "results")
    for path in paths_in(page.read_text()):
        found = any((place / path).exists() for place in places)
        assert found or path in NOT_HERE, path


def test_the_architecture_names_paths() -> None:
    assert len(paths_in(ARCHITECTURE)) > 40


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built where the extra dev is installed")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text()
    assert "fine_bench.callback.FINECallback" in api
    for page, name in (
        ("api_methods", "baselines.tracin.TracIn"),
        ("api_gradients", "fine_bench.gradients.engine.GradientEngine"),
        ("api_data", "fine_bench.data.task.TaskData"),
        ("api_results", "fine_bench.store.records.RecordStore"),
    ):
        assert f'id="{name}"' in (tmp_path / f"{page}.html").read_text()


# --------------------------------------------------------------------- commands as they are typed

COMMAND = re.compile(r"(?:python -m fine_bench|fine-bench (bank|run)) ([^`#\n]*)")
OF_A_PACKAGE = {"two_clouds", "surprise"}
"""Names of the files that ``docs/extending.md`` has its reader write."""


def typed() -> list[tuple[str, str, str]]:
    """The commands with a configuration: page, file of ``conf``, overrides."""
    pages = [ROOT / "README.md", *PAGES, *sorted((ROOT / "results").glob("*.md"))]
    return sorted({
        (page.name, "bank" if match[1] == "bank" else "config", " ".join(match[2].split()))
        for page in pages
        for match in COMMAND.finditer(page.read_text().replace("\\\n", " "))
    })  # fmt: skip


@pytest.mark.parametrize(("page", "kind", "overrides"), typed())
def test_what_is_typed_makes_a_configuration(page: str, kind: str, overrides: str) -> None:
    """Nothing runs: the files are found, the options known and their values allowed."""
    words = [word for word in shlex.split(overrides) if "=" in word or word[0] in "~+"]
    if any(name in word for word in words for name in (*OF_A_PACKAGE, "…", "$", "NAME")):
        pytest.skip("names what its reader has")
    # one job of a sweep
    words = [re.sub(r"^(\w[\w.]*=[\w.]+),[\w.,]+$", r"\1", word) for word in words]
    register()
    with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
        config = compose(kind, overrides=words)
    (bank_config.check if kind == "bank" else check)(config)
