"""Comparison of tensors, and gradients taken the slow way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def close(a: Tensor, b: Any, tolerance: float = 1e-10) -> None:
    """Equal in shape, and in values up to ``tolerance`` times the largest entry of ``b``."""
    b = torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape
    assert float((a.double() - b).abs().max()) <= tolerance * float(b.abs().max())


def observable_gradients(
    net: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, observable: str
) -> Tensor:
    """∇ of each example's observable, (n, P), by differentiating the observable itself."""
    net = net.double()

    def one(values: dict[str, Tensor], xi: Tensor, yi: Tensor) -> Tensor:
        log_p = F.log_softmax(functional_call(net, values, (xi[None],)), 1)[0]
        if observable == "loss":
            return -log_p.gather(0, yi[None])[0]
        p = log_p.exp().gather(0, yi[None])[0]
        return -(p / (1 - p)).log()

    grads = vmap(grad(one), in_dims=(None, 0, 0))(params, x.double(), y)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)
