"""Random projections φ = Pᵀg of per-example gradients, never holding (examples, parameters).

P has one row a parameter and ``dim`` columns, scaled so that E‖Pᵀg‖² = ‖g‖² over the draw of P
(Johnson and Lindenstrauss 1984). Inner products are then preserved in expectation as well; what
differs between the kinds is the error around it and the price:

- ``none``        P = I.
- ``gaussian``    independent N(0, 1/dim). Var‖φ‖² = (2/dim)‖g‖⁴.
- ``rademacher``  independent ±1/√dim (Achlioptas 2003): the same error or less, cheaper to draw.
- ``sjlt``        s entries ±1/√s in every row, one in each of s ranges of columns (Kane and
                  Nelson 2014, arXiv:1012.1577): the same order of error at s/dim of the arithmetic.
- ``factorized``  Kronecker-structured, P = P_b ⊗ P_a for the [W|b] of every layer, as in LoGra
                  (Choe et al. 2024, arXiv:2405.13954). A layer's gradient Σ_t b_t a_tᵀ becomes
                  Σ_t (P_bᵀ b_t)(P_aᵀ a_t)ᵀ, so neither gradient nor P is ever formed: by far the
                  cheapest. ``dim`` is split into k_b · k_a = dim, as square as possible with
                  k_a ≥ k_b (512 = 16 · 32). The error is larger, Var‖φ‖² up to
                  ((1 + 2/k_a)(1 + 2/k_b) − 1)‖g‖⁴, like that of a Gaussian of dimension ≈ k_b.
                  LoGra gives each layer its own coordinates; here the layers' terms are added in
                  the same ``dim`` coordinates, as an unstructured P would, so that the dimension
                  needs no division among layers. For an embedding table P_b has a row a token and
                  P_a one a coordinate; parameters outside of layers with factors (norms, grouped
                  convolutions, what ``torch.func`` takes) are projected as by ``gaussian``.

Randomness: each layer has the stream ``projection/<layer name>``, from which P is drawn row by
row in fixed portions and in float32. So P depends on seed, layer and ``dim`` alone: not on batch
size, order, precision, or what else is projected; nor is it kept between calls.

Cost of the unstructured kinds: a dense P takes parameters · dim multiplications an example, and
for a linear layer nothing exact is cheaper in general. Where the gradient at an output unit is
zero (an inactive ReLU), that unit's part is skipped, which is exact and removes most of the work
for the first layers of ReLU networks. ``sjlt`` takes parameters · s additions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fine_bench.gradients.blocks.protocol import Block
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.projection.chunks import Rows, joined, n_bytes, shapes
from fine_bench.seeds import random_signs, stream

ProjectionKind: TypeAlias = Literal["none", "gaussian", "rademacher", "sjlt", "factorized"]

PORTION = 256
"""Rows of P drawn at once. Part of what defines P: changing it changes every projection."""

SJLT_NONZEROS = 4
"""Entries a row of a sparse projection (all columns, where ``dim`` is smaller)."""

WIDE = 64
"""Inputs from which a product with one output unit's rows of P is worth its call."""

HELD_BYTES = 128 * 2**20
"""Gradient factors gathered before P is drawn once for all of them."""


class Projection(ABC):
    """A random matrix P, ``(parameters, dim)``, known by what it does to gradients.

    Args:
        dim: number of columns, ≥ 1.
        seed: ≥ 0.

    Attributes:
        takes_factors: what it is given should be factors where these are known, not gradients in
            full.
    """

    takes_factors: ClassVar[bool] = False

    def __init__(self, dim: int, seed: int) -> None:
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if seed < 0:
            raise ValueError(f"seed must be a non-negative integer, got {seed}")
        self.dim = dim
        self.seed = seed

    @abstractmethod
    def project(self, gradients: PerExampleGradients) -> Tensor:
        """φ = Pᵀg, ``(B, dim)`` in the precision of the gradients."""

    @abstractmethod
    def matrix(self, block: Block) -> Tensor:
        """P of one block, explicitly, ``(block.n_params, dim)`` float64; for small models."""

    def whole(self, gradients: PerExampleGradients) -> Tensor:
        """P of all blocks; see ``projection_matrix``."""
        return torch.cat([self.matrix(block) for block in gradients.blocks])

    def project_all(self, batches: Iterable[PerExampleGradients]) -> Tensor:
        """φ of many batches, ``(n, dim)``."""
        return torch.cat([self.project(batch) for batch in batches])

    def stream(self, name: str) -> torch.Generator:
        """The random stream of a layer."""
        return stream(self.seed, f"projection/{name}")


def make_projection(kind: ProjectionKind, dim: int, seed: int) -> Projection:
    """The projection of a kind. ``dim`` has no meaning for ``"none"``, whose φ is g.

    Raises:
        ValueError: an unknown kind, or a ``dim`` or ``seed`` out of its range.
    """
    kinds: dict[str, Callable[[int, int], Projection]] = {
        "none": NoProjection,
        "gaussian": Gaussian,
        "rademacher": Rademacher,
        "sjlt": SparseJL,
        "factorized": Factorized,
    }
    if kind not in kinds:
        names = ", ".join(repr(name) for name in get_args(ProjectionKind))
        raise ValueError(f"projection must be one of {names}, got {kind!r}")
    return kinds[kind](dim, seed)


