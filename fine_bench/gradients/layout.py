"""Where a layer's input has the examples of a batch, found by passes over batches of two sizes.

Most layers get the examples as their first dimension. Others get the sequence first, ``(T, B, D)``,
as in ``nn.TransformerEncoderLayer`` at its defaults; or examples and positions in one dimension,
``(B·T, D)``; or something that all examples share, such as positions ``(1, T)``. Shapes of one
batch do not tell, least of all with T = B. A pass over n examples and one over m of them do: the
dimension of the examples is the one whose size changes in the ratio n : m, and none where the
input is shared. Within one dimension of size outer · B · inner the values tell: those of the first
m examples are the same in both passes.

What is shared is repeated for each example on its way out of the layer (a view, ``expand``), so
that the gradient there is each example's own. No value changes by that where what follows repeats
it anyway. Whether it does is compared: in both passes, and for a training pass in ``same_steps``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Layout:
    """The examples in an input: dimension ``dim`` is outer · B · inner.

    Attributes:
        dim: of the examples.
        outer, inner: 1, 1 where the dimension is the examples alone; None for whatever it comes to.
    """

    dim: int
    outer: int | None = 1
    inner: int | None = 1

    def sizes(self, x: Tensor, n: int) -> tuple[int, int] | None:
        """Outer and inner of an input for n examples; None where it is of another shape."""
        if not -1 < self.dim < x.ndim:
            return None
        rest, left = divmod(x.shape[self.dim], max(n, 1) * (self.outer or 1) * (self.inner or 1))
        if left or not rest or (rest != 1 and self.outer and self.inner):
            return None
        return self.outer or rest, self.inner or rest

    def examples_first(self, x: Tensor, n: int) -> Tensor:
        """Rows ``(n · outer · inner, …)``, those of one example side by side."""
        return self.rows(x, n).flatten(0, 2)

    def rows(self, x: Tensor, n: int) -> Tensor:
        """``(n, outer, inner, …)``."""
        sizes = self.sizes(x, n)
        assert sizes is not None
        outer, inner = sizes
        x = x.movedim(self.dim, 0)
        return x.reshape(outer, n, inner, *x.shape[1:]).transpose(0, 1)


FIRST = Layout(0)
"""The examples are the first dimension."""

SHARED = Layout(-1)
"""An input that all examples share."""


MARK = "_fine_bench_repeated"
"""Attribute of a tensor that has been repeated."""

Call = tuple[str, int]
"""A layer's name, and the number of its call in a pass."""

Pass = tuple[int, Callable[[], Any]]
"""A number of examples, and what sends them through the model."""


