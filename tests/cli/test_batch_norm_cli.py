"""A ResNet-9 with batch normalisation runs through every method for images."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fine_bench.store.records import RecordStore
from support.commands import Commands

CONF = Path(__file__).parents[2] / "conf" / "estimator"
LANGUAGE = {"bm25", "length", "perplexity", "representation_similarity", "less"}
METHODS = sorted(
    path.stem
    for path in CONF.glob("*.yaml")
    if "llm" not in path.stem and path.stem not in LANGUAGE
)
SMALL = [
    "task.n_train=40", "task.n_query=6", "trainer.max_epochs=2", "trainer.batch_size=8",
    "trainer.num_threads=1", "model=resnet9_bn", "model.width=2",
    "estimators.trak_last.dim=8", "estimators.trak_runs.dim=8", "estimators.trak_runs.runs=2",
    "estimators.lissa.depth=5", "estimators.arnoldi.krylov=5", "estimators.trak.dim=8",
    "estimators.fine_paper.sample=8", "estimators.fine_paper.every_n_steps=1",
    "estimators.seed_ensemble.runs=2",
]  # fmt: skip
MAY_SKIP = {
    "unrolled": "mixes the examples of a batch",
    "unrolled_gauss_newton": "mixes the examples of a batch",
    "kfac": "has no Kronecker factors",  # nor has any other normalisation
    "mean_over_runs": "has no Kronecker factors",  # its base method is kfac
    "confident_learning": "needs the package cleanlab",
}
"""Methods that have no reading of batch normalisation, and say so; extras that may not be there."""


@pytest.mark.any_trainer("batch normalisation")
def test_every_method_scores_it_or_says_why_not(cli: Commands, tmp_path: Path) -> None:
    chosen = f"estimator=[{','.join(METHODS)}]"
    done = cli.run("fine_bench", f"results_dir={tmp_path}", *SMALL, chosen, "seed=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "batch normalisation in net.1 and 7 more" in done.stdout + done.stderr
    records = RecordStore(tmp_path).scan().records
    assert {r.estimator for r in records} == set(METHODS)
    assert {r.status for r in records} == {"finished", "skipped"}
    scored = {r.estimator for r in records if r.status == "finished"}
    for record in records:
        if record.estimator not in scored:
            assert MAY_SKIP.get(record.estimator, "no such method") in (record.reason or "")


def test_the_lists_are_those_of_the_folder() -> None:
    """Language methods are told from others by what they are, so that none is forgotten."""
    for name in METHODS:
        options = yaml.safe_load((CONF / f"{name}.yaml").read_text())
        assert not options["_target_"].startswith("fine_bench.llm"), name
