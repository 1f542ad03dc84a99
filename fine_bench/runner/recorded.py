"""The job behind a record: its configuration checked, its data made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.calls import ALWAYS_ALLOWED
from fine_bench.runner.config import check
from fine_bench.runner.plan import Job, plan
from fine_bench.types import RunRecord


def job_of(record: RunRecord, allow_packages: Sequence[str] = ()) -> Job:
    """The run behind a record, to train its model again: no estimator is asked.

    Args:
        record: any record of the task and setting.
        allow_packages: packages besides ``fine_bench`` and ``baselines`` that it may name. A
            record is a file: what it says is trusted is not asked.

    Raises:
        ConfigError: a configuration that this version does not read, or a package not allowed.
        DataError: the data are missing, or not those of the record.
    """
    sections = ("task", "model", "trainer")
    if not set(sections) <= set(record.config):
        raise ConfigError(
            f"the record of {record.estimator} seed {record.seed} holds no full configuration "
            f"(task, model and trainer are needed); run {record.task} again with force=true"
        )
    job = _planned(
        record,
        sections,
        allow_packages,
        targets=["self"],
        # a run needs an estimator; this one is never asked
        estimators={"random": {"_target_": "baselines.controls.RandomScores"}},
    )
    if record.data_sha256 and job.data.sha256 != record.data_sha256:
        raise DataError(
            f"the data of {record.task} are no longer those of the records: their digest is "
            f"{job.data.sha256[:8]}, the records' {record.data_sha256[:8]}. Run the task again"
        )
    return job


def cell_of(record: RunRecord, folder: Path, allow_packages: Sequence[str] = ()) -> Job:
    """The run that makes this record alone, its results below ``folder``.

    Raises:
        ConfigError: a record without a full configuration, one that this version does not read,
            or a package that the user did not allow.
        DataError: the data are missing or damaged.
    """
    sections = ("estimator", "model", "task", "trainer")
    if not set(sections) <= set(record.config):
        raise ConfigError(
            f"the record of {record.estimator} seed {record.seed} holds no full configuration "
            f"({', '.join(sections)} are needed), so it cannot be computed again"
        )
    return _planned(
        record,
        sections,
        allow_packages,
        targets=[record.target],
        estimators={record.varies or record.estimator: record.config["estimator"]},
        query_weighting=record.config.get("query_weighting"),
        results_dir=str(folder),
        force=True,
    )


def _planned(
    record: RunRecord, sections: Sequence[str], allow_packages: Sequence[str], **more: Any
) -> Job:
    config = record.config
    for section in ("task", "model", "estimator"):
        if section in sections:
            _check_package(config[section], section, allow_packages)
    chosen: Mapping[str, Any] = {
        "seed": record.seed,
        **{section: config[section] for section in ("task", "model", "trainer")},
        "allow_packages": list(allow_packages),
        **more,
    }
    return plan(check(OmegaConf.create(dict(chosen))))


def _check_package(options: Mapping[str, Any], section: str, allowed: Sequence[str]) -> None:
    """Refuse a record's ``_target_`` outside of the packages that the user trusts."""
    path = str(options.get("_target_", ""))
    package = path.partition(".")[0]
    if package not in (*ALWAYS_ALLOWED, *allowed):
        raise ConfigError(
            f"the records name {path} as their {section}, which lies outside of fine_bench; if "
            f"you trust it, add --allow-packages {package}"
        )
