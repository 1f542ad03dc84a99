"""Parameters that a module uses in operations of its own: class tokens, positions, scales.

While the module's ``forward`` runs, every operation is looked at (PyTorch's ``TorchFunctionMode``;
none is changed). What an operation makes of parameters and constants alone, ``p[:, :t]`` or
``p.exp()``, is v(p). Where v meets the batch in an operation f, as in ``x + v``, ``x * v``,
``x @ v`` or ``torch.cat([v, x])``, its gradient for each example follows from that one operation
(``reevaluation.py``), and that of p by the chain rule. v may have a row for each example, as
``p.expand(B, …)`` has: then the gradient at its rows is that of the examples.

Shapes: B examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from fine_bench.gradients.reevaluation import (
    FAILURES,
    Application,
    Dims,
    NoRuleError,
    Places,
    Seen,
    Values,
    batch_dims,
    matching,
)

REPEATING = {
    Tensor.expand,
    Tensor.expand_as,
    Tensor.broadcast_to,
    torch.broadcast_to,
    Tensor.repeat,
    Tensor.tile,
    torch.tile,
}
"""Operations that repeat what they get along dimensions of length one."""

DETACHING = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
"""Operations behind which nothing depends on the parameters any more."""


@dataclass(eq=False)
class Made:
    """What was made of parameters and constants alone; a parameter itself has a name.

    Attributes:
        value: the tensor.
        name: of the parameter.
        function: what made it.
        leaves, spec: of what; ``inputs`` are those that were made themselves, by their place.
        place: which of the function's outputs it is.
    """

    value: Tensor
    name: str | None = None
    function: Any = None
    leaves: list[Any] = field(default_factory=list)
    spec: Any = None
    inputs: dict[int, Made] = field(default_factory=dict)
    place: int = 0

    def parameters(self) -> Values:
        """The parameters behind it, by name."""
        if self.name is not None:
            return {self.name: self.value.detach()}
        found: Values = {}
        for made in self.inputs.values():
            found |= made.parameters()
        return found

    def again(self, values: Values) -> Tensor:
        """The same of other values of the parameters."""
        if self.name is not None:
            return values[self.name]
        leaves = list(self.leaves)
        for place, made in self.inputs.items():
            leaves[place] = made.again(values)
        args, kwargs = tree_unflatten(leaves, self.spec)
        found: Tensor = tree_flatten(self.function(*args, **kwargs))[0][self.place]
        return found

    def repeated(self) -> Made | None:
        """What it repeats along dimensions of length one, the first among them; None if nothing."""
        if self.function not in REPEATING or list(self.inputs) != [0]:
            return None
        source = self.inputs[0]
        mine, theirs = self.value.shape, source.value.shape
        padded = (1,) * (len(mine) - len(theirs)) + tuple(theirs)
        fits = all(a in (1, b) for a, b in zip(padded, mine, strict=True))
        return source if fits and padded[0] == 1 else None

    def pull(self, gradients: Tensor, *, rows: bool) -> Values:
        """Gradients at it to those at the parameters, ``(B, *shape)`` each.

        Args:
            gradients: ``(B, *value.shape)``, or with ``rows`` ``(B, *value.shape[1:])``, those at
                the row of each example.
            rows: see ``gradients``.
        """
        if rows and (source := self.repeated()) is not None:
            return source.pull(_summed_to(gradients[:, None], source.value.shape), rows=False)
        if self.name is not None and not rows:
            return {self.name: gradients}
        back = vjp(self.again, self.parameters())[1]
        if not rows:
            try:
                found: Values = vmap(back)(gradients)[0]
            except FAILURES:
                found = _stacked(back(g)[0] for g in gradients)
            return found
        # what rows depend on is not known: one after the other
        parts = []
        for i, g in enumerate(gradients):
            cotangent = torch.zeros_like(self.value)
            cotangent[i] = g
            parts.append(back(cotangent)[0])
        return _stacked(parts)


class FunctionUses(TorchFunctionMode):
    """Looks at the operations of a forward pass.

    Args:
        parameters: the parameters of interest, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.parameters = parameters
        self._uses: list[tuple[Application, dict[str, Made]]] = []
        self._seen: list[Seen] | None = None  # in a pass that looks where the examples are
        self._made: dict[int, Made] = {}
        self._constants: dict[int, Tensor] = {}

    def begin(self, buffers: Iterable[Tensor]) -> None:
        """Before the pass of a module; uses in earlier ones stay.

        Args:
            buffers: constants of the module.
        """
        self._made = {id(p): Made(p, name) for name, p in self.parameters.items()}
        self._constants = {id(x): x for x in buffers}

    def end(self) -> None:
        """After the pass of a module."""
        self._made, self._constants = {}, {}

    def clear(self) -> None:
        """Forget the uses."""
        self._uses = []

    def look(self) -> None:
        """From now on a pass looks where the examples are."""
        self._seen = []

    def looked(self) -> list[Seen]:
        """What the pass saw, in the order of the uses."""
        seen, self._seen = self._seen, None
        return seen or []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Carry an operation out, and note what it does with the parameters."""
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        made = {k: self._made[id(x)] for k, x in enumerate(leaves) if id(x) in self._made}
        batch = [x for x in tensors if id(x) not in self._made and not self._constant(x)]
        writes = _writes(func)
        if batch and writes and tensors:
            self._constants.pop(id(tensors[0]), None)
        if not made:
            output = func(*args, **kwargs)
            if not batch and isinstance(output, Tensor):
                self._constants[id(output)] = output
            return output
        before = leaves
        if writes:  # what is written into is needed as it was
            before = [x.detach().clone() if x is tensors[0] else x for x in leaves]
        output = func(*args, **kwargs)
        if not torch.is_grad_enabled() and self._seen is None:
            return output
        if not batch:
            self._note(func, leaves, spec, made, output)
        else:
            result = tensors[0] if output is None else output
            if self._seen is not None:
                if any(isinstance(x, Tensor) for x in tree_flatten(result)[0]):
                    self._seen.append(Seen.of(leaves, result))
                return output
            self._uses.append(
                (_application(func, before, spec, made, result, writes), made_by(made))
            )
        return output

    def _constant(self, x: Tensor) -> bool:
        return id(x) in self._constants or isinstance(x, torch.nn.Parameter)

    def _note(
        self, func: Any, leaves: list[Any], spec: Any, made: dict[int, Made], output: Any
    ) -> None:
        for place, out in enumerate(tree_flatten(output)[0]):
            if not isinstance(out, Tensor) or id(out) in self._made:
                continue
            follows = func not in DETACHING and out.is_floating_point()
            if out.requires_grad or (self._seen is not None and follows):
                self._made[id(out)] = Made(out, None, func, leaves, spec, made, place)
            else:
                self._constants[id(out)] = out

    # ------------------------------------------------------------------ after the backward pass

    def gradients(self, batch_size: int, places: Sequence[Places | None] | None = None) -> Values:
        """``(B, *shape)`` of every parameter that was used.

        Args:
            batch_size: B.
            places: where the uses have the examples; None where nobody has looked.

        Raises:
            NoRuleError: a use from which they do not follow.
        """
        total: Values = {}
        known = matching(places, [application for application, _ in self._uses], batch_size)
        for (application, made), place in zip(self._uses, known, strict=True):
            found = _of_use(application, made, batch_size, place) if application.reached else {}
            for name, value in found.items():
                total[name] = total[name] + value if name in total else value
        return total


def made_by(made: Mapping[int, Made]) -> dict[str, Made]:
    """By the name under which an application knows them."""
    return {str(place): value for place, value in made.items()}


def _application(
    func: Any, leaves: list[Any], spec: Any, made: Mapping[int, Made], output: Any, writes: bool
) -> Application:
    places = set(made)

    def apply(values: Values, args: Any, kwargs: Any) -> Any:
        flat = [
            values[str(k)] if k in places else leaf
            for k, leaf in enumerate(tree_flatten((args, kwargs))[0])
        ]
        if writes:
            flat[0] = flat[0].clone()
        again, keywords = tree_unflatten(flat, spec)
        found = func(*again, **keywords)
        return again[0] if found is None else found

    args, kwargs = tree_unflatten(leaves, spec)
    return Application(apply, args, kwargs, output)


def _of_use(
    application: Application, made: Mapping[str, Made], batch_size: int, places: Places | None
) -> Values:
    """The parameters' gradients from one use."""
    values = {place: m.value.detach() for place, m in made.items()}
    reason = "none of its inputs has the examples first"
    outputs = None if places is None else places.outputs
    for (dims, rows), one_by_one in product(
        _ways(application, made, batch_size, places), [False, True]
    ):
        try:
            found = application.gradients(values, dims, rows, outputs, one_by_one=one_by_one)
        except NoRuleError as error:
            reason = str(error)
            continue
        total: Values = {}
        for place, g in found.items():
            for name, value in made[place].pull(g, rows=place in rows).items():
                total[name] = total[name] + value if name in total else value
        return total
    raise NoRuleError(reason)


