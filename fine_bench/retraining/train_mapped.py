"""M networks of any one architecture trained at once, by ``torch.func``."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from fine_bench.types import UnsupportedProblemError


class Masked(nn.Module):
    """Dropout with the mask as an input: a buffer that is set before each step.

    Args:
        p: the share that is dropped.
    """

    kept: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.register_buffer("kept", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """In training, each number zero or divided by 1 − p; else as it is."""
        return x * self.kept if self.training else x


class ModuleStack:
    """M networks of any one architecture.

    The forward pass is mapped over the stacked parameters (``torch.vmap``), and one optimiser over
    the stack is M optimisers, because SGD acts on every number by itself. Batch normalisation takes
    the statistics of each model's own batch in training, and its running ones in ``logits``.
    ``nn.Dropout`` drops by each model's own stream, so that what a model becomes does not depend on
    which others are in the stack.

    Args:
        nets: the initialised networks; they are copied.
        device: where to train.
        momentum, weight_decay: of SGD, as in ``torch.optim.SGD``.
        draws: M CPU generators for dropout; None refuses networks that have it.

    Raises:
        UnsupportedProblemError: a module that has no statistics of its own to be evaluated with,
            or drops at random in a way that is not known here or without ``draws``, or parameters
            shared in two ways at once.
    """

    def __init__(
        self,
        nets: Sequence[nn.Module],
        device: torch.device | str = "cpu",
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        draws: Sequence[torch.Generator] | None = None,
    ) -> None:
        for name, part in nets[0].named_modules():
            if isinstance(part, nn.modules.batchnorm._NormBase) and (
                not isinstance(part, nn.modules.batchnorm._BatchNorm) or part.running_mean is None
            ):
                raise UnsupportedProblemError(
                    f"{name} ({type(part).__name__}) mixes the examples of a batch in evaluation "
                    "too, so a model's output for an example is not its own; use GroupNorm, "
                    "LayerNorm, or batch normalisation with track_running_stats=True"
                )
            if isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0:
                if type(part) is not nn.Dropout:
                    raise UnsupportedProblemError(
                        f"{name} ({type(part).__name__}) draws from the global random state, which "
                        "a stack of models cannot repeat; use nn.Dropout, or set its p to 0"
                    )
                if draws is None:
                    raise UnsupportedProblemError(
                        f"{name} ({type(part).__name__}) draws at random, and this training has no "
                        "stream for it; set its p to 0"
                    )
        self._normalised = next(
            (
                f"{name} ({type(part).__name__})"
                for name, part in nets[0].named_modules()
                if isinstance(part, nn.modules.batchnorm._BatchNorm)
            ),
            "",
        )
        self._net = copy.deepcopy(nets[0]).train()  # its mode is changed
        # functional_call leaves a module that occurs twice broken, unless it ignores ties
        modules = [*nets[0].modules()]
        twice = len([*nets[0].named_modules(remove_duplicate=False)]) > len(modules)
        own = [id(p) for part in modules for p in part.parameters(recurse=False)]
        tied = len(set(own)) < len(own)
        if twice and tied:
            raise UnsupportedProblemError(
                "the network holds the same module twice and another module with the same "
                "parameter; use one of the two ways of sharing"
            )
        self._tie_weights = not twice
        params, buffers = stack_module_state(list(nets))
        self._n_models = len(nets)
        self._params = {
            name: self._laid_out(p.detach().to(device).clone()).requires_grad_(p.requires_grad)
            for name, p in params.items()
        }
        # copies: running statistics are written in place
        self._buffers = {name: b.detach().to(device).clone() for name, b in buffers.items()}
        self._draws = list(draws or ())
        self._masked = _masked(self._net)
        self._shapes: list[torch.Size] | None = None
        self._trained = [p for p in self._params.values() if p.requires_grad]
        self._optimizer = torch.optim.SGD(
            self._trained, lr=1.0, momentum=momentum, weight_decay=weight_decay
        )

    def __len__(self) -> int:
        return self._n_models

    def _call(self, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        logits: Tensor = functional_call(
            self._net, (params, buffers), (x,), tie_weights=self._tie_weights
        )
        return logits

    def _laid_out(self, p: Tensor) -> Tensor:
        """A stacked parameter; of one model on a CPU with the channels of a convolution last, by
        which pooling takes less than half the time.
        """
        if self._n_models > 1 or p.ndim != 5 or p.device.type != "cpu":
            return p
        # a copy: contiguous() would leave kernels of a single channel as they lie
        return p[0].clone(memory_format=torch.channels_last)[None]

    def _each(self, x: Tensor, same: bool) -> Tensor:
        """``(M, m, classes)`` on ``x (M, m, ...)``, or on the ``same`` ``x (m, ...)`` for all."""
        if self._n_models == 1:
            # mapped over, the convolutions of one model are grouped ones, a third slower on a CPU
            params = {name: p[0] for name, p in self._params.items()}
            buffers = {name: b[0] for name, b in self._buffers.items()}
            return self._call(params, buffers, x if same else x[0])[None]
        mapped = torch.vmap(self._call, (0, 0, None if same else 0))
        found: Tensor = mapped(self._params, self._buffers, x)
        return found

    def _drop(self, x: Tensor) -> None:
        """New masks for a batch ``x (M, m, ...)``, each model's from its own stream."""
        if self._shapes is None:
            self._shapes = self._dropped_shapes(x[0, :1])
        like = next(iter(self._params.values()))
        for (name, part), shape in zip(self._masked.items(), self._shapes, strict=True):
            kept = torch.empty(len(x), x.shape[1], *shape, dtype=like.dtype)
            for mask, generator in zip(kept, self._draws, strict=True):
                mask.bernoulli_(1.0 - part.p, generator=generator)
            self._buffers[f"{name}.kept"] = kept.div_(1.0 - part.p).to(like.device)

    def _dropped_shapes(self, x: Tensor) -> list[torch.Size]:
        """The shape of one example's numbers at each dropout, from one pass of a model.

        Raises:
            UnsupportedProblemError: one that is not called once in a pass.
        """
        found: dict[str, list[torch.Size]] = {name: [] for name in self._masked}
        hooks = [
            part.register_forward_hook(
                lambda _, given, __, name=name: found[name].append(given[0].shape[1:])
            )
            for name, part in self._masked.items()
        ]
        device = x.device
        buffers = {name: b[0] for name, b in self._buffers.items()}
        buffers |= {f"{name}.kept": torch.ones((), device=device) for name in self._masked}
        with torch.no_grad():
            self._net.eval()
            try:
                self._call({name: p[0] for name, p in self._params.items()}, buffers, x)
            finally:
                self._net.train()
                for hook in hooks:
                    hook.remove()
        for name, shapes in found.items():
            if len(shapes) != 1:
                raise UnsupportedProblemError(
                    f"{name} (Dropout) is called {len(shapes)} times in a pass, and a stack of "
                    "models draws once for each; give every place a dropout of its own"
                )
        return [shapes[0] for shapes in found.values()]

    def step(self, x: Tensor, y: Tensor, lr: float, weights: Tensor | None = None) -> None:
        """One step of SGD of every model; see ``Stack``.

        Raises:
            UnsupportedProblemError: weights under batch normalisation: an example of weight 0
                would still be in the statistics.
        """
        if weights is not None and self._normalised:
            raise UnsupportedProblemError(
                f"{self._normalised} normalises by its batch, so an example that is left out of "
                "the loss still acts on the others; use group in the place of batch normalisation"
            )
        if self._masked:
            self._drop(x)
        logits = self._each(x, same=False)
        # summed over the models, so that each gets the gradient of its own mean
        if weights is None:
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
            loss = losses @ weights.flatten()
        loss = loss / y.shape[1]
        gradients = torch.autograd.grad(loss, self._trained)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """``(M, c, classes)`` of the same examples under every model."""
        self._net.eval()
        try:
            return self._each(x, same=True)
        finally:
            self._net.train()

    def finite(self) -> Tensor:
        """``(M,)`` boolean: whether all parameters of a model are finite numbers."""
        return torch.stack([p.detach().flatten(1).isfinite().all(1) for p in self._trained]).all(0)

    def parameters(self, k: int) -> dict[str, Tensor]:
        """The parameters of model ``k`` under the names of its network."""
        return {name: p.detach()[k].clone() for name, p in self._params.items()}


def _masked(net: nn.Module) -> dict[str, Masked]:
    """Put ``Masked`` in the place of every dropout of a network; they by their names."""
    found: dict[str, Masked] = {}
    instead: dict[nn.Module, Masked] = {}
    for parent_name, parent in list(net.named_modules()):
        for name, part in list(parent._modules.items()):
            if type(part) is not nn.Dropout or part.p == 0:
                continue
            if part not in instead:  # the same module may stand in several places
                instead[part] = Masked(part.p)
                found[f"{parent_name}.{name}" if parent_name else name] = instead[part]
            setattr(parent, name, instead[part])
    return found
