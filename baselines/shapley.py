"""In-run data Shapley: what each example gave to the drop of the validation loss, step by step.

Idea (Wang, Mittal, Song, Jia, *Data Shapley in One Training Run*, arXiv:2406.11011). A step of
plain SGD moves the parameters by θ_{t+1} = θ_t − u_t with u_t = η_t Σ_j a_j, where a_j is example
j's share of the gradient of the training loss (g_j/m for a mean over m examples). Had only the
examples S of the batch been used, the validation loss ℓ would have dropped by

    U_t(S) = ℓ(θ_t) − ℓ(θ_t − η_t Σ_{j∈S} a_j).

U_t is a cooperative game, and its Shapley values share the drop of the step among the examples.
For the Taylor expansion of ℓ at θ_t they have a closed form: a linear term belongs to its example,
a product of two examples is halved between them. With g the gradient and H the Hessian of ℓ at θ_t,

    first order    φ_i = Σ_t η_t ⟨a_i,t, g_t⟩
    second order   φ_i = Σ_t η_t ⟨a_i,t, g_t − ½ H_t u_t⟩

over the steps with i in the batch. One Hessian-vector product a step serves all examples. φ_i > 0:
i lowered the loss. The values of a step add up to the expansion of the drop: they miss the drop
itself by O(η²) in first order, by O(η³) in second.

The shares hold for plain SGD alone. Momentum and adaptive steps carry gradients of earlier batches
along, weight decay moves the parameters without any example, clipping rescales the step: such runs
are refused instead of being given values that add up to nothing.

Our choices: ℓ is the *mean* loss of the validation examples in evaluation mode; they are not
weighted, so that the values add up to the drop of a loss that anybody can measure.

Shapes: m examples of a batch, V validation examples, R rows of the scores, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from fine_bench.fine.passes import Aside
from fine_bench.gradients.blocks.direction import Direction
from fine_bench.gradients.curvature.products import as_direction, parameter_names
from fine_bench.gradients.engine import GradientEngine, per_example_loss
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.types import REDUCE, InfluenceScores, Loss, Target, UnsupportedProblemError

Order: TypeAlias = Literal[1, 2]

NAME = "in_run_shapley"

VERSION = 1
"""Raised when scores may change."""


def check_question(target: Target, order: Order, has_queries: bool) -> None:
    """Refuse what in-run Shapley cannot be asked.

    Raises:
        UnsupportedProblemError: a target that it does not serve.
        ValueError: an unknown order; no validation examples.
    """
    if order not in get_args(Order):
        raise ValueError(f"order must be 1 or 2, got {order!r}")
    if target == "self":
        raise UnsupportedProblemError(
            'target="self" has no validation loss whose drop the examples could share; in-run '
            'Shapley serves "validation", "validation_per_class" and, in first order, "queries"'
        )
    if target == "queries" and order == 2:
        raise UnsupportedProblemError(
            'target="queries" would need a Hessian-vector product for every query at every step; '
            'use order=1, or target="validation"'
        )
    if target not in ("queries", "validation", "validation_per_class"):
        raise ValueError(
            'target must be "validation", "validation_per_class" or "queries", got ' + repr(target)
        )
    if not has_queries:
        raise ValueError(f"target={target!r} needs queries=…, the validation examples")


def refuse_other_updates(
    optimizer: str, momentum: float = 0.0, weight_decay: float = 0.0, clipping: bool = False
) -> None:
    """Refuse a run whose steps are not −η times the gradient of the batch.

    Args:
        optimizer: name of its class.
        momentum, weight_decay: of the optimiser.
        clipping: whether gradients are clipped.

    Raises:
        UnsupportedProblemError: with the option that makes it so.
    """
    reasons = []
    if optimizer != "SGD":
        reasons.append(f"optimiser {optimizer}")
    if momentum:
        reasons.append(f"momentum={momentum}")
    if weight_decay:
        reasons.append(f"weight_decay={weight_decay}")
    if clipping:
        reasons.append("gradient clipping")
    if reasons:
        raise UnsupportedProblemError(
            "in-run Shapley shares the step of plain SGD among the examples of its batch, but this "
            f"run has {', '.join(reasons)}; use torch.optim.SGD without them"
        )


def loss_derivatives(
    output: Callable[[Mapping[str, Tensor]], Tensor],
    loss: Loss,
    params: Mapping[str, Tensor],
    y: Tensor,
    weights: Tensor,
    along: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of weighted losses, and their Hessians times one vector.

    Row r is the function ℓ_r(θ) = Σ_v w_rv ℓ(z_v(θ), y_v). The Hessian times u is the gradient of
    ⟨∇ℓ_r, u⟩ (Pearlmutter, Neural Computation 6(1), 1994).

    Args:
        output: parameters by name → logits of the V examples.
        loss: ``loss(logits, y, reduction="none") -> (V,)``.
        params: where, detached.
        y: labels, ``(V, …)``.
        weights: w, ``(R, V)``.
        along: u by parameter; None leaves the Hessians out.

    Returns:
        gradients and products, each ``(R, P)``, parameters in the order of ``params``.
    """
    with torch.enable_grad():
        values = {name: p.detach().requires_grad_() for name, p in params.items()}
        losses = per_example_loss(loss, output(values), y)
        wanted = list(values.values())
        gradients, products = [], []
        for row in weights.to(losses):
            slope = torch.autograd.grad(
                losses @ row,
                wanted,
                retain_graph=True,
                create_graph=along is not None,
                materialize_grads=True,
            )
            gradients.append(_flat(slope))
            if along is None:
                continue
            inner = sum(
                (part * along[name]).sum() for name, part in zip(values, slope, strict=True)
            )
            assert isinstance(inner, Tensor)
            # a loss that is linear in the parameters has no graph left to differentiate
            again = torch.zeros_like(gradients[-1])
            if inner.requires_grad:
                curved = torch.autograd.grad(
                    inner, wanted, retain_graph=True, materialize_grads=True
                )
                again = _flat(curved)
            products.append(again)
    return torch.stack(gradients), torch.stack(products) if along is not None else None


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def step_values(
    shares: PerExampleGradients,
    gradient: Tensor,
    product: Tensor | None,
    lr: float,
    like: Direction,
) -> Tensor:
    """φ of one step, η ⟨a_i, g_r − ½ H_r u⟩, ``(R, m)``.

    Args:
        shares: a_i, the examples' shares of the training gradient.
        gradient: g, ``(R, P)``, in the order of ``like``.
        product: H u, ``(R, P)``; None for the first order.
        lr: η.
        like: any direction in these parameters.
    """
    direction = gradient if product is None else gradient - 0.5 * product
    return lr * shares.contract(as_direction(direction, like))


