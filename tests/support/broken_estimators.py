"""Estimators that go wrong on purpose; the tests name them in ``_target_``."""

from __future__ import annotations

import os
import signal

from baselines.controls import RandomScores
from fine_bench.types import InfluenceScores


class FailsOnSeedOne(RandomScores):
    """Raises for one seed."""

    name = "broken"

    def compute(self) -> InfluenceScores:
        if self.seed == 1:
            raise RuntimeError("the disk is on [fire]")
        return super().compute()


class Kills(RandomScores):
    """Ends the whole process the way SIGKILL does, until the file ``flag`` is there.

    Whichever process asks: one that is free and makes up for the killed one dies as well.
    """

    name = "killer"

    def __init__(self, flag: str, seed: int = 0) -> None:
        super().__init__(seed)
        self.flag = flag

    def compute(self) -> InfluenceScores:
        if not os.path.exists(self.flag):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute()


class NotesItsParent(RandomScores):
    """Leaves the number of its process's parent in the folder ``$NOTES``, one file a seed."""

    name = "noting"

    def compute(self) -> InfluenceScores:
        if "NOTES" in os.environ:
            with open(os.path.join(os.environ["NOTES"], str(self.seed)), "w") as file:
                file.write(str(os.getppid()))
        return super().compute()


class LosesSignal(RandomScores):
    """Is sent SIGTERM where Python ignores what the handler raises."""

    name = "loses_signal"

    def compute(self) -> InfluenceScores:
        """The scores, with the signal in a finaliser."""

        class Finalised:
            def __del__(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

        Finalised()
        return super().compute()
