"""fine_bench: training-data influence under training randomness, measured reproducibly."""

from fine_bench.estimator import InfluenceEstimator, Schedule, replay
from fine_bench.types import Checkpoint, GroundTruth, InfluenceScores, Problem, RunRecord

__version__ = "0.1.0"

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
