"""The system (C + λI) x = g of influence functions, at one checkpoint: λ, and each way to solve it.

What each solver is, and where it is limited, is said in ``baselines/influence_functions.py``; the
solvers themselves are in ``baselines/inverses.py``. Here C and λ meet the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from baselines.arnoldi import RitzPairs, krylov_space
from baselines.inverses import ArnoldiInverse, CGInverse, ExactInverse, Inverse, LissaInverse
from baselines.lissa import Apply, Lissa
from fine_bench.gradients.curvature.products import (
    CURVATURES,
    Batches,
    Curvature,
    CurvatureProducts,
    Roots,
    curvature_matrix,
    sum_of_squares_trace,
)
from fine_bench.gradients.engine import GradientEngine
from fine_bench.gradients.held_products import HeldProducts, has_held_products
from fine_bench.seeds import stream
from fine_bench.types import Problem

Solver: TypeAlias = Literal["exact", "cg", "lissa", "arnoldi", "ekfac"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)


class Series(NamedTuple):
    """LiSSA's options; see ``InfluenceFunction``."""

    scale: float | None
    depth: int
    repeats: int
    sample_size: int | None


@dataclass(frozen=True, eq=False)
class DampedSystem:
    """C + λI at the present parameters of a model.

    Attributes:
        engine: gradients of the model.
        problem: the training examples and the loss.
        kind: which curvature.
        names: the parameters in the order of the system's coordinates.
        n_params: P.
        absolute: λ itself, ≥ 0; None for the relative one.
        relative: λ in units of the mean eigenvalue of C, ≥ 0.
        uniforms: see ``curvature.products.Roots``.
        batches: the training examples in the model's precision.
        cast: brings inputs and real-valued targets into it.
        extras: told ``damping``, and what a solver has to say of its answer.
        count: told how many gradients a product or a solution is worth.
    """

    engine: GradientEngine
    problem: Problem
    kind: Curvature
    names: list[str]
    n_params: int
    absolute: float | None
    relative: float
    uniforms: Tensor
    batches: Batches
    cast: Callable[[Tensor], Tensor]
    extras: dict[str, Tensor]
    count: Callable[[int], None]

    # ------------------------------------------------------------------ solvers

    def exact(self) -> Inverse:
        """By a Cholesky factor of the matrix."""
        matrix = self._matrix()
        lam = self.damping(float(matrix.trace()))
        matrix.diagonal().add_(lam)
        return ExactInverse(matrix, lam)

    def cg(self, tol: float, max_iter: int) -> Inverse:
        """By conjugate gradients; extras ``iterations`` and ``residual``."""
        lam = self._damping_of_products()
        self.extras["iterations"] = torch.zeros(1, dtype=torch.int64)
        self.extras["residual"] = torch.zeros(0, dtype=torch.float64)

        def report(iterations: int, residual: Tensor) -> None:
            self.extras["iterations"] += iterations
            self.count(iterations * len(residual) * self.problem.n_train)
            self._add_residual(residual)

        return CGInverse(self._products, lam, tol, max_iter, report)

    def arnoldi(self, dim: int, seed: int) -> Inverse:
        """Within a Krylov space of ``dim`` dimensions.

        Raises:
            ValueError: λ = 0.
        """
        lam = self._damping_of_products()
        _require_damping("arnoldi", lam)
        products, start = self._products, stream(seed, "influence-function/arnoldi")
        basis, compressed = krylov_space(products, self.n_params, dim, start)
        self.count(products.products * self.problem.n_train)
        return ArnoldiInverse(RitzPairs(basis, compressed, lam))

    def lissa(self, series: Series, seed: int) -> Inverse:
        """By LiSSA; extras ``scale`` and ``residual``.

        Raises:
            ValueError: λ = 0.
            DivergedSeriesError: the scale is too small, or C + λI is indefinite.
        """
        lam = self._damping_of_products()
        _require_damping("lissa", lam)
        problem, n, products = self.problem, self.problem.n_train, self._products
        size = n if series.sample_size is None else min(series.sample_size, n)

        def whole(v: Tensor) -> Tensor:
            self.count(len(v) * n)
            return products(v).add_(v, alpha=lam)

        def sampled(rows: Tensor) -> Apply:
            x, y = examples(problem, rows)
            batch = slice(0, size), self.cast(x), self.cast(y)
            draw = self._products_over(lambda: iter([batch]), size, self.uniforms[rows])

            def apply(v: Tensor) -> Tensor:
                self.count(len(v) * size)
                return draw(v).add_(v, alpha=lam)

            return apply

        def draws(repeat: int) -> Iterator[Apply]:
            generator = stream(seed, f"influence-function/lissa/{repeat}")
            while True:
                if size == n:
                    yield whole
                else:
                    yield sampled(torch.randperm(n, generator=generator)[:size])

        definite = self.kind != "hessian"
        dtype = next(self.engine.model.parameters()).dtype
        of_series = series.scale, series.depth, series.repeats
        lissa = Lissa(whole, draws, self.n_params, lam, *of_series, definite, dtype)
        self.extras["scale"] = torch.zeros(0, dtype=torch.float64)
        self.extras["residual"] = torch.zeros(0, dtype=torch.float64)

        def report(residual: Tensor, scales: Tensor) -> None:
            self._add_residual(residual)
            self.extras["scale"] = torch.cat([self.extras["scale"], scales])

        return LissaInverse(lissa, report)

    # ------------------------------------------------------------------ C and λ

    def damping(self, trace: float | Callable[[], float]) -> float:
        """λ, from tr C (or what computes it, where it is needed); told to ``extras``.

        Raises:
            ValueError: a relative damping of a curvature with a negative trace.
        """
        if self.absolute is not None:
            lam = self.absolute
        else:
            value = trace() if callable(trace) else trace
            lam = self.relative * value / self.n_params
            if lam < 0:
                raise ValueError(
                    f"the {self.kind} has a negative mean eigenvalue, "
                    f"{value / self.n_params:.3g}, so it gives no scale for relative damping; "
                    "give damping= itself"
                )
        self.extras["damping"] = torch.tensor([lam], dtype=torch.float64)
        return lam

    def _damping_of_products(self) -> float:
        """λ for solvers that do not hold C; a relative one of the Hessian takes its matrix."""
        if self.kind == "hessian" and self.absolute is None:
            return self.damping(float(self._matrix().trace()))
        return self.damping(self._trace)

    @cached_property
    def _products(self) -> CurvatureProducts | HeldProducts:
        """v ↦ C v."""
        return self._products_over(self.batches, self.problem.n_train, self.uniforms)

    def _products_over(
        self, batches: Batches, n: int, uniforms: Tensor
    ) -> CurvatureProducts | HeldProducts:
        """v ↦ C v, C the mean over some n examples."""
        model, loss = self.engine.model, self.problem.loss
        if self._may_hold:
            return HeldProducts(model, loss, self.kind, batches, n)
        return CurvatureProducts(model, loss, self.names, self.kind, batches, n, uniforms)

    @cached_property
    def _may_hold(self) -> bool:
        """Asked of the problem's own model: the engine's copy has the recorder's hooks, and a
        network with hooks is not known to be what its layers say.
        """
        _, x, _ = next(self.batches())
        return has_held_products(self.problem.model, self.names, self.kind, x)

    def _matrix(self) -> Tensor:
        """C itself, ``(P, P)``."""
        like = torch.zeros(1, self.n_params, dtype=torch.float64)
        matrix = curvature_matrix(self._products, like)
        self.count(self.problem.n_train * self.n_params)
        return matrix

    def _trace(self) -> float:
        self.count(self.problem.n_train)
        roots = Roots(self.kind, self.problem.loss, self.uniforms)
        return sum_of_squares_trace(self.engine, self.batches, roots, self.problem.n_train)

    def _add_residual(self, residual: Tensor) -> None:
        self.extras["residual"] = torch.cat([self.extras["residual"], residual])


