"""Fixtures of the commands' tests."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from commands import Run, command, environment  # type: ignore[import-not-found]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """``benchmarks/kill_and_resume.py``, which compares results folders."""
    spec = importlib.util.spec_from_file_location("kill_and_resume", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Run:
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # not the checkout: conf/ must be found

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(folder, arguments),
            cwd=elsewhere,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run
