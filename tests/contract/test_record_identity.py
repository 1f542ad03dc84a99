"""Code may move, records may not: every digest of every published record comes out again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fine_bench.runner import addresses
from fine_bench.runner.calls import ALWAYS_ALLOWED, Section, target_of
from fine_bench.runner.config import estimator_digest, setting_digest
from fine_bench.runner.schema import RunConfig, TrainerConfig
from fine_bench.store.records import RecordStore, Scan

RESULTS = Path(__file__).parents[2] / "results"


@pytest.fixture(scope="module")
def published() -> Scan:
    return RecordStore(RESULTS, published_only=True).scan()


def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def config_of(content: Mapping[str, Any]) -> RunConfig:
    trainer = OmegaConf.merge(OmegaConf.structured(TrainerConfig), plain(content["trainer"]))
    config = RunConfig(task=plain(content["task"]), model=plain(content["model"]))
    config.trainer = OmegaConf.to_object(trainer)  # type: ignore[assignment]
    return config


def test_there_are_published_records_and_none_is_damaged(published: Scan) -> None:
    assert len(published.records) >= 1800
    assert published.problems == []


def test_digests_follow_from_the_configuration(published: Scan) -> None:
    """``estimator_hash`` and ``setting``, as the runner makes them today."""
    settings: dict[str, str] = {}
    for record in published.records:
        who = f"{record.task} {record.estimator} {record.target} seed {record.seed}"
        assert estimator_digest(plain(record.config["estimator"])) == record.estimator_hash, who
        key = json.dumps([plain(record.config[k]) for k in ("task", "model", "trainer")])
        if key not in settings:
            settings[key] = setting_digest(config_of(record.config))
        assert settings[key] == record.setting, who


def test_every_recorded_address_leads_to_code(published: Scan) -> None:
    sections: dict[str, Section] = {"task": "task", "model": "model", "estimator": "estimators"}
    found = {
        (record.config[name]["_target_"], section)
        for record in published.records
        for name, section in sections.items()
    }
    for path, section in sorted(found):
        assert callable(target_of({"_target_": path}, "record", ALWAYS_ALLOWED, section))


def test_records_hold_the_address_of_the_day() -> None:
    for new, old in addresses.MOVED.items():
        assert addresses.today(old) == new
        assert addresses.today(new) == new
        options = {"_target_": new, "inner": [{"_target_": new, "x": 1}], "name": new}
        written = addresses.recorded(options)
        assert written == {"_target_": old, "inner": [{"_target_": old, "x": 1}], "name": new}
        assert estimator_digest(options) == estimator_digest(written)
    assert len(set(addresses.MOVED.values())) == len(addresses.MOVED)