def _require_damping(solver: str, lam: float) -> None:
    if lam <= 0:
        raise ValueError(
            f'solver="{solver}" divides by λ where it does not see the curvature, got damping 0; '
            "give damping= or relative_damping= above 0"
        )


def in_own_precision(solver: Solver) -> bool:
    """Whether a solver works in the network's own precision: EK-FAC, whose factors are estimates,
    and LiSSA, whose draws are. The others answer to a tolerance that float32 does not reach.
    """
    return solver in ("ekfac", "lissa")


def in_float64(values: Tensor) -> Tensor:
    """Inputs or real-valued targets in float64; integers as they are."""
    return values.double() if values.is_floating_point() else values


def examples(problem: Problem, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The training examples at these positions, in this order, as one batch."""
    if isinstance(problem.train, TensorDataset):
        x, y = problem.train.tensors[:2]
        return x[rows], y[rows]
    # the loader's own generator leaves the global random state alone
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
        Subset(problem.train, rows.tolist()),
        batch_size=len(rows),
        generator=torch.Generator().manual_seed(0),
    )
    x, y, *_ = next(iter(loader))
    return x, y


def check_options(
    solver: str, curvature: str | None, damping: float | None, relative_damping: float
) -> None:
    """Refuse settings that no problem could make sense of."""
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


def check_iterations(
    scale: float | None, depth: int, repeats: int, sample_size: int | None, krylov: int
) -> None:
    """Refuse settings of the iterative solvers that no problem could make sense of."""
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale must be a finite number > 0, or None to find one, got {scale}")
    for name, value in (
        ("depth", depth),
        ("repeats", repeats),
        ("sample_size", sample_size),
        ("krylov", krylov),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if sample_size is None and repeats > 1:
        raise ValueError(
            f"repeats={repeats} with sample_size=None would compute the same series {repeats} "
            "times; pass repeats=1, or a sample_size"
        )
