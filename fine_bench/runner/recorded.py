"""The job behind a record: its configuration checked, its data made again.

A record is a file, and may be anybody's. What it names is called only if it is a task, a model or
an estimator (``calls``) of a package that the user allows; it names no places on this disk, allows
no download, and reads no variable of the environment. Whatever else goes wrong while its data are
made is the record's failure, with its reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf

from fine_bench.errors import ConfigError, DataError, UserError
from fine_bench.llm.hub import is_name
from fine_bench.runner.calls import ALWAYS_ALLOWED, target_of
from fine_bench.runner.config import PLACES, check
from fine_bench.runner.plan import Job, plan
from fine_bench.store.plausibility import FILES
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
    if record.data_sha256 and not job.made(record.data_sha256):
        raise DataError(
            f"the data of {record.task} are no longer those of the records: their digest is "
            f"{job.data_sha256[:8]}, the records' {record.data_sha256[:8]}. Run the task again"
        )
    return job


OWN_FILES = ("path", "queries_path", "test_path")
"""Options of a task that name files of the user's own; a record keeps their digests alone."""


def digests_of(files: Any) -> dict[str, str]:
    """Option → SHA-256, from what a record or a task says of the user's own files."""
    if not isinstance(files, Mapping):
        return {}
    return {
        str(option): str(file["sha256"])
        for option, file in files.items()
        if isinstance(file, Mapping) and "sha256" in file
    }


def cell_of(
    record: RunRecord,
    folder: Path,
    allow_packages: Sequence[str] = (),
    files: Mapping[str, Path] = MappingProxyType({}),
) -> Job:
    """The run that makes this record alone, its results below ``folder``.

    Args:
        record: a finished one.
        folder: where its results go.
        allow_packages: as in ``job_of``.
        files: where the user's own files lie, by ``OWN_FILES``: the user says it, never a record.

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
    needed = digests_of(record.training.get(FILES))
    if missing := [option for option in (needed or (files and OWN_FILES)) if option not in files]:
        words = " ".join(f"--{option.replace('_', '-')} FILE" for option in missing)
        raise ConfigError(
            f"the record of {record.estimator} seed {record.seed} is of somebody's own files, and "
            f"a record says nothing of where they lie; add {words}"
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
        files=files,
    )


def _planned(
    record: RunRecord,
    sections: Sequence[str],
    allow_packages: Sequence[str],
    files: Mapping[str, Path] = MappingProxyType({}),
    **more: Any,
) -> Job:
    for value in (record.estimator, record.varies, record.target, record.config):
        _refuse_references(value)
    config = {section: _section(record.config[section], section) for section in sections}
    for section in ("task", "model", "estimator"):
        if section in sections:
            _check_package(config[section], section, allow_packages)
    config["task"] = _without_download(
        _without_places(config["task"], "task", PLACES - {"download"}), allow_packages
    )
    for option, file in files.items():
        if "${" in str(file):
            raise ConfigError(
                f"--{option.replace('_', '-')} {file} has ${{ in its name, which a configuration "
                "would replace; give the file another name"
            )
    config["task"] |= {option: str(file) for option, file in files.items()}
    config["model"] = _model(config["model"], "model")
    if isinstance(config["task"].get("model"), Mapping):
        config["task"]["model"] = _model(config["task"]["model"], "task.model")
    chosen: Mapping[str, Any] = {
        "seed": record.seed,
        **{section: config[section] for section in ("task", "model", "trainer")},
        "allow_packages": list(allow_packages),
        **more,
    }
    try:
        return plan(check(OmegaConf.create(dict(chosen))))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"the configuration in the record of {record.estimator} seed {record.seed} cannot be "
            f"planned: {type(error).__name__}: {error}"
        ) from error


def _section(options: Any, where: str) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"the record's config.{where} is {options!r:.40}, where a section belongs; it cannot "
            "be computed again"
        )
    return dict(options)


def _refuse_references(value: Any) -> None:
    """Strings of a record are values: ``${oc.env:SECRET}`` is none, and is never resolved."""
    if isinstance(value, Mapping):
        for pair in value.items():
            _refuse_references(pair)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_references(inner)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(
            f"the record holds {value[:60]!r}; a record holds values, no references, so it cannot "
            "be computed again"
        )


def _without_places(options: Mapping[str, Any], where: str, places: Set[str]) -> dict[str, Any]:
    for key in sorted(places & set(options)):
        if options[key] not in (None, False):
            raise ConfigError(
                f"the record's config.{where}.{key} is {options[key]!r:.60}; a record says nothing "
                "about files of this machine, so it cannot be computed again"
            )
    return {key: value for key, value in options.items() if key not in places}


def _without_download(options: Mapping[str, Any], allowed: Sequence[str]) -> dict[str, Any]:
    """Records of before places were left out say ``download: true``; nothing is fetched for any."""
    own = {key: value for key, value in options.items() if key != "download"}
    make = target_of(own, "task", (*ALWAYS_ALLOWED, *allowed))
    if "download" in inspect.signature(make).parameters:
        own["download"] = False
    return own


def _model(options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A language model is the name of one that is on this machine; nothing is fetched."""
    if "path" in options and not is_name(options["path"]):
        return _without_places(options, where, {"path"})
    return {key: value for key, value in options.items() if key != "download"}


def _check_package(options: Mapping[str, Any], section: str, allowed: Sequence[str]) -> None:
    """Refuse a record's ``_target_`` outside of the packages that the user trusts."""
    path = str(options.get("_target_", ""))
    package = path.partition(".")[0]
    if package not in (*ALWAYS_ALLOWED, *allowed):
        raise ConfigError(
            f"the records name {path} as their {section}, which lies outside of fine_bench; if "
            f"you trust it, add --allow-packages {package}"
        )
