"""Gradients of each example from one application of something with parameters, done once more.

What a pass holds of an application of f are its inputs, the parameters θ and the gradient δ at its
output. If row i of the output depends on row i of the inputs alone, the example's gradient in θ is

    ∂⟨f(θ; x_i), δ_i⟩/∂θ,

f applied to the example by itself: for all examples at once by ``torch.func``, or one after the
other where that cannot map f. That the outputs are those of the pass is looked at every time, so
random operations and whatever mixes examples do not go unnoticed.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from fine_bench.gradients.layout import other_order

Values: TypeAlias = dict[str, Tensor]
Dims: TypeAlias = Sequence[int | None]
"""For each input its dimension of the examples; None where all examples share it."""

Shapes: TypeAlias = tuple[torch.Size | None, ...]
"""Of the tensors among inputs or outputs; None for what is none."""

FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError)
"""What operations raise that cannot be applied in some way."""


class NoRuleError(Exception):
    """The gradients do not follow from the application; with why."""


class Application:
    """One application, as a pass leaves it.

    Args:
        function: ``function(θ by name, args, kwargs)``, what is applied.
        args, kwargs: its inputs.
        output: what came out, a tensor or a nest of them.
        output_dim: where an output has the examples, by its place in the nest, where nobody looks.
    """

    def __init__(
        self,
        function: Callable[[Values, Any, Any], Any],
        args: Any,
        kwargs: Any,
        output: Any,
        output_dim: Callable[[int], int] = lambda place: 0,
    ) -> None:
        self.function = function
        self.output_dim = output_dim
        leaves, self._spec = tree_flatten((args, kwargs))
        self.leaves: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self._outputs: dict[int, tuple[Tensor, int]] = {}
        self._grads: dict[int, Tensor] = {}
        for place, out in enumerate(tree_flatten(output)[0]):
            if isinstance(out, Tensor) and out.requires_grad:
                self._outputs[place] = out.detach(), out._version
                out.register_hook(self._keeper(place))  # type: ignore[no-untyped-call]

    def _keeper(self, place: int) -> Callable[[Tensor], None]:
        def keep(grad: Tensor) -> None:
            self._grads[place] = grad.detach()

        return keep

    @property
    def shapes(self) -> Shapes:
        """Of the inputs."""
        return shapes_of(self.leaves)

    @property
    def reached(self) -> bool:
        """Whether the loss depends on what came out."""
        return bool(self._grads)

    def gradients(
        self,
        values: Values,
        inputs: Dims,
        rows: Collection[str] = (),
        outputs: Dims | None = None,
        *,
        one_by_one: bool = False,
    ) -> Values:
        """``(B, *shape)`` for each parameter.

        Args:
            values: θ by name.
            inputs: see ``Dims``, for ``leaves``.
            rows: names of what has a row for each example, and so gradients ``(B, …)`` of rows.
            outputs: where the outputs have the examples; by default where ``output_dim`` says.
            one_by_one: one example after the other.

        Raises:
            NoRuleError: an example by itself gives another output, or none.
        """
        places = sorted(self._grads)
        dims = [self._output_dim(place, outputs) for place in places]
        precision = max((p.dtype for p in values.values()), key=lambda d: torch.finfo(d).bits)
        leaves = [_wide(leaf, precision) for leaf in self.leaves]
        where = {k: dim for k, dim in enumerate(inputs) if dim is not None}
        xs = [leaves[k].movedim(dim, 0) for k, dim in where.items()]
        deltas = [
            _wide(self._grads[place].movedim(dim, 0), precision)
            for place, dim in zip(places, dims, strict=True)
        ]

        def one(theta: Values, xi: Sequence[Tensor], di: Sequence[Tensor]) -> tuple[Tensor, Any]:
            given = list(leaves)
            for (k, dim), x in zip(where.items(), xi, strict=True):
                given[k] = x.unsqueeze(dim)
            args, kwargs = tree_unflatten(given, self._spec)
            alone = {k: p[None] if k in rows else p for k, p in theta.items()}
            found = tree_flatten(self.function(alone, args, kwargs))[0]
            outs = [found[p].movedim(dim, 0)[0] for p, dim in zip(places, dims, strict=True)]
            terms = [(out * d).sum() for out, d in zip(outs, di, strict=True)]
            return torch.stack(terms).sum(), outs

        try:
            if one_by_one:
                result, outs = _looped(one, values, rows, xs, deltas)
            else:
                by_name = {name: 0 if name in rows else None for name in values}
                gradient = vmap(grad(one, has_aux=True), in_dims=(by_name, 0, 0))
                result, outs = gradient(values, xs, deltas)
        except FAILURES as error:
            raise NoRuleError(str(error).split("\n")[0]) from error
        for place, out, dim in zip(places, outs, dims, strict=True):
            self._compare(place, out, dim)
        return {name: value.detach() for name, value in result.items()}

    def _output_dim(self, place: int, outputs: Dims | None) -> int:
        dim = self.output_dim(place) if outputs is None else outputs[place]
        if dim is None:
            raise NoRuleError("its output is the same for all examples")
        return dim

    def _compare(self, place: int, out: Tensor, dim: int) -> None:
        """Refuse another output than that of the pass."""
        expected, version = self._outputs[place]
        if expected._version != version:
            return  # it was written into since
        expected = expected.movedim(dim, 0)
        if out.shape != expected.shape:
            raise NoRuleError(
                f"one example alone gives an output of shape {tuple(out.shape[1:])}, the batch "
                f"one of {tuple(expected.shape)}"
            )
        eps = max(torch.finfo(expected.dtype).eps, torch.finfo(out.dtype).eps)
        if not expected.numel():
            return
        low, high = expected.aminmax()
        size = max(-float(low), float(high))
        if not isfinite(size):
            return  # such a step is left out and reported
        low, high = (out - expected).aminmax()
        if not max(-float(low), float(high)) <= eps**0.5 * size:
            raise NoRuleError(
                "an example by itself gives another output than in its batch: there are random "
                "operations, or some that mix examples"
            )


def _wide(leaf: Any, precision: torch.dtype) -> Any:
    """In the precision of the parameters where its own is lower (mixed precision)."""
    if isinstance(leaf, Tensor) and leaf.dtype in (torch.bfloat16, torch.float16):
        return leaf.to(precision)
    return leaf


def _looped(
    one: Callable[..., tuple[Tensor, Any]],
    values: Mapping[str, Tensor],
    rows: Collection[str],
    xs: Sequence[Tensor],
    deltas: Sequence[Tensor],
) -> tuple[Values, list[Tensor]]:
    """What ``vmap(grad(one, has_aux=True))`` gives."""
    found: list[tuple[Tensor, ...]] = []
    outs: list[list[Tensor]] = []
    for i in range(len(deltas[0])):
        theta = {
            name: (value[i] if name in rows else value).detach().requires_grad_()
            for name, value in values.items()
        }
        with torch.enable_grad():
            total, out = one(theta, [x[i] for x in xs], [d[i] for d in deltas])
            found.append(
                torch.autograd.grad(
                    total, list(theta.values()), allow_unused=True, materialize_grads=True
                )
            )
        outs.append([part.detach() for part in out])
    stacked = [torch.stack(part) for part in zip(*found, strict=True)]
    return dict(zip(values, stacked, strict=True)), [
        torch.stack(part) for part in zip(*outs, strict=True)
    ]


def each_example(
    mapped: Callable[[], Values],
    alone: Callable[[int, Values], Tensor],
    values: Values,
    cotangents: Tensor,
) -> Values:
    """Gradients of all examples by ``torch.func``, or in a loop where that cannot map a model.

    Args:
        mapped: gives them at once, ``(M, B, *shape)`` for M cotangents.
        alone: the output for one example, of other values of the parameters.
        values: the parameters, by name.
        cotangents: at the outputs, ``(M, B, …)``.

    Raises:
        Exception: whatever ``alone`` raises; random operations are left to ``mapped`` alone, since
            a loop would draw anew.
    """
    try:
        return mapped()
    except FAILURES as error:
        if "random" in str(error):
            raise
    rows: list[Values] = []
    for i, vectors in enumerate(cotangents.unbind(1)):
        with torch.enable_grad():
            theta = {name: value.detach().requires_grad_() for name, value in values.items()}
            out = alone(i, theta)
            found = [
                torch.autograd.grad(
                    out,
                    list(theta.values()),
                    vector.reshape(out.shape),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                for vector in vectors
            ]
        rows.append(dict(zip(theta, map(torch.stack, zip(*found, strict=True)), strict=True)))
    return {name: torch.stack([row[name] for row in rows], 1) for name in values}


@dataclass(eq=False)
class Seen:
    """The shapes of an application in a pass that looks where the examples are.

    Attributes:
        values: its inputs, held until they are compared with those of the other pass.
    """

    inputs: Shapes
    outputs: Shapes
    values: Sequence[Any] = ()

    @classmethod
    def of(cls, inputs: Any, output: Any) -> Seen:
        """Of an application."""
        leaves = tree_flatten(inputs)[0]
        values = [x.detach() if isinstance(x, Tensor) else None for x in leaves]
        return cls(shapes_of(leaves), shapes_of(tree_flatten(output)[0]), values)

    def reordered(self, other: Seen, sizes: tuple[int, int]) -> bool:
        """Whether an input has the examples in another order than the batch.

        Args:
            other: the same application in a pass over the batch's first examples.
            sizes: numbers of examples.
        """
        for a, b in zip(self.values, other.values, strict=False):
            if a is None or b is None or a.ndim != b.ndim:
                continue
            dim = _moved(a.shape, b.shape, sizes)
            if dim in (None, -1):
                continue
            first, second = (x.movedim(dim, 0).flatten(1) for x in (a[..., None], b[..., None]))
            if other_order(first, second):
                return True
        return False


@dataclass(frozen=True)
class Places:
    """Where an application's inputs and outputs have the examples; −1 where that is not clear.

    Attributes:
        ranks: the inputs' numbers of dimensions, by which the application is known again.
    """

    inputs: Dims
    outputs: Dims
    ranks: tuple[int | None, ...]

    @classmethod
    def of(cls, first: Seen, second: Seen, sizes: tuple[int, int]) -> Places | None:
        """From passes over two numbers of examples; None where they are not of one application."""
        same = [ranks_of(first.inputs) == ranks_of(second.inputs)]
        same.append(ranks_of(first.outputs) == ranks_of(second.outputs))
        if not all(same):
            return None
        return cls(
            [_moved(a, b, sizes) for a, b in zip(first.inputs, second.inputs, strict=True)],
            [_moved(a, b, sizes) for a, b in zip(first.outputs, second.outputs, strict=True)],
            ranks_of(first.inputs),
        )

    @property
    def clear(self) -> bool:
        """Whether it is clear where the examples are."""
        return -1 not in self.inputs and -1 not in self.outputs and set(self.inputs) != {None}


def matching(
    places: Sequence[Places | None] | None, found: Sequence[Application], batch_size: int
) -> Sequence[Places | None]:
    """The places of some applications; None for all where shapes have to tell.

    Args:
        places: of what was looked at; None if nobody has looked.
        found: the applications of a pass.
        batch_size: B.

    Raises:
        NoRuleError: they are not what was looked at, and shapes do not tell.
    """
    unknown = [None] * len(found)
    if places is None:
        return unknown
    ranks = [ranks_of(application.shapes) for application in found]
    if [None if place is None else place.ranks for place in places] == ranks:
        return places
    shapes = [shape for application in found for shape in application.shapes if shape]
    if any(list(shape).count(batch_size) > 1 for shape in shapes):
        raise NoRuleError(
            f"an input has {batch_size} numbers in several dimensions, any of which could be the "
            "examples, and a look at fewer examples did not tell"
        )
    return unknown


def shapes_of(leaves: Sequence[Any]) -> Shapes:
    """See ``Shapes``."""
    return tuple(x.shape if isinstance(x, Tensor) else None for x in leaves)


def ranks_of(shapes: Shapes) -> tuple[int | None, ...]:
    """Numbers of dimensions."""
    return tuple(None if shape is None else len(shape) for shape in shapes)


def _moved(a: torch.Size | None, b: torch.Size | None, sizes: tuple[int, int]) -> int | None:
    """The dimension that is the number of examples in both; None if nothing changes, −1 if else."""
    if a is None or b is None or a == b:
        return None
    changed = [k for k, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    if len(changed) != 1 or (a[changed[0]], b[changed[0]]) != sizes:
        return -1
    return changed[0]


def batch_dims(leaves: Sequence[Any], batch_size: int) -> list[Dims]:
    """Which inputs may have the examples first: all whose length fits, or the first of them.

    Args:
        leaves: the inputs.
        batch_size: B.
    """
    fit = [isinstance(x, Tensor) and x.shape[:1] == (batch_size,) for x in leaves]
    if not any(fit):
        return []
    first = fit.index(True)
    every: list[Dims] = [[0 if f else None for f in fit]]
    alone: Dims = [0 if k == first else None for k in range(len(fit))]
    return every if sum(fit) == 1 else [*every, alone]
