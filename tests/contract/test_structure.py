"""Heavy frameworks stay where they belong, and packages stay few.

That imports point one way is import-linter's to say (pyproject.toml, .ci/run).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import baselines
import fine_bench

ROOTS = {
    "fine_bench": Path(fine_bench.__file__).parent,
    "baselines": Path(baselines.__file__).parent,
}

FRAMEWORKS: dict[str, set[str]] = {
    "pytorch_lightning": {"models", "data", "callback", "baselines", "llm", "runner"},
    "hydra": {"runner", "commands", "__main__"},
    "omegaconf": {"runner", "commands", "__main__"},
    "wandb": {"runner", "commands"},
    "transformers": {"llm"},
    "peft": {"llm"},
    "tokenizers": {"llm"},
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for package, root in ROOTS.items():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            part = "baselines" if package == "baselines" else parts[0]
            found.append((part, path))
    return found


def imported(path: Path, *, at_once: bool = False) -> set[str]:
    """What a file imports anywhere, or only ``at_once``, when it is imported itself."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_frameworks_stay_where_they_belong() -> None:
    for part, path in modules():
        for name in imported(path):
            framework = name.split(".")[0]
            if framework in FRAMEWORKS:
                assert part in FRAMEWORKS[framework], f"{path} imports {framework}"


RUNNERS_ONLY = {"hydra", "omegaconf", "wandb", "rich", "matplotlib", "pooch"}


def test_scores_can_be_computed_without_what_only_the_runner_needs() -> None:
    """Nothing of it is imported by f-INE and the methods, in a process that imports only them.

    Lightning itself imports Rich, and torchmetrics Matplotlib, where they are installed: of these
    only our own imports are looked at.
    """
    code = (
        "import sys, fine_bench, fine_bench.callback, baselines.tracin, baselines.controls\n"
        "ours = [m for n, m in sys.modules.items() if n.split('.')[0] in"
        " ('fine_bench', 'baselines')]\n"
        "print(*(m.__file__ for m in ours if getattr(m, '__file__', None)), sep='\\n')\n"
        "print(*({'hydra', 'omegaconf', 'wandb', 'pooch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *ours, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert len(ours) > 20
    for path in map(Path, ours):
        names = {name.split(".")[0] for name in imported(path, at_once=True)}
        assert not RUNNERS_ONLY & names, path


def test_packages_and_loose_modules_are_few() -> None:
    root = ROOTS["fine_bench"]
    packages = {path.parent.name for path in root.glob("*/__init__.py")}
    loose = {path.stem for path in root.glob("*.py")} - {"__init__", "__main__"}
    assert len(packages) <= 14, sorted(packages)
    assert len(loose) <= 6, sorted(loose)


def test_no_file_is_long() -> None:
    """A file of more than 450 lines hides a second purpose."""
    lengths = {str(path): len(path.read_text().splitlines()) for _, path in modules()}
    assert {path: n for path, n in lengths.items() if n > 450} == {}


def test_language_packages_are_imported_only_where_they_are_used() -> None:
    """Without the extra llm everything can be imported: they stand inside of functions."""
    extra = {"transformers", "peft", "tokenizers", "huggingface_hub", "bitsandbytes"}
    for _, path in modules():
        found = extra & {name.split(".")[0] for name in imported(path, at_once=True)}
        assert not found, f"{path.name} imports {found} when it is imported"


def test_no_file_that_is_read_can_run_code() -> None:
    """No pickle, no eval; ``torch.load`` with ``weights_only``, NumPy without pickle."""
    for _, path in modules():
        assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & {
            name.split(".")[0] for name in imported(path)
        }, path
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            assert called not in ("eval", "exec", "compile"), f"{path.name}: {called}"
            if called == "torch.load":
                assert ast.unparse(given["weights_only"]) == "True", path
            if called == "np.load":
                assert "allow_pickle" not in given or (
                    ast.unparse(given["allow_pickle"]) == "False"
                ), path


@pytest.mark.parametrize("name", ["fine.py", "paper.py", "trainer.py"])
def test_no_formula_in_the_lightning_adapters(name: str) -> None:
    tree = ast.parse((ROOTS["fine_bench"] / "callback" / name).read_text())
    calls = {
        n.func.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not calls & {"std", "var", "sqrt", "square", "rsqrt"}
