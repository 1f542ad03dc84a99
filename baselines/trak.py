"""TRAK: the model as a linear regression on its own (projected) gradients.

    φ_i = Pᵀ ∇_θ log(p_i/(1 − p_i))                       (dim,), θ at checkpoint c
    TRAK(q, i) = mean_c [ φ_qᵀ (ΦᵀΦ + ridge·I)⁻¹ φ_i ] · mean_c (1 − p_i)

Φ ``(n_train, dim)`` stacks the φ_i, p_i is the probability of example i's label. Park, Georgiev,
Ilyas, Leclerc, Madry: *TRAK: Attributing Model Behavior at Scale* (ICML 2023, arXiv:2303.14186).
Near its final parameters a classifier's margin is about linear in them, and for a linear model one
Newton step gives the leave-one-out change of the query's margin; 1 − p_i is the size of the
example's own residual. Positive: i raises the margin of q, so it helps q.

The checkpoints may come from several models trained alike (the paper's M): pass the last of each to
``replay``, with ``runs=M``. Each model then has a P of its own, so that the projection's noise is
averaged too, as in the paper. With ``runs=1``, the checkpoints of one run, one P serves all.

Where we deviate:
- The default is P = I, no projection; it needs a small model and a ridge (below).
- Full precision: gradients in the model's, ΦᵀΦ and everything after it in float64.
- The public package also divides the inverse by its mean absolute entry, checkpoint by
  checkpoint. We do not: it would change the scale, and the checkpoints' weights, with ``dim``.
- The margin's gradient is taken directly instead of as the loss gradient over 1 − p, which has no
  correct digit left where p rounds to one. It is the margin's whatever the training loss was.
- The paper soft-thresholds the scores. We do not: that is a choice of the use, not of the method.
- A numerically singular ΦᵀΦ is refused instead of being inverted. With P = I it always is
  singular for a softmax classifier (adding a constant to all logits moves no margin), so P = I
  needs a ridge; where examples are fewer than parameters the n × n dual
  φ_qᵀ (ΦᵀΦ + λI)⁻¹ Φᵀ = (φ_qᵀ Φᵀ)(ΦΦᵀ + λI)⁻¹ is used.

Nothing of size (n_train, parameters) is held: (n_train, dim) with a projection; without one the
gradients are computed again where they are needed.

Query weighting in a mean over queries, the rule of ``fine_bench.gradients.query_weighting`` at each
checkpoint, refers to what is averaged here: ``"norm"`` divides query v by ‖φ_v‖, the norm of its
projected margin gradient; ``"noise"`` by std_j s_vj over reference examples j, with
s_vj = (1 − p_j) φ_vᵀ (ΦᵀΦ + ridge·I)⁻¹ φ_j, its statistic against their loss gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from baselines.tracin import gather
from fine_bench.estimator import InfluenceEstimator, Schedule, T
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.margin import classification_reason, negative_margin
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.projection.random import Projection, ProjectionKind, make_projection
from fine_bench.gradients.query_weighting import check_weighting, query_groups, reference_rows
from fine_bench.gradients.reciprocal import inverse_or_zero
from fine_bench.seeds import derive
from fine_bench.types import (
    Checkpoint,
    InfluenceScores,
    Problem,
    QueryWeighting,
    UnsupportedProblemError,
)

PIECES = 4
"""Pieces of the columns of Φ in ΦᵀΦ: more are less arithmetic, in products that are less quick."""

MAX_SIDE = 8192
"""Largest matrix factorised, rows: 0.5 GiB in float64. Bounds P = I; projections stay below."""

SHARED_FLOATS = 2**29
"""Numbers of Φ, over all checkpoints, that are kept for another target of the same run: 2 GiB."""


def gram_matrix(features: Iterable[Tensor]) -> Tensor:
    """ΦᵀΦ from blocks of rows of Φ ``(b, dim)``: five eighths of the product, the rest mirrored."""
    gram: Tensor | None = None
    for phi in features:
        dim = phi.shape[1]
        gram = phi.new_zeros(dim, dim) if gram is None else gram
        for start in range(0, dim, step := -(-dim // PIECES)):
            end = min(start + step, dim)
            gram[start:end, :end].addmm_(phi[:, start:end].T, phi[:, :end])
    assert gram is not None
    return gram.tril() + gram.tril(-1).T


class TRAK(InfluenceEstimator):
    """TRAK over all given checkpoints.

    Args:
        projection: None for P = I (at most ``MAX_SIDE`` parameters or examples, and a ridge), or
            ``"gaussian"``, ``"rademacher"``, ``"sjlt"``, ``"factorized"``; see
            ``fine_bench.gradients.projection.random``.
        dim: projected dimension, from 1 to ``MAX_SIDE``; at most n_train without a ridge. No
            meaning for P = I.
        ridge: λ added to the eigenvalues of the *sum* ΦᵀΦ, ≥ 0.
        seed: of the projection, ≥ 0.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        layers: names of modules whose parameters count; None for all.
        runs: M, ≥ 1: with more than one, the last checkpoints of so many runs are expected, which
            the benchmark's runner trains, and each has a projection of its own.
        every: with one run, only every so many of its checkpoints, counted back from the last,
            which is always among them; ≥ 1. A number above the checkpoints' leaves the last alone.

    Values are dimensionless differences of margins: the drop of q's margin when i is left out.
    """

    name = "trak"
    version = 1

    def __init__(
        self,
        projection: ProjectionKind | None = None,
        dim: int = 512,
        ridge: float = 0.0,
        seed: int = 0,
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
        runs: int = 1,
        every: int = 1,
    ) -> None:
        check_weighting(query_weighting)
        if runs < 1:
            raise ValueError(f"runs counts models, at least 1, got {runs}; the paper has 5 to 100")
        if every < 1:
            raise ValueError(f"every counts checkpoints, at least 1, got {every}; pass every=1")
        if runs > 1 and every > 1:
            raise ValueError(
                f"every={every} thins the checkpoints of one run, but runs={runs} reads the last "
                "of each of several; pass every=1, or runs=1"
            )
        if runs > 1:
            self.schedule = Schedule.RUNS
        self.runs = runs
        self.every = every
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge must be a finite number ≥ 0, got {ridge}")
        self.projection: Projection | None = None
        if projection is not None and projection != "none":
            if dim > MAX_SIDE:
                raise ValueError(f"dim must be at most {MAX_SIDE}, got {dim}")
            self.projection = make_projection(projection, dim, seed)
        self._kind, self._dim, self._seed = projection, dim, seed
        self._n_selected = 1
        self.ridge = ridge
        self.query_weighting: QueryWeighting = query_weighting
        self.layers = layers

    def select(self, checkpoints: Sequence[T]) -> Sequence[T]:
        """Every so many, the last one among them."""
        chosen = super().select(checkpoints)[:: -self.every][::-1]
        self._n_selected = len(chosen)
        return chosen

    def unsupported(self, problem: Problem) -> str | None:
        """No class probabilities, a singular ΦᵀΦ foreseen, or P = I on too large a problem."""
        reason = classification_reason(problem)
        if reason is not None:
            return reason
        n = problem.n_train
        if self.projection is not None:
            if self.ridge == 0 and self.projection.dim > n:
                return (
                    f"dim={self.projection.dim} is more than the {n} training examples, so ΦᵀΦ is "
                    f"singular; pass dim={max(1, n // 2)} or less, or ridge > 0"
                )
            return None
        try:
            p = self._n_params(problem)
        except UnsupportedProblemError as error:
            return str(error)
        if min(p, n) > MAX_SIDE:
            return (
                f"projection=None needs a matrix of {min(p, n)} rows for {p} parameters and {n} "
                f'examples, and the limit is {MAX_SIDE}; pass projection="rademacher", dim=512'
            )
        if self.ridge == 0 and p > n:
            return (
                f"projection=None has {p} parameters for {n} training examples, so ΦᵀΦ is "
                f'singular; pass ridge > 0, or projection="rademacher" with dim={max(1, n // 2)} '
                "or less"
            )
        return None

    def _n_params(self, problem: Problem) -> int:
        _, x, y = next(iter(problem.batches("train", batch_size=1)))
        model = copy.deepcopy(problem.model).eval()
        return GradientEngine(model, negative_margin, self.layers)(x, y).n_params

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = GradientEngine(self.model, negative_margin, self.layers)
        # in the primal, features are held (projected) or computed again (P = I)
        self.dual = self.projection is None and self._n_params(problem) > problem.n_train
        self._kernel: Tensor | None = None
        self._residual = torch.zeros(problem.n_train, dtype=torch.float64)

    def update(self, checkpoint: Checkpoint) -> None:
        """Add one checkpoint's kernel and 1 − p."""
        if self.runs > 1:
            self._next_model()
        self.load(checkpoint)
        self._residual_now = torch.empty(self.problem.n_train, dtype=torch.float64)
        term = self._dual() if self.dual else self._primal()
        self._kernel = term if self._kernel is None else self._kernel + term
        self._residual += self._residual_now

    def _next_model(self) -> None:
        """Another model's projection.

        Raises:
            ValueError: more models than were announced.
        """
        if self.n_updates >= self.runs:
            raise ValueError(
                f"{self.name} expects the last checkpoints of runs={self.runs} models and got "
                "another; pass the last checkpoint of each run, or runs=… as many as there are"
            )
        if self.projection is not None:
            first, number = self._seed, self.n_updates
            seed = derive(first, f"trak/model {number}") if number else first
            self.projection = make_projection(self._kind, self._dim, seed)  # type: ignore[arg-type]

    def means(self) -> tuple[Tensor, Tensor]:
        """The two means over the checkpoints so far, whose product the scores are.

        Those of several models tell the scores of every group of them: the means of the means.

        Returns:
            of φ_qᵀ (ΦᵀΦ + ridge·I)⁻¹ φ_i, ``(rows, n_train)``, and of 1 − p_i, ``(n_train,)``;
            float64.
        """
        self.require_update()
        assert self._kernel is not None
        return self._kernel / self.n_updates, self._residual / self.n_updates

    def compute(self) -> InfluenceScores:
        """The product of the two means over the checkpoints so far."""
        kernel, residual = self.means()
        values = kernel * residual
        return InfluenceScores(
            values=values.to(next(self.model.parameters()).dtype),
            method=self.name,
            target=self.problem.target,
            version=self.version,
        )

    # -- gradients ------------------------------------------------------------------------------

    def _gradients(self, which: Literal["train", "queries"]) -> Iterator[PerExampleGradients]:
        """−∇ margin batch by batch (a kernel is even in φ); keeps the training set's 1 − p."""
        for rows, x, y in self.problem.batches(which):
            gradients = self.engine(x, y)
            self.gradient_evaluations += len(y)
            if which == "train":
                assert gradients.one_minus_p is not None
                self._residual_now[rows] = gradients.one_minus_p.double()
            yield gradients

    # -- dim × dim ------------------------------------------------------------------------------

    def _primal(self) -> Tensor:
        """φ_qᵀ (ΦᵀΦ + λI)⁻¹ φ_i at the loaded checkpoint, rows reduced, ``(rows, n)``."""
        held: Tensor | None = None
        if self.projection is not None:
            held = self._projected()

        def features() -> Iterator[Tensor]:
            if held is None:
                for gradients in self._gradients("train"):
                    yield gradients.dense().double()
            else:
                for chunk in torch.split(held, 4096):
                    yield chunk.double()

        if held is None:
            factor = self._factor(gram_matrix(features()))
        else:
            found = self.shared_value(("trak/gram", *self._what()), lambda: gram_matrix(features()))
            factor = self._factor(found)
        if isinstance(self.problem.queries, str):
            parts = [
                torch.linalg.solve_triangular(factor, phi.T, upper=False).square().sum(0)
                for phi in features()
            ]
            return torch.cat(parts)[None]
        queries = self._features_of(self._gradients("queries"))
        solved = torch.cholesky_solve(queries.T, factor).T

        def at_reference(rows: Tensor) -> Tensor:
            if held is not None:
                return solved @ held[rows].double().T
            reference = self.engine(*gather(self.problem, rows))
            self.gradient_evaluations += len(rows)
            return solved @ reference.dense().double().T

        reduction = self._reduction(queries.norm(dim=1), at_reference)
        solved = solved if reduction is None else reduction @ solved
        return torch.cat([solved @ phi.T for phi in features()], 1)

    def _what(self) -> tuple[object, ...]:
        """What a projected Φ depends on besides parameters and training examples."""
        assert self.projection is not None
        layers = None if self.layers is None else tuple(self.layers)
        return self.name, self._kind, self.projection.dim, self.projection.seed, layers

    def _projected(self) -> Tensor:
        """Φ at the loaded checkpoint, ``(n, dim)``; it leaves 1 − p as ``_gradients`` does.

        Kept for another target of the run, unless it is large.
        """
        assert self.projection is not None
        project = self.projection.project_all

        def make() -> tuple[Tensor, Tensor]:
            return project(self._gradients("train")), self._residual_now

        n = self.problem.n_train
        if n * self.projection.dim * self._n_selected > SHARED_FLOATS:
            return make()[0]
        before = self.gradient_evaluations
        held, self._residual_now = self.shared_value(("trak/features", *self._what()), make)
        self.gradient_evaluations = before + n
        return held

    def _features_of(self, batches: Iterator[PerExampleGradients]) -> Tensor:
        if self.projection is not None:
            return self.projection.project_all(batches).double()
        return torch.cat([gradients.dense().double() for gradients in batches])

    # -- n × n ----------------------------------------------------------------------------------

    def _dual(self) -> Tensor:
        """The same as ``_primal`` from the kernel ΦΦᵀ."""
        n = self.problem.n_train
        kernel = torch.empty(n, n, dtype=torch.float64)
        # every pair of batches, recomputing the second: factors of all examples are never held
        for rows, x, y in self.problem.batches("train"):
            mine = self.engine(x, y).double()
            self.gradient_evaluations += len(y)
            self._kernel_against(mine, kernel[rows], stop=rows.stop)
            kernel[: rows.start, rows] = kernel[rows, : rows.start].T
        factor = self._factor(kernel)
        if isinstance(self.problem.queries, str):
            return torch.cholesky_solve(kernel, factor).diagonal()[None]
        norms, against = [], []
        for gradients in self._gradients("queries"):
            mine = gradients.double()
            norms.append(mine.norm2().sqrt())
            against.append(torch.empty(len(mine), n, dtype=torch.float64))
            self._kernel_against(mine, against[-1])
        solved = torch.cholesky_solve(torch.cat(against).T, factor).T
        reduction = self._reduction(torch.cat(norms), lambda rows: solved[:, rows])
        return solved if reduction is None else reduction @ solved

    def _kernel_against(
        self, mine: PerExampleGradients, out: Tensor, stop: int | None = None
    ) -> None:
        """Fill ``out`` ``(B, n)`` with dot products against the training examples before stop."""
        start = 0
        for gradients in self._gradients("train"):
            theirs = gradients.double()
            out[:, start : start + len(theirs)] = mine.gram(theirs)
            start += len(theirs)
            if stop is not None and start >= stop:
                break

    # -- shared ---------------------------------------------------------------------------------

    def _reduction(self, norms: Tensor, at_reference: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Weights of the queries in every row of the result, ``(rows, V)``; None: as they are."""
        if self.problem.reduce is None:
            return None
        groups = query_groups(self.problem.labels("queries"), self.problem.reduce)
        if self.query_weighting is None:
            return groups
        scale = norms
        if self.query_weighting == "noise":
            rows = reference_rows(self.problem.n_train)
            if len(rows) < 2:
                raise ValueError('query_weighting="noise" needs at least two training examples')
            scale = (at_reference(rows) * self._residual_now[rows]).std(1)
        reduction: Tensor = groups * inverse_or_zero(scale)
        return reduction

    def _factor(self, gram: Tensor) -> Tensor:
        """Lower Cholesky factor of gram + ridge·I.

        Raises:
            UnsupportedProblemError: it is singular within the rounding of the gradients.
        """
        gram = gram.clone()
        gram.diagonal().add_(self.ridge)
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(gram)
        pivots = factor.diagonal().square()
        # rounded to relative ε, gradients fill empty directions up to about ε² of the squares
        rounding = torch.finfo(next(self.model.parameters()).dtype).eps
        tolerance = max((32 * rounding) ** 2, len(gram) * torch.finfo(gram.dtype).eps)
        if int(info) > 0 or float(pivots.min()) <= tolerance * float(pivots.max()):
            what = "ΦΦᵀ" if self.dual else "ΦᵀΦ"
            advice = "pass ridge > 0" if self.ridge == 0 else "pass a larger ridge"
            if self.projection is None:
                advice += ' (P = I needs one for softmax outputs) or projection="rademacher"'
            else:
                advice += " or a smaller dim"
            raise UnsupportedProblemError(
                f"{self.name}: {what} + ridge·I of {len(gram)} rows is numerically singular at "
                f"ridge={self.ridge}; {advice}"
            )
        return factor
