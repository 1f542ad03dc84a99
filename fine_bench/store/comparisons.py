"""What comparing the seeds of one row gave, kept so that tables outlive scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fine_bench.store.digest import FORMAT, decode, digest, encode, number, to_json


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

    @property
    def digest(self) -> str:
        """Covers what was compared: score digests by seed, k and metric version."""
        return consistency_digest(self.scores, self.k, self.metric_version)


def consistency_digest(scores: Mapping[int, str], k: int, metric_version: int) -> str:
    """Digest of the sorted score digests (with their seeds), k and the version of the metrics."""
    return digest([sorted([sha, seed] for seed, sha in scores.items()), k, metric_version])


def consistency_json(consistency: Consistency) -> bytes:
    """The file of a comparison."""
    payload = {f.name: getattr(consistency, f.name) for f in fields(consistency)}
    pairs = [[a, b, dict(values)] for (a, b), values in sorted(consistency.pairs.items())]
    payload |= {"format": FORMAT, "kind": "consistency", "pairs": pairs}
    return to_json(encode(payload))


def consistency_from(payload: Mapping[str, Any]) -> Consistency:
    try:
        found = Consistency(
            **{name: str(payload[name]) for name in ("task", "setting", "estimator", "target")},
            k=int(payload["k"]),
            metric_version=int(payload["metric_version"]),
            scores={int(seed): str(sha) for seed, sha in payload["scores"].items()},
            pairs={
                (int(a), int(b)): {name: number(x) for name, x in decode(values).items()}
                for a, b, values in payload["pairs"]
            },
            variation={name: number(x) for name, x in decode(payload["variation"]).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a consistency file: {type(error).__name__} {error}") from None
    if any(seed not in found.scores for pair in found.pairs for seed in pair):
        raise ValueError("compares seeds whose scores it does not name")
    return found
