"""Which bank is this? What all its models have in common, and how two banks differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fine_bench.store.digest import digest


def as_json(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it comes back from a file."""
    found: dict[str, Any] = json.loads(json.dumps(identity))
    return found


def bank_folder(root: Path | str, identity: Mapping[str, Any]) -> Path:
    """Where below ``root`` the bank of this identity lies, if there is one."""
    return Path(root) / f"{identity['task']}-{digest(identity)[:8]}"


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """What differs between two identities, one line each: where, what is there, what was asked."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        lines = []
        for key in sorted({*found, *expected}):
            full = f"{where}.{key}" if where else str(key)
            lines += differences(found.get(key), expected.get(key), full)
        return lines
    return [] if found == expected else [f"{where} is {found!r} there, asked for is {expected!r}"]
