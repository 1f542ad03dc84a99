"""fine_bench: training-data influence under training randomness, measured reproducibly."""

from pathlib import Path

from fine_bench.estimator import InfluenceEstimator, Schedule, replay
from fine_bench.types import Checkpoint, GroundTruth, InfluenceScores, Problem, RunRecord

__version__ = "0.1.0"

# `python -m fine_bench.figures` and its siblings go on working for one release
__path__.append(str(Path(__file__).parent / "commands" / "former"))

__all__ = [
    "Checkpoint",
    "GroundTruth",
    "InfluenceEstimator",
    "InfluenceScores",
    "Problem",
    "RunRecord",
    "Schedule",
    "__version__",
    "replay",
]
