"""Which parameters are trained: it may change while a run goes on.

Fine-tuning freezes layers and lets go of them later, now and then others than at first. An example
has an effect through the parameters that its step moves, so each step is observed with the layers
that are trained in it: one that is let go of is taken in from then on, one that is frozen leaves
the sum.
"""

from __future__ import annotations

from torch import nn

NOTHING_TRAINS = "none of the layers to be watched is trained any more; they were frozen"
"""Why a run that goes on is not observed."""


class TrainedParameters:
    """Tells when other parameters are trained than before.

    Args:
        module: the model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._parameters = list(module.parameters())
        self._trained = self._now()
        self._epoch: int | None = None

    def change(self, epoch: int) -> bool:
        """Whether others are trained than when this was asked for the last time.

        A module whose layers are replaced or added has other parameters; that is looked for once
        an epoch, at its first batch.

        Args:
            epoch: number of the epoch.
        """
        others = epoch != self._epoch and self._list_anew()
        self._epoch = epoch
        before, self._trained = self._trained, self._now()
        return others or self._trained != before

    def _list_anew(self) -> bool:
        """Look at the module's parameters themselves; whether there are others than before."""
        before, self._parameters = self._parameters, list(self.module.parameters())
        return len(before) != len(self._parameters) or any(
            a is not b for a, b in zip(before, self._parameters, strict=True)
        )

    def _now(self) -> list[bool]:
        return [p.requires_grad for p in self._parameters]


__all__ = ["TrainedParameters"]
