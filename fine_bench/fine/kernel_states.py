"""At which parameters the kernels of ``fine.kernel_scores`` are taken, and the taking.

*The run's own*: before the first step and after snapshots 1, 2, 4, 8, …: kernels change most at
the beginning, and a run that does not know its length can do it.

*Fresh initialisations*: the entries of every trained parameter before the first step, in a random
order each. Entries that were drawn independently from one distribution, as all common schemes draw
them, are as good in any order: this is another initialisation of the same network, of whatever
scale, for which nothing has to be called. It is no initialisation of weights that were trained
elsewhere (``n_initialisations=0`` leaves them out) and only roughly one of orthogonal matrices.
Frozen parameters and buffers stay.

*Of the inputs*, where ``input_share`` is above 0: exp(−‖x − x'‖²/2σ²), the same in every run, and
free of passes. It stands where fresh initialisations stand, for what does not depend on
the run: random networks have kernels of the inputs, too.

So the kernel that a run would have *on average* over its seeds costs passes over the data and no
training. A kernel is that of one random combination of the logits (``tangent_kernel.Probe``), each
of another.

The parameters are kept and the kernels taken at the end: a run that is interrupted has no (N, N)
matrices to save. While they are taken the model's parameters are others; they are put back, the
same storage, before anybody else looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fine_bench.fine.kernel_scores import BLOCKS
from fine_bench.fine.kernel_system import train_diagonal
from fine_bench.gradients.input_products import InputProducts
from fine_bench.gradients.per_example import PerExampleGradients
from fine_bench.gradients.tangent_kernel import Probe, cross_gram, gram_matrix
from fine_bench.seeds import stream
from fine_bench.types import UnsupportedProblemError

MOST_EXAMPLES = 12_000
"""Training examples and queries together: 0.6 GB a matrix in float32, of which about seven live."""

PROJECTED = 512
"""Rows of the kernels from which their scales are read."""

State = dict[str, Tensor]

Take = Callable[[int], Iterator[tuple[slice, PerExampleGradients]]]
"""Gradients of the probe by position, of all batches that end after a position."""

Some = Callable[[], Iterator[tuple[slice, PerExampleGradients]]]
"""Those of the landmarks, in their order."""


def too_many(n_train: int, n_query: int) -> str | None:
    """Why matrices of all pairs would not fit; None if they do."""
    if n_train + n_query <= MOST_EXAMPLES:
        return None
    return (
        f"the kernel of {n_train} training examples and {n_query} queries would have "
        f"{n_train + n_query} rows and columns, more than the limit of {MOST_EXAMPLES}: ask fewer "
        "queries at a time, train on fewer examples, or use a method that holds no matrix of all "
        'pairs, for instance geometry="ekfac" with schedule="snapshot"'
    )


def is_due(n_snapshots: int) -> bool:
    """Whether a kernel is to be taken at the snapshot that is the so many-th: 1, 2, 4, 8, …"""
    return n_snapshots & (n_snapshots - 1) == 0


def state_of(module: nn.Module) -> State:
    """A copy of parameters and buffers by name, on the CPU."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().to("cpu", copy=True) for name, value in found.items()}


def fresh(state: Mapping[str, Tensor], trained: Sequence[str], seed: int, number: int) -> State:
    """Another initialisation like the one in ``state``.

    Args:
        state: before the first step.
        trained: names of the parameters whose entries change places.
        seed, number: name the random stream.
    """
    generator = stream(seed, f"fine/kernel/initialisation {number}")
    found = dict(state)
    for name in trained:
        value = state[name]
        order = torch.randperm(value.numel(), generator=generator)
        found[name] = value.flatten()[order].reshape(value.shape)
    return found


def landmarks_of(n_landmarks: int | None, n_train: int, n_query: int, seed: int) -> Tensor | None:
    """Whose rows of the kernels are taken: so many random training examples, and all queries.

    Returns:
        Positions, ascending, ``(L,)``; None for all, where there are not more examples.
    """
    if n_landmarks is None or n_landmarks >= n_train:
        return None
    order = torch.randperm(n_train, generator=stream(seed, "fine/kernel/landmarks"))
    own = order[:n_landmarks].sort().values
    return torch.cat([own, torch.arange(n_train, n_train + n_query)])


@contextmanager
def other_parameters(module: nn.Module) -> Iterator[Callable[[Mapping[str, Tensor]], None]]:
    """Gives a function that puts other parameters and buffers into the module; afterwards all are
    as they were, in the same storage."""
    places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    before = {name: place.data for name, place in places.items()}

    def load(state: Mapping[str, Tensor]) -> None:
        for name, value in state.items():
            place = places[name]
            place.data = value.to(device=place.device, dtype=place.dtype)

    try:
        yield load
    finally:
        for name, place in places.items():
            place.data = before[name]


