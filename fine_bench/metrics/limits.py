"""What retraining says of one setting, as numbers that a table can show beside those of methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """One oracle: scores that retraining gave, measured as a method's are.

    Attributes:
        name: of the row.
        made_of: how many retrained models or subsets, in words.
        target: which question it answers.
        numbers: metrics by name, as in a record.
    """

    name: str
    made_of: str
    target: str
    numbers: Mapping[str, float]