class Layouts:
    """The layouts of a model's layers.

    Attributes:
        looked: whether anybody has looked. A call without a layout is then refused where its
            examples could be in several dimensions; otherwise they are in the first.
        refused: layers with a shared input that cannot be repeated for each example, and why.
        reordered: layers that get the examples in another order than the batch has.
    """

    def __init__(self) -> None:
        self.looked = False
        self.refused: dict[str, str] = {}
        self.reordered: set[str] = set()
        self._known: dict[str, list[Layout | None]] = {}
        self._shared: set[Call] = set()
        self._numbers: Counter[str] = Counter()
        self._seen: dict[Call, Tensor] | None = None
        self._examples = 0

    @property
    def looks(self) -> bool:
        """Whether one of the passes that look is on its way."""
        return self._seen is not None

    @property
    def shared(self) -> list[str]:
        """Layers with an input that all examples share and that is repeated for each."""
        return sorted({name for name, _ in self._shared})

    def starts(self) -> None:
        """A pass begins."""
        self._numbers.clear()

    def next(self, name: str) -> Layout | None:
        """The layout of the next call of a layer; None where nobody knows."""
        known, number = self._known.get(name), self._numbers[name]
        self._numbers[name] += 1
        if not known:
            return None
        # whatever their order: checkpoints run parts of a pass again
        if len(known) == 1 or len(set(known)) == 1:
            return known[0]
        return known[number] if number < len(known) else None

    def note(self, name: str, x: Tensor, output: Tensor) -> Tensor | None:
        """One call of a layer in one of the passes that look.

        Returns:
            what the layer is to give in the place of ``output``, if anything.
        """
        assert self._seen is not None
        call = name, self._numbers[name]
        self._numbers[name] += 1
        self._seen[call] = x.detach()
        return repeated(output, self._examples) if call in self._shared else None

    def find(self, passes: Sequence[Pass], default: Callable[[str], Layout]) -> list[Any]:
        """Look at two passes.

        Args:
            passes: over n and over m examples, of which one begins with the examples of the other.
            default: the likeliest layout of a layer.

        Returns:
            the outputs of both.
        """
        self.looked = True
        self.refused, self.reordered, self._shared = {}, set(), set()
        plain, seen = self._look(passes)
        sizes = [n for n, _ in passes]
        while True:
            found = {
                call: layout_of(x, seen[1][call], sizes, default(call[0]))
                if call in seen[1]
                else None
                for call, x in seen[0].items()
            }
            fresh = [
                call
                for call, layout in found.items()
                if layout is SHARED and call not in self._shared and call[0] not in self.refused
            ]
            if not fresh:
                break
            # one at a time: what comes after it may get its input from it
            self._shared.add(fresh[0])
            try:
                outputs, again = self._look(passes)
                same = all(_equal(a, b) for a, b in zip(plain, outputs, strict=True))
            except (RuntimeError, ValueError, IndexError):
                same = False
            if same:
                seen = again
            else:
                self._shared.discard(fresh[0])
                self.refused[fresh[0][0]] = "what follows does not repeat it for each example"
        self._known = {}
        for call, layout in found.items():
            known = None if layout is SHARED and call not in self._shared else layout
            self._known.setdefault(call[0], []).append(known)
            if layout is None or layout is SHARED:
                continue
            inputs = list(zip((seen[0][call], seen[1][call]), sizes, strict=True))
            if all(layout.sizes(x, n) for x, n in inputs) and other_order(
                *(layout.rows(x, n) for x, n in inputs)
            ):
                self.reordered.add(call[0])
        return plain

    def forget(self) -> None:
        """Nothing could be seen: a call is refused where its examples are not clear."""
        self.looked, self.refused, self._known, self._shared = True, {}, {}, set()
        self.reordered = set()

    def same_steps(self, n: int, run: Callable[[], Any], parameters: Sequence[Tensor]) -> bool:
        """Whether a training pass is the same, bit for bit, with shared inputs repeated.

        If not, none is repeated from now on.

        Args:
            n: number of examples.
            run: makes the pass, each time with the same random numbers.
            parameters: of the layers in ``shared``.
        """
        kept, results = self._shared, []
        for repeated_calls in (set(), kept):
            self._shared = repeated_calls
            try:
                (output,), _ = self._look([(n, run)])
                leaves = _numbers_of(output)
                whole = sum((_varied(leaf) for leaf in leaves), torch.zeros(()))
                grads = torch.autograd.grad(whole, list(parameters), allow_unused=True)
            except (RuntimeError, ValueError, IndexError):
                break
            results.append([*(leaf.detach() for leaf in leaves), *grads])
        self._shared = kept
        if len(results) == 2 and _equal(*results):
            return True
        for name, _ in kept:
            self.refused[name] = (
                "repeating it would change the training (by dropout, or by the order of sums)"
            )
            self._known[name] = [None if known is SHARED else known for known in self._known[name]]
        self._shared = set()
        return False

    def _look(self, passes: Sequence[Pass]) -> tuple[list[Any], list[dict[Call, Tensor]]]:
        outputs, seen = [], []
        for n, run in passes:
            self._seen, self._examples = {}, n
            self.starts()
            try:
                outputs.append(run())
                seen.append(self._seen)
            finally:
                self._seen = None
                self.starts()
        return outputs, seen


