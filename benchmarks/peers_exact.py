"""The exact answers of ``benchmarks/peers.py``: float64, written from the formulas alone.

Nothing of ``fine_bench`` or of any package compared is used: per-example gradients come from
``torch.func``, one parameter tensor at a time, and are kept in full. Small problems only.

Shapes: n training examples, V queries, P parameters, O outputs and I inputs of a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

Gradients = dict[str, Tensor]
Score = Callable[[Tensor, Tensor], Tensor]
CHUNK = 50


def log_loss(logits: Tensor, y: Tensor) -> Tensor:
    """−log p of the label, for one example: logits ``(classes,)``."""
    return torch.logsumexp(logits, 0) - _at(logits, y)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """log(p/(1−p)) of the label, for one example."""
    others = torch.where(torch.arange(len(logits)) == y, -torch.inf, logits)
    return _at(logits, y) - torch.logsumexp(others, 0)


def _at(logits: Tensor, y: Tensor) -> Tensor:
    # a sum, because vmap cannot index by a batch of labels
    return torch.where(torch.arange(len(logits)) == y, logits, 0.0).sum()


def per_example(model: nn.Module, x: Tensor, y: Tensor, score: Score = log_loss) -> Gradients:
    """Gradients of ``score`` by parameter name, ``(n, *shape)`` float64."""
    parts = list(_chunks(model, x, y, score))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _chunks(model: nn.Module, x: Tensor, y: Tensor, score: Score) -> Iterator[Gradients]:
    net = copy.deepcopy(model).double().eval()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def one(values: Gradients, xi: Tensor, yi: Tensor) -> Tensor:
        return score(functional_call(net, values, (xi[None],))[0], yi)

    gradient = vmap(grad(one), in_dims=(None, 0, 0))
    for start in range(0, len(y), CHUNK):
        rows = slice(start, start + CHUNK)
        yield gradient(params, x[rows].double(), y[rows])


def flat(gradients: Gradients) -> Tensor:
    """``(n, P)``, in the order of ``model.named_parameters()``."""
    return torch.cat([g.flatten(1) for g in gradients.values()], 1)


def mean_square(gradients: Gradients) -> float:
    """Mean eigenvalue of the empirical Fisher, mean_i ‖g_i‖² / P."""
    rows = flat(gradients)
    return float(rows.square().sum() / rows.numel())


def tracin(queries: Gradients, train: Gradients, lr: float) -> Tensor:
    """lr ⟨g_q, g_i⟩, ``(V, n)``."""
    return lr * flat(queries) @ flat(train).T


def tracin_self(train: Gradients, lr: float) -> Tensor:
    """lr ⟨g_i, g_i⟩, ``(1, n)``."""
    return lr * flat(train).square().sum(1)[None]


def trak(queries: Tensor, train: Tensor, one_minus_p: Tensor) -> Tensor:
    """φ_qᵀ (ΦᵀΦ)⁻¹ φ_i (1 − p_i) from features φ, ``(V, n)``."""
    train, queries = train.double(), queries.double()
    return queries @ torch.linalg.solve(train.T @ train, train.T) * one_minus_p


def one_minus_p(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """1 − p of the label, ``(n,)``."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(x.double())
    return 1 - torch.softmax(logits, 1)[torch.arange(len(y)), y]


