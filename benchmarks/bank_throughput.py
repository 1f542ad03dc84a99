"""How fast a retraining bank trains: the stack against its matrix products alone, and one by one.

    python benchmarks/bank_throughput.py [--n-train 4000] [--models 8] [--epochs 1] [--repeats 7]
        [--threads 1] [--device cpu] [--momentum 0]

Models, data and recipe are those of ``+experiment=mnist_mlp``: MNIST, 784-256-10, batch 64, each
model on its own half of the examples. In every repeat, in rotating order and in this one process:

- stack     ``train_stack``: M models at once, orders and gathering of the examples included;
- products  the batched matrix products of the same steps on arrays of the same shapes, into arrays
            made before, and nothing else: per layer one forward, one for the weights' gradient and,
            above the first layer, one for the error below;
- one       ``train_one``: one model after the other, autograd and ``torch.optim.SGD`` (a single
            model is timed).

Printed are medians over the repeats of the seconds a model, and of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from fine_bench.data.mnist import mnist_mislabel
from fine_bench.models.networks import mlp
from fine_bench.retraining.train import Recipe, evaluate, train_one, train_stack
from fine_bench.seeds import stream

HIDDEN, BATCH, LR, KEEP = 256, 64, 0.05, 0.5


def products(sizes: list[int], models: int, device: str) -> Callable[[int], None]:
    """One step's batched products, as a function of the batch size."""
    weights = [torch.randn(models, a, b, device=device) * a**-0.5 for a, b in pairwise(sizes)]
    gradients = [torch.empty_like(w) for w in weights]
    arrays: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def step(m: int) -> None:
        if m not in arrays:
            a = [torch.randn(models, m, size, device=device) for size in sizes]
            arrays[m] = a, [torch.randn_like(layer) for layer in a]
        a, delta = arrays[m]
        for layer, weight in enumerate(weights):
            torch.bmm(a[layer], weight, out=a[layer + 1])
        for layer in range(len(weights) - 1, -1, -1):
            if layer > 0:
                torch.bmm(delta[layer + 1], weights[layer].transpose(1, 2), out=delta[layer])
            torch.bmm(a[layer].transpose(1, 2), delta[layer + 1], out=gradients[layer])

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n-train", type=int, default=4000)
    parser.add_argument("--models", type=int, default=8, help="M, trained at once")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--momentum", type=float, default=0.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, models = arguments.device, arguments.models

    data = mnist_mislabel(seed=0, n_train=arguments.n_train, n_query=200)
    x, y = data.x.to(device), data.y.to(device)
    size = round(KEEP * data.n_train)
    recipe = Recipe(arguments.epochs, BATCH, LR, arguments.momentum)
    sizes = [x[0].numel(), HIDDEN, data.n_classes]
    batches = [BATCH] * (size // BATCH) + [size % BATCH] * (size % BATCH > 0)
    torch.manual_seed(0)
    nets: list[nn.Module] = [
        mlp(tuple(x.shape[1:]), data.n_classes, hidden=[HIDDEN]) for _ in range(models)
    ]
    single = mlp(tuple(x.shape[1:]), data.n_classes, hidden=[HIDDEN]).to(device)
    subsets = torch.stack(
        [torch.randperm(len(x), generator=stream(k, "subset"))[:size] for k in range(models)]
    )
    one_step = products(sizes, models, device)
    stacks = []

    def stack() -> None:
        orders = [stream(k, "order") for k in range(models)]
        stacks[:] = [train_stack(nets, x, y, subsets, orders, recipe)]

    def bare() -> None:
        for _ in range(arguments.epochs):
            for m in batches:
                one_step(m)

    def one() -> None:
        train_one(single, x, y, subsets[0], stream(0, "order"), recipe)

    def outputs() -> None:
        evaluate(stacks[0], x, y)

    runs = {"stack": (stack, models), "products": (bare, models), "one": (one, 1)}
    runs["evaluation"] = (outputs, models)

    def seconds(run: Callable[[], None]) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run, _ in runs.values():
        run()  # warm up
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for repeat in range(arguments.repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            run, count = runs[name]
            times[name].append(seconds(run) / count)

    print(
        f"{platform.machine()}, {arguments.threads} thread(s), {device}; n = {data.n_train:,}, "
        f"subsets of {size:,}, {arguments.epochs} epoch(s), M = {models}, momentum "
        f"{arguments.momentum:g}, {arguments.repeats} repeats"
    )
    print("seconds a model, median: ", end="")
    print(", ".join(f"{name} {statistics.median(t):.4f}" for name, t in times.items()))
    for above, below in (("stack", "products"), ("one", "stack"), ("evaluation", "stack")):
        ratios = sorted(a / b for a, b in zip(times[above], times[below], strict=True))
        print(
            f"{above} / {below}: {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} … {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
