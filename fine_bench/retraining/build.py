"""Train the models that a bank lacks, over several processes.

The missing models are cut into stacks of equal subset size. Each worker trains one stack at a time
on one thread and stores it itself, so nothing that is trained waits to be stored. Workers end with
the process that started them, however that one ends.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fine_bench.gradients.batch_products import is_dense
from fine_bench.retraining.bank import Bank
from fine_bench.retraining.design import Design, Model
from fine_bench.retraining.outputs import BankModels
from fine_bench.retraining.train import Recipe, default_stack, evaluate, train_stack
from fine_bench.seeds import stream
from fine_bench.store.files import temporary_folder

OnStored: TypeAlias = Callable[[int], None]
"""Called with the number of models whenever some are stored."""

Stacks: TypeAlias = Sequence[Sequence[Model]]


_WORTH_WORKERS = 20.0  # seconds of work; a worker needs several to start
_OPERATIONS_A_SECOND = 40e9  # of one core


class WorkerError(RuntimeError):
    """A worker process ended without a result."""


@dataclass(frozen=True, eq=False)
class Examples:
    """The data of a bank.

    Attributes:
        x, y: ``(n, ...)`` and ``(n,)``, the training data, of which the models get subsets.
        query_x, query_y: ``(q, ...)`` and ``(q,)``.
    """

    x: Tensor
    y: Tensor
    query_x: Tensor
    query_y: Tensor

    def to(self, device: str) -> Examples:
        """The same there."""
        return Examples(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def save(self, path: Path) -> None:
        """Write a file that several processes can map into memory."""
        tensors = {name: getattr(self, name).contiguous() for name in self.__dataclass_fields__}
        safetensors.torch.save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> Examples:
        """Read what ``save`` wrote."""
        return cls(**safetensors.torch.load_file(path))


@dataclass(frozen=True, eq=False)
class Retraining:
    """How the models of a bank are trained: all it takes, but for the data.

    Attributes:
        recipe: how to train.
        design: which subset and seeds a model has.
        make: ``make(seed)`` is the network initialised by this run seed; it can be pickled.
        device: where to train.
    """

    recipe: Recipe
    design: Design
    make: Callable[[int], nn.Module]
    device: str = "cpu"

    def train(self, models: Sequence[Model], examples: Examples) -> BankModels:
        """Train models with equally large subsets as one stack, and evaluate them.

        Args:
            models: which.
            examples: the data, on the device.

        Raises:
            DivergedModelError, UnsupportedProblemError: see ``train_stack``.
        """
        n, design = len(examples.x), self.design
        subsets = torch.stack([design.positions(model, n) for model in models])
        nets = [self.make(design.init_seed(model)) for model in models]
        names = [model.name for model in models]
        # the same stream as a benchmark run with this seed
        orders = [stream(design.order_seed(model), "order") for model in models]
        draws = [stream(design.order_seed(model), "dropout") for model in models]
        stack = train_stack(
            nets, examples.x, examples.y, subsets, orders, self.recipe, names, draws
        )
        training = evaluate(stack, examples.x, examples.y, names, self.recipe)
        queries = evaluate(stack, examples.query_x, examples.query_y, names, self.recipe)
        loss, margin, query_loss, query_margin = (t.float().numpy() for t in training + queries)
        members = np.zeros((len(models), n), dtype=np.bool_)
        np.put_along_axis(members, subsets.numpy(), True, axis=1)
        return BankModels(
            members=members,
            subset=np.array([model.subset for model in models], dtype=np.int64),
            seed=np.array([design.run_seed(model) for model in models], dtype=np.int64),
            loss=loss,
            margin=margin,
            query_loss=query_loss,
            query_margin=query_margin,
        )


@dataclass(frozen=True)
class Built:
    """What a call of ``build`` did.

    Attributes:
        trained: number of models.
        seconds: wall time, the start of the workers included.
        processes: how many worked.
    """

    trained: int
    seconds: float
    processes: int


def missing(bank: Bank, wanted: Sequence[Model]) -> list[Model]:
    """Those of ``wanted`` that are not stored, in their order."""
    present = {part: bank.present(part) for part in {model.part for model in wanted}}
    return [model for model in wanted if model.key not in present[model.part]]


def stacks(models: Sequence[Model], design: Design, n: int, at_once: int) -> list[list[Model]]:
    """Cut models into stacks of one part and one subset size, in their order.

    Without some of these stacks the others are still cut in the same way: a run that was killed
    goes on with the stacks that it would have trained.
    """
    groups: dict[tuple[str, int], list[Model]] = {}
    for model in models:
        groups.setdefault((model.part, design.size_of(model, n)), []).append(model)
    return [
        group[start : start + at_once]
        for group in groups.values()
        for start in range(0, len(group), at_once)
    ]


def default_processes(device: str) -> int:
    """All cores that this process may use; one process for a GPU."""
    if torch.device(device).type != "cpu":
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build(
    bank: Bank,
    wanted: Sequence[Model],
    retraining: Retraining,
    examples: Examples,
    *,
    processes: int | None = None,
    at_once: int | None = None,
    report: OnStored = lambda count: None,
) -> Built:
    """Train and store those of ``wanted`` that the bank lacks.

    Args:
        bank: where they go.
        wanted: models of any parts.
        retraining: what it takes to train them.
        examples: the data.
        processes: how many work at once, one thread each. None: ``default_processes``, but this
            process alone where starting others would take longer than the work.
        at_once: models in a stack; None chooses by the network and the device.
        report: called whenever models are stored.

    Raises:
        DivergedModelError: with the name of the model; what is stored stays.
        WorkerError: a worker was killed.
        UnsupportedProblemError: a network that cannot be trained in a stack.
    """
    start = time.perf_counter()
    bank.remove_leftovers()
    net = retraining.make(0)
    at_most = processes or default_processes(retraining.device)
    if at_once is None:
        # by what is wanted and not by what is missing, so that running again changes no stack
        share = max(math.ceil(len(wanted) / at_most), 1)
        at_once = min(default_stack(net, retraining.device), share)
    todo = stacks(missing(bank, wanted), retraining.design, len(examples.x), at_once)
    if processes is None and is_dense(net, examples.x):
        seconds = _seconds(net, todo, retraining, len(examples.x))
        at_most = at_most if seconds > _WORTH_WORKERS else 1
    processes = max(min(at_most, len(todo)), 1)
    if processes == 1:
        _here(bank, todo, retraining, examples, report)
    else:
        _in_workers(bank, todo, retraining, examples, report, processes)
    return Built(sum(map(len, todo)), time.perf_counter() - start, processes)


def _seconds(net: nn.Module, todo: Stacks, retraining: Retraining, n: int) -> float:
    """Roughly how long fully connected networks train on one core: three products a weight."""
    weights = sum(parameter.numel() for parameter in net.parameters())
    seen = sum(retraining.design.size_of(model, n) for models in todo for model in models)
    return 6 * weights * seen * retraining.recipe.max_epochs / _OPERATIONS_A_SECOND


def _here(
    bank: Bank, todo: Stacks, retraining: Retraining, examples: Examples, report: OnStored
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        examples = examples.to(retraining.device)
        for models in todo:
            bank.add(models, retraining.train(models, examples))
            report(len(models))
    finally:
        torch.set_num_threads(threads)


def _in_workers(
    bank: Bank,
    todo: Stacks,
    retraining: Retraining,
    examples: Examples,
    report: OnStored,
    processes: int,
) -> None:
    others = set(multiprocessing.active_children())
    with temporary_folder("bank") as folder:
        data = folder / "data.safetensors"
        examples.save(data)
        executor = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(bank, retraining, data),
        )
        try:
            for future in as_completed([executor.submit(_work, models) for models in todo]):
                report(future.result())
        except BrokenProcessPool as error:
            raise WorkerError(
                "a worker process was ended from outside (out of memory?); what is stored stays. "
                "Run again to go on, with fewer processes if memory is short: bank.processes="
                f"{max(processes // 2, 1)}"
            ) from error
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


_worker: list[tuple[Bank, Retraining, Examples]] = []


def _start_worker(bank: Bank, retraining: Retraining, data: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _worker[:] = [(bank, retraining, Examples.load(data).to(retraining.device))]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(models: Sequence[Model]) -> int:
    bank, retraining, examples = _worker[0]
    bank.add(models, retraining.train(models, examples))
    return len(models)
