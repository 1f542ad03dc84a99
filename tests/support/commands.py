"""The commands as a user types them, the main one on a small slice of the digits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import mkdtemp

from support.interpreter import Child, Interpreter

TESTS = Path(__file__).parents[1]
SMALL = (
    "task.n_train=120",
    "task.n_query=20",
    "trainer.max_epochs=2",
    "trainer.batch_size=16",
    "trainer.num_threads=1",
)

Done = subprocess.CompletedProcess[str]


def environment() -> dict[str, str]:
    """This process's, with ``tests/`` on the path of its children."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")])),
        "COLUMNS": "200",
    }


class Commands:
    """Runs commands in processes of their own, from a folder that is not the checkout."""

    def __init__(self, interpreter: Interpreter, elsewhere: Path) -> None:
        self.interpreter = interpreter
        self.elsewhere = elsewhere

    def __call__(self, folder: Path, *arguments: str) -> Done:
        """``python -m fine_bench`` on the small slice to its end, with results in ``folder``."""
        return self.run("fine_bench", *small(folder), *arguments)

    def run(self, module: str, *arguments: str) -> Done:
        """``python -m module`` to its end, which comes within five minutes."""
        child = self.start(module, *arguments)
        return Done([module, *arguments], child.wait(300), *child.texts())

    def start(self, module: str, *arguments: str) -> Child:
        """``python -m module`` on its way, forked from the waiting interpreter."""
        streams = Path(mkdtemp(dir=self.elsewhere))
        return self.interpreter.start(module, arguments, self.elsewhere, environment(), streams)

    def typed(self, module: str, *arguments: str, timeout: float = 300) -> Done:
        """The same as ``run`` in a Python that starts afresh, which takes six seconds longer."""
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.elsewhere,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def small(folder: Path) -> list[str]:
    """What the main command is given first: results in ``folder``, and the small slice."""
    return [f"results_dir={folder}", *SMALL]
