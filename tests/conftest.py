"""Shared fixtures. Tests never download anything."""

from __future__ import annotations

import os

# One thread a process, before PyTorch is imported: several workers of pytest-xdist, and the
# commands that they start, share the cores. It is also what makes sums repeatable.
os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from support.benchmarks import loaded
from support.commands import Commands, environment
from support.interpreter import Interpreter

# The machine may be busy: a slow example is not a failure. The same examples every time, so that
# a failure can be repeated.
settings.register_profile("fine_bench", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fine_bench")


@pytest.fixture(scope="session", autouse=True)
def _no_flushing() -> Iterator[None]:
    """Thousands of small files need not survive a power cut here; a command's own still do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Directory with the four MNIST files; the test is skipped where there is none."""
    from fine_bench.data import downloads, mnist

    for directory in [*mnist.directories(), mnist.cache()]:
        if all(downloads.find(name, [directory]) for name in mnist.FILES):
            return directory
    pytest.skip(
        "MNIST is neither where FINE_BENCH_DATA points nor in the user's cache "
        f"({mnist.cache()}); tests do not download it"
    )


@pytest.fixture
def hydra() -> Iterator[None]:
    """``hydra.compose`` finds the project's configuration."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from fine_bench.runner.schema import config_folder, register

    register()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The commands, each call a process of its own, outside the checkout: conf/ must be found."""
    interpreter = Interpreter(tmp_path_factory.mktemp("i"), environment())
    yield Commands(interpreter, tmp_path_factory.mktemp("elsewhere"))
    interpreter.close()


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """``benchmarks/kill_and_resume.py``, which compares results folders."""
    return loaded("kill_and_resume")
