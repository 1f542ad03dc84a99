"""Self-influence of all 60,000 MNIST training images at one checkpoint: seconds and memory.

    FINE_BENCH_DATA=... python benchmarks/self_influence.py [--model mlp|cnn] [--repeats 3]
        [--threads 2]

Limits that the project set itself on two cores, for the MLP: 5 s for TracIn, 20 s for EK-FAC
(factors, eigenvalues and scores). Data are in memory beforehand; medians over the repeats.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from baselines.influence_functions import InfluenceFunction
from baselines.tracin import TracIn
from fine_bench import Checkpoint, InfluenceEstimator, Problem, replay
from fine_bench.data.mnist import mnist_mislabel
from fine_bench.models.networks import cnn, mlp

LR, EPOCHS, BATCH = 0.05, 1, 64
METHODS: dict[str, Callable[[], InfluenceEstimator]] = {
    "TracIn": TracIn,
    "EK-FAC, the model's Fisher": lambda: InfluenceFunction(solver="ekfac"),
    "EK-FAC, empirical Fisher": lambda: InfluenceFunction(
        solver="ekfac", curvature="empirical_fisher"
    ),
}


def main() -> None:
    """Train one epoch, time each method, print one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = mnist_mislabel(seed=0, n_train=None, n_query=10)
    torch.manual_seed(0)
    net = {"mlp": mlp, "cnn": cnn}[arguments.model]((1, 28, 28), 10)
    optimiser = torch.optim.SGD(net.parameters(), lr=LR)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data.y)).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(net(data.x[rows]), data.y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    problem = Problem(
        model=net.eval(),
        loss=F.cross_entropy,
        train=TensorDataset(data.x, data.y),
        queries="self",
    )
    checkpoint = Checkpoint(params=net.state_dict(), lr=LR)
    print(f"{arguments.model}, {len(data.y):,} images, {arguments.threads} threads")
    for name, make in METHODS.items():
        seconds = []
        for _ in range(arguments.repeats):
            start = time.perf_counter()
            scores = replay(make(), problem, [checkpoint])
            seconds.append(time.perf_counter() - start)
        assert scores.values.shape == (1, len(data.y))
        print(f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f}–{max(seconds):.2f})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident set of everything: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
