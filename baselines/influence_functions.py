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
    cross-entropy the two are the same matrix. See ``fine_bench.gradients.curvature.products``.
``solver``
    ``"exact"``: C in full, float64, Cholesky; up to ``EXACT_LIMIT`` parameters. For the empirical
    Fisher with n < parameters the n × n dual instead, K (K/n + λI)⁻¹ with K the Gram matrix of the
    gradients, for any number of parameters and up to ``EXACT_LIMIT`` examples.
    ``"cg"``: block conjugate gradients in float64; the queries of a block share their Krylov space
    and every pass over the data; no graph is kept. The true relative residual
    ‖b − (C + λI)x‖/‖b‖ of each row is in ``extras["residual"]``; one that stays above ``tol`` is
    an error. (EK-FAC as a preconditioner was tried and *costs* iterations: it spreads the large
    eigenvalues over directions in which the rank-deficient C has none.)
    ``"lissa"``: a truncated Neumann series over sampled batches (``baselines/lissa.py``), the
    paper's own solver, in the network's own precision: the noise of its draws is far above
    rounding. The relative residual of each row on all the data is in ``extras["residual"]``, its
    scale in ``extras["scale"]``; a series that diverges is tried again at twice the scale where
    that was open, and refused where it was given.
    ``"arnoldi"``: C within one Krylov space, λ outside of it (``baselines/arnoldi.py``).
    ``"ekfac"``: C approximated as in ``fine_bench.gradients.curvature.ekfac``, one block a layer.
``damping``
    λ itself, or by default ``relative_damping`` times the mean eigenvalue tr C / P (for ``ekfac``
    of each layer); the λ used is in ``extras["damping"]``. C + λI must be positive definite: an
    indefinite one is refused, since its "optimum" is a saddle.

A mean over queries is linear, so it costs one solve a row. ``query_weighting="norm"`` divides a
query by its Euclidean gradient norm (the same weight as for every other method, and no solve),
``"noise"`` by the spread over reference examples of this method's own statistic,
std_j g_qᵀ(C + λI)⁻¹g_j.

We deviate from the paper in solving the system by default instead of iterating LiSSA, whose answer
depends on a scale, a depth and a number of repeats; and λ is stated for the *mean* loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from baselines.damped_system import (
    DampedSystem,
    Series,
    Solver,
    check_iterations,
    check_options,
    in_float64,
    in_own_precision,
)
from baselines.inverses import Inverse, cholesky
from baselines.tracin import reference_batches
from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.blocks.direction import Direction, concatenated
from fine_bench.gradients.curvature.ekfac import EKFAC, fit_ekfac
from fine_bench.gradients.curvature.products import (
    Curvature,
    Roots,
    count_parameters,
    parameter_names,
)
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import (
    check_weighting,
    noise_weights,
    query_direction,
    query_groups,
    query_weights,
    reference_rows,
)
from fine_bench.seeds import stream
from fine_bench.types import (
    Checkpoint,
    InfluenceScores,
    Problem,
    QueryWeighting,
)

EXACT_LIMIT = 20_000
"""Largest matrix, in rows, that ``exact`` builds: 3.2 GB in float64."""

SELF_CG_LIMIT = 2_000
"""Largest training set whose self-influence ``cg`` or ``lissa`` solves for, one system each."""

KRYLOV_FLOATS = 2**27
"""Numbers that the basis of ``arnoldi`` may take: 1 GiB."""

QUERY_FLOATS = 2**27
"""Numbers that the preconditioned gradients of one chunk of queries may take."""


