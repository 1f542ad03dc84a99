"""Shared fixtures. Tests never download anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

# The machine may be busy: a slow example is not a failure. The same examples every time, so that
# a failure can be repeated.
settings.register_profile("fine_bench", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fine_bench")


@pytest.fixture(scope="session")
def mnist_dir() -> Path:
    """Directory with the four MNIST files; the test is skipped where there is none."""
    from fine_bench.data import loading, mnist

    for directory in [*mnist.directories(), mnist.cache()]:
        if all(loading.find(name, [directory]) for name in mnist.FILES):
            return directory
    pytest.skip(
        "MNIST is neither where FINE_BENCH_DATA points nor in the user's cache "
        f"({mnist.cache()}); tests do not download it"
    )