def projection_matrix(projection: Projection, gradients: PerExampleGradients) -> Tensor:
    """P explicitly, ``(parameters, dim)`` float64, rows in the order of ``gradients.dense()``."""
    return projection.whole(gradients)


class NoProjection(Projection):
    """P = I: φ is the gradient itself, ``(B, parameters)``."""

    def project(self, gradients: PerExampleGradients) -> Tensor:
        """g, formed in full."""
        return gradients.dense()

    def matrix(self, block: Block) -> Tensor:
        """The block's identity, ``(block.n_params, block.n_params)``."""
        return torch.eye(block.n_params, dtype=torch.float64)

    def whole(self, gradients: PerExampleGradients) -> Tensor:
        """The identity of all parameters."""
        return torch.eye(gradients.n_params, dtype=torch.float64)


class _Unstructured(Projection):
    """A projection drawn row by row, applied to chunks of the gradient.

    P is drawn anew in every call, once for as many examples as ``HELD_BYTES`` of gradient factors
    hold. Working transposed, ``(rows of P, examples)``, or not is the subclass's choice.
    """

    @abstractmethod
    def _portion(self, generator: torch.Generator) -> Tensor:
        """The next ``PORTION`` rows of P, in the subclass's own encoding."""

    @abstractmethod
    def _decode(self, rows: Tensor) -> Tensor:
        """Encoded rows as float64 rows of P without its scale, ``(rows, dim)``."""

    @abstractmethod
    def _add(self, block: Block, rows: Rows, total: Tensor) -> None:
        """Add the block's Pᵀg without the scale to ``total`` ``(B, dim)``."""

    @property
    def _scale(self) -> float:
        return float(self.dim**-0.5)

    def _rows(self, name: str) -> Rows:
        return Rows(self._portion, self.stream(name))

    def matrix(self, block: Block) -> Tensor:
        """P of one block, drawn and decoded."""
        return self._decode(self._rows(block.name).take(block.n_params)) * self._scale

    def project(self, gradients: PerExampleGradients) -> Tensor:
        """φ, adding block by block."""
        like = gradients.blocks[0].values
        total = like.new_zeros(len(gradients), self.dim)
        for block in gradients.blocks:
            self._add(block, self._rows(block.name), total)
        return total.mul_(self._scale)

    def project_all(self, batches: Iterable[PerExampleGradients]) -> Tensor:
        """φ of many batches, drawing P once for many of them."""
        done: list[Tensor] = []
        held: list[PerExampleGradients] = []
        size = 0
        for batch in batches:
            small = PerExampleGradients([block.compact() for block in batch.blocks])
            if held and (size > HELD_BYTES or shapes(small) != shapes(held[0])):
                done.append(self.project(joined(held)))
                held, size = [], 0
            held.append(small)
            size += sum(n_bytes(block) for block in small.blocks)
        return torch.cat([*done, self.project(joined(held))])


class _DenseRows(_Unstructured):
    """Every entry of P is drawn: products of chunks of gradients and chunks of P."""

    def _decode(self, rows: Tensor) -> Tensor:
        return rows.double()

    def _add(self, block: Block, rows: Rows, total: Tensor) -> None:
        outer = block.outer_products()
        if outer is not None and outer.a.shape[1] >= WIDE:
            a, b, bias = outer
            for unit in range(b.shape[1]):
                _add_unit(a, b[:, unit], rows.take(a.shape[1]).to(total), total)
            if bias:
                total.addmm_(b, rows.take(b.shape[1]).to(total))
            return
        for (_, examples, values), mine in rows.beside(block):
            if examples is None:
                total.addmm_(values, mine.to(total))
            else:
                total.index_add_(0, examples, values @ mine.to(total))


class Gaussian(_DenseRows):
    """Independent N(0, 1/dim)."""

    def _portion(self, generator: torch.Generator) -> Tensor:
        return torch.randn(PORTION, self.dim, generator=generator)


class Rademacher(_DenseRows):
    """Independent ±1/√dim, one random bit each."""

    def _portion(self, generator: torch.Generator) -> Tensor:
        return random_signs(PORTION, self.dim, generator)


