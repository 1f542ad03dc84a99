"""Fixtures of the commands' tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import Run, command, environment  # type: ignore[import-not-found]


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