def _ways(
    application: Application, made: Mapping[str, Made], batch_size: int, places: Places | None
) -> list[tuple[Dims, list[str]]]:
    """What may have the examples, and where: the inputs, and what was made of parameters."""
    if places is not None:
        rows = [place for place in made if places.inputs[int(place)] is not None]
        dims = [None if str(k) in made else dim for k, dim in enumerate(places.inputs)]
        plain = places.clear and all(places.inputs[int(place)] == 0 for place in rows)
        return [(dims, rows)] if plain else []
    others = [None if str(k) in made else x for k, x in enumerate(application.leaves)]
    may = [place for place, m in made.items() if m.value.shape[:1] == (batch_size,)]
    # what has a row for each example shows in that it does not fit one example otherwise
    return list(product(batch_dims(others, batch_size), [[], may] if may else [[]]))


def _writes(func: Any) -> bool:
    """Whether an operation writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in KEEPING)
    return name.endswith("_")


KEEPING = {"__invert__", "__index__", "__int__", "__iter__", "__init__"}
"""Methods whose names begin like those of writing operators."""


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """``(B, …)`` summed, example by example, over what was repeated from ``shape``."""
    inner = x.shape[1:]
    padded = (1,) * (len(inner) - len(shape)) + tuple(shape)
    over = [k + 1 for k, (a, b) in enumerate(zip(padded, inner, strict=True)) if a == 1 != b]
    summed = x.sum(over, keepdim=True) if over else x
    return summed.reshape(len(x), *shape)


def _stacked(parts: Iterable[Values]) -> Values:
    found = list(parts)
    return {name: torch.stack([part[name] for part in found]) for name in found[0]}