def query_values(shares: PerExampleGradients, queries: PerExampleGradients, lr: float) -> Tensor:
    """First-order φ of one step for every single query, η ⟨a_i, g_v⟩, ``(V, m)``."""
    return lr * queries.gram(shares)


class ValidationLoss:
    """The loss whose drop is shared, at the present parameters of a model in training.

    Args:
        module: the model.
        engine: gradients of the model; it knows the loss.
        x, y: the validation examples, ``(V, …)`` each, on the model's device.
        target: rows: one a query, one for all, or one a class.
        order: 1, or 2 with the curvature of the loss.
        aside: opens a context beside the training; see ``fine_bench.fine.passes.Aside``.

    Attributes:
        evaluations: gradients of validation examples so far; with curvature, each counts twice.
    """

    def __init__(
        self,
        module: nn.Module,
        engine: GradientEngine,
        x: Tensor,
        y: Tensor,
        *,
        target: Target,
        order: Order,
        aside: Aside,
    ) -> None:
        self.module, self.engine = module, engine
        self.x, self.y = x, y
        self.target, self.order = target, order
        self.aside = aside
        self.evaluations = 0
        self._weights = query_groups(y.cpu(), REDUCE[target])
        self._like: Direction | None = None

    @property
    def n_rows(self) -> int:
        """Rows R of the scores."""
        return len(self._weights)

    def watch(self) -> None:
        """Other parameters are trained than before."""
        self.engine.watch()
        self._like = None

    def step_values(self, shares: PerExampleGradients, lr: float) -> Tensor:
        """φ of the present step, ``(R, m)``.

        Args:
            shares: a_i, the examples' shares of the training gradient.
            lr: η.
        """
        engine = self.engine
        self.evaluations += len(self.y) * self.order
        if self.target == "queries":
            with self.aside():
                return query_values(shares, engine(self.x, self.y), lr)
        if self._like is None:
            self._like = shares.weighted_sum(shares.blocks[0].values.new_ones(1, len(shares)))
        params = dict(self.module.named_parameters())
        watched = {name: params[name] for name in parameter_names(engine.recorder)}
        update = None
        if self.order == 2:
            update = {
                name: torch.zeros_like(p) if p.grad is None else lr * p.grad
                for name, p in watched.items()
            }
        # other callbacks may be recording the training step of the same model
        with self.aside(), engine.recorder.alone():
            gradient, product = loss_derivatives(
                lambda values: engine.functional(values, self.x),
                engine.loss,
                watched,
                self.y,
                self._weights,
                update,
            )
        return step_values(shares, gradient, product, lr, self._like)


