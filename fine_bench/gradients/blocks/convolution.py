"""Per-example gradients of a convolution without writing every receptive field out.

A convolution with a k × k kernel is a linear layer on its receptive fields, (B, T, C · k²): each
input pixel stands in k² of them, and copying them costs about as much as the convolution. With
stride one, the fields of all positions at one kernel row ky are a *window* of the same
matrix: let

    R[(c, kx), (h, w)] = x[c, h, w + kx · dilation],     h over all (padded) input rows;

then the part of the gradient at ky is Σ_t b_t R[:, t + ky · dilation · W]ᵀ, where t runs over the T
output positions, W of them a row: a slice of R, not a copy. So R is written once, k times the
input instead of k².

Gradients formed in this way have the order (ky, c, kx, o), that of the weight is (o, c, ky, kx);
norms and products of gradients do not care.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fine_bench.gradients.blocks.direction import BlockDirection
from fine_bench.gradients.blocks.linear import FactorBlock

FEW_ROWS = 2
"""Directions up to which convolutions with them cost less than the gradients."""

FEW_INPUTS = 1 / 16
"""Inputs C · k², as a share of the positions, up to which gradients cost less all the same: they
are small then, and a convolution's output is not."""


class Fields:
    """The receptive fields of one application of a convolution.

    Args:
        conv: the layer; see ``serves``.
        x: its input, ``(B, C, H, W)``.
    """

    def __init__(self, conv: nn.Conv2d, x: Tensor) -> None:
        self.x = x
        self.kernel = conv.kernel_size
        self.dilation = conv.dilation
        self._pad = conv._reversed_padding_repeated_twice
        self._mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode

    @staticmethod
    def serves(conv: nn.Module) -> bool:
        """Whether the layer is one whose fields are windows: 2-d, one group, stride one."""
        return (
            isinstance(conv, nn.Conv2d)
            and conv.groups == 1
            and tuple(conv.stride) == (1, 1)
            and conv.kernel_size != (1, 1)
        )

    def rows(self, which: slice | Tensor) -> Fields:
        """The fields of some of the examples."""
        return self._with(self.x[which])

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the input."""
        return self.x.dtype

    def is_floating_point(self) -> bool:
        """Whether the input has one, as a tensor says it."""
        return self.x.is_floating_point()

    def to(self, dtype: torch.dtype) -> Fields:
        """The same in another precision."""
        return self._with(self.x.to(dtype))

    def times(self, factor: float) -> Fields:
        """The fields of the input times a number."""
        return self._with(self.x * factor)

    def alike(self, other: Fields) -> bool:
        """Whether gradients formed from both have one order."""
        return self.kernel == other.kernel and self.dilation == other.dilation

    @property
    def sizes(self) -> tuple[int, int, int]:
        """B, T and C · k²."""
        n, channels, _, _ = self.x.shape
        height, width = self._output
        return n, height * width, channels * self.kernel[0] * self.kernel[1]

    @cached_property
    def full(self) -> Tensor:
        """All fields, ``(B, T, C · k²)``."""
        x, (height, width) = self._padded, self._output
        s_n, s_c, s_h, s_w = x.stride()
        (k_h, k_w), (d_h, d_w) = self.kernel, self.dilation
        view = x.as_strided(
            (*x.shape[:2], k_h, k_w, height, width), (s_n, s_c, s_h * d_h, s_w * d_w, s_h, s_w)
        )
        n, t, n_in = self.sizes
        return view.reshape(n, n_in, t).transpose(1, 2)

    @cached_property
    def _columns(self) -> Tensor:
        """R, ``(B, C · k, padded rows · W)``."""
        x, width = self._padded, self._output[1]
        s_n, s_c, s_h, s_w = x.stride()
        view = x.as_strided(
            (*x.shape[:2], self.kernel[1], x.shape[2], width),
            (s_n, s_c, s_w * self.dilation[1], s_h, s_w),
        )
        return view.reshape(len(x), -1, x.shape[2] * width)

    def windows(self) -> Iterator[Tensor]:
        """For each kernel row, ``(B, C · k, T)``."""
        height, width = self._output
        for row in range(self.kernel[0]):
            start = row * self.dilation[0] * width
            yield self._columns[:, :, start : start + height * width]

    def convolved(self, weight: Tensor) -> Tensor:
        """The convolution's output for another weight ``(O, C, k, k)``, ``(B, O, H', W')``."""
        return F.conv2d(self._padded, weight, dilation=self.dilation)

    def combined(self, matrix: Tensor) -> Tensor:
        """Combinations of all fields by a matrix ``(K, C · k²)``, ``(B, T, K)``."""
        weight = matrix.view(-1, self.x.shape[1], *self.kernel)
        return self.convolved(weight).flatten(2).transpose(1, 2)

    def weight_gradient(self, b: Tensor) -> Tensor:
        """Gradient of the weight ``(O, C, k, k)``, summed over examples, for b ``(B, O, T)``."""
        shape = (b.shape[1], self.x.shape[1], *self.kernel)
        grad = b.reshape(*b.shape[:2], *self._output)
        summed: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            self._padded, shape, grad, dilation=self.dilation
        )
        return summed

    @cached_property
    def _padded(self) -> Tensor:
        return F.pad(self.x, self._pad, mode=self._mode) if any(self._pad) else self.x

    @property
    def _output(self) -> tuple[int, int]:
        left, right, top, bottom = self._pad
        height = self.x.shape[2] + top + bottom - self.dilation[0] * (self.kernel[0] - 1)
        width = self.x.shape[3] + left + right - self.dilation[1] * (self.kernel[1] - 1)
        return height, width

    def _with(self, x: Tensor) -> Fields:
        other = object.__new__(Fields)
        other.x, other.kernel, other.dilation = x, self.kernel, self.dilation
        other._pad, other._mode = self._pad, self._mode
        return other


