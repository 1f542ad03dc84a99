"""Influence functions: how the optimum moves when one training example counts a little more.

    IF(q, i) = g_qᵀ (C + λI)⁻¹ g_i                            (θ at the last checkpoint)

g the gradient of an example's own loss, C the *mean* curvature of the training examples. Koh,
Liang: *Understanding Black-box Predictions via Influence Functions* (ICML 2017,
arXiv:1703.04730); EK-FAC: Grosse et al. (arXiv:2308.03296).

Sign and scale. Let θ(ε) minimise mean_j ℓ_j + (λ/2)‖θ‖² + ε ℓ_i. Then dθ/dε = −(C + λI)⁻¹ g_i with
C the Hessian, and the value is **−dℓ_q/dε** at ε = 0: positive where more of i lowers q's loss.
Leaving i out is ε = −1/n, so it raises ℓ_q by about value/n. (Koh and Liang's sign is the
opposite.)

``curvature``
    ``"hessian"``, ``"ggn"``, ``"fisher"`` (the model's own: exact expectation over classes up to
    100 of them, beyond that ``n_samples`` labels drawn for each example) or
    ``"empirical_fisher"``; default ``"fisher"`` for ``ekfac``, else ``"ggn"``. For softmax
    cross-entropy the two are the same matrix. See ``fine_bench.gradients.curvature``.
``solver``
    ``"exact"``: C in full, float64, Cholesky; up to ``EXACT_LIMIT`` parameters. For the empirical
    Fisher with n < parameters the n × n dual instead, K (K/n + λI)⁻¹ with K the Gram matrix of the
    gradients, for any number of parameters and up to ``EXACT_LIMIT`` examples.
    ``"cg"``: block conjugate gradients in float64; the queries of a block share their Krylov space
    and every pass over the data; no graph is kept. The true relative residual
    ‖b − (C + λI)x‖/‖b‖ of each row is in ``extras["residual"]``; one that stays above ``tol`` is
    an error. (EK-FAC as a preconditioner was tried and *costs* iterations: it spreads the large
    eigenvalues over directions in which the rank-deficient C has none.)
    ``"ekfac"``: C approximated as in ``fine_bench.gradients.ekfac``, one block a layer.
``damping``
    λ itself, or by default ``relative_damping`` times the mean eigenvalue tr C / P (for ``ekfac``
    of each layer); the λ used is in ``extras["damping"]``. C + λI must be positive definite: an
    indefinite one is refused, since its "optimum" is a saddle.

A mean over queries is linear, so it costs one solve a row. ``query_weighting="norm"`` divides a
query by its Euclidean gradient norm (the same weight as for every other method, and no solve),
``"noise"`` by the spread over reference examples of this method's own statistic,
std_j g_qᵀ(C + λI)⁻¹g_j.

We deviate from the paper in solving the system instead of iterating LiSSA, whose answer depends on
a scale, a depth and a number of repeats that one must guess; and λ is stated for the *mean* loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.blocks import (
    DenseBlock,
    Direction,
    PerExampleGradients,
    add_directions,
)
from fine_bench.gradients.curvature import (
    CURVATURES,
    Curvature,
    CurvatureProducts,
    Roots,
    as_direction,
    as_rows,
    count_parameters,
    curvature_matrix,
    parameter_names,
    sum_of_squares_trace,
)
from fine_bench.gradients.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.engine import GradientEngine
from fine_bench.seeds import stream
from fine_bench.types import (
    Checkpoint,
    InfluenceScores,
    Problem,
    QueryWeighting,
)
from fine_bench.weighting import check_weighting, query_groups, query_weights, reference_rows

Solver: TypeAlias = Literal["exact", "cg", "ekfac"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)

EXACT_LIMIT = 20_000
"""Largest matrix, in rows, that ``exact`` builds: 3.2 GB in float64."""

SELF_CG_LIMIT = 2_000
"""Largest training set whose self-influence ``cg`` solves for, one system an example."""

QUERY_FLOATS = 2**27
"""Numbers that the preconditioned gradients of one chunk of queries may take."""

BLOCK_FLOATS = 2**24
"""Numbers in one of the vectors' blocks of CG, which holds about six of them."""


