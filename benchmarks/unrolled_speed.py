"""What the exact derivative of a run costs beside its own matrix products.

    python benchmarks/unrolled_speed.py [--queries 200] [--steps 20]

A step of ``baselines.unrolled`` back through SGD on the benchmark's MLP (784-256-10, batch 64, as
in ``mnist_mlp``) for many queries at once, and the matrix products that it consists of alone, on
arrays of the same shapes, in turn in one process. Random data: no number depends on them. The
training that is done again (one step forward and one from the moment kept) is in the first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.unrolled import _Run
from fine_bench.gradients.batch_products import batch_products
from fine_bench.gradients.update_rules import rule_of
from fine_bench.models.networks import mlp
from fine_bench.types import TrainingSteps

INPUTS, HIDDEN, CLASSES, BATCH, LR = (1, 28, 28), 256, 10, 64, 0.05


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def own_products(vectors: list[Tensor], queries: int) -> Callable[[], None]:
    """The matrix products of one step back, into arrays that are there already."""
    d = 28 * 28
    x, a, error = torch.randn(BATCH, d), torch.randn(BATCH, HIDDEN), torch.randn(BATCH, CLASSES)
    weight = torch.randn(CLASSES, HIDDEN)
    first, second = vectors[0].view(-1, d), vectors[2]
    wide = torch.randn(BATCH, queries * HIDDEN)
    out = torch.randn(BATCH * queries, CLASSES)

    def call() -> None:
        torch.mm(x, first.T, out=wide)  # forward, first layer
        a @ second.reshape(-1, HIDDEN).T  # forward, second layer, its two parts
        torch.mm(wide.view(-1, HIDDEN), weight.T, out=out)
        torch.mm(out, weight)  # backward, its two parts
        error @ second
        error.T @ wide  # the product of the second layer, its two parts
        out.view(BATCH, -1).T @ a
        first.addmm_(wide.T, x, alpha=-1e-9)  # the product of the first layer

    return call


def main() -> None:
    """Time both in turn and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    net = mlp(INPUTS, CLASSES, hidden=(HIDDEN,))
    x, y = torch.randn(4000, *INPUTS), torch.randint(CLASSES, (4000,))
    batches = [torch.randperm(4000)[:BATCH] for _ in range(arguments.steps)]
    steps = TrainingSteps(
        net.state_dict(), batches, [LR] * len(batches), "SGD", {"momentum": arguments.momentum}
    )
    rule = rule_of(steps.optimizer, steps.options)
    products = batch_products(net, F.cross_entropy, "hessian", x)
    vectors = [torch.randn(arguments.queries, *p.shape) * 1e-3 for _, p in net.named_parameters()]
    alone = own_products([v.clone() for v in vectors], arguments.queries)
    ratios = []
    for number in range(arguments.rounds + 1):
        run = _Run(steps, rule, products, x, y, len(batches))

        def whole(run: _Run = run) -> None:
            run.forward(4, [])
            run.backward(vectors)

        mine = timed(whole) / len(batches)
        theirs = timed(lambda: [alone() for _ in batches]) / len(batches)
        if number:  # the first warms up
            ratios.append(mine / theirs)
            print(f"a step back {1e3 * mine:.0f} ms, its matrix products {1e3 * theirs:.0f} ms")
    print(
        f"{arguments.queries} queries, {arguments.threads} thread: {statistics.median(ratios):.2f} "
        f"times its own matrix products (median of {len(ratios)})"
    )


if __name__ == "__main__":
    main()
