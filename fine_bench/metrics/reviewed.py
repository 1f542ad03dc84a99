"""Detection among the examples that people reviewed, and no others.

Where errors were sought by some model first and only its suspects were shown to people, an error
that the model did not suspect counts as right among all examples, and a score like the model's own
gains by it. Among the reviewed alone every label was judged in the same way, so that methods may be
compared there; the numbers of ``metrics.detection`` over all known examples stand beside.
"""

from __future__ import annotations

from fine_bench.metrics.detection import detection_metrics
from fine_bench.metrics.registry import Given, Metric, metric

REVIEWED = "among reviewed examples alone"


@metric(
    Metric("reviewed_average_precision", "avg. precision", "higher", table=REVIEWED,
           title="average precision among the reviewed examples", rank=20,
           note="Among the reviewed alone: every one of them was judged by people, so methods may "
           "be compared here; among all known examples, an error that the reviewers' own model "
           "did not suspect counts as right."),
    Metric("reviewed_auroc", "AUROC", "higher", table=REVIEWED,
           title="AUROC among the reviewed examples", rank=21),
    Metric("n_reviewed", "reviewed examples", unit="examples", table=""),
    needs=["bad", "reviewed"],
)  # fmt: skip
def among_reviewed(given: Given) -> dict[str, float]:
    """Average precision and AUROC of the reviewed; their number alone where all are alike."""
    assert given.reviewed is not None
    chosen = given.reviewed.cpu().numpy()
    found = {"n_reviewed": float(chosen.sum())}
    bad = given.bad[chosen]
    if 0 < int(bad.sum()) < len(bad):
        numbers = detection_metrics(given.suspicion[chosen], bad)
        found |= {f"reviewed_{name}": numbers[name] for name in ("average_precision", "auroc")}
    return found
