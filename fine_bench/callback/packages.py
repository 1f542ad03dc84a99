"""Lightning's two packages, ``pytorch_lightning`` and ``lightning``: either is enough.

They hold the same code twice, with classes of their own. A Trainer calls its callbacks' hooks by
name, whatever class they are of, so that one callback serves both; classes of theirs are compared
by name here (``is_a``).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

PACKAGES = ("pytorch_lightning", "lightning.pytorch")

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:

    def _callback_class() -> type:
        """``Callback`` of the package that the program has loaded, or else of one it could load."""
        loaded = [name for name in PACKAGES if name in sys.modules]
        for name in (*loaded, *PACKAGES):
            try:
                return import_module(name).Callback
            except ModuleNotFoundError as error:
                if error.name is None or not name.startswith(error.name):
                    raise
        raise ModuleNotFoundError(
            "the callbacks need Lightning: pip install pytorch-lightning, or lightning; a training "
            "loop of your own is watched without it by fine_bench.watch(…)"
        )

    Callback = _callback_class()


def is_a(thing: object, *names: str) -> bool:
    """Whether an object is of a class of one of these names, in whichever package.

    Args:
        thing: any object.
        names: plain names of classes.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


__all__ = ["PACKAGES", "Callback", "is_a"]