class Inverse(Protocol):
    """(C + λI)⁻¹, as the estimator uses it."""

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """gᵀ(C + λI)⁻¹g, ``(B,)``."""
        ...

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λI)⁻¹g for every query, to be contracted with ``view`` of the training gradients."""
        ...

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """Training gradients in the coordinates of ``prepare``."""
        ...

    def solve(self, direction: Direction) -> Direction:
        """(C + λI)⁻¹ times directions in the model's own coordinates."""
        ...


class InfluenceFunction(InfluenceEstimator):
    """g_qᵀ (C + λI)⁻¹ g_i at the last checkpoint.

    Args:
        solver: ``"exact"``, ``"cg"`` or ``"ekfac"``.
        curvature: which C; None for the solver's default.
        damping: λ itself, ≥ 0, in the unit of the curvature; None for the relative one.
        relative_damping: λ in units of the mean eigenvalue, ≥ 0; ignored where damping is given.
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        tol: relative residual at which CG stops, > 0.
        max_iter: iterations that CG may take for one block, ≥ 1.
        n_samples: labels drawn for each example where the Fisher has too many classes, ≥ 1.
        seed: of those draws.

    Values have the unit of the loss, per unit of an example's weight in the mean loss.
    ``extras``: ``damping`` (1,), or one a layer for ``ekfac``; for ``cg`` ``residual`` (rows
    solved,), and ``iterations`` (1,) in total.
    """

    name = "influence_function"
    version = 1
    schedule = Schedule.LAST

    def __init__(
        self,
        solver: Solver = "ekfac",
        curvature: Curvature | None = None,
        damping: float | None = None,
        relative_damping: float = 0.1,
        layers: Sequence[str] | None = None,
        query_weighting: QueryWeighting = None,
        tol: float = 1e-8,
        max_iter: int = 5000,
        n_samples: int = 1,
        seed: int = 0,
    ) -> None:
        check_options(solver, curvature, damping, relative_damping)
        check_weighting(query_weighting)
        if not 0 < tol < 1:
            raise ValueError(f"tol is a relative residual between 0 and 1, got {tol}")
        if max_iter < 1 or n_samples < 1:
            raise ValueError(
                f"max_iter and n_samples must be at least 1, got {max_iter} and {n_samples}"
            )
        self.solver: Solver = solver
        self.curvature: Curvature = curvature or ("fisher" if solver == "ekfac" else "ggn")
        self.damping = damping
        self.relative_damping = relative_damping
        self.layers = layers
        self.query_weighting: QueryWeighting = query_weighting
        self.tol = tol
        self.max_iter = max_iter
        self.n_samples = n_samples
        self.seed = seed

    def unsupported(self, problem: Problem) -> str | None:
        """Systems that are too large for the solver."""
        if self.solver == "ekfac":
            return None
        n_params = count_parameters(copy.deepcopy(problem.model), self.layers)
        if self.solver == "exact":
            if min(n_params, problem.n_train) <= EXACT_LIMIT and self._dual(problem, n_params):
                return None
            if n_params > EXACT_LIMIT:
                return (
                    f'solver="exact" would build a matrix of {n_params} × {n_params} parameters, '
                    f'more than the limit of {EXACT_LIMIT}; use solver="cg" or "ekfac", or name '
                    "layers=[...]"
                )
        elif isinstance(problem.queries, str) and problem.n_train > SELF_CG_LIMIT:
            return (
                f'solver="cg" with queries="self" would solve {problem.n_train} systems, one an '
                f'example (limit {SELF_CG_LIMIT}); use solver="ekfac", or "exact" for a small model'
            )
        elif self.curvature == "hessian" and self.damping is None and n_params > EXACT_LIMIT:
            return (
                "relative damping needs the trace of the Hessian, which takes one product for each "
                f"of the {n_params} parameters (limit {EXACT_LIMIT}); give damping= itself"
            )
        return None

    def _dual(self, problem: Problem, n_params: int) -> bool:
        """Whether the n × n dual stands in for the P × P matrix."""
        return self.curvature == "empirical_fisher" and problem.n_train < n_params

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model; in float64 unless the solver is EK-FAC."""
        super().setup(problem)
        self._dtype = next(self.model.parameters()).dtype
        if self.solver != "ekfac":
            self.model.double()
        self.engine = GradientEngine(self.model, problem.loss, self.layers)
        params = dict(self.model.named_parameters())
        self._names = parameter_names(self.engine.recorder)
        self._n_params = sum(params[name].numel() for name in self._names)
        # one row of numbers an example, drawn at once: batches do not change its labels
        self._uniforms = torch.rand(
            problem.n_train,
            self.n_samples,
            generator=stream(self.seed, "influence-function/fisher-labels"),
            dtype=torch.float64,
        )
        self._values: Tensor | None = None
        self._extras: dict[str, Tensor] = {}

    def update(self, checkpoint: Checkpoint) -> None:
        """Scores at this checkpoint; the last one counts."""
        self.load(checkpoint)
        self._extras = {}
        if self.solver == "exact" and self._dual(self.problem, self._n_params):
            values = self._dual_values()
        else:
            values = self._values_from(self._inverse())
        self._values = values.to(self._dtype)

    def compute(self) -> InfluenceScores:
        """The scores at the last checkpoint."""
        self.require_update()
        assert self._values is not None
        return InfluenceScores(
            values=self._values,
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras=self._extras,
        )

    # ------------------------------------------------------------------ gradients and curvature

    def _batches(
        self, which: Literal["train", "queries"] = "train"
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The data in the precision of the solver."""
        for rows, x, y in self.problem.batches(which):
            yield rows, self._cast(x), self._cast(y)

    def _cast(self, values: Tensor) -> Tensor:
        return values.double() if self.solver != "ekfac" and values.is_floating_point() else values

    def _gradients(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        self.gradient_evaluations += len(x)
        return self.engine(x, y)

    def _ekfac(self) -> EKFAC:
        roots = Roots(self.curvature, self.problem.loss, self._uniforms)
        fitted = fit_ekfac(self.engine, self._batches, roots, self.problem.n_train)
        fitted.damp(self.damping, self.relative_damping)
        self.gradient_evaluations += 2 * self.problem.n_train
        return fitted

    def _inverse(self) -> Inverse:
        n = self.problem.n_train
        if self.solver == "ekfac":
            fitted = self._ekfac()
            self._extras["damping"] = fitted.damping
            return fitted
        loss = self.problem.loss
        products = CurvatureProducts(
            self.model, loss, self._names, self.curvature, self._batches, n, self._uniforms
        )
        if self.solver == "exact" or (self.curvature == "hessian" and self.damping is None):
            like = torch.zeros(1, self._n_params, dtype=torch.float64)
            matrix = curvature_matrix(products, like)
            self.gradient_evaluations += n * self._n_params
            lam = self._lambda(float(matrix.trace()))
            if self.solver == "exact":
                matrix.diagonal().add_(lam)
                return ExactInverse(matrix, lam)
        else:
            lam = self._lambda(self._trace)
        self._extras["iterations"] = torch.zeros(1, dtype=torch.int64)
        self._extras["residual"] = torch.zeros(0, dtype=torch.float64)
        return CGInverse(products, lam, self.tol, self.max_iter, self._report)

    def _report(self, iterations: int, residual: Tensor) -> None:
        self._extras["iterations"] += iterations
        self.gradient_evaluations += iterations * len(residual) * self.problem.n_train
        self._extras["residual"] = torch.cat([self._extras["residual"], residual])

    def _trace(self) -> float:
        self.gradient_evaluations += self.problem.n_train
        roots = Roots(self.curvature, self.problem.loss, self._uniforms)
        return sum_of_squares_trace(self.engine, self._batches, roots, self.problem.n_train)

    def _lambda(self, trace: float | Callable[[], float]) -> float:
        if self.damping is not None:
            lam = self.damping
        else:
            value = trace() if callable(trace) else trace
            lam = self.relative_damping * value / self._n_params
            if lam < 0:
                raise ValueError(
                    f"the {self.curvature} has a negative mean eigenvalue, "
                    f"{value / self._n_params:.3g}, so it gives no scale for relative damping; "
                    "give damping= itself"
                )
        self._extras["damping"] = torch.tensor([lam], dtype=torch.float64)
        return lam

    # ------------------------------------------------------------------ scores

    def _values_from(self, inverse: Inverse) -> Tensor:
        problem = self.problem
        if isinstance(problem.queries, str):
            parts = [inverse.quadratic(self._gradients(x, y)) for _, x, y in self._batches()]
            return torch.cat(parts)[None]
        if problem.reduce is None:
            return self._pairwise(inverse, self._batches)
        direction = inverse.solve(self._query_direction(inverse))
        parts = [self._gradients(x, y).contract(direction) for _, x, y in self._batches()]
        return torch.cat(parts, 1)

    def _pairwise(
        self, inverse: Inverse, train: Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]
    ) -> Tensor:
        """Every query against every training example, as many queries a pass as fit."""
        size = max(1, min(QUERY_FLOATS // self._n_params, self.problem.n_query))
        bands = []
        for _, x, y in self.problem.batches("queries", size):
            prepared = inverse.prepare(self._gradients(self._cast(x), self._cast(y)))
            rows = [inverse.view(self._gradients(x, y)).contract(prepared) for _, x, y in train()]
            bands.append(torch.cat(rows, 1))
        return torch.cat(bands)

    def _query_direction(self, inverse: Inverse) -> Direction:
        """Σ_v w_v g_v for each row of the reduction."""
        statistic = None
        if self.query_weighting == "noise":
            statistic = self._pairwise(inverse, self._reference)
        problem = self.problem
        groups = query_groups(problem.labels("queries"), problem.reduce)
        direction: Direction | None = None
        for which, x, y in self._batches("queries"):
            queries = self._gradients(x, y)
            if statistic is None:
                weights = query_weights(queries, None, self.query_weighting)
            else:
                weights = noise_weights(statistic[which])
            part = queries.weighted_sum(groups[:, which].to(weights) * weights)
            direction = part if direction is None else add_directions(direction, part)
        assert direction is not None
        return direction

    def _reference(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The reference examples among the training batches; positions are theirs."""
        chosen = reference_rows(self.problem.n_train)
        for which, x, y in self._batches():
            inside = (chosen >= which.start) & (chosen < which.stop)
            here = chosen[inside] - which.start
            if len(here):
                start = int(torch.nonzero(inside)[0])
                yield slice(start, start + len(here)), x[here], y[here]

    def _dual_values(self) -> Tensor:
        """``exact`` in the n × n dual of the empirical Fisher.

        With G (n, P) the gradients, (GᵀG/n + λI)⁻¹Gᵀ = Gᵀ(GGᵀ/n + λI)⁻¹, so every score is an
        entry of K_q (K/n + λI)⁻¹, K = GGᵀ and K_q = G_q Gᵀ: only dot products are needed.
        """
        problem, n = self.problem, self.problem.n_train
        train = [self._gradients(x, y) for _, x, y in self._batches()]
        kernel = torch.cat([torch.cat([g.gram(h) for h in train], 1) for g in train])
        lam = self._lambda(float(kernel.trace()) / n)
        damped = kernel / n
        damped.diagonal().add_(lam)
        factor = cholesky(damped, lam, "the dual K/n")
        if isinstance(problem.queries, str):
            return torch.cholesky_solve(kernel, factor).diagonal()[None].clone()
        cross, norm_weights = [], []
        for _, x, y in self._batches("queries"):
            queries = self._gradients(x, y)
            cross.append(torch.cat([queries.gram(g) for g in train], 1))
            if self.query_weighting != "noise":
                norm_weights.append(query_weights(queries, None, self.query_weighting))
        values = torch.cholesky_solve(torch.cat(cross).T, factor).T
        if problem.reduce is None:
            return values
        if self.query_weighting == "noise":
            weights = noise_weights(values[:, reference_rows(n)])
        else:
            weights = torch.cat(norm_weights)
        groups = query_groups(problem.labels("queries"), problem.reduce)
        return (groups.to(weights) * weights) @ values


def check_options(
    solver: str, curvature: str | None, damping: float | None, relative_damping: float
) -> None:
    """Refuse settings that no problem could make sense of."""
    if solver in ("lissa", "arnoldi"):
        raise NotImplementedError(
            f"solver={solver!r} is not implemented; the solvers are {', '.join(SOLVERS)}"
        )
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if curvature is not None and curvature not in CURVATURES:
        raise ValueError(f"curvature must be one of {CURVATURES} or None, got {curvature!r}")
    if solver == "ekfac" and curvature == "hessian":
        raise ValueError(
            'the Hessian is not a sum of squares and has no Kronecker factors: solver="ekfac" '
            'takes curvature="fisher", "ggn" or "empirical_fisher"; for the Hessian use '
            'solver="exact" or "cg"'
        )
    for name, value in (("damping", damping), ("relative_damping", relative_damping)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number ≥ 0, got {value}")


def noise_weights(statistic: Tensor) -> Tensor:
    """1/std of each query's statistic over reference examples, ``(V, R)`` → ``(V,)``.

    The shared rule, told that a query's dot products with the reference *are* the statistic: in
    the coordinates of the reference examples these are the unit vectors.
    """
    unit = torch.eye(statistic.shape[1], dtype=statistic.dtype)
    return query_weights(
        PerExampleGradients([DenseBlock("statistic", statistic)]),
        PerExampleGradients([DenseBlock("reference", unit)]),
        "noise",
    )


class ExactInverse:
    """A Cholesky factor of C + λI, ``(P, P)``."""

    def __init__(self, damped: Tensor, lam: float) -> None:
        self.factor = cholesky(damped, lam, "the curvature C")

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """‖L⁻¹g‖² with C + λI = LLᵀ, ``(B,)``."""
        rows = gradients.dense().T
        half: Tensor = torch.linalg.solve_triangular(self.factor, rows, upper=False)
        return half.square().sum(0)

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λI)⁻¹g for every query."""
        return as_direction(self._solve(queries.dense()), direction_like(queries))

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """The gradients themselves."""
        return gradients

    def solve(self, direction: Direction) -> Direction:
        """(C + λI)⁻¹ times directions."""
        return as_direction(self._solve(as_rows(direction)), direction)

    def _solve(self, rows: Tensor) -> Tensor:
        return torch.cholesky_solve(rows.T, self.factor).T


class CGInverse:
    """(C + λI)⁻¹ by block conjugate gradients.

    Args:
        products: v ↦ C v.
        lam: λ.
        tol, max_iter: see ``InfluenceFunction``.
        report: told the iterations and the relative residuals ``(K,)`` of each block.
    """

    def __init__(
        self,
        products: CurvatureProducts,
        lam: float,
        tol: float,
        max_iter: int,
        report: Callable[[int, Tensor], None],
    ) -> None:
        self.products = products
        self.lam = lam
        self.tol = tol
        self.max_iter = max_iter
        self.report = report

    def quadratic(self, gradients: PerExampleGradients) -> Tensor:
        """gᵀ(C + λI)⁻¹g, ``(B,)``."""
        rows = gradients.dense()
        return (self._solve(rows) * rows).sum(1)

    def prepare(self, queries: PerExampleGradients) -> Direction:
        """(C + λI)⁻¹g for every query."""
        return as_direction(self._solve(queries.dense()), direction_like(queries))

    def view(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """The gradients themselves."""
        return gradients

    def solve(self, direction: Direction) -> Direction:
        """(C + λI)⁻¹ times directions."""
        return as_direction(self._solve(as_rows(direction)), direction)

    def _solve(self, rows: Tensor) -> Tensor:
        def apply(v: Tensor) -> Tensor:
            return self.products(v) + self.lam * v

        # more right-hand sides than dimensions cannot be independent
        size = max(1, min(BLOCK_FLOATS // rows.shape[1], rows.shape[1]))
        parts = []
        for block in torch.split(rows, size):
            x, residual, iterations = solve_cg(apply, block, self.tol, self.max_iter)
            self.report(iterations, residual)
            parts.append(x)
        return torch.cat(parts)


def direction_like(gradients: PerExampleGradients) -> Direction:
    """One direction of the shape of these gradients, as a pattern."""
    one = gradients.rows(slice(0, 1))
    return one.weighted_sum(one.norm2()[None])


def cholesky(damped: Tensor, lam: float, what: str) -> Tensor:
    """The lower Cholesky factor of ``what`` + λI.

    Raises:
        ValueError: the matrix is not positive definite; says by how much.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    pivots = factor.diagonal()
    slack = len(damped) * torch.finfo(damped.dtype).eps
    if int(info) == 0 and float(pivots.min()) ** 2 > slack * float(pivots.max()) ** 2:
        return factor
    low = float(torch.linalg.eigvalsh(damped)[0])
    raise ValueError(
        f"{what} + λI is not positive definite: its smallest eigenvalue is {low:.3g} with "
        f"λ = {lam:.3g} in it; give a damping above {lam - low:.3g}, or a curvature that is never "
        'negative, such as "ggn"'
    )


def solve_cg(
    apply: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Solve A x = b for every row b of ``rhs`` ``(K, P)``.

    The recurrences of block CG drift from the true residual, so that is computed when they claim
    to be done, and the remainder is solved for until the truth agrees.

    Returns:
        x ``(K, P)``, the true relative residuals ``(K,)``, and the iterations used.

    Raises:
        ValueError: A is not positive definite; states the negative curvature that was met.
        RuntimeError: a residual is above ``tol`` after ``max_iter`` iterations.
    """
    norms = rhs.norm(dim=1, keepdim=True)
    # rows of one size, and 0 for a query without gradient
    scaled = rhs / torch.where(norms > 0, norms, 1.0)
    x = torch.zeros_like(rhs)
    remainder, used = scaled, 0
    relative = remainder.norm(dim=1)
    while float(relative.max()) > tol and used < max_iter:
        goal = 0.5 * tol / float(relative.max())
        step, iterations = block_cg(apply, remainder, goal, max_iter - used)
        used += iterations
        x = x + step
        remainder = scaled - apply(x)
        relative = remainder.norm(dim=1)
    if float(relative.max()) > tol:
        raise RuntimeError(
            f"CG stopped after {used} iterations at a relative residual of "
            f"{float(relative.max()):.2g}, above tol = {tol:.2g}; raise max_iter or damping, or "
            "accept a larger tol"
        )
    return x * norms, relative, used


def block_cg(
    apply: Callable[[Tensor], Tensor], rhs: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, int]:
    """Block conjugate gradients from zero, until the largest residual has shrunk by ``tol``.

    The residuals of all K rows are kept as Q C with Q (P, K) orthonormal, so that rows which
    converge or turn dependent do no harm (Dubrulle, *Retooling the method of block conjugate
    gradients*, ETNA 12, 2001).

    Raises:
        ValueError: a search direction of negative curvature.
    """
    q, c = torch.linalg.qr(rhs.T)
    goal = tol * float(c.norm(dim=0).max())
    x, s = torch.zeros_like(q), q
    for iteration in range(max_iter):
        if float(c.norm(dim=0).max()) <= goal:
            return x.T, iteration
        a_s = apply(s.T.contiguous()).T
        curvature = s.T @ a_s
        factor, info = torch.linalg.cholesky_ex((curvature + curvature.T) / 2)
        if int(info) > 0:
            refuse_negative_curvature(apply, s)
            # positive after all, only too ill-conditioned to go on: the caller starts anew
            return x.T, iteration + 1
        x = x + s @ torch.cholesky_solve(c, factor)
        q, turn = torch.linalg.qr(q - a_s @ torch.cholesky_inverse(factor))
        s = q + s @ turn.T
        c = turn @ c
    return x.T, max_iter


def refuse_negative_curvature(apply: Callable[[Tensor], Tensor], s: Tensor) -> None:
    """Raise if the matrix has negative curvature within the span of ``s`` ``(P, K)``."""
    basis = torch.linalg.qr(s)[0]
    inside = basis.T @ apply(basis.T.contiguous()).T
    low = float(torch.linalg.eigvalsh((inside + inside.T) / 2)[0])
    if low <= 0:
        raise ValueError(
            f"C + λI is not positive definite: CG met a direction of curvature {low:.3g}; give a "
            'larger damping, or a curvature that is never negative, such as "ggn"'
        )
