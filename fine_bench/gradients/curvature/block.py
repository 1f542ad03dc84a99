"""What EK-FAC asks of the curvature of one block, and which class fits it for which kind of block.

A kind of block is registered with ``curvature_fit``; one that is not has its gradients formed in
full (``ekfac_dense.py``).

Shapes: B examples, R rows of a direction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.protocol import Block

B = TypeVar("B", bound=Block)


class BlockCurvature(ABC, Generic[B]):
    """The curvature C of one block and its damped inverse.

    Attributes:
        name: name of the block.
        eigenvalues: s, float64, ≥ 0.
        inverse: 1/(s + λ), in the shape of ``eigenvalues``; set by ``EKFAC.damp``.
    """

    name: str
    eigenvalues: Tensor
    inverse: Tensor

    @abstractmethod
    def quadratic(self, block: B) -> Tensor:
        """vᵀ(C + λ)⁻¹v for every example's gradient v, ``(B,)``."""

    @abstractmethod
    def gram(self, block: B, other: B) -> Tensor:
        """vᵀ(C + λ)⁻¹w for every pair of gradients of two batches, ``(B, B')``."""

    @abstractmethod
    def own_and_total(self, block: B) -> tuple[Tensor, Tensor]:
        """vᵢᵀ(C + λ)⁻¹vᵢ and Σ_j vᵢᵀ(C + λ)⁻¹v_j over the batch, each ``(B,)``."""

    @abstractmethod
    def prepare(self, block: B) -> BlockDirection:
        """(C + λ)⁻¹v, in the coordinates of ``view``."""

    def view(self, block: B) -> Block:
        """Training gradients as ``prepare`` wants them: here as they are."""
        return block

    @abstractmethod
    def solve(self, direction: BlockDirection) -> BlockDirection:
        """(C + λ)⁻¹ times directions in the layer's own coordinates."""


class CurvatureFit(ABC, Generic[B]):
    """Estimates the curvature of one block from two passes over the training examples.

    Args:
        name: name of the block.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def see(self, block: B, root: int) -> None:
        """First pass: one batch's gradients of one root, counted from 0."""

    @abstractmethod
    def decompose(self, dtype: torch.dtype) -> None:
        """Between the passes: find the eigenvectors, in the precision of the gradients."""

    def add(self, block: B, n_roots: int) -> None:
        """Second pass: one batch's gradients of one of ``n_roots`` roots. Nothing if unneeded."""

    def end_batch(self) -> None:
        """Second pass: all roots of a batch have been added."""

    @abstractmethod
    def curvature(self, n: int) -> BlockCurvature[B]:
        """The curvature of the mean over n examples; λ is still unset."""


FITS: dict[type[Block], Callable[[str], CurvatureFit[Any]]] = {}
"""What fits the curvature of a kind of block, by its class."""

KINDS: list[type[BlockCurvature[Any]]] = []
"""Every kind of curvature, for states that are read again."""


def register_curvature(
    kind: type[BlockCurvature[B]], block: type[B], fit: Callable[[str], CurvatureFit[B]]
) -> None:
    """Say what fits the curvature of a kind of block.

    Args:
        kind: a dataclass whose fields are its whole state.
        block: the class of blocks; subclasses are included.
        fit: makes an empty fit for the block of a name.
    """
    KINDS.append(kind)
    FITS[block] = fit


def curvature_fit(block: Block) -> CurvatureFit[Any]:
    """An empty fit for blocks of this kind."""
    found = next(FITS[cls] for cls in type(block).__mro__ if cls in FITS)
    return found(block.name)


def added(total: Tensor | None, term: Tensor) -> Tensor:
    """Accumulate in float64, so that the number of batches leaves no trace."""
    if total is None:
        return term.double()
    total += term
    return total
