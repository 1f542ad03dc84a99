"""What comparing the seeds of one row gave, kept so that tables outlive scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fine_bench.store.digest import FORMAT, decode, digest, encode, json_digest, number, to_json
from fine_bench.store.plausibility import check_numbers


@dataclass(frozen=True)
class Consistency:
    """What comparing the seeds of one leaderboard row gave, kept so that tables outlive scores.

    Attributes:
        task, setting, estimator, target: the row.
        k: the k of Jaccard@k, the number of bad examples.
        metric_version: version of the metrics, raised when their values may change.
        scores: seed → digest of the scores compared.
        pairs: (seed_a, seed_b) with seed_a < seed_b → metric values by name.
        variation: summary of the per-example coefficient of variation over the seeds.
        sealed: whether its file carries a digest of its numbers, which held. Files of before there
            was one do not; their numbers are computed again where the scores are at hand.
    """

    task: str
    setting: str
    estimator: str
    target: str
    k: int
    metric_version: int
    scores: Mapping[int, str]
    pairs: Mapping[tuple[int, int], Mapping[str, float]]
    variation: Mapping[str, float] = field(default_factory=dict)
    sealed: bool = field(default=True, compare=False)

    @property
    def digest(self) -> str:
        """Covers what was compared: score digests by seed, k and metric version."""
        return consistency_digest(self.scores, self.k, self.metric_version)


def consistency_digest(scores: Mapping[int, str], k: int, metric_version: int) -> str:
    """Digest of the sorted score digests (with their seeds), k and the version of the metrics."""
    return digest([sorted([sha, seed] for seed, sha in scores.items()), k, metric_version])


def consistency_json(consistency: Consistency) -> bytes:
    """The file of a comparison."""
    names = [f.name for f in fields(consistency) if f.name != "sealed"]
    payload = {name: getattr(consistency, name) for name in names}
    pairs = [[a, b, dict(values)] for (a, b), values in sorted(consistency.pairs.items())]
    payload |= {"format": FORMAT, "kind": "consistency", "pairs": pairs}
    return to_json(encode({**payload, "sha256": digest(payload)}))


def consistency_from(payload: Mapping[str, Any]) -> Consistency:
    """The comparison that a JSON object describes.

    Args:
        payload: as ``guarded.parse_json`` gives it.

    Raises:
        ValueError: it is none, it was edited (the digest in it is that of other numbers), or its
            numbers cannot be.
    """
    try:
        found = Consistency(
            **{name: str(payload[name]) for name in ("task", "setting", "estimator", "target")},
            k=_whole(payload["k"]),
            metric_version=_whole(payload["metric_version"]),
            scores={int(seed): str(sha) for seed, sha in payload["scores"].items()},
            pairs={
                (_whole(a), _whole(b)): {name: number(x) for name, x in decode(values).items()}
                for a, b, values in payload["pairs"]
            },
            variation={name: number(x) for name, x in decode(payload["variation"]).items()},
            sealed="sha256" in payload,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a consistency file: {type(error).__name__} {error}") from None
    seal = {key: value for key, value in payload.items() if key != "sha256"}
    if found.sealed and payload["sha256"] != json_digest(seal):
        raise ValueError("was edited: its digest is that of other numbers; remove the file")
    if any(a >= b or {a, b} - found.scores.keys() for a, b in found.pairs):
        raise ValueError("compares seeds whose scores it does not name")
    for numbers in (*found.pairs.values(), found.variation):
        check_numbers(numbers)
    return found


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r:.60} is no whole number")
    return value
