"""What the targets ask, in words for figures and pages."""

from __future__ import annotations

from collections.abc import Mapping

from fine_bench.types import SUSPICIOUS_END, End

TARGET_TITLES: Mapping[str, str] = {
    "self": "target self: influence on its own prediction",
    "validation": "target validation: influence on clean queries",
    "queries": "target queries: influence on single queries",
    "validation_per_class": "target validation, by class",
}
"""What each target asks; its own suspicious end, where no task declares another."""


def titles_of(ends: Mapping[str, End]) -> dict[str, str]:
    """Titles of targets: a task that declares the other end asks something else of its queries.

    Args:
        ends: by target, the suspicious end of its scores in this task's records.
    """
    found = {}
    for target, end in ends.items():
        title = TARGET_TITLES.get(target, f"target {target}")
        if end != SUSPICIOUS_END.get(target, end):
            title = f"target {target}: influence on this task's queries ({end} is suspicious)"
        found[target] = title
    return found


def caption_of(target: str, ends: Mapping[str, End]) -> str:
    """What a target asks, and which end of its scores is suspicious."""
    end = ends.get(target, SUSPICIOUS_END.get(target))
    title = titles_of({target: end}).get(target, "") if end else f"target {target}"
    return title if end is None or "is suspicious" in title else f"{title}; {end} is suspicious"