class FieldBlock(FactorBlock):
    """Gradients of one convolution for B examples: a ``FactorBlock`` that writes a when asked.

    Attributes:
        fields: the receptive fields.
    """

    fields: Fields

    def __init__(self, name: str, fields: Fields, b: Tensor, weight: bool, bias: bool) -> None:
        self.__dict__.update(name=name, fields=fields, b=b, weight=weight, bias=bias)

    @property
    def a(self) -> Tensor:
        """All receptive fields, ``(B, T, I)``; written out once."""
        return self.fields.full

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, I and O."""
        return *self.fields.sizes, self.b.shape[2]

    def scaled(self, factor: Tensor) -> FieldBlock:
        """Every example's gradient times its factor, ``(B,)``."""
        return self._with(self.fields, self.b * factor[:, None, None])

    def trained(self, weight: bool, bias: bool) -> FieldBlock:
        """The gradients of the weight, the bias or both, whatever the layer trains."""
        return FieldBlock(self.name, self.fields, self.b, weight, bias)

    def outputs_times(self, factor: Tensor) -> FieldBlock:
        """Row o of every gradient times its factor, ``(O,)``."""
        return self._with(self.fields, self.b * factor)

    def row_products(self, matrix: Tensor) -> Tensor:
        """Dot products of the weight's gradient with a matrix, by row, ``(B, O)``."""
        return (self.fields.combined(matrix) * self.b).sum(1)

    def rows(self, which: slice | Tensor) -> FieldBlock:
        """The gradients of some of the examples."""
        return self._with(self.fields.rows(which), self.b[which])

    def double(self) -> FieldBlock:
        """The same in float64."""
        return self._with(self.fields.to(torch.float64), self.b.double())

    def alike(self, other: FactorBlock) -> bool:
        """Whether ``formed`` gives both in one order."""
        return isinstance(other, FieldBlock) and self.fields.alike(other.fields)

    def formed(self, units: list[slice]) -> Iterator[Tensor]:
        """The weight's gradients, some output units and one kernel row at a time, ``(B, …)``."""
        for some in units:
            b = self.b[:, :, some]
            for window in self.fields.windows():
                yield torch.bmm(window, b).flatten(1)

    def _contract_weight(self, w: Tensor) -> Tensor:
        """Products with the weight's part of R directions ``(R, O, I)``, ``(R, B)``.

        ⟨Σ_t b_t a_tᵀ, w⟩ = Σ_t ⟨b_t, w a_t⟩, and w a_t is what the layer would give with the weight
        w: for a row or two that is faster than forming gradients.
        """
        n_rows, n_out, _ = w.shape
        k_h, k_w = self.fields.kernel
        if self._convolves(n_rows):
            b = self.b.transpose(1, 2)
            outputs = [self.fields.convolved(row.view(n_out, -1, k_h, k_w)) for row in w]
            return torch.stack([(output.flatten(2) * b).sum((1, 2)) for output in outputs])
        total = self.b.new_zeros(n_rows, len(self))
        units = self.some_units()
        parts = iter(self.formed(units))
        by_row = w.view(n_rows, n_out, -1, k_h, k_w)
        for some in units:
            for row in range(k_h):
                part = by_row[:, some, :, row].flatten(2).transpose(1, 2)  # (R, C · k, units)
                total.addmm_(part.reshape(n_rows, -1), next(parts).T)
        return total

    def weighted_sum(self, weights: Tensor) -> BlockDirection:
        """Σ_i w_ri g_i for weights ``(R, B)``: few of them as a convolution's own gradient."""
        if not self.weight:
            return super().weighted_sum(weights)
        if not self._convolves(len(weights)):
            return self._sum_of_formed(weights)
        b = self.b.transpose(1, 2)
        rows = [self.fields.weight_gradient(b * w[:, None, None]).flatten(1) for w in weights]
        return BlockDirection(torch.stack(rows), weights @ self.b.sum(1) if self.bias else None)

    def _convolves(self, n_rows: int) -> bool:
        """Whether convolutions with so many directions cost less than the gradients."""
        _, t, n_in, _ = self.sizes
        return n_rows <= FEW_ROWS and n_in > FEW_INPUTS * t

    def _sum_of_formed(self, weights: Tensor) -> BlockDirection:
        n_rows, (k_h, k_w) = len(weights), self.fields.kernel
        units = self.some_units()
        parts, summed = iter(self.formed(units)), []
        for some in units:
            n_units = self.b[:, :, some].shape[2]
            # (R, C · k, units) for each kernel row
            by_row = [(weights @ next(parts)).view(n_rows, -1, k_w, n_units) for _ in range(k_h)]
            summed.append(torch.stack(by_row, 2).permute(0, 4, 1, 2, 3).flatten(2))
        return BlockDirection(torch.cat(summed, 1), weights @ self.b.sum(1) if self.bias else None)

    def _sketched_weight(self, p: Tensor | None, b: Tensor) -> list[Tensor]:
        """The weight's part, without writing the receptive fields out."""
        if p is not None:
            return [torch.bmm(b.mT, self.fields.combined(p)).flatten(1)]
        # few inputs: the fields as windows
        return list(FieldBlock(self.name, self.fields, b, True, False).formed([slice(None)]))

    def _inputs_times(self, factor: float, b: Tensor) -> FieldBlock:
        return self._with(self.fields.times(factor), b)

    def _with(self, fields: Fields, b: Tensor) -> FieldBlock:
        return FieldBlock(self.name, fields, b, self.weight, self.bias)