def take_kernels(
    module: nn.Module,
    kept: Sequence[State],
    trained: Sequence[str],
    probe: Probe,
    gradients: Take,
    *,
    n_train: int,
    n_query: int,
    n_classes: int,
    n_initialisations: int,
    seed: int,
    landmarks: Tensor | None = None,
    some: Some | None = None,
    of_inputs: Tensor | None = None,
    input_share: float = 0.0,
) -> tuple[list[Tensor], list[float]]:
    """What the kernels of each block add to K̄, G times ``(N, N)``, and the run's scales.

    A kernel K_t counts in K̄ divided by its mean diagonal. How fast the run trained along K̄ at that
    time is said by its scale

        κ_t = ⟨K_t, K̄⟩ / (|v|² ⟨K̄, K̄⟩),

    of its projection on K̄, |v|² that of its probe v: what a kernel gains on its diagonal alone, as
    it does where a network learns single examples by heart, brings K̄'s directions nowhere. Products
    are over ``PROJECTED`` rows, equally spaced, and all columns of training examples. With
    landmarks only their rows are taken, ``(L, N)``, and mean diagonals and products are over those.

    Args:
        module: whose parameters are exchanged meanwhile.
        kept: the run's own, the first of them before the first step.
        trained: names of the parameters that the gradients are taken in.
        probe: the loss behind ``gradients``.
        gradients: of training examples and queries, in this order.
        n_train, n_query, n_classes: n, V, k.
        n_initialisations: fresh ones, ≥ 0; they make half of K̄.
        seed: of initialisations and probes.
        landmarks: see ``landmarks_of``; None for all rows.
        some: gradients of the landmarks.
        of_inputs: a kernel of the inputs, of diagonal 1, in the shape of the others.
        input_share: what it makes of K̄, in [0, 1); the others make the rest.

    Returns:
        The blocks, and κ_t of each in ``kept``, NaN for a kernel that is not finite or zero.

    Raises:
        UnsupportedProblemError: no kernel is finite and above zero.
    """
    rows = slice(0, n_train, -(-n_train // PROJECTED))
    if landmarks is not None:
        own_landmarks = int((landmarks < n_train).sum())
        rows = slice(0, own_landmarks, -(-own_landmarks // PROJECTED))
    products, n = InputProducts(), n_train + n_query

    def taken() -> Tensor:
        if landmarks is None or some is None:
            return gram_matrix(gradients, n, products)
        return cross_gram(some(), lambda: gradients(0), n, products=products)[0]

    parts: dict[int, tuple[float, Tensor]] = {}
    blocks: list[Tensor] = []
    usable = 0
    share = 0.5 if n_initialisations else 1.0
    rest = 1.0 if of_inputs is None else 1.0 - input_share
    with other_parameters(module) as load:
        for number in range(n_initialisations + len(kept)):
            own = number - n_initialisations
            state = kept[own] if own >= 0 else fresh(kept[0], trained, seed, number)
            weight = share / len(kept) if own >= 0 else 0.5 / n_initialisations
            load(state)
            probe.draw(n_classes, stream(seed, f"fine/kernel/probe {number}"))
            kernel = taken()
            kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
            blocks = blocks or [torch.zeros_like(kernel) for _ in range(BLOCKS)]
            scale = float(train_diagonal(kernel, landmarks, n_train).mean())
            if scale > 0 and bool(torch.isfinite(kernel).all()):
                # the run's own and the fresh ones each in turn
                block = blocks[(own if own >= 0 else number) % BLOCKS]
                block.add_(kernel, alpha=rest * weight / scale)
                usable += 1
                if own >= 0:
                    # a copy: of a kernel in float64 it would be a view that keeps all of it
                    part = kernel[rows, :n_train].to(torch.float64, copy=True)
                    parts[own] = 1 / float(probe.weights.square().sum()), part
    if not usable:
        raise UnsupportedProblemError(
            'geometry="kernel": all gradients of the outputs vanish or are not finite, so no '
            "kernel tells examples apart; look at the network's initialisation"
        )
    if of_inputs is not None:
        # of every block alike: it is the same in all runs
        for block in blocks:
            block.add_(of_inputs.to(block), alpha=input_share / BLOCKS)
    mean = blocks[0][rows, :n_train].to(torch.float64, copy=True)
    for block in blocks[1:]:
        mean += block[rows, :n_train]
    mean /= sum(float(train_diagonal(block, landmarks, n_train).mean()) for block in blocks)
    scales = [math.nan] * len(kept)
    for own, (factor, part) in parts.items():
        scales[own] = factor * float((part * mean).sum() / mean.square().sum())
    return blocks, scales
