"""Where a number came from: commit, versions, hardware."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Where a number came from: commit, versions, hardware. No host name, no user's path.

    ``commit`` and ``dirty`` speak of the source tree of this package (its code and ``conf/``, not
    the results beside it), and are ``"unknown"`` when it is not a git checkout.
    """
    return {**_fixed_environment(), "threads": torch.get_num_threads()}


@cache  # the code that runs is the code that was imported, whatever is edited meanwhile
def _fixed_environment() -> dict[str, Any]:
    versions = {name: _version(name) for name in ("torch", "pytorch_lightning", "numpy", "scipy")}
    cuda = torch.cuda.is_available()
    return {
        **_git(Path(__file__).resolve().parents[1]),
        **versions,
        "hydra": _version("hydra-core"),
        "fine_bench": _version("fine_bench"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name(0) if cuda else "none",
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(package: Path) -> dict[str, Any]:
    """Commit and dirty flag of the tree that holds ``package``, if git tracks the package there."""
    # inside a git hook these variables point at another repository
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=clean, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        # an environment inside somebody's repository is not a checkout of this package
        git("ls-files", "--error-unmatch", f"{package.name}/__init__.py")
        source = [package.name, "baselines", "conf", "pyproject.toml"]
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", *source)),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0
