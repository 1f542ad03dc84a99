"""What finished models of runs said, as files, so that an interrupted call goes on where it was.

What one fold's model said is kept below ``FOLDER/runs/`` under a digest of all that decides it:
inputs, labels, model, optimiser, seed; of a model of somebody's own its code as well. So a second
call with a trusted list, another level or score trains nothing anew, and other data or options
never meet an old file. Plain arrays, nothing pickled.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fine_bench.runner.clean.recipe import Recipe, build
from fine_bench.runner.clean.training import Run
from fine_bench.store.files import write_atomic

VERSION = 3
"""Raised when what a file holds for the same digest changes."""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ARRAYS = ("probabilities", "own", "mu", "std_error")


@dataclass(frozen=True)
class FoldStore:
    """Where the folds of runs are kept.

    Attributes:
        folder: of the files.
        key: digest of data and options.
    """

    folder: Path
    key: str

    def path(self, seed: int, number: int) -> Path:
        """Of one fold of one run."""
        return self.folder / f"{self.key}-run{seed}-fold{number}.npz"

    def keeper(self, seed: int) -> Callable[[int, Callable[[], Run]], Run]:
        """What ``train_run`` takes as ``keep``: reads what is there, makes and keeps the rest.

        A file that cannot be read is made anew.
        """

        def keep(number: int, make: Callable[[], Run]) -> Run:
            path = self.path(seed, number)
            found = read_fold(path)
            if found is None:
                found = make()
                write_atomic(path, as_bytes(found))
            return found

        return keep

    def finished(self, seeds: list[int], folds: int) -> int:
        """How many folds are there already."""
        return sum(self.path(s, k).is_file() for s in seeds for k in range(folds))


def key_of(x: Tensor, y: Tensor, recipe: Recipe, influence: bool) -> str:
    """Digest of what decides a run but for its seed, 16 hexadecimal digits."""
    said = hashlib.sha256()
    about: dict[str, Any] = {k: v for k, v in asdict(recipe).items() if k != "make"}
    made = f"{getattr(recipe.make, '__module__', '')}.{getattr(recipe.make, '__qualname__', '')}"
    about |= {"made": made, "influence": influence, "version": VERSION, "shape": list(x.shape)}
    said.update(json.dumps(about, sort_keys=True).encode())
    if not made.startswith("fine_bench."):
        _say_own(recipe, x, y, said.update)
    for array in (x.numpy(), y.numpy()):
        said.update(np.ascontiguousarray(array).tobytes())
    return said.hexdigest()[:16]


def _say_own(recipe: Recipe, x: Tensor, y: Tensor, say: Callable[[bytes], None]) -> None:
    """A model of somebody's own: its name stays when its code changes.

    What stands in its file, and what it makes: modules, options, and parameters before training.
    """
    module = build(recipe, tuple(x.shape[1:]), int(y.max()) + 1, seed=0).eval()
    with torch.no_grad():
        module(x[:2])  # lazy layers have their parameters after this
    for made in (recipe.make, type(module)):
        try:
            say(Path(inspect.getfile(made)).read_bytes())
        except (TypeError, OSError):  # typed at a prompt, or an object
            code = getattr(made, "__code__", None)
            say(b"" if code is None else code.co_code + repr(code.co_consts).encode())
    say(_ADDRESS.sub("", f"{module}{dict(module.hparams)}").encode())
    for name, value in module.state_dict().items():
        say(name.encode())
        say(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())


def as_bytes(run: Run) -> bytes:
    """A fold as an archive of plain arrays."""
    out = io.BytesIO()
    np.savez_compressed(
        out,
        **{name: getattr(run, name) for name in _ARRAYS},
        epochs=np.array(run.epochs, dtype=np.int64),
        examples=np.array(run.examples),
        trouble=np.array(run.trouble),
    )
    return out.getvalue()


def read_fold(path: Path) -> Run | None:
    """A fold that is there and whole, else None."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return Run(
                found["probabilities"],
                found["own"],
                found["mu"],
                found["std_error"],
                tuple(int(n) for n in found["epochs"]),
                int(found["examples"]),
                str(found["trouble"]),
            )
    except Exception:  # absent or damaged, in NumPy's and zipfile's many ways: made anew
        return None
