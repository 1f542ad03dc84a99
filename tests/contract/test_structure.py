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

# room → what it may import from the project; a room is a module or package below fine_bench/
CORE = {"types", "seeds", "errors", "__version__"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "seeds": set(),
    "errors": set(),
    "privacy": {"tradeoff"},
    "tradeoff": set(),
    "testing": {"tradeoff"},
    "gradients": CORE,
    "weighting": {*CORE, "gradients"},
    "estimator": {*CORE, "gradients"},
    "fine_error": CORE,
    "fine": {*CORE, "fine_error", "gradients", "weighting", "testing", "tradeoff"},
    "watch": {*CORE, "gradients", "weighting", "fine", "fine_error"},
    "callback_trainer": CORE,
    "callback": {
        *CORE,
        "callback_trainer",
        "gradients",
        "weighting",
        "fine",
        "fine_error",
        "watch",
    },
    "shapley": {*CORE, "gradients"},
    "callback_shapley": {*CORE, "callback_trainer", "gradients", "weighting", "shapley", "watch"},
    "factorial": set(),
    "error_rate": {*CORE, "testing", "metrics"},
    "clean": {*CORE, "run"},
    "cure": {*CORE, "run"},
    "subsets": CORE,
    "fine_paper": {*CORE, "gradients", "fine", "subsets", "testing"},
    "callback_paper": {
        *CORE,
        "callback_trainer",
        "gradients",
        "weighting",
        "fine",
        "fine_paper",
        "subsets",
        "watch",
    },
    "data": CORE,
    "models": CORE,
    "metrics": {*CORE, "tradeoff", "testing"},
    "records": CORE,
    "progress": set(),
    "leaderboard": {
        *CORE,
        "records",
        "metrics",
        "progress",
        "leaderboard_ties",
        "leaderboard_view",
    },
    "leaderboard_ties": {*CORE, "metrics", "leaderboard"},
    "leaderboard_view": {*CORE, "records", "metrics", "leaderboard"},
    "figures": {
        *CORE,
        "records",
        "metrics",
        "leaderboard",
        "progress",
        "tradeoff",
        "privacy",
        "sensitivity",
        "testing",
    },
    "report": {
        *CORE,
        "data",
        "records",
        "metrics",
        "leaderboard",
        "leaderboard_view",
        "figures",
        "llm",
        "progress",
        "sensitivity",
        "sequences",
        "truth",
    },
    "sensitivity": {*CORE, "records", "leaderboard", "leaderboard_view", "progress"},
    "verify": {*CORE, "run"},
    "bank": {*CORE, "records", "run"},
    "truth": {*CORE, "bank", "metrics", "records", "figures"},
    "score": {*CORE, "leaderboard", "leaderboard_view", "metrics", "records", "truth"},
    "audit": {*CORE, "records", "privacy"},
    "summary": {*CORE, "leaderboard", "progress", "records"},
    "config": {*CORE, "records", "sensitivity"},
    "sequences": CORE,
    "moments": CORE,
    "llm": {
        *CORE,
        "gradients",
        "sequences",
        "moments",
        "records",
        "data",
        "models",
        "fine",
        "subsets",
        "callback",
        "callback_paper",
    },
    "baselines": {
        *CORE,
        "gradients",
        "weighting",
        "estimator",
        "baselines",
        "sequences",
        "moments",
    },
}
FRAMEWORKS: dict[str, set[str]] = {
    "pytorch_lightning": {
        "models",
        "data",
        "callback",
        "callback_paper",
        "callback_shapley",
        "llm",
        "callback_trainer",
        "run",
    },
    "hydra": {"config", "run", "__main__"},
    "omegaconf": {"config", "run", "__main__"},
    "wandb": {"run"},
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


def project_room(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] == "baselines":
        return "baselines"
    if parts[0] == "fine_bench":
        return parts[1] if len(parts) > 1 else "__init__"
    return None


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda v: str(getattr(v, "name", v)))
def test_imports_point_one_way(room: str, path: Path) -> None:
    for name in imported(path):
        framework = name.split(".")[0]
        if framework in FRAMEWORKS:
            assert room in FRAMEWORKS[framework], f"{path.name} imports {framework}"
        other = project_room(name)
        if other is None or room in ("run", "__main__", "__init__") or other == room:
            continue
        assert room in ALLOWED, f"say in this test what {room} may import"
        assert other in ALLOWED[room], f"{path.name} ({room}) imports {name}"


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


@pytest.mark.parametrize("name", ["callback.py", "callback_paper.py", "callback_shapley.py"])
def test_no_formula_in_the_lightning_adapters(name: str) -> None:
    tree = ast.parse((ROOTS["fine_bench"] / name).read_text())
    calls = {
        n.func.attr
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not calls & {"std", "var", "sqrt", "square", "rsqrt"}
