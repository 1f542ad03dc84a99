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

The sum over j is taken in one of two ways, layer by layer, for V queries and P_l = I × O:

    Σ_j w_qj g_j once, and its products with all g_i      2 V n P_l
    ⟨g_j, g_i⟩ for pairs of examples, summed with w_qj     n² (I + O + V)

The second needs only the factors of a gradient, and is for linear layers that are applied once,
where it is cheaper (``_by_pairs``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fine_bench.estimator import InfluenceEstimator, Schedule
from fine_bench.gradients.blocks.dense import in_full
from fine_bench.gradients.blocks.direction import Direction, add_directions
from fine_bench.gradients.blocks.protocol import Block
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
        self._pairs: list[bool] = []

    def update(self, checkpoint: Checkpoint) -> None:
        """Scores at this checkpoint; the last one counts."""
        self.load(checkpoint)
        self._held, self._pairs = None, []
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
            gradients = self._kept(self.engine(x, y))
            self.gradient_evaluations += len(x)
            if not self._fits(gradients):
                held = None
            elif held is not None:
                held.append(gradients)
            yield gradients
        self._held = held

    def _kept(self, gradients: PerExampleGradients) -> PerExampleGradients:
        """Each layer's gradients by factors where its sum goes over pairs, else formed in full."""
        if not self._pairs:
            self._pairs = [self._by_pairs(block) for block in gradients.blocks]
            if not self._fits(self._kept(gradients)):  # pairs would take every batch anew
                self._pairs = [False] * len(self._pairs)
        parts = zip(gradients.blocks, self._pairs, strict=True)
        return PerExampleGradients([b if pairs else in_full(b) for b, pairs in parts])

    def _by_pairs(self, block: Block) -> bool:
        factors = block.outer_products()
        if factors is None:
            return False
        floats, n = block.n_floats // len(block), self.problem.n_train
        if isinstance(self.problem.queries, str):  # nothing but pairs is needed
            return floats < block.n_params
        rows = self.problem.n_query
        return n * (floats + rows) < 2 * rows * block.n_params

    def _fits(self, kept: PerExampleGradients) -> bool:
        """Whether all training gradients can be held in this form."""
        floats = sum(block.n_floats for block in kept.blocks) // len(kept)
        return floats * self.problem.n_train <= HELD_FLOATS

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
            queries = self._kept(self.engine(x, y))
            self.gradient_evaluations += len(x)
            products = torch.cat([_grams(queries, g) for g in self._train()], 2)  # (L, V, n)
            corrections = self._corrections(products * self._shrink[:, None] / self.problem.n_train)
            bands.append(((products - corrections) / self._damping[:, None, None]).sum(0))
        return torch.cat(bands)

    def _corrections(self, weights: Tensor) -> Tensor:
        """Σ_j w_lqj ⟨g_j, g_i⟩ in each layer, ``(L, V, n)`` float64."""
        result = torch.zeros_like(weights)
        by_pairs = [layer for layer, pairs in enumerate(self._pairs) if pairs]
        formed = [layer for layer, pairs in enumerate(self._pairs) if not pairs]
        if formed:
            direction: Direction | None = None
            for mine, g in self._placed(formed):
                part = [
                    block.weighted_sum(weights[layer, :, mine].to(block.values))
                    for layer, block in zip(formed, g.blocks, strict=True)
                ]
                direction = part if direction is None else add_directions(direction, part)
            assert direction is not None
            for mine, g in self._placed(formed):
                result[formed, :, mine] = _contractions(g, direction)
        if by_pairs:
            for mine, g in self._placed(by_pairs):
                for theirs, h in self._placed(by_pairs):
                    for layer, gram in zip(by_pairs, _grams(h, g), strict=True):
                        result[layer, :, mine] += weights[layer, :, theirs] @ gram
                        if theirs != mine:  # a pair of batches serves both
                            result[layer, :, theirs] += weights[layer, :, mine] @ gram.T
                    if theirs == mine:
                        break
        return result

    def _placed(self, layers: list[int]) -> Iterator[tuple[slice, PerExampleGradients]]:
        """Positions and gradients of some layers, batch by batch."""
        start = 0
        for g in self._train():
            yield slice(start, start + len(g)), PerExampleGradients([g.blocks[i] for i in layers])
            start += len(g)

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
