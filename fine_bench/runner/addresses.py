"""Where code lies today, and the address under which records know it.

The ``_target_`` of a task, a model and an estimator is part of what a record's digests are taken
of. Code may move; the address in a record may not, or every finished cell would be computed again.
So records and digests hold the address of the day when a class was first published, and whoever
reads a configuration follows it to where the class lies today.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED: Mapping[str, str] = {
    "fine_bench.callback.paper.PaperFINECallback": "fine_bench.callback_paper.PaperFINECallback",
    "baselines.in_run_shapley.InRunShapleyCallback": (
        "fine_bench.callback_shapley.InRunShapleyCallback"
    ),
}
"""Address today → address in records, for what has moved since it was first recorded."""

_TODAY = {recorded: today for today, recorded in MOVED.items()}


def today(path: str) -> str:
    """Where the code lies that a record or a user's configuration calls by this name."""
    return _TODAY.get(path, path)


def recorded(options: Any) -> Any:
    """The same options, each ``_target_`` in them under the address that records hold.

    Args:
        options: anything that JSON can hold; mappings and lists are gone through.
    """
    if isinstance(options, Mapping):
        return {
            key: MOVED.get(value, value)
            if key == "_target_" and isinstance(value, str)
            else recorded(value)
            for key, value in options.items()
        }
    if isinstance(options, list | tuple):
        return [recorded(value) for value in options]
    return options