def layout_of(x: Tensor, other: Tensor, sizes: Sequence[int], default: Layout) -> Layout | None:
    """Where the examples are in an input, from two passes.

    Args:
        x, other: the input in a pass over n and in one over m examples.
        sizes: n and m.
        default: the likeliest layout.

    Returns:
        ``SHARED`` where nothing changes with the number of examples, None where it is not clear.
    """
    n, m = sizes
    if x.shape == other.shape:
        return SHARED
    if x.ndim != other.ndim:
        return None
    changed = [
        dim
        for dim, (a, b) in enumerate(zip(x.shape, other.shape, strict=True))
        if a != b and a * m == b * n and a % n == 0
    ]
    if len(changed) != 1:
        return None
    (dim,) = changed
    k = x.shape[dim] // n
    if k == 1:
        return Layout(dim)
    fitting = []
    for outer in (d for d in range(1, k + 1) if k % d == 0):
        layout = Layout(dim, 1, None) if outer == 1 else Layout(dim, None, k // outer)
        if _same_examples(layout.rows(x, n), layout.rows(other, m)):
            fitting.append(layout)
    if default in fitting:
        return default
    return fitting[0] if len(fitting) == 1 else None


def repeated(x: Tensor, n: int) -> Tensor:
    """What all examples share, for each of n of them: ``(n, …)``, without a copy."""
    if getattr(x, MARK, False):  # by another recorder of the same model
        return x
    x = x if x.ndim and x.shape[0] == 1 else x[None]
    result = x.expand(n, *x.shape[1:])
    setattr(result, MARK, True)
    return result


def regrouped(features: Any, n: int) -> Any:
    """``(n·k, T, …)``, the rows of one example side by side, as ``(n, k·T, …)``."""
    if hasattr(features, "features"):  # with what else is known of the call
        result = copy(features)
        result.features = regrouped(features.features, n)
        return result
    full = getattr(features, "full", features)  # receptive fields that are not written yet
    return full.reshape(n, -1, *full.shape[2:])


def resized(x: Any, count: int) -> Any:
    """The first examples, or all of them twice."""
    if not isinstance(x, Tensor):
        return x
    return x[:count] if count < len(x) else torch.cat([x, x])[:count]


def copied(x: Any) -> Any:
    """The same in memory of its own: a model may write into what it is given (``x.div_(255)``)."""
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, x)


def fewer_or_twice(n: int) -> int:
    """Half as many examples, or two for one."""
    return n // 2 or 2


@contextmanager
def layers_called() -> Iterator[None]:
    """Let Transformer layers call their own layers, which they bypass where nothing is trained."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _same_examples(x: Tensor, other: Tensor) -> bool:
    if x.shape[1:] != other.shape[1:]:
        return False
    count = min(len(x), len(other))
    a, b = x[:count], other[:count]
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = a.abs().amax()
    return bool((a - b).abs().amax() <= torch.finfo(a.dtype).eps ** 0.5 * (scale + 1e-30))


def other_order(x: Tensor, other: Tensor) -> bool:
    """Whether the second pass has rows ``(m, …)`` of the first one, but not in their order.

    A model that draws random numbers has other rows, which says nothing.
    """
    if x.shape[1:] != other.shape[1:] or len(other) > len(x) or _same_examples(x, other):
        return False
    a, b = x.flatten(1).double(), other.flatten(1).double()
    nearest = torch.cdist(b, a, p=float("inf")).amin(1)
    eps = torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0
    return bool((nearest <= eps**0.5 * (a.abs().amax() + 1e-30)).all())


def _numbers_of(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _equal(x: Any, y: Any) -> bool:
    pairs = zip(tree_leaves(x), tree_leaves(y), strict=True)
    return all(not isinstance(a, Tensor) or torch.equal(a, b) for a, b in pairs)


def _varied(x: Tensor) -> Tensor:
    """A sum in which no two numbers count alike."""
    weights = torch.arange(x.numel(), device=x.device, dtype=torch.float64).sin().to(x.dtype)
    return (x.flatten() * weights).sum().cpu()
