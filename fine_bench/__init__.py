"""fine_bench: training-data influence under training randomness, measured reproducibly."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fine_bench.data.positions import with_index
    from fine_bench.estimator import InfluenceEstimator, Schedule, replay
    from fine_bench.fine.watch import watch
    from fine_bench.runner.clean.cleaning import clean
    from fine_bench.types import (
        Checkpoint,
        GroundTruth,
        InfluenceScores,
        Problem,
        RunRecord,
        TrainingSteps,
    )

__version__ = "0.1.0"

# `fine-bench figures` and its siblings go on working for one release
__path__.append(str(Path(__file__).parent / "commands" / "former"))

__all__ = [
    "Checkpoint",
    "GroundTruth",
    "InfluenceEstimator",
    "InfluenceScores",
    "Problem",
    "RunRecord",
    "Schedule",
    "TrainingSteps",
    "__version__",
    "clean",
    "replay",
    "watch",
    "with_index",
]

_HOMES = {
    "clean": "fine_bench.runner.clean.cleaning",
    **dict.fromkeys(("InfluenceEstimator", "Schedule", "replay"), "fine_bench.estimator"),
    "watch": "fine_bench.fine.watch",
    "with_index": "fine_bench.data.positions",
}
"""Where public names are that are not in ``types``."""


def __getattr__(name: str) -> object:
    """Public names are imported when they are asked for: a command's help needs no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'fine_bench' has no attribute {name!r}")
    home = _HOMES.get(name, "fine_bench.types")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
