"""A control for methods that say what trained a prediction: a kernel of the inputs.

    score(q, i) = Z_qi ⟨ḡ_q, r̄_i⟩,   Z = K_q (K + λI)⁻¹,   K(x, x') = exp(−‖x − x'‖²/2σ²)

With nothing of the network in it: x are the inputs, flattened. σ² is the total variance of the
training inputs, half of the mean squared distance of two of them, so that it follows the scale of
the inputs (d for d standardised ones). r̄_i is the residual at i of the regression of
onehot(y) − 1/k without i, and ḡ_q = onehot(y_q) − 1/k: every value is an exact leave-one-out
effect, of a model that nobody asked about. ``residual="run"`` takes both from the run instead, as
``baselines/kernel_regression.py`` does. A method that reads a network and predicts retrained
networks no better than this control has shown nothing about the network.

What leaving an example out has to do with the formula stands in
``fine_bench.gradients.tangent_kernel``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.kernel_regression import KernelRegression
from fine_bench.estimator import Schedule
from fine_bench.gradients.input_kernel import gaussian, total_variance
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting


class GaussianKernel(KernelRegression):
    """A control: ridge regression on the inputs, which knows nothing of the network.

    Args:
        ridge: λ, > 0; the kernel's diagonal is 1.
        bandwidth: σ², > 0; None for the total variance of the training inputs.
        residual: ``"leave_one_out"``, the regression's own; or ``"run"``, the network's, averaged
            over the checkpoints.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.

    Values are differences of the regression on onehot(y) − 1/k, for ``residual="run"`` relative.
    """

    name = "gaussian_kernel"
    version = 1

    def __init__(
        self,
        ridge: float = 1.0,
        bandwidth: float | None = None,
        residual: Literal["leave_one_out", "run"] = "leave_one_out",
        query_weighting: QueryWeighting = None,
    ) -> None:
        super().__init__(ridge, query_weighting)
        if bandwidth is not None and not 0 < bandwidth < float("inf"):
            raise ValueError(f"bandwidth is σ² > 0, or None to find one, got {bandwidth}")
        if residual not in ("leave_one_out", "run"):
            raise ValueError(f'residual must be "leave_one_out" or "run", got {residual!r}')
        self.bandwidth, self.residual = bandwidth, residual
        self.schedule = Schedule.ALL if residual == "run" else Schedule.LAST

    def unsupported(self, problem: Problem) -> str | None:
        """Besides what no kernel regression serves: inputs without a distance."""
        _, x, _ = next(iter(problem.batches("train", batch_size=1)))
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            what = x.dtype if isinstance(x, Tensor) else type(x).__name__
            return f"needs real-valued inputs, of which it takes distances, got {what}"
        return super().unsupported(problem)

    def update(self, checkpoint: Checkpoint) -> None:
        """Add the checkpoint's residuals; without them it is not looked at."""
        if self.residual == "run":
            self.load(checkpoint)
            self.observe()
        else:
            self.n_updates += 1

    def compute(self) -> InfluenceScores:
        """The regression on the inputs."""
        self.require_update()
        problem = self.problem
        x, y = self._inputs("train"), problem.labels("train")
        centre = x.mean(0)
        x = x - centre
        width = self.bandwidth or total_variance(x)
        kernel = gaussian(x, x, width)
        itself = isinstance(problem.queries, str)
        xq, yq = (x, y) if itself else (self._inputs("queries") - centre, problem.labels("queries"))
        targets: tuple[Tensor, Tensor] | None = None
        if self.residual == "leave_one_out":
            k = int(max(y.max(), yq.max())) + 1
            targets = F.one_hot(y, k).to(x) - 1 / k, F.one_hot(yq, k).to(x) - 1 / k
        cross = None if itself else gaussian(xq, x, width)
        return self.scores(kernel, cross, x.new_ones(len(xq)), targets)

    def _inputs(self, which: Literal["train", "queries"]) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        return torch.cat([x.flatten(1) for _, x, _ in self.problem.batches(which)]).to(dtype)
