"""A small transformer, for sequences of tokens and for images read row by row.

Attention is built from linear layers, and places are an embedding table with one row of places an
example, so that every parameter has per-example gradients that can be read off a pass.

Shapes: B examples, T positions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Self-attention over all positions.

    Args:
        width: D.
        heads: into how many parts of equal size D is split.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        n, t, d = x.shape
        q, k, v = self.inputs(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / math.sqrt(d // self.heads), -1)
        result: Tensor = self.output((weights @ v).transpose(1, 2).reshape(n, t, d))
        return result


class Layer(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut.

    Args:
        width, heads: see ``Attention``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.inner = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, D)`` to ``(B, T, D)``."""
        x = x + self.attention(self.first(x))
        result: Tensor = x + self.inner(self.second(x))
        return result


class Transformer(nn.Module):
    """Logits of a class from the mean over positions.

    Args:
        embed: makes ``(B, T, D)`` of the model's input.
        length: largest T.
        n_classes: number of logits.
        width, heads: see ``Attention``.
        depth: number of layers.
    """

    def __init__(
        self, embed: nn.Module, length: int, n_classes: int, width: int, heads: int, depth: int
    ) -> None:
        super().__init__()
        self.embed = embed
        self.places = nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.last = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, ``(B, n_classes)``."""
        h = self.embed(x)
        # one row of places an example: then their table has per-example gradients too
        places = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        logits: Tensor = self.last(self.layers(h + self.places(places)).mean(1))
        return logits


class Rows(nn.Module):
    """The rows of an image as a sequence: ``(B, C, H, W)`` to ``(B, H, C · W)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Row h of all channels, side by side."""
        return x.transpose(1, 2).flatten(2)


def token_transformer(
    n_tokens: int,
    length: int,
    n_classes: int,
    *,
    width: int = 64,
    heads: int = 4,
    depth: int = 4,
) -> nn.Module:
    """A transformer on tokens ``(B, T)``, T ≤ ``length``, of a vocabulary of ``n_tokens``."""
    return Transformer(nn.Embedding(n_tokens, width), length, n_classes, width, heads, depth)


def row_transformer(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    width: int = 64,
    heads: int = 4,
    depth: int = 4,
) -> nn.Module:
    """A transformer on images, whose tokens are their rows: 28 of 28 numbers on MNIST.

    Raises:
        ValueError: a size below one, or a width that the heads cannot share.
    """
    for name, size in (("width", width), ("heads", heads), ("depth", depth)):
        if size < 1:
            raise ValueError(f"model.{name} must be a positive number, got {size}")
    if width % heads:
        raise ValueError(
            f"model.heads={heads} must divide model.width, got {width}; type model.heads=1"
        )
    channels, height, columns = in_shape
    embed = nn.Sequential(Rows(), nn.Linear(channels * columns, width))
    return Transformer(embed, height, n_classes, width, heads, depth)
