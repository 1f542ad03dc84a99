"""Canonical JSON and its SHA-256.

JSON knows no NaN and no infinity: in the store they are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, which no other value may be.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

FORMAT = 1
"""Of records and comparisons; other formats are refused by name."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any, where: str = "") -> Any:
    """``value`` as strict JSON; NaN and infinities become ``"NaN"``, ``"Infinity"``, ...."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        if value in _NOT_FINITE:
            raise ValueError(
                f"{where or 'value'} is the string {value!r}, which the store keeps for numbers "
                "that are not finite; pass the number or another word"
            )
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy or torch scalar
        return encode(value.item(), where)
    raise TypeError(
        f"{where or 'value'} is a {type(value).__name__}, which JSON cannot hold; pass numbers, "
        "strings, lists and mappings"
    )


def decode(value: Any) -> Any:
    """Inverse of ``encode`` up to tuples, which come back as lists."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def to_json(encoded: Any) -> bytes:
    text = json.dumps(encoded, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def digest(obj: Any) -> str:
    """SHA-256 (64 hex digits) of ``obj`` as canonical JSON: sorted keys, no white space."""
    text = json.dumps(
        encode(obj), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def json_digest(value: Any) -> str:
    """``digest(decode(value))`` of what strict JSON said, which ``encode`` would not change."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def number(value: Any) -> float:
    """A metric or a cost: a number, where ``null`` too means NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a metric or cost must be a number, got {value!r}")
    return float(value)
