"""Small networks. A model of the benchmark is one function and one YAML file.

A function takes the shape of one input and the number of classes first, so that a YAML file fits
every data set; the rest are its options. Networks mix the examples of a batch only where they are
asked for batch normalisation: ``bn_cnn``, and ``resnet9`` with ``norm="batch"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

Halving: TypeAlias = Literal["stride", "pool"]
Norm: TypeAlias = Literal["group", "batch"]

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
    dropout: float = 0.0,
) -> nn.Module:
    """Fully connected network on the flattened input; 784-256-10 on MNIST by default. In
    training a share ``dropout`` of each hidden layer's activations is dropped."""
    _positive(hidden, "hidden")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"model.dropout is a share from 0 to below 1, got {dropout}; type model.dropout=0.1"
        )
    sizes = [prod(in_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out, bias=bias), _activation(activation)]
        layers += [nn.Dropout(dropout)] if dropout else []
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


def _normalised(
    n_in: int, n_out: int, kernel: int, stride: int, norm: Norm, groups: int
) -> list[nn.Module]:
    """Convolution and normalisation. The normalisation has the bias."""
    if norm not in get_args(Norm):
        raise ValueError(
            f"model.norm must be {' or '.join(get_args(Norm))}, got {norm!r}; type model.norm=group"
        )
    if norm == "group" and n_out % groups:
        raise ValueError(
            f"model.groups={groups} must divide every number of channels, got {n_out}; "
            "type model.groups=1 or other channels"
        )
    return [
        nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.GroupNorm(groups, n_out) if norm == "group" else nn.BatchNorm2d(n_out),
    ]


def gn_cnn(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    channels: Sequence[int] = (32, 64, 128),
    halving: Sequence[Halving] = ("stride", "pool", "stride"),
    first_kernel: int = 5,
    groups: int = 8,
    activation: str = "relu",
) -> nn.Module:
    """Convolutional network with group normalisation, made for one CPU core and small photographs.

    Per entry of ``channels``: convolution (3×3, the first one larger), group normalisation,
    activation. Each halves the resolution, by a stride of the convolution (cheap) or by 2×2 max
    pooling after it (better, four times the work). Then 2×2 average pooling and one linear layer.
    Group and not batch normalisation: examples of a batch stay independent, so each has a gradient
    of its own.
    """
    return _convolutional(
        in_shape, n_classes, channels, halving, first_kernel, "group", groups, activation
    )


def bn_cnn(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    channels: Sequence[int] = (32, 64, 128),
    halving: Sequence[Halving] = ("stride", "pool", "stride"),
    first_kernel: int = 5,
    activation: str = "relu",
) -> nn.Module:
    """``gn_cnn`` with batch in the place of group normalisation, for comparison."""
    return _convolutional(
        in_shape, n_classes, channels, halving, first_kernel, "batch", 1, activation
    )


def _convolutional(
    in_shape: Sequence[int],
    n_classes: int,
    channels: Sequence[int],
    halving: Sequence[Halving],
    first_kernel: int,
    norm: Norm,
    groups: int,
    activation: str,
) -> nn.Module:
    """What ``gn_cnn`` and ``bn_cnn`` share."""
    _positive([*channels, first_kernel, groups], "channels, first_kernel and groups")
    unknown = [how for how in halving if how not in get_args(Halving)]
    if unknown or len(halving) != len(channels):
        raise ValueError(
            f"model.halving must say stride or pool for each of the {len(channels)} entries of "
            f"model.channels, got {list(halving)}; type model.halving="
            f"[{','.join(['stride'] * len(channels))}]"
        )
    if first_kernel % 2 == 0:
        raise ValueError(
            f"model.first_kernel={first_kernel} must be odd, so that it has a middle; type "
            "model.first_kernel=5"
        )
    n_in, height, width = in_shape
    layers: list[nn.Module] = []
    for number, (n_out, how) in enumerate(zip(channels, halving, strict=True)):
        kernel = 3 if number else first_kernel
        layers += _normalised(n_in, n_out, kernel, 2 if how == "stride" else 1, norm, groups)
        layers.append(_activation(activation))
        if how == "pool":
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
        else:
            height, width = (height + 1) // 2, (width + 1) // 2
        if min(height, width) < 1:
            raise ValueError(
                f"{len(channels)} halvings leave nothing of a {in_shape[1]}×{in_shape[2]} image; "
                "type fewer model.channels and model.halving"
            )
        n_in = n_out
    if min(height, width) > 1:
        layers.append(nn.AvgPool2d(2))
        height, width = height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(n_in * height * width, n_classes)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as ``x``."""
        result: Tensor = x + self.body(x)
        return result


def resnet9(
    in_shape: Sequence[int],
    n_classes: int,
    *,
    width: int = 64,
    groups: int = 8,
    activation: str = "relu",
    norm: Norm = "group",
) -> nn.Module:
    """Residual network of nine layers with group or batch normalisation, for a GPU.

    A convolution, then three stages that double the channels and halve the resolution; the first
    and the third end in a residual block of two convolutions; global max pooling and one linear
    layer. 6.6 million parameters with ``width=64``.
    """
    _positive([width, groups], "width and groups")
    n_in, height, breadth = in_shape
    if min(height, breadth) < 8:
        raise ValueError(
            f"three poolings leave nothing of a {height}×{breadth} image; type model=gn_cnn or mlp"
        )

    def block(n_from: int, n_to: int) -> list[nn.Module]:
        return [*_normalised(n_from, n_to, 3, 1, norm, groups), _activation(activation)]

    def residual(n: int) -> Residual:
        return Residual(*block(n, n), *block(n, n))

    return nn.Sequential(
        *block(n_in, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        residual(2 * width),
        *block(2 * width, 4 * width),
        nn.MaxPool2d(2),
        *block(4 * width, 8 * width),
        nn.MaxPool2d(2),
        residual(8 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, n_classes),
    )
