"""M fully connected networks (``is_dense``) trained at once, by batched matrix products.

The weights of layer l of all models are one array W (M, in, out), a batch is x (M, m, in), each
model with examples of its own. For softmax cross-entropy, the mean over the batch,

    forward    a₀ = x,  s_l = a_l W_l + b_l,  a_{l+1} = act(s_l),  p = softmax(s_last)
    backward   δ_last = p − onehot(y),  δ_{l−1} = (δ_l W_lᵀ) ⊙ act'(s_{l−1})
    update     W_l ← (1 − lr·decay) W_l − (lr/m) a_lᵀ δ_l,   b_l likewise with a row of ones for a_l

The update is one product that accumulates into the weights, so no gradient is ever written out.
With momentum the product accumulates into the velocity instead. All intermediate arrays are made
once and written in place: what is left besides the products is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fine_bench.gradients.batch_products import ACTIVATIONS

_aten: Any = torch.ops.aten


class _Trained:
    """One parameter of all models, ``(M, rows, out)``, with what SGD keeps of it."""

    def __init__(self, value: Tensor, momentum: float, weight_decay: float) -> None:
        self.value = value.contiguous()
        self.momentum, self.weight_decay = momentum, weight_decay
        # from zero, so that the first velocity is the gradient itself, as in torch.optim.SGD
        self.velocity = torch.zeros_like(self.value) if momentum else None

    def update(self, left: Tensor, right: Tensor, lr: float, m: int) -> None:
        """SGD with the gradient ``left @ right / m``."""
        if self.velocity is None:
            beta = 1.0 - lr * self.weight_decay
            self.value.baddbmm_(left, right, beta=beta, alpha=-lr / m)
            return
        self.velocity.baddbmm_(left, right, beta=self.momentum, alpha=1.0 / m)
        if self.weight_decay:
            self.velocity.add_(self.value, alpha=self.weight_decay)
        self.value.add_(self.velocity, alpha=-lr)


class _Work:
    """Arrays for one batch size: pre-activations, outputs and errors of every layer."""

    def __init__(self, weights: Sequence[_Trained], m: int, keep_input: bool) -> None:
        first = weights[0].value
        self.ones = first.new_ones(len(first), 1, m)
        self.minus = first.new_full((len(first), m, 1), -1.0)
        self.pre = [first.new_empty(len(first), m, w.value.shape[2]) for w in weights]
        # ReLU and tanh know their derivative from their output and may overwrite their input
        self.out = [torch.empty_like(s) if keep_input else s for s in self.pre]
        self.delta = [torch.empty_like(s) for s in self.pre[:-1]]


class DenseStack:
    """M networks of one architecture; see the module's text.

    Args:
        nets: the initialised networks; they are copied.
        device: where to train.
        momentum, weight_decay: of SGD, as in ``torch.optim.SGD``.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        device: torch.device | str = "cpu",
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        layers = [[part for part in net.modules() if isinstance(part, nn.Linear)] for net in nets]
        self._names = [
            name for name, part in nets[0].named_modules() if isinstance(part, nn.Linear)
        ]

        def trained(values: Sequence[Tensor]) -> _Trained:
            return _Trained(torch.stack([*values]).detach().to(device), momentum, weight_decay)

        self._weights: list[_Trained] = []
        self._biases: list[_Trained | None] = []
        for same in zip(*layers, strict=True):
            self._weights.append(trained([part.weight.t() for part in same]))
            has_bias = same[0].bias is not None
            self._biases.append(trained([part.bias[None] for part in same]) if has_bias else None)
        self._activation = next((p for p in nets[0].modules() if isinstance(p, ACTIVATIONS)), None)
        self._work: dict[int, _Work] = {}

    def __len__(self) -> int:
        return len(self._weights[0].value)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, lr: float, weights: Tensor | None = None) -> None:
        """One step of SGD of every model.

        Args:
            x: ``(M, m, ...)``, contiguous.
            y: ``(M, m)`` int64.
            lr: step size of this step.
            weights: ``(M, m)`` of the examples' losses in the sum that is divided by m; None
                for 1.
        """
        m = y.shape[1]
        if m not in self._work:
            self._work[m] = _Work(self._weights, m, isinstance(self._activation, nn.GELU))
        work = self._work[m]
        inputs = [x.flatten(2), *work.out[:-1]]
        last = len(self._weights) - 1
        for layer, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            if bias is None:
                torch.bmm(inputs[layer], weight.value, out=work.pre[layer])
            else:
                torch.baddbmm(bias.value, inputs[layer], weight.value, out=work.pre[layer])
            if layer < last:
                self._activate(work.pre[layer], work.out[layer])
        delta = work.pre[last]
        torch.softmax(delta, -1, out=delta)
        delta.scatter_add_(2, y.unsqueeze(2), work.minus)
        if weights is not None:
            delta *= weights.unsqueeze(2)
        for layer in range(last, -1, -1):
            weight, bias, error = self._weights[layer], self._biases[layer], delta
            if layer > 0:  # before the update: the error passes through the old weights
                delta = work.delta[layer - 1]
                torch.bmm(error, weight.value.transpose(1, 2), out=delta)
                self._differentiate(delta, work.pre[layer - 1], work.out[layer - 1])
            weight.update(inputs[layer].transpose(1, 2), error, lr, m)
            if bias is not None:
                bias.update(work.ones, error, lr, m)

    def _activate(self, pre: Tensor, out: Tensor) -> None:
        if isinstance(self._activation, nn.ReLU):
            out.clamp_min_(0)
        elif isinstance(self._activation, nn.Tanh):
            out.tanh_()
        else:
            assert isinstance(self._activation, nn.GELU)
            _aten.gelu.out(pre, approximate=self._activation.approximate, out=out)

    def _differentiate(self, delta: Tensor, pre: Tensor, out: Tensor) -> None:
        """``delta ⊙= act'``."""
        if isinstance(self._activation, nn.ReLU):
            _aten.threshold_backward.grad_input(delta, out, 0, grad_input=delta)
        elif isinstance(self._activation, nn.Tanh):
            _aten.tanh_backward.grad_input(delta, out, grad_input=delta)
        else:
            assert isinstance(self._activation, nn.GELU)
            approximate = self._activation.approximate
            _aten.gelu_backward.grad_input(delta, pre, approximate=approximate, grad_input=delta)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """``(M, c, classes)`` of the same examples ``x (c, ...)`` under every model."""
        a = x.flatten(1).expand(len(self), -1, -1)
        last = len(self._weights) - 1
        for layer, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            pre = torch.bmm(a, weight.value)
            if bias is not None:
                pre += bias.value
            if layer < last:
                a = torch.empty_like(pre) if isinstance(self._activation, nn.GELU) else pre
                self._activate(pre, a)
        return pre

    def finite(self) -> Tensor:
        """``(M,)`` boolean: whether all parameters of a model are finite numbers."""
        every = [p.value for p in (*self._weights, *self._biases) if p is not None]
        return torch.stack([value.flatten(1).isfinite().all(1) for value in every]).all(0)

    def parameters(self, k: int) -> dict[str, Tensor]:
        """The parameters of model ``k`` under the names and in the shapes of its network."""
        found: dict[str, Tensor] = {}
        for name, weight, bias in zip(self._names, self._weights, self._biases, strict=True):
            found[f"{name}.weight"] = weight.value[k].t().clone()
            if bias is not None:
                found[f"{name}.bias"] = bias.value[k, 0].clone()
        return found