class SparseJL(_Unstructured):
    """s entries ±1/√s in every row, one in each of s nearly equal ranges of columns.

    Encoded as integers ``(rows, s)``: twice the column, plus one where the entry is negative.
    """

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self.nonzeros = min(SJLT_NONZEROS, dim)
        edges = torch.tensor([j * dim // self.nonzeros for j in range(self.nonzeros + 1)])
        self._starts, self._widths = edges[:-1], edges.diff()

    @property
    def _scale(self) -> float:
        return float(self.nonzeros**-0.5)

    def _portion(self, generator: torch.Generator) -> Tensor:
        draws = torch.empty(PORTION, self.nonzeros, dtype=torch.int64).random_(generator=generator)
        return 2 * self._starts + draws % (2 * self._widths)

    def _decode(self, rows: Tensor) -> Tensor:
        dense = torch.zeros(len(rows), self.dim, dtype=torch.float64)
        return dense.scatter_(1, rows >> 1, 1.0 - 2.0 * (rows & 1).double())

    def _add(self, block: Block, rows: Rows, total: Tensor) -> None:
        # transposed, (dim, B): a row of P then touches contiguous memory
        transposed = torch.zeros_like(total.T, memory_format=torch.contiguous_format)
        outer = block.outer_products()
        if outer is not None:
            a, b = outer.a.T.contiguous(), outer.b.T.contiguous()
            for units in torch.split(b, max(1, 4096 // len(a))):
                bags = self._bags(rows.take(len(units) * len(a)), a)
                for start in range(0, a.shape[1], 256):  # so few that a chunk stays in cache
                    part = slice(start, start + 256)
                    chunk = (units[:, None, part] * a[None, :, part]).flatten(0, 1)
                    transposed[:, part] += _sum_bags(chunk, bags)
            if outer.bias:
                transposed += _sum_bags(b, self._bags(rows.take(len(b)), b))
        else:
            for (_, examples, values), mine in rows.beside(block):
                sums = _sum_bags(values.T.contiguous(), self._bags(mine, values))
                if examples is None:
                    transposed += sums
                else:
                    transposed.index_add_(1, examples, sums)
        total += transposed.T

    def _bags(self, rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For every column of P the rows with an entry in it: positions, offsets, signs."""
        codes = rows.flatten()
        columns, order = (codes >> 1).sort(stable=True)
        offsets = torch.searchsorted(columns, torch.arange(self.dim))
        signs = (1 - 2 * (codes[order] & 1)).to(like)
        return (order // self.nonzeros).to(like.device), offsets.to(like.device), signs


class Factorized(Projection):
    """P_b ⊗ P_a for the [W|b] of every layer, both Gaussian, scaled by 1/√k_b and 1/√k_a."""

    takes_factors = True

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__(dim, seed)
        self.k_b = max(k for k in range(1, int(dim**0.5) + 1) if dim % k == 0)
        self.k_a = dim // self.k_b
        if self.k_b == 1 and dim > 3:
            raise ValueError(
                f'projection="factorized" splits dim into two factors and {dim} is prime; pass '
                f"dim={dim + 1}"
            )
        # parameters without factors are projected as by an unstructured Gaussian
        self._fallback = Gaussian(dim, seed)

    def _factors(self, block: Block, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """P_b ``(O, k_b)`` and P_a ``(I + 1, k_a)``, the last row of P_a for the bias."""
        generator = self.stream(block.name)
        n_out, n_in = shape
        p_b = torch.randn(n_out, self.k_b, generator=generator)
        p_a = torch.randn(n_in + 1, self.k_a, generator=generator)
        return p_b, p_a

    def matrix(self, block: Block) -> Tensor:
        """The Kronecker product in full."""
        if block.matrix_shape is None:
            return self._fallback.matrix(block)
        p_b, p_a = (factor.double() for factor in self._factors(block, block.matrix_shape))
        full = torch.einsum("ob,ia->oiba", p_b, p_a).flatten(2) * self.dim**-0.5
        return block.in_order(full)

    def project(self, gradients: PerExampleGradients) -> Tensor:
        """φ from the factors alone."""
        total = gradients.blocks[0].values.new_zeros(len(gradients), self.dim)
        for block in gradients.blocks:
            if block.matrix_shape is None:
                total += self._fallback.project(PerExampleGradients([block]))
                continue
            p_b, p_a = (factor.to(total) for factor in self._factors(block, block.matrix_shape))
            b, a = block.projected_factors(p_b, p_a)
            total += torch.bmm(b.transpose(1, 2), a).flatten(1) * self.dim**-0.5
        return total


def _add_unit(a: Tensor, b: Tensor, rows: Tensor, total: Tensor) -> None:
    """Add b_i · Pᵀa_i for one output unit: a ``(B, I)``, b ``(B,)``, rows of P ``(I, dim)``."""
    step = 8192  # examples at a time, to bound the chunk of the gradient
    for start in range(0, len(a), step):
        part = slice(start, start + step)
        active = b[part].nonzero()[:, 0]
        if len(active) > 0.8 * len(b[part]):
            total[part].addmm_(a[part] * b[part, None], rows)
        elif len(active):
            active += start
            total[active] += (a[active] * b[active, None]) @ rows


def _sum_bags(values: Tensor, bags: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Signed sums of rows of ``values`` ``(rows, B)`` into the columns of P, ``(dim, B)``."""
    index, offsets, signs = bags
    return F.embedding_bag(index, values, offsets, mode="sum", per_sample_weights=signs)