class InfluenceFunction(InfluenceEstimator):
    """g_qᵀ (C + λI)⁻¹ g_i at the last checkpoint.

    Args:
        solver: ``"exact"``, ``"cg"``, ``"lissa"``, ``"arnoldi"`` or ``"ekfac"``.
        curvature: which C; None for the solver's default.
        damping: λ itself, ≥ 0, in the unit of the curvature; None for the relative one.
        relative_damping: λ in units of the mean eigenvalue, ≥ 0; ignored where damping is given.
        layers: names of modules whose parameters count; None for all.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        tol: relative residual at which CG stops, > 0.
        max_iter: iterations that CG may take for one block, ≥ 1.
        n_samples: labels drawn for each example where the Fisher has too many classes, ≥ 1.
        seed: of those draws, of LiSSA's batches and of Arnoldi's start.
        scale: LiSSA's s, > 0, above half of the largest eigenvalue of C + λI; None finds one.
        depth: steps of LiSSA's series, ≥ 1.
        repeats: series that LiSSA averages, ≥ 1.
        sample_size: training examples in one of its steps, ≥ 1; None for all of them.
        krylov: dimensions of Arnoldi's space, ≥ 1: as many products with C.

    Values have the unit of the loss, per unit of an example's weight in the mean loss.
    ``extras``: ``damping`` (1,), or one a layer for ``ekfac``; for ``cg`` and ``lissa``
    ``residual`` (rows solved,); for ``cg`` ``iterations`` (1,) in total, for ``lissa``
    ``scale`` (1,).
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
        scale: float | None = None,
        depth: int = 1000,
        repeats: int = 1,
        sample_size: int | None = 64,
        krylov: int = 200,
    ) -> None:
        check_options(solver, curvature, damping, relative_damping)
        check_iterations(scale, depth, repeats, sample_size, krylov)
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
        self.scale = scale
        self.depth = depth
        self.repeats = repeats
        self.sample_size = sample_size
        self.krylov = krylov

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
        elif self.solver == "arnoldi" and min(self.krylov, n_params) * n_params > KRYLOV_FLOATS:
            return (
                f'solver="arnoldi" would hold {self.krylov} vectors of {n_params} parameters, more '
                f"than {KRYLOV_FLOATS:,} numbers; pass krylov={KRYLOV_FLOATS // n_params}, or name "
                "layers=[...]"
            )
        elif self._solves_each() and problem.n_train > SELF_CG_LIMIT and self._per_example(problem):
            return (
                f'solver="{self.solver}" would solve {problem.n_train} systems, one a training '
                f'example (limit {SELF_CG_LIMIT}); use solver="ekfac" or "arnoldi", or "exact" for '
                "a small model"
            )
        elif self.curvature == "hessian" and self.damping is None and n_params > EXACT_LIMIT:
            return (
                "relative damping needs the trace of the Hessian, which takes one product for each "
                f"of the {n_params} parameters (limit {EXACT_LIMIT}); give damping= itself"
            )
        return None

    def _solves_each(self) -> bool:
        """Whether the solver works anew for every right-hand side."""
        return self.solver in ("cg", "lissa")

    def _per_example(self, problem: Problem) -> bool:
        """Whether every training example is a right-hand side."""
        return isinstance(problem.queries, str)

    def _dual(self, problem: Problem, n_params: int) -> bool:
        """Whether the n × n dual stands in for the P × P matrix."""
        return self.curvature == "empirical_fisher" and problem.n_train < n_params

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model; in float64 where a system is solved to the end."""
        super().setup(problem)
        self._dtype = next(self.model.parameters()).dtype
        if not in_own_precision(self.solver):
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
        return values if in_own_precision(self.solver) else in_float64(values)

    def _gradients(self, x: Tensor, y: Tensor) -> PerExampleGradients:
        self.gradient_evaluations += len(x)
        return self.engine(x, y)

    def _ekfac(self) -> EKFAC:
        roots = Roots(self.curvature, self.problem.loss, self._uniforms)
        layers = None if self.layers is None else tuple(self.layers)
        sampled = (self.n_samples, self.seed) if self.curvature == "fisher" else ()
        what = ("ekfac", self.curvature, layers, sampled)
        fitted = self.shared_value(
            what, lambda: fit_ekfac(self.engine, self._batches, roots, self.problem.n_train)
        ).copy()
        fitted.damp(self.damping, self.relative_damping)
        self.gradient_evaluations += 2 * self.problem.n_train
        return fitted

    def _system(self) -> DampedSystem:
        return DampedSystem(
            engine=self.engine,
            problem=self.problem,
            kind=self.curvature,
            names=self._names,
            n_params=self._n_params,
            absolute=self.damping,
            relative=self.relative_damping,
            uniforms=self._uniforms,
            batches=self._batches,
            cast=self._cast,
            extras=self._extras,
            count=self._count,
        )

    def _count(self, gradients: int) -> None:
        self.gradient_evaluations += gradients

    def _inverse(self) -> Inverse:
        if self.solver == "ekfac":
            fitted = self._ekfac()
            self._extras["damping"] = fitted.damping
            return fitted
        system = self._system()
        if self.solver == "exact":
            return system.exact()
        if self.solver == "arnoldi":
            return system.arnoldi(self.krylov, self.seed)
        if self.solver == "lissa":
            series = Series(self.scale, self.depth, self.repeats, self.sample_size)
            return system.lissa(series, self.seed)
        return system.cg(self.tol, self.max_iter)

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
            prepared = self._prepared(inverse, self._cast(x), self._cast(y))
            rows = [inverse.view(self._gradients(x, y)).contract(prepared) for _, x, y in train()]
            bands.append(torch.cat(rows, 1))
        return torch.cat(bands)

    def _prepared(self, inverse: Inverse, x: Tensor, y: Tensor) -> Direction:
        """(C + λI)⁻¹g of these queries; a closed form takes as many at a time as suit it."""
        if self.solver != "ekfac":
            return inverse.prepare(self._gradients(x, y))
        size = self.problem.batch_size
        parts = [
            inverse.prepare(self._gradients(some_x, some_y))
            for some_x, some_y in zip(torch.split(x, size), torch.split(y, size), strict=True)
        ]
        return concatenated(parts)

    def _query_direction(self, inverse: Inverse) -> Direction:
        """Σ_v w_v g_v for each row of the reduction."""
        problem = self.problem
        statistic = self._statistic(inverse) if self.query_weighting == "noise" else None

        def weigh(which: slice, queries: PerExampleGradients) -> Tensor:
            if statistic is not None:
                return noise_weights(statistic[which])
            return query_weights(queries, None, self.query_weighting)

        batches = ((which, self._gradients(x, y)) for which, x, y in self._batches("queries"))
        return query_direction(
            batches, query_groups(problem.labels("queries"), problem.reduce), weigh
        )

    def _statistic(self, inverse: Inverse) -> Tensor:
        """The scores of every query at the reference examples, ``(V, R)``."""
        return self._pairwise(inverse, self._reference)

    def _reference(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The reference examples, in the precision of the solver; positions are among them."""
        for rows, x, y in reference_batches(self.problem):
            yield rows, self._cast(x), self._cast(y)

    def _dual_values(self) -> Tensor:
        """``exact`` in the n × n dual of the empirical Fisher.

        With G (n, P) the gradients, (GᵀG/n + λI)⁻¹Gᵀ = Gᵀ(GGᵀ/n + λI)⁻¹, so every score is an
        entry of K_q (K/n + λI)⁻¹, K = GGᵀ and K_q = G_q Gᵀ: only dot products are needed.
        """
        problem, n = self.problem, self.problem.n_train
        train = [self._gradients(x, y) for _, x, y in self._batches()]
        kernel = torch.cat([torch.cat([g.gram(h) for h in train], 1) for g in train])
        lam = self._system().damping(float(kernel.trace()) / n)
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
