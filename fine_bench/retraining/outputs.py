"""What a set of retrained models says, as arrays: the raw material of the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class BankModels:
    """K models trained on subsets of n training examples, and their outputs.

    Attributes:
        members: ``(K, n)`` boolean, which examples each model was trained on.
        subset: ``(K,)`` int64, models with the same number were trained on the same subset.
        seed: ``(K,)`` int64, the run seed of each model.
        loss: ``(K, n)`` float32, each training example's loss under each model.
        margin: ``(K, n)`` float32, log(p / (1 − p)) of its given label.
        query_loss, query_margin: ``(K, q)`` float32, the same on the queries.
    """

    members: NDArray[np.bool_]
    subset: NDArray[np.int64]
    seed: NDArray[np.int64]
    loss: NDArray[np.float32]
    margin: NDArray[np.float32]
    query_loss: NDArray[np.float32]
    query_margin: NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.members.ndim != 2 or self.members.dtype != np.bool_:
            raise ValueError(
                f"members must be a boolean (K, n) array, got {self.members.dtype} of shape "
                f"{self.members.shape}"
            )
        k, n = self.members.shape
        for name, shape in (("subset", (k,)), ("seed", (k,)), ("loss", (k, n)), ("margin", (k, n))):
            found = getattr(self, name).shape
            if found != shape:
                raise ValueError(f"{name} must have shape {shape}, got {found}")
        if self.query_loss.shape != self.query_margin.shape or len(self.query_loss) != k:
            raise ValueError(
                f"query_loss and query_margin must have one shape ({k}, q), got "
                f"{self.query_loss.shape} and {self.query_margin.shape}"
            )
        for name in ("loss", "margin", "query_loss", "query_margin"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"{name} holds values that are not finite; a model of the bank diverged"
                )

    def __len__(self) -> int:
        return len(self.members)

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return int(self.members.shape[1])

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> BankModels:
        """Some of the models."""
        return BankModels(
            **{name: getattr(self, name)[which] for name in self.__dataclass_fields__}
        )
