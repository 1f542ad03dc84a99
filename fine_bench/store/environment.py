"""Where a number came from: commit, versions, hardware, and what of them decides its last bits.

A sum of floating-point numbers depends on the order in which it is made, and that order on the
instruction set, the number of threads and the library that multiplies matrices. Rounding of one
part in 10⁷ grows during a training, so that a run on another kind of processor ends at other
weights. ``BITS`` names what a record keeps of this; none of it belongs to a record's identity.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_info

BITS = (
    "threads",
    "cpu",
    "cpu_family",
    "cpu_kernels",
    "blas",
    "kernel_options",
    "float_dtype",
    "gpu",
    "torch",
    "torch_build",
    "numpy",
    "scipy",
    "machine",
)
"""Keys of ``environment`` on which the bits of a result may depend, with the same code."""

_KERNEL_OPTIONS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
)
"""Variables by which a user chooses the kernels; their names and values say nothing personal."""


def environment() -> dict[str, Any]:
    """Where a number came from: commit, versions, hardware. No host name, no user's path.

    ``commit`` and ``dirty`` speak of the source tree of this package (its code and ``conf/``, not
    the results beside it), and are ``"unknown"`` when it is not a git checkout.
    """
    return {
        **_fixed_environment(),
        "threads": torch.get_num_threads(),
        "float_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


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
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cpu_family": _cpu_family(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "blas": _blas(),
        "kernel_options": " ".join(
            f"{name}={os.environ[name][:40]}" for name in _KERNEL_OPTIONS if name in os.environ
        ),
        "torch_build": _torch_build(),
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


def _cpu_lines() -> dict[str, str]:
    """What ``/proc/cpuinfo`` says of the first processor; nothing on other systems."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if not line.strip():
                break
            name, _, value = line.partition(":")
            found[name.strip()] = value.strip()
    return found


def _cpu() -> str:
    return _cpu_lines().get("model name") or platform.processor() or platform.machine()


def _cpu_family() -> str:
    """Family, model and stepping: virtual machines often hide them behind one name."""
    lines = _cpu_lines()
    parts = [lines.get(name, "") for name in ("cpu family", "model", "stepping")]
    return "/".join(parts) if all(parts) else "unknown"


def _torch_build() -> str:
    """Digest of how PyTorch was built; the kernels that it chooses here are no part of it."""
    lines = torch.__config__.show().splitlines()
    built = "\n".join(line for line in lines if "capability usage" not in line)
    return hashlib.sha256(built.encode()).hexdigest()[:12]


def _blas() -> str:
    """What multiplies matrices: PyTorch's libraries, and NumPy's and SciPy's with their kernels."""
    import scipy.linalg  # noqa: F401  what it loads is part of the answer, whoever came first

    built = torch.__config__.show()
    found = {
        match[0].strip()
        for match in re.finditer(
            r"(oneAPI Math Kernel Library Version \S+|OpenBLAS\S*|MKL-DNN v\S+)", built
        )
    }
    for library in threadpool_info():
        if library.get("user_api") == "blas":
            words = (library.get(key) for key in ("internal_api", "version", "architecture"))
            found.add(" ".join(str(word) for word in words if word))
    return "; ".join(sorted(found)) or "unknown"


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0
