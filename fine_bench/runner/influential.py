"""Which of the user's own language samples drive the given completions: μ beside the text.

After a sweep over language data from files, each row of f-INE that was asked about the given
completions (*validation*) has a list of all samples, the largest μ first: what training on the
sample does to those completions, μ > 0 if it makes them likelier. Over several seeds μ is the mean,
with the interval of ``clean.scoring.interval_over_runs``; of one seed it is that run's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fine_bench.llm.task import LanguageTask
from fine_bench.runner.clean.scoring import interval_over_runs
from fine_bench.runner.plan import Cell, Job
from fine_bench.store.files import StoreError, slug
from fine_bench.store.records import RecordStore
from fine_bench.types import InfluenceScores

FOLDER = "influential"
"""Below the results: lists of samples with their texts."""


@dataclass(frozen=True, eq=False)
class Listing:
    """The samples of one task by their influence, as one row of the leaderboard sees it.

    Attributes:
        task, estimator: whose.
        path: of the list without its ending, below the results.
        seeds: runs that it is of.
        table: a line for each sample that has a score, the largest μ first: ``rank`` from 1,
            ``mu`` with ``mu_low`` and ``mu_high`` (missing where one run saw too little of the
            sample), ``runs``, ``source`` (missing where unknown), ``line`` in the file from 1,
            ``prompt``, ``completion``; and ``poison`` where the data say who is.
    """

    task: str
    estimator: str
    path: Path
    seeds: tuple[int, ...]
    table: pd.DataFrame


def own_language(jobs: Iterable[Job]) -> list[Job]:
    """The jobs whose samples are the user's own."""
    return [job for job in jobs if isinstance(job.data, LanguageTask) and job.data.files]


def listings(jobs: Sequence[Job]) -> list[Listing]:
    """A list for each f-INE row of each task and setting, from the scores that are stored.

    Args:
        jobs: of a sweep. Cells without whole scores are left out: the leaderboard names them.
    """
    found: dict[tuple[Any, ...], dict[int, InfluenceScores]] = {}
    first: dict[tuple[Any, ...], Job] = {}
    for job in own_language(jobs):
        for cell in job.cells:
            if not _asked(cell):
                continue
            scores = _scores(job, cell)
            if scores is not None and scores.std_error is not None:
                key = (job.results, job.setting, job.data_sha256, cell.estimator,
                       cell.estimator_hash)  # fmt: skip
                first.setdefault(key, job)
                found.setdefault(key, {})[job.config.seed] = scores
    made = []
    for key, by_seed in found.items():
        job, (root, setting, data, estimator, options) = first[key], key
        assert isinstance(job.data, LanguageTask)
        name = f"{slug(job.data.name)}-{setting[:8]}-{data[:8]}-{slug(estimator)}-{options[:8]}"
        table = table_of(job.data, list(by_seed.values()))
        made.append(Listing(job.data.name, estimator, root / FOLDER / name, tuple(by_seed), table))
    return made


def _asked(cell: Cell) -> bool:
    return cell.watches_all and cell.target == "validation" and not cell.variation


def _scores(job: Job, cell: Cell) -> InfluenceScores | None:
    store = RecordStore(job.results)
    record = job.done(store, cell)
    with suppress(StoreError):
        if record is not None and record.status == "finished":
            return store.load_scores(record)
    return None


def table_of(task: LanguageTask, runs: Sequence[InfluenceScores]) -> pd.DataFrame:
    """``Listing.table`` from the scores of several runs.

    Args:
        task: whose samples they are.
        runs: scores of the target ``validation``, ``(1, n_train)`` each, with standard errors.
    """
    parts = [_known(scores) for scores in runs]
    mu, error = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    mean, low, high = interval_over_runs(mu, error)
    columns: dict[str, Any] = {
        "rank": 0,
        "mu": mean,
        "mu_low": low,
        "mu_high": high,
        "runs": (~np.isnan(mu)).sum(axis=0),
        "source": [s.group for s in task.samples],
        "line": [s.line for s in task.samples],
        "prompt": [s.prompt for s in task.samples],
        "completion": [s.completion for s in task.samples],
    }
    if any(s.is_bad is not None for s in task.samples):
        columns["poison"] = [s.is_bad for s in task.samples]
    table = pd.DataFrame(columns)
    table = table[table["runs"] > 0].sort_values("mu", ascending=False, kind="stable")
    table["rank"] = np.arange(1, len(table) + 1)
    return table.reset_index(drop=True)


def _known(scores: InfluenceScores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """μ and its standard error, ``(n_train,)`` each; NaN for what has none."""
    assert scores.std_error is not None
    mu, error = (a[0].double().numpy().copy() for a in (scores.values, scores.std_error))
    if scores.watched is not None:
        unwatched = np.ones(len(mu), dtype=np.bool_)
        unwatched[scores.watched.numpy()] = False
        mu[unwatched] = np.nan
    return mu, error
