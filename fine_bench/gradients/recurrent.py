"""Recurrent layers written out step by step, where their fused form knows no ``torch.func``.

PyTorch runs ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` in one operation that cannot be mapped over
examples and has no forward derivatives. Written out (the equations of PyTorch's documentation),

    RNN     h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh)
    GRU     r, z = σ(…), n = tanh(W_in x + b_in + r ∘ (W_hn h + b_hn)), h' = (1 − z) ∘ n + z ∘ h
    LSTM    i, f, o = σ(…), g = tanh(…), c' = f ∘ c + i ∘ g, h' = W_hr (o ∘ tanh c')

they are ordinary operations, with the same result up to rounding.

Shapes: T steps, B examples, D inputs, H hidden numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def unrolled_recurrence(model: nn.Module) -> Iterator[None]:
    """Within, the model's recurrent layers run written out."""
    kinds = (nn.RNN, nn.GRU, nn.LSTM)
    found = [m for m in model.modules() if type(m) in kinds and "forward" not in m.__dict__]
    for layer in found:
        layer.__dict__["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in found:
            del layer.__dict__["forward"]


def _forward(layer: Any, x: Any, hx: Any = None) -> Any:
    """The layer's output and its last states, as the layer gives them."""
    random = layer.dropout > 0 and layer.training and layer.num_layers > 1
    if not isinstance(x, Tensor) or random:  # packed sequences have batches of different sizes
        return type(layer).forward(layer, x, hx)
    alone = x.ndim == 2
    if alone:
        x = x[:, None]
        hx = None if hx is None else _each(hx, lambda h: h[:, None])
    elif layer.batch_first:
        x = x.transpose(0, 1)
    n_directions = 2 if layer.bidirectional else 1
    before = _states(layer, x, hx, n_directions)
    ends: list[tuple[Tensor, ...]] = []
    for level in range(layer.num_layers):
        outputs = []
        for direction in range(n_directions):
            first = before[len(ends)]
            out, last = _run(layer, level, x, first, backwards=direction == 1)
            outputs.append(out)
            ends.append(last)
        x = torch.cat(outputs, -1)
    last_states = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
    if alone:
        x, last_states = x[:, 0], tuple(h[:, 0] for h in last_states)
    elif layer.batch_first:
        x = x.transpose(0, 1)
    return x, last_states if isinstance(layer, nn.LSTM) else last_states[0]


def _each(states: Any, function: Any) -> Any:
    return tuple(map(function, states)) if isinstance(states, tuple) else function(states)


def _states(layer: Any, x: Tensor, hx: Any, n_directions: int) -> list[tuple[Tensor, ...]]:
    """The first states of every level and direction, ``(B, H)`` each."""
    count = layer.num_layers * n_directions
    if hx is None:
        width = getattr(layer, "proj_size", 0) or layer.hidden_size
        zeros = x.new_zeros(count, x.shape[1], width)
        hx = zeros
        if isinstance(layer, nn.LSTM):
            hx = (zeros, x.new_zeros(count, x.shape[1], layer.hidden_size))
    if not isinstance(hx, tuple):
        hx = (hx,)
    return [tuple(h[k] for h in hx) for k in range(count)]


def _run(
    layer: Any, level: int, x: Tensor, states: tuple[Tensor, ...], *, backwards: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One level in one direction: outputs ``(T, B, ·)`` and the last states."""
    suffix = f"_l{level}" + ("_reverse" if backwards else "")

    def part(name: str) -> Any:
        return getattr(layer, name + suffix, None)

    inputs = F.linear(x, part("weight_ih"), part("bias_ih"))  # of all steps
    w, b, projection = part("weight_hh"), part("bias_hh"), part("weight_hr")
    steps = range(len(x) - 1, -1, -1) if backwards else range(len(x))
    outputs: list[Tensor] = []
    for t in steps:
        states = _step(layer, inputs[t], F.linear(states[0], w, b), states, projection)
        outputs.append(states[0])
    if backwards:
        outputs.reverse()
    return torch.stack(outputs), states


def _step(
    layer: Any, x: Tensor, h: Tensor, states: tuple[Tensor, ...], projection: Tensor | None
) -> tuple[Tensor, ...]:
    """The next states from what input and last state contribute."""
    if isinstance(layer, nn.LSTM):
        i, f, g, o = (x + h).chunk(4, -1)
        cell = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        return hidden if projection is None else F.linear(hidden, projection), cell
    if isinstance(layer, nn.GRU):
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        new = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return ((1 - z) * new + z * states[0],)
    total = x + h
    return (torch.tanh(total) if layer.nonlinearity == "tanh" else torch.relu(total),)