class EKFAC:
    """EK-FAC of every Linear and Conv2d layer, [W|b] as one block.

    Args:
        model: at the checkpoint.
        x, y: training examples.
        empirical: roots are the gradients of the given labels; otherwise √p_k ∇(−log p_k) for
            every class k, the model's own Fisher without sampling.
        damping: λ, added to every eigenvalue.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, empirical: bool, damping: float
    ) -> None:
        net = copy.deepcopy(model).double().eval()
        self.damping = damping
        self.layers = {
            name: layer
            for name, layer in net.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        with torch.no_grad():
            p = torch.softmax(net(x.double()), 1)
        classes = p.shape[1]
        self.bases = self._bases(net, x.double(), y, p, empirical)
        self.eigenvalues: dict[str, Tensor] = {}
        labels = [y] if empirical else [torch.full_like(y, k) for k in range(classes)]
        for k, label in enumerate(labels):
            weights = torch.ones(len(y)).double() if empirical else p[:, k]
            done = 0
            for chunk in _chunks(model, x, label, log_loss):
                for name in self.layers:
                    g = self._rotate(name, self._matrix(name, chunk))
                    w = weights[done : done + len(g), None, None]
                    term = (w * g.square()).sum(0) / len(y)
                    self.eigenvalues[name] = self.eigenvalues.get(name, 0) + term
                done += len(g)

    def _bases(
        self, net: nn.Module, x: Tensor, y: Tensor, p: Tensor, empirical: bool
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Eigenvectors (Q_G, Q_A) of a layer's second moments of output gradients and inputs."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                seen[name] = (inputs[0].detach(), output)

            return hook

        handles = [m.register_forward_hook(keep(name)) for name, m in self.layers.items()]
        inner: dict[str, Tensor] = {}
        outer: dict[str, Tensor] = {}
        for start in range(0, len(y), CHUNK):
            rows = slice(start, start + CHUNK)
            log_p = torch.log_softmax(net(x[rows]), 1)
            outputs = [seen[name][1] for name in self.layers]
            classes = range(1) if empirical else range(p.shape[1])
            for k in classes:
                label = y[rows] if empirical else torch.full_like(y[rows], k)
                loss = -log_p[torch.arange(len(label)), label]
                weight = torch.ones_like(loss) if empirical else p[rows, k]
                gradients = torch.autograd.grad(loss.sum(), outputs, retain_graph=True)
                for name, b in zip(self.layers, gradients, strict=True):
                    root = b * weight.sqrt().view(-1, *[1] * (b.ndim - 1))
                    root = root.movedim(1, -1).flatten(0, -2)
                    outer[name] = outer.get(name, 0) + root.T @ root
            for name, layer in self.layers.items():
                a = seen[name][0]
                if isinstance(layer, nn.Conv2d):
                    a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                    a = a.transpose(1, 2).flatten(0, 1)
                if layer.bias is not None:
                    a = torch.cat([a, torch.ones(len(a), 1).double()], 1)
                inner[name] = inner.get(name, 0) + a.T @ a
        for handle in handles:
            handle.remove()
        return {
            name: (torch.linalg.eigh(outer[name])[1], torch.linalg.eigh(inner[name])[1])
            for name in self.layers
        }

    def _matrix(self, name: str, gradients: Gradients) -> Tensor:
        """[W|b], ``(n, O, I)``."""
        parts = [gradients[f"{name}.weight"].flatten(2)]
        if f"{name}.bias" in gradients:
            parts.append(gradients[f"{name}.bias"][:, :, None])
        return torch.cat(parts, 2)

    def _rotate(self, name: str, matrix: Tensor) -> Tensor:
        q_out, q_in = self.bases[name]
        return q_out.T @ matrix @ q_in

    def pairwise(self, queries: Gradients, train: Gradients) -> Tensor:
        """g_qᵀ (C + λ)⁻¹ g_i, ``(V, n)``."""
        total: Tensor | float = 0.0
        for name in self.layers:
            left = self._rotate(name, self._matrix(name, queries))
            left = left / (self.eigenvalues[name] + self.damping)
            right = self._rotate(name, self._matrix(name, train))
            total = total + left.flatten(1) @ right.flatten(1).T
        assert isinstance(total, Tensor)
        return total

    def self_influence(self, train: Gradients) -> Tensor:
        """g_iᵀ (C + λ)⁻¹ g_i, ``(1, n)``."""
        total: Tensor | float = 0.0
        for name in self.layers:
            g = self._rotate(name, self._matrix(name, train))
            total = total + (g.square() / (self.eigenvalues[name] + self.damping)).sum((1, 2))
        assert isinstance(total, Tensor)
        return total[None]
