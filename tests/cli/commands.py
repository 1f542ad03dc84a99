"""The command as a user types it, on a small slice of the digits.

Not in conftest.py: other folders have one too, and Python knows one module of that name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
SMALL = (
    "task.n_train=120",
    "task.n_query=20",
    "trainer.max_epochs=2",
    "trainer.batch_size=16",
    "trainer.num_threads=1",
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def command(folder: Path, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "fine_bench", f"results_dir={folder}", *SMALL, *arguments]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "200",
    }
