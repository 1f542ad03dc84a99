"""From a model's place in the design to its losses and margins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fine_bench.retraining.design import Design, Model
from fine_bench.retraining.outputs import BankModels
from fine_bench.retraining.train import Recipe, evaluate, train_stack
from fine_bench.seeds import stream


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
class Workshop:
    """What it takes to train any model of a bank, but for the data.

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
        stack = train_stack(nets, examples.x, examples.y, subsets, orders, self.recipe, names)
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
