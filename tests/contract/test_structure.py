"""Imports point one way, and heavy frameworks stay in their rooms."""

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
            room = "baselines" if package == "baselines" else parts[0]
            found.append((room, path))
    return found


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_frameworks_stay_where_they_belong() -> None:
    for room, path in modules():
        for name in imported(path):
            framework = name.split(".")[0]
            if framework in FRAMEWORKS:
                assert room in FRAMEWORKS[framework], f"{path} imports {framework}"


def test_scores_can_be_computed_without_hydra_and_wandb() -> None:
    code = (
        "import sys, fine_bench, fine_bench.callback, baselines.tracin, baselines.controls\n"
        "print([m for m in ('hydra', 'wandb', 'omegaconf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_language_packages_are_imported_only_where_they_are_used() -> None:
    """Without the extra llm everything can be imported: they stand inside of functions."""
    extra = {"transformers", "peft", "tokenizers", "huggingface_hub", "bitsandbytes"}
    for _, path in modules():
        for node in ast.parse(path.read_text()).body:
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = extra & {name.split(".")[0] for name in names}
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
