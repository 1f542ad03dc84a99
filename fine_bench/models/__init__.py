"""Networks of the benchmark and the LightningModule that trains them."""

from fine_bench.models.classifier import Classifier, DivergedError
from fine_bench.models.networks import cnn, mlp

__all__ = ["Classifier", "DivergedError", "cnn", "mlp"]