class ShapleyAccumulator:
    """Running sums of φ for R rows and n examples, in float64.

    Args:
        n_train, n_rows: n and R, ≥ 1.

    Attributes:
        n_observations: how often each example was in a batch, ``(n_train,)``.
        n_steps: steps taken in.
        n_not_finite: steps left out because of NaN or infinite values.
    """

    def __init__(self, n_train: int, n_rows: int) -> None:
        if n_train < 1 or n_rows < 1:
            raise ValueError(f"n_train and n_rows must be at least 1, got {n_train}, {n_rows}")
        self._values = torch.zeros((n_rows, n_train), dtype=torch.float64)
        self.n_observations = torch.zeros(n_train, dtype=torch.int64)
        self.n_steps = 0
        self.n_not_finite = 0

    def observe(self, index: Tensor, values: Tensor) -> bool:
        """Take in one step; whether it could be used.

        Args:
            index: which training examples, ``(m,)``; one that stands there twice has two shares.
            values: φ of the step, ``(R, m)``.
        """
        if not bool(torch.isfinite(values).all()):
            self.n_not_finite += 1
            return False
        index = index.cpu()
        self._values.index_add_(1, index, values.double().cpu())
        self.n_observations.index_add_(0, index, torch.ones_like(index))
        self.n_steps += 1
        return True

    def scores(self, target: Target) -> InfluenceScores:
        """φ so far, ``(n_rows, n_train)``, in units of the validation loss.

        An example that was in no batch has the value 0.
        """
        return InfluenceScores(
            values=self._values.float(),
            n_observations=self.n_observations.clone(),
            method=NAME,
            target=target,
            version=VERSION,
        )

    def drop(self) -> Tensor:
        """What the values add up to: the expansion of the drop of each row's loss, ``(R,)``."""
        return self._values.sum(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after an interruption."""
        return {
            "values": self._values.clone(),
            "n_observations": self.n_observations.clone(),
            "counts": (self.n_steps, self.n_not_finite),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``.

        Raises:
            ValueError: it belongs to other data or queries.
        """
        values = state["values"]
        if values.shape != self._values.shape:
            raise ValueError(
                f"the saved in-run Shapley values are for {tuple(values.shape)} (rows, examples), "
                f"this run has {tuple(self._values.shape)}; resume with the same data and queries"
            )
        self._values = values.clone()
        self.n_observations = state["n_observations"].clone()
        self.n_steps, self.n_not_finite = state["counts"]
