"""A bank on the disk: whole, growing, and never taken for another one."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fine_bench.retraining.bank import Bank, find_bank
from fine_bench.retraining.design import Model, definition_models, repeated_models, single_models
from fine_bench.retraining.identity import bank_folder, differences
from fine_bench.retraining.outputs import BankModels
from fine_bench.store.files import StoreError

N, Q = 21, 3
IDENTITY: dict[str, Any] = {
    "task": "toy",
    "data_sha256": "ab" * 32,
    "n_train": N,
    "n_query": Q,
    "details": {"trainer": {"lr": 0.1, "max_epochs": 3}, "model": {"hidden": (4, 5)}},
    "design": {"seed": 0, "keep": 0.5},
}


def values(models: list[Model], n: int = N, q: int = Q) -> BankModels:
    """Arrays that depend on the model alone."""
    rows = []
    for model in models:
        rng = np.random.default_rng([model.subset % 2**32, model.run])
        members = rng.random(n) < 0.5
        floats = [rng.normal(size=size).astype(np.float32) for size in (n, n, q, q)]
        rows.append((members, model.subset, 10 * model.subset + model.run, *floats))
    members, subset, seed, *floats = (np.stack(column) for column in zip(*rows, strict=True))
    return BankModels(members, subset, seed, *floats)


def equal(a: BankModels, b: BankModels) -> bool:
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__
    )


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return Bank.create(tmp_path / "bank", IDENTITY, bad=np.array([2, 5]))


def files(bank: Bank) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(bank.folder.rglob("*")) if p.is_file()}


def test_what_goes_in_comes_out(bank: Bank) -> None:
    models = single_models(12)
    bank.add(models[:5], values(models[:5]))
    bank.add(models[5:], values(models[5:]))
    found = Bank.open(bank.folder).part("single")
    assert found is not None
    assert equal(found, values(models))
    assert found.loss.dtype == found.query_margin.dtype == np.float32
    assert found.members.dtype == np.bool_
    assert bank.present("single") == {(k, 0) for k in range(12)}
    assert bank.part("repeated") is None
    assert bank.present("definition") == set()


def test_models_come_in_the_order_of_subset_and_run(bank: Bank) -> None:
    models = repeated_models(3, 5)
    shuffled = [models[k] for k in np.random.default_rng(0).permutation(len(models))]
    for start in (0, 4, 8, 12):
        bank.add(shuffled[start : start + 4], values(shuffled[start : start + 4]))
    assert equal(bank.load("repeated"), values(models))


def test_growing_changes_nothing_that_is_there(bank: Bank) -> None:
    models = single_models(20)
    bank.add(models[:8], values(models[:8]))
    bank.add_sets({"a": [3, 1]})
    before = files(bank)
    again = Bank.create(bank.folder, IDENTITY)
    again.add(models[8:], values(models[8:]))
    again.add_sets({"a": [1, 3], "b": [2]})
    after = files(again)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 2
    assert equal(again.load("single").take(np.arange(8)), values(models[:8]))


def test_the_same_models_twice_count_once(bank: Bank) -> None:
    models = single_models(6)
    first = bank.add(models, values(models))
    assert bank.add(models, values(models)) == first
    other = replace(values(models[:4]), loss=np.zeros((4, N), dtype=np.float32))
    assert bank.add(models[:4], other) != first
    assert len(bank.load("single")) == 6


def test_writers_at_once_never_tear_a_chunk(bank: Bank) -> None:
    models = single_models(16)
    failures: list[Exception] = []

    def write() -> None:
        try:
            for start in range(0, 16, 4):
                bank.add(models[start : start + 4], values(models[start : start + 4]))
                bank.present("single")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert equal(bank.load("single"), values(models))
    assert not list(bank.folder.rglob("*.tmp"))


def test_what_the_manifest_says(bank: Bank) -> None:
    manifest = json.loads((bank.folder / "manifest.json").read_text())
    assert manifest["bad"] == [2, 5]
    assert manifest["format"] == 1
    assert manifest["task"] == "toy"
    assert {"created", "environment"} <= set(manifest)
    assert bank.identity == json.loads(json.dumps(IDENTITY))


def test_sets_have_names(bank: Bank) -> None:
    assert bank.sets() == {}
    bank.add_sets({"b": [4, 2], "example_3": [3]})
    bank.add_sets({"a/ß": np.array([1])})
    assert bank.sets() == {"a/ß": (1,), "b": (2, 4), "example_3": (3,)}
    with pytest.raises(StoreError, match=r"the set 'b' of .* holds 2 other positions"):
        bank.add_sets({"b": [2]})
    next((bank.folder / "sets").glob("*.json")).write_text("{")
    with pytest.raises(StoreError, match=r"is damaged .*run fine-bench bank again"):
        bank.sets()


def test_leftovers_of_killed_writers_go_when_they_are_old(bank: Bank) -> None:
    bank.add(single_models(2), values(single_models(2)))
    old, new = bank.folder / "single" / ".1-ab.tmp", bank.folder / ".2-cd.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90000,) * 2)
    bank.remove_leftovers()
    assert not old.exists()
    assert new.exists()
    assert len(bank.present("single")) == 2


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("task",), "other", "task is 'toy' there, asked for is 'other'"),
        (("data_sha256",), "cd" * 32, "data_sha256 is 'abab"),
        (("details", "trainer", "lr"), 0.2, r"details\.trainer\.lr is 0\.1 there, .* is 0\.2"),
        (("details", "model", "hidden"), [4], r"details\.model\.hidden is \[4, 5\] there"),
        (("design", "keep"), 0.9, r"design\.keep is 0\.5 there, asked for is 0\.9"),
        (("design", "vary"), "order", r"design\.vary is None there, asked for is 'order'"),
    ],
)
def test_another_bank_is_refused(bank: Bank, path: Any, value: Any, message: str) -> None:
    wanted = json.loads(json.dumps(IDENTITY))
    inner = wanted
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    for make in (Bank.open, Bank.create):
        with pytest.raises(StoreError, match=message):
            make(bank.folder, wanted)
    with pytest.raises(StoreError, match=f"Those that are there:\n  bank: {message}"):
        find_bank(bank.folder.parent, wanted)
    assert Bank.open(bank.folder, IDENTITY).identity == bank.identity


def test_finding_a_bank(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no bank of this .*; train one with fine-bench bank"):
        find_bank(tmp_path, IDENTITY)
    made = Bank.create(bank_folder(tmp_path, IDENTITY), IDENTITY)
    assert find_bank(tmp_path, IDENTITY).folder == made.folder
    assert differences(made.identity, made.identity) == []


def test_no_bank_and_a_broken_manifest(bank: Bank) -> None:
    with pytest.raises(StoreError, match=r"holds no bank: there is no manifest.json"):
        Bank.open(bank.folder / "single")
    manifest = bank.folder / "manifest.json"
    good = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**good, "format": 2}))
    with pytest.raises(StoreError, match="has format 2, this fine_bench reads format 1"):
        Bank.open(bank.folder)
    for bad in ("{", "[]", '{"format": 1}'):
        manifest.write_text(bad)
        with pytest.raises(StoreError, match=r"cannot be read .*restore it from a copy"):
            Bank.open(bank.folder)


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_truncated_chunk_is_named(bank: Bank, keep: int) -> None:
    models = single_models(12)
    bank.add(models[:6], values(models[:6]))
    path = bank.add(models[6:], values(models[6:]))
    path.write_bytes(path.read_bytes()[:keep])
    for read in (bank.present, bank.load):
        with pytest.raises(StoreError, match=f"{re.escape(str(path))} is damaged or incomplete"):
            read("single")


def test_a_chunk_with_other_bytes_is_named(bank: Bank) -> None:
    path = bank.add(single_models(12), values(single_models(12)))
    blob = bytearray(path.read_bytes())
    blob[-5] ^= 1
    path.write_bytes(blob)
    with pytest.raises(StoreError, match=f"{re.escape(str(path))} is damaged .*not those that"):
        bank.load("single")


def test_a_chunk_of_another_bank_part_or_format_is_named(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = repeated_models(1, 5)
    path = bank.add(models, values(models))
    (bank.folder / "single").mkdir()
    shutil.copy(path, bank.folder / "single")
    other = Bank.create(bank.folder.parent / "other", {**IDENTITY, "task": "other"})
    (other.folder / "repeated").mkdir()
    shutil.copy(path, other.folder / "repeated")
    for place, part in ((bank, "single"), (other, "repeated")):
        for read in (place.present, place.load):
            with pytest.raises(StoreError, match="belongs to another bank or part"):
                read(part)  # type: ignore[arg-type]
    monkeypatch.setattr("fine_bench.retraining.bank.FORMAT", 2)
    with pytest.raises(StoreError, match="has format 1, this fine_bench reads format 2"):
        bank.load("repeated")


def test_examples_that_are_in_all_models_or_in_none(bank: Bank) -> None:
    models = single_models(12)
    good = values(models)
    for value, state in ((True, "all of the models have"), (False, "none of the models has")):
        members = good.members.copy()
        members[:, 4] = value
        fresh = Bank.create(bank.folder.parent / str(value), IDENTITY)
        fresh.add(models, replace(good, members=members))
        with pytest.raises(StoreError, match=rf"{state} example 4 .*bank\.models=32"):
            fresh.load("single")
    # on all data every model has every example, and that is how it should be
    definition = definition_models({}, 3, 0)
    everything = replace(values(definition), members=np.ones((3, N), dtype=np.bool_))
    bank.add(definition, everything)
    assert bank.load("definition").members.all()


def test_too_few_models(bank: Bank) -> None:
    models = single_models(12)
    bank.add(models, values(models))
    assert len(bank.load("single", at_least=12)) == 12
    with pytest.raises(StoreError, match="holds 12 models, at least 13 are needed"):
        bank.load("single", at_least=13)
    with pytest.raises(StoreError, match=r"'repeated' of .* holds 0 models, at least 1"):
        bank.load("repeated")


def test_chunks_that_do_not_fit_are_refused_before_anything_is_written(bank: Bank) -> None:
    models = single_models(2)
    with pytest.raises(ValueError, match=r"= \(2, 21, 3\) in this bank; got .* \(2, 20, 3\)"):
        bank.add(models, values(models, n=20))
    mixed = [models[0], repeated_models(1, 5)[0]]
    with pytest.raises(ValueError, match=r"got parts .*repeated.*single"):
        bank.add(mixed, values(mixed))
    with pytest.raises(ValueError, match="part must be one of"):
        bank.present("singles")  # type: ignore[arg-type]
    assert not list(bank.folder.rglob("*.safetensors"))
