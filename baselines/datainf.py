"""DataInf: influence functions in closed form, by averaging inverses instead of inverting a mean.

    IF(q, i) = Σ_l g_qlᵀ (C_l + λ_l I)⁻¹ g_il,       C_l = (1/n) Σ_j g_jl g_jlᵀ

layer by layer, with the inverse of the mean replaced by the mean of the inverses, each of which is
known by Sherman and Morrison:

    (1/n) Σ_j (g_j g_jᵀ + λ I)⁻¹ = (1/(n λ)) Σ_j ( I − g_j g_jᵀ / (λ + ‖g_j‖²) )

    DataInf(q, i) = Σ_l (1/λ_l) [ ⟨g_q, g_i⟩ − (1/n) Σ_j ⟨g_q, g_j⟩ ⟨g_j, g_i⟩ / (λ_l + ‖g_j‖²) ]_l

Kwon, Wu, Wu, Zou: *DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and Diffusion
Models* (ICLR 2024, arXiv:2310.00902). The error of the exchange grows with the number of
parameters of a layer, so it was made for LoRA matrices, each of which is a layer here. λ_l is
``relative_damping`` times the mean eigenvalue of C_l, mean_j ‖g_jl‖² / P_l, the paper's choice at
0.1. Sign: positive where i helps q (the paper's is the opposite). θ is that of the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.blocks.dense import in_full
from fine_bench.gradients.blocks.direction import Direction, add_directions
from fine_bench.gradients.cache import engine_of
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.query_weighting import (
    check_weighting,
    reduced_rows,
)
from fine_bench.types import Checkpoint, InfluenceScores, Problem, QueryWeighting

HELD_FLOATS = 2**27
"""Gradients that are held instead of being computed again: half a gigabyte in float32."""


class DataInf(InfluenceEstimator):
    """DataInf at the last checkpoint.

    Args:
        damping: λ of every layer, > 0, in the unit of a squared gradient; None for the relative
            one.
        relative_damping: λ in units of each layer's mean eigenvalue, > 0; ignored where damping is
            given.
        query_weighting: weights of the queries in a mean: None, ``"norm"`` or ``"noise"``.
        layers: names of modules whose parameters count; None for all.

    Values have the unit of the loss, per unit of an example's weight in the mean loss. ``extras``:
    ``damping`` (layers,).
    """

    name = "datainf"
    version = 1
    schedule = Schedule.LAST

    def __init__(
        self,
        damping: float | None = None,
        relative_damping: float = 0.1,
        query_weighting: QueryWeighting = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        check_weighting(query_weighting)
        for name, value in (("damping", damping), ("relative_damping", relative_damping)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        self.damping = damping
        self.relative_damping = relative_damping
        self.query_weighting: QueryWeighting = query_weighting
        self.layers = layers

    def setup(self, problem: Problem) -> None:
        """Prepare the copy of the model."""
        super().setup(problem)
        self.engine = engine_of(self.model, problem.loss, self.layers)
        self._values: Tensor | None = None
        self._held: list[PerExampleGradients] | None = None

    def update(self, checkpoint: Checkpoint) -> None:
        """Scores at this checkpoint; the last one counts."""
        self.load(checkpoint)
        self._held = None
        norms = torch.cat([_norms(g) for g in self._train(keep=True)], 1)
        self._damping, self._shrink = self._dampings(norms)
        if isinstance(self.problem.queries, str):
            self._values = self._self_values(norms)
        else:
            self._values = self._reduced(self._rows())
        self._held = None

    def compute(self) -> InfluenceScores:
        """The scores at the last checkpoint."""
        self.require_update()
        assert self._values is not None
        dtype = next(self.model.parameters()).dtype
        return InfluenceScores(
            values=self._values.to(torch.float64 if dtype == torch.float64 else torch.float32),
            method=self.name,
            target=self.problem.target,
            version=self.version,
            extras={"damping": self._damping.cpu()},
        )

    # ------------------------------------------------------------------ gradients and damping

    def _train(self, *, keep: bool = False) -> Iterator[PerExampleGradients]:
        """The training gradients batch by batch, held from the first pass on if they are few."""
        if self._held is not None:
            yield from self._held
            return
        held: list[PerExampleGradients] | None = [] if keep else None
        for _, x, y in self.problem.batches("train"):
            gradients = _dense(self.engine(x, y))
            self.gradient_evaluations += len(x)
            if gradients.n_params * self.problem.n_train > HELD_FLOATS:
                held = None
            elif held is not None:
                held.append(gradients)
            yield gradients
        self._held = held

    def _dampings(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        """λ ``(L,)`` and 1/(λ + ‖g_j‖²) ``(L, n)``, from the squared norms ``(L, n)``."""
        first = next(self._train())
        sizes = torch.tensor([b.n_params for b in first.blocks]).to(norms)
        if self.damping is not None:
            lam = torch.full_like(sizes, self.damping)
        else:
            lam = self.relative_damping * norms.mean(1) / sizes
        if bool((lam <= 0).any()):
            name = first.blocks[int(lam.argmin())].name
            raise ValueError(
                f"all training gradients of layer {name!r} are zero, which gives no scale for "
                "relative damping; give damping= itself, or leave the layer out with layers=[...]"
            )
        return lam, 1.0 / (lam[:, None] + norms)

    # ------------------------------------------------------------------ scores

    def _rows(self) -> Tensor:
        """Every query against every training example, ``(V, n)``."""
        bands = []
        for _, x, y in self.problem.batches("queries"):
            queries = _dense(self.engine(x, y))
            self.gradient_evaluations += len(x)
            products = torch.cat([_grams(queries, g) for g in self._train()], 2)  # (L, V, n)
            # Σ_j w_vj g_j is one direction in each layer, so no n × n matrix is needed
            weights = products * self._shrink[:, None] / self.problem.n_train
            direction: Direction | None = None
            start = 0
            for g in self._train():
                mine = weights[:, :, start : start + len(g)]
                part = [
                    block.weighted_sum(w.to(block.values.dtype))
                    for block, w in zip(g.blocks, mine, strict=True)
                ]
                direction = part if direction is None else add_directions(direction, part)
                start += len(g)
            assert direction is not None
            corrections = torch.cat([_contractions(g, direction) for g in self._train()], 2)
            bands.append(((products - corrections) / self._damping[:, None, None]).sum(0))
        return torch.cat(bands)

    def _self_values(self, norms: Tensor) -> Tensor:
        """Each example with itself, ``(1, n)``."""
        correction = torch.zeros_like(norms)
        stop = 0
        for g in self._train():
            mine = slice(stop, stop + len(g))
            stop, start = mine.stop, 0
            for h in self._train():
                theirs = slice(start, start + len(h))
                start = theirs.stop
                squares = _grams(g, h).square()
                correction[:, mine] += (squares * self._shrink[:, None, theirs]).sum(2)
                if start == stop:
                    break
                # a pair of batches serves both
                correction[:, theirs] += (squares * self._shrink[:, mine, None]).sum(1)
        correction /= self.problem.n_train
        return ((norms - correction) / self._damping[:, None]).sum(0, keepdim=True)

    def _reduced(self, rows: Tensor) -> Tensor:
        def norms() -> Tensor:
            batches = self.problem.batches("queries")
            return torch.cat([self.engine(x, y).norm2() for _, x, y in batches]).sqrt()

        return reduced_rows(rows, self.problem, self.query_weighting, norms)


def _norms(gradients: PerExampleGradients) -> Tensor:
    """Squared norms layer by layer, ``(L, B)`` float64."""
    return torch.stack([block.norm2().double() for block in gradients.blocks])


def _grams(mine: PerExampleGradients, theirs: PerExampleGradients) -> Tensor:
    """Dot products layer by layer, ``(L, B, B')`` float64."""
    layers = zip(mine.blocks, theirs.blocks, strict=True)
    pairs = [(PerExampleGradients([x]), PerExampleGradients([y])) for x, y in layers]
    return torch.stack([x.gram(y).double() for x, y in pairs])


def _contractions(gradients: PerExampleGradients, direction: Direction) -> Tensor:
    """Dot products with R directions layer by layer, ``(L, R, B)`` float64."""
    layers = zip(gradients.blocks, direction, strict=True)
    return torch.stack([block.contract(d).double() for block, d in layers])


def _dense(gradients: PerExampleGradients) -> PerExampleGradients:
    """The gradients formed in full, whatever their factors."""
    return PerExampleGradients([in_full(block) for block in gradients.blocks])
