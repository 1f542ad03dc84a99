"""The exact derivative of a run: what an example's weight did to a query, through every step.

Let the run's losses be weighted, L_t(θ, w) = (1/m) Σ_{i ∈ batch t} w_i ℓ_i(θ), with w = 1 as it
was. Its last parameters θ_T(w) are then a function of w, and the score is

    score(q, i) = ∂ f_q(θ_T(w)) / ∂ w_i   at w = 1,       f_q the query's margin, or minus its loss.

It is computed backwards. The query's gradient a_T = ∇f_q(θ_T) is carried through the steps that
really happened, in their order and with their batches; for plain SGD with step sizes η_t

    score(q, i) −= η_t ⟨a_{t+1}, ∇ℓ_i(θ_t)⟩ / m   for i in batch t,
    a_t = a_{t+1} − η_t H_t a_{t+1},              H_t = ∇²L_t(θ_t),

and likewise with momentum, weight decay, a schedule, Adam and AdamW
(``fine_bench.gradients.update_rules``). Exact, first order in w: nothing is inverted, damped,
projected or averaged. It is what one run says of itself.

Known as *metagradient*: Maclaurin, Duvenaud and Adams (*Gradient-based hyperparameter optimization
through reversible learning*, ICML 2015, arXiv:1502.03492); Engstrom, Ilyas, Chen, Feldmann, Moses
and Madry (*Optimizing ML training with metagradient descent*, 2025, arXiv:2503.13751), who compute
it at scale by REPLAY; Ilyas and Engstrom (*MAGIC: near-optimal data attribution for deep learning*,
2025, arXiv:2504.16430), who take it as the attribution.

Where we differ:

- Moments of the run are kept every ``every`` steps, and the steps between computed again, one level
  deep: memory for about 2 √T moments and two trainings of work, where REPLAY keeps a tree of
  them (log T moments, log T trainings).
- Many queries are carried together and share each step's passes and matrix products; MAGIC carries
  one output a call.
- Whatever was trained is differentiated as it is. The papers first make the training smooth
  ("metasmooth": by architecture, batch size and optimiser), so that the derivative foretells a
  retraining. How far it does here is in ``results/this_run.md``: kinks are what spoils it.
- ``matrix="gauss_newton"`` puts the Gauss–Newton matrix in the place of H_t. This is no derivative,
  but it cannot grow where H_t has large negative eigenvalues.

The training is done again from ``Problem.steps``, and compared with the checkpoints of the run on
the way: a run that does not repeat (dropout, another order, clipping) is refused.

Scale: in logits (margin) or units of the loss, for a weight of one example raised from 1 to 2 at
every step where it is seen, at the same m. Leaving example i out is foretold to change f_q by
−score. Positive helps.

Cost, for K queries: K Hessian–vector products a step, each about two trainings' worth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.batch_norm import refuse_batch_coupling
from fine_bench.gradients.batch_products import MATRICES, BatchProducts, Matrix, batch_products
from fine_bench.gradients.curvature.products import CHUNK
from fine_bench.gradients.margin import classification_reason, negative_margin
from fine_bench.gradients.query_weighting import query_groups
from fine_bench.gradients.update_rules import Moment, Tensors, UpdateRule, rule_of
from fine_bench.types import Checkpoint, InfluenceScores, Problem, TrainingSteps

Observable: TypeAlias = Literal["margin", "loss"]

QUERY_FLOATS = 2**26
"""Numbers that the adjoints of one chunk of queries may take."""

SELF_FLOATS = 2**28
"""Examples × parameters beyond which ``self`` is refused."""

TOLERANCE = 0.01
"""Distance of the repeated training from a checkpoint, in units of how far the run had come."""


class Unrolled(InfluenceEstimator):
    """∂ f_q(θ_T(w)) / ∂ w_i at w = 1, through every step of the run.

    Args:
        observable: f_q: ``"margin"``, log(p/(1 − p)) of the query's label, or ``"loss"``, minus it.
        matrix: ``"hessian"`` for the derivative, or ``"gauss_newton"``.
        every: steps between two moments that are kept, ≥ 1; None for √T.

    ``extras``: ``replay_gap`` (1,), the largest distance of the repeated training from a checkpoint
    of the run, in units of how far the run had come there.
    """

    name = "unrolled"
    version = 1
    schedule = Schedule.ALL

    def __init__(
        self,
        observable: Observable = "margin",
        matrix: Matrix = "hessian",
        every: int | None = None,
    ) -> None:
        if observable not in get_args(Observable):
            raise ValueError(
                f"observable must be one of {get_args(Observable)}, got {observable!r}"
            )
        if matrix not in MATRICES:
            raise ValueError(f"matrix must be one of {MATRICES}, got {matrix!r}")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.observable: Observable = observable
        self.matrix: Matrix = matrix
        self.every = every

    def unsupported(self, problem: Problem) -> str | None:
        """A run whose steps are not known, or cannot be repeated."""
        steps = problem.steps
        if steps is None:
            return (
                "repeats the run step by step, and the batches of its steps were not kept; pass "
                "Problem(steps=TrainingSteps(initial, batches, lr, optimizer, options))"
            )
        try:
            rule_of(steps.optimizer, steps.options)
            # the mode that it was trained in
            refuse_batch_coupling(problem.model)
        except ValueError as error:
            return str(error)
        for name, part in problem.model.named_modules():
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
                return f"{name} ({type(part).__name__}) drew at random, which cannot be repeated"
            if isinstance(part, nn.RNNBase):
                return f"{name} ({type(part).__name__}) has no products with its second derivatives"
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                return f"{name} ({type(part).__name__}) mixed the examples of a batch in training"
        if self.observable == "margin":
            reason = classification_reason(problem)
            if reason is not None:
                return f"{reason}; or use observable='loss'"
        if isinstance(problem.queries, str):
            n_params = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
            if problem.n_train * n_params > SELF_FLOATS:
                return (
                    f'queries="self" would carry {problem.n_train} gradients of {n_params} '
                    f"parameters through every step, more than {SELF_FLOATS:,} numbers; ask about "
                    "single queries or their mean"
                )
        return None

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        assert problem.steps is not None
        self._steps: TrainingSteps = problem.steps
        self._rule: UpdateRule = rule_of(self._steps.optimizer, self._steps.options)
        self._checkpoints: list[Checkpoint] = []
        parts = [(x, y) for _, x, y in problem.batches("train")]
        self._x, self._y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        largest = max(int(batch.max()) for batch in self._steps.batches)
        least = min(int(batch.min()) for batch in self._steps.batches)
        if least < 0 or largest >= problem.n_train:
            raise ValueError(
                f"the batches of steps name positions from {least} to {largest}, but there are "
                f"{problem.n_train} training examples; positions count from 0 in the order of train"
            )

    def update(self, checkpoint: Checkpoint) -> None:
        """Keep the checkpoint; the work is done when the last one is known."""
        self.load(checkpoint)
        self._checkpoints.append(checkpoint)

    def compute(self) -> InfluenceScores:
        """Repeat the training, and go back through it once for every chunk of queries.

        Raises:
            ValueError: the repeated training does not reach the run's checkpoints.
        """
        self.require_update()
        products = batch_products(self.model, self.problem.loss, self.matrix, self._x)
        run = _Run(self._steps, self._rule, products, self._x, self._y, self._length())
        gap = run.forward(self.every or math.isqrt(run.length - 1) + 1, self._checkpoints)
        own = self.problem.target == "self"
        parts = []
        for rows, adjoint in self._adjoints(products.names):
            found = run.backward(adjoint)
            parts.append(found[:, rows].diagonal() if own else found)
        self.gradient_evaluations += run.gradient_evaluations
        return InfluenceScores(
            values=torch.cat(parts)[None] if own else torch.cat(parts),
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras={"replay_gap": torch.tensor([gap], dtype=torch.float64)},
        )

    def _length(self) -> int:
        """Steps up to the last checkpoint."""
        last, n = self._checkpoints[-1].step, len(self._steps.batches)
        if last is not None and last > n:
            raise ValueError(
                f"the last checkpoint was left after step {last}, but steps= knows {n} steps; pass "
                "the batches of all of them"
            )
        return n if last is None else last

    # ------------------------------------------------------------------ the queries

    def _adjoints(self, names: Sequence[str]) -> Iterator[tuple[slice, Tensors]]:
        """∇f_q at the last checkpoint by chunks of queries, or ∇ of their means."""
        problem = self.problem
        params = {name: dict(self.model.named_parameters())[name].detach() for name in names}
        fixed = {name: p.detach() for name, p in self.model.named_parameters()}
        loss = negative_margin if self.observable == "margin" else problem.loss

        def value(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = functional_call(self.model, fixed | values, (x,))
            result: Tensor = -loss(output, y, reduction="none")
            return result

        if problem.reduce is None:
            n_params = sum(p.numel() for p in params.values())
            chunk = max(1, QUERY_FLOATS // (n_params * (1 + self._rule.slots)))

            def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
                return value(values, x[None], y[None]).sum()

            each = vmap(grad(one), in_dims=(None, 0, 0), chunk_size=CHUNK)
            for rows, x, y in problem.batches("queries", chunk):
                self.gradient_evaluations += len(x)
                found = each(params, x, y)
                yield rows, [found[name].contiguous() for name in names]
            return
        groups = query_groups(problem.labels("queries"), problem.reduce)

        def mean(values: dict[str, Tensor], x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
            return value(values, x, y) @ weights

        total = [p.new_zeros(len(groups), *p.shape) for p in params.values()]
        for rows, x, y in problem.batches("queries"):
            self.gradient_evaluations += len(x) * len(groups)
            weights = groups[:, rows].to(total[0])
            part = vmap(grad(mean), in_dims=(None, None, None, 0))(params, x, y, weights)
            for into, name in zip(total, names, strict=True):
                into += part[name]
        yield slice(0, len(groups)), total


class _Run:
    """A training that is done again, and gone through backwards.

    Args:
        steps: what happened.
        rule: how its optimiser steps.
        products: of a batch's curvature.
        x, y: all training examples.
        length: steps that count.
    """

    def __init__(
        self,
        steps: TrainingSteps,
        rule: UpdateRule,
        products: BatchProducts,
        x: Tensor,
        y: Tensor,
        length: int,
    ) -> None:
        self.steps, self.rule, self.products = steps, rule, products
        self.x, self.y, self.length = x, y, length
        self.gradient_evaluations = 0
        self._kept: dict[int, tuple[Tensors, list[Tensors]]] = {}
        self._fixed = {name: p.detach() for name, p in products.model.named_parameters()}

    def forward(self, every: int, checkpoints: Sequence[Checkpoint]) -> float:
        """Train again, keeping a moment every so many steps.

        Returns:
            the largest relative distance from a checkpoint; 0 without checkpoints.

        Raises:
            ValueError: it is larger than ``TOLERANCE``.
        """
        names = self.products.names
        try:
            start = [self.steps.initial[name].detach().to(self.x.device) for name in names]
        except KeyError as error:
            raise ValueError(
                f"steps.initial has no parameter {error}; pass model.state_dict() as before the "
                "first step"
            ) from error
        params = [p.clone() for p in start]
        slots = [[torch.zeros_like(p) for p in params] for _ in range(self.rule.slots)]
        known = {point.step: point for point in checkpoints if point.step is not None}
        if checkpoints:
            known[self.length] = checkpoints[-1]
        gap = 0.0
        for t in range(self.length):
            if t % every == 0:
                self._kept[t] = _copy(params), [_copy(slot) for slot in slots]
            self._step(params, slots, t)
            if t + 1 in known:
                there = [known[t + 1].params[name] for name in names]
                gap = max(gap, _distance(params, there) / max(_distance(there, start), 1e-30))
                if not gap <= TOLERANCE:
                    raise ValueError(
                        f"repeating the training from steps= does not lead to the checkpoint after "
                        f"step {t + 1}: it lies {gap:.2g} of the way that the run had come there "
                        f"away, more than {TOLERANCE:g}; pass the initial parameters, batches, "
                        "step sizes and optimiser of the run that left the checkpoints. A run with "
                        "dropout, clipping or other layers that draw cannot be repeated"
                    )
        return gap

    def backward(self, adjoint: Tensors) -> Tensor:
        """Scores ``(K, n)`` of K functions whose gradients at the end are ``adjoint``.

        ``adjoint`` is overwritten by the gradients at the beginning.
        """
        k = len(adjoint[0])
        scores = adjoint[0].new_zeros(k, len(self.x), dtype=torch.float64)
        carried = [adjoint, *([torch.zeros_like(p) for p in adjoint] for _ in self._slots())]
        stop = self.length
        for start in sorted(self._kept, reverse=True):
            moments = self._again(start, stop)
            for t in range(stop - 1, start - 1, -1):
                self._back(scores, carried, moments.pop(), t)
            stop = start
        return scores.to(adjoint[0].dtype)

    def _slots(self) -> range:
        return range(self.rule.slots)

    def _batch(self, t: int) -> tuple[Tensor, Tensor, Tensor]:
        index = self.steps.batches[t].to(self.x.device)
        return index, self.x[index], self.y[index]

    def _step(self, params: Tensors, slots: list[Tensors], t: int) -> Tensors:
        """Step t, counted from 0, in place; the gradient with its weight decay."""
        index, x, y = self._batch(t)
        leaves = [p.detach().requires_grad_() for p in params]
        values = self._fixed | dict(zip(self.products.names, leaves, strict=True))
        with torch.enable_grad():
            output = functional_call(self.products.model, values, (x,))
            loss = self.products.loss(output, y, reduction="none").mean()
            found = torch.autograd.grad(loss, leaves, allow_unused=True)
        gradient = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)
        ]
        self.gradient_evaluations += len(index)
        return self.rule.step(params, slots, gradient, self.steps.lr[t], t + 1)

    def _again(self, start: int, stop: int) -> list[Moment]:
        """The moments of the steps from ``start`` to before ``stop``."""
        kept_params, kept_slots = self._kept[start]
        params, slots = _copy(kept_params), [_copy(slot) for slot in kept_slots]
        moments = []
        # SGD is carried back without its gradients and velocities
        remembers = self.rule.reads_moments
        for t in range(start, stop):
            before = _copy(params)
            gradient = self._step(params, slots, t)
            after = [_copy(slot) for slot in slots] if remembers else []
            moments.append(Moment(before, gradient if remembers else [], after))
        return moments

    def _back(self, scores: Tensor, carried: list[Tensors], moment: Moment, t: int) -> None:
        index, x, y = self._batch(t)
        product = self.products.at(moment.params, x, y)

        def apply(vectors: Tensors, into: Tensors, scale: float) -> None:
            slopes = product(vectors, into, scale)
            scores.index_add_(1, index, slopes.double(), alpha=scale / len(index))
            self.gradient_evaluations += slopes.numel()

        self.rule.reverse(carried, moment, self.steps.lr[t], t + 1, apply)


def _copy(tensors: Sequence[Tensor]) -> Tensors:
    return [tensor.clone() for tensor in tensors]


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    total = sum(float((x - y).double().square().sum()) for x, y in zip(a, b, strict=True))
    return math.sqrt(total)
