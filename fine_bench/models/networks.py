"""Small networks. A model of the benchmark is one function and one YAML file.

A function takes the shape of one input and the number of classes first, so that a YAML file fits
every data set; the rest are its options. No network mixes the examples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def _activation(name: str) -> nn.Module:
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}; "
            "type model.activation=relu"
        )
    return _ACTIVATIONS[name]()


def _positive(sizes: Sequence[int], name: str) -> None:
    if any(size < 1 for size in sizes):
        raise ValueError(f"model.{name} must be positive numbers, got {list(sizes)}")


def mlp(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    hidden: Sequence[int] = (256,),
    activation: str = "relu",
    bias: bool = True,
) -> nn.Module:
    """Fully connected network on the flattened input; 784-256-10 on MNIST by default."""
    _positive(hidden, "hidden")
    sizes = [prod(in_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=bias), _activation(activation)]
    layers.append(nn.Linear(sizes[-1], n_classes, bias=bias))
    return nn.Sequential(*layers)


def cnn(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    channels: Sequence[int] = (16, 32),
    hidden: int = 64,
    activation: str = "relu",
) -> nn.Module:
    """Small convolutional network: (3×3 convolution, activation, 2×2 pooling) per entry of
    ``channels``, one hidden layer, no normalisation."""
    _positive([*channels, hidden], "channels")
    n_in, height, width = in_shape
    if min(height, width) >> len(channels) < 1:
        raise ValueError(
            f"{len(channels)} poolings leave nothing of a {height}×{width} image; "
            "type model.channels=[16]"
        )
    layers: list[nn.Module] = []
    for n_out in channels:
        layers += [nn.Conv2d(n_in, n_out, 3, padding=1), _activation(activation), nn.MaxPool2d(2)]
        n_in, height, width = n_out, height // 2, width // 2
    layers += [
        nn.Flatten(),
        nn.Linear(n_in * height * width, hidden),
        _activation(activation),
        nn.Linear(hidden, n_classes),
    ]
    return nn.Sequential(*layers)
