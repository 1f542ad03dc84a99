"""The store: roundtrips, crashes, full disks, damage, several writers."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fine_bench.store import environment as environment_module
from fine_bench.store import files as files_module
from fine_bench.store.comparisons import Consistency
from fine_bench.store.digest import digest
from fine_bench.store.environment import BITS, environment
from fine_bench.store.files import StoreError
from fine_bench.store.record_json import IDENTITY
from fine_bench.store.records import RecordStore, newest
from fine_bench.store.scores import pack, scores_digest
from fine_bench.types import InfluenceScores, RunRecord
from support.records import make_record


def make_scores(seed: int = 0, n: int = 7, **changes: Any) -> InfluenceScores:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(1, n, generator=draw)
    return InfluenceScores(values=values, method="fine", target="self", **changes)


def failed(**changes: Any) -> RunRecord:
    return make_record(status="failed", reason="NaN loss", scores_sha256="", **changes)


def files(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


# ---------------------------------------------------------------------------------- roundtrips


def test_roundtrip_of_record_and_scores(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    scores = make_scores(
        std_error=torch.full((1, 7), math.inf),
        n_observations=torch.arange(7),
        extras={"bound": torch.ones(1, 7, dtype=torch.float64)},
        version=3,
    )
    record = make_record(
        metrics={"auroc": 0.1 + 0.2, "nan": math.nan},
        cost={"seconds": math.inf, "lost": -math.inf},
        config={"task": {"name": "digits", "sizes": (3, 4), "rate": np.float32(0.5), "none": None}},
        training={"loss": math.nan, "test_accuracy": torch.tensor(0.5)},
    )
    saved = store.save(record, scores)
    scan = store.scan()
    assert scan.problems == []
    (read,) = scan.records
    assert repr(read) == repr(saved)  # repr, because NaN differs from itself
    assert read.metrics["auroc"] == 0.1 + 0.2
    assert math.isnan(read.metrics["nan"])
    assert read.cost == {"seconds": math.inf, "lost": -math.inf}
    assert read.config["task"] == {"name": "digits", "sizes": [3, 4], "rate": 0.5, "none": None}
    assert math.isnan(read.training["loss"])
    assert read.created.endswith("+00:00")
    assert read.scores_sha256 == scores_digest(scores)

    back = store.load_scores(read)
    assert back.values.dtype == torch.float32
    assert torch.equal(back.values, scores.values)
    assert back.std_error is not None
    assert torch.equal(back.std_error, torch.full((1, 7), math.inf))
    assert back.n_observations is not None
    assert torch.equal(back.n_observations, torch.arange(7))
    assert torch.equal(back.extras["bound"], torch.ones(1, 7, dtype=torch.float64))
    assert (back.method, back.target, back.version) == ("fine", "self", 3)


def test_scores_of_some_examples_come_back_and_have_a_digest_of_their_own(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    watched = torch.tensor([1, 4, 5])
    scores = make_scores(watched=watched, extras={"lower": torch.ones(3)})
    back = store.load_scores(store.save(make_record(), scores))
    assert back.watched is not None
    assert torch.equal(back.watched, watched)
    assert torch.equal(back.watched_values, scores.values[:, watched])
    # the same values of all examples, or of others, are other scores
    everyone, others = make_scores(), make_scores(watched=torch.tensor([1, 4, 6]))
    assert len({scores_digest(s) for s in (scores, everyone, others)}) == 3
    assert everyone.watched_values is everyone.values


def test_the_digest_of_scores_of_all_examples_is_that_of_their_values() -> None:
    """Records written before scores of a sample existed keep their digests."""
    scores = InfluenceScores(torch.tensor([[1.0, -2.0, 0.5]]), "fine", "self")
    expected = "19765e1181a17a2e806c22d1871c4dbcf712769f55684aafee470cc48e5f19f2"
    assert scores_digest(scores) == expected


@pytest.mark.parametrize(
    ("watched", "message"),
    [
        (torch.tensor([0.5]), "positions .* of type int64"),
        (torch.tensor([[1]]), "positions .* of type int64"),
        (torch.tensor([1, 7]), "from 1 to 7, but there are 7"),
        (torch.tensor([-1]), "from -1 to -1"),
        (torch.tensor([2, 1]), "must ascend"),
        (torch.tensor([2, 2]), "must ascend"),
    ],
)
def test_watched_is_checked(watched: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_scores(watched=watched)


def test_json_is_strict_and_names_are_where_the_layout_says(tmp_path: Path) -> None:
    saved = RecordStore(tmp_path).save(make_record(metrics={"a": math.nan}), make_scores())
    record, scores = files(tmp_path)
    assert record.startswith("records/digits/01234567/fine--self--seed0--")
    assert record.endswith("--r1.json")
    assert scores == record.replace("records/", "scores/").replace(".json", ".safetensors")
    assert saved.scores_file == scores.removeprefix("scores/")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / record).read_text(), parse_constant=refuse)


def test_reasons_are_words_even_when_they_look_like_numbers(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    saved = store.save(replace(failed(), reason="NaN"), None)
    assert saved.reason == "NaN"
    assert store.scan().records == [saved]


def test_float64_scores_stay_float64_and_views_can_be_saved(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    big = torch.randn(7, 4, dtype=torch.float64).T[1:2]
    scores = InfluenceScores(values=big, method="m", target="self", std_error=big)
    back = store.load_scores(store.save(make_record(), scores))
    assert back.values.dtype == torch.float64
    assert torch.equal(back.values, big)


def test_the_same_scores_always_give_the_same_bytes() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    extras = {"b": values, "a": values}
    scores = InfluenceScores(values, "m", "queries", std_error=values, extras=extras)
    # safetensors by itself orders its metadata differently at every call
    assert len({pack(scores) for _ in range(20)}) == 1


def test_scores_digest_covers_type_shape_and_values() -> None:
    values = torch.zeros(2, 3)
    variants = [values, values.double(), values.reshape(3, 2), values + 1, values[:1], -values]
    scores = [InfluenceScores(values=v, method="m", target="queries") for v in variants]
    assert len({scores_digest(s) for s in scores}) == len(variants)  # 0 and -0 differ in bits


def test_awkward_names_stay_inside_the_store(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "results")
    record = make_record(task="../..", estimator="trak[dim=512]/é", setting="..")
    saved = store.save(record, make_scores())
    assert store.scan().records == [saved]
    assert all(name.startswith("results/") for name in files(tmp_path))
    assert store.load_scores(saved).values.shape == (1, 7)


def test_digest_is_canonical() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": (1, 2), "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": math.nan}) == digest({"a": math.nan})
    assert len(digest({})) == 64


@pytest.mark.parametrize(
    ("record", "scores", "error", "message"),
    [
        (make_record(), None, ValueError, "finished records have scores"),
        (failed(), make_scores(), ValueError, "comes with scores"),
        (make_record(scores_sha256="0" * 64), make_scores(), ValueError, "the record names scores"),
        (make_record(target="validation"), make_scores(), ValueError, "target"),
        (make_record(config={"f": print}), make_scores(), TypeError, r"config\.f is a builtin"),
        (make_record(config={"f": "NaN"}), make_scores(), ValueError, "the string 'NaN'"),
    ],
)
def test_contradictions_are_refused_and_leave_nothing(
    tmp_path: Path,
    record: RunRecord,
    scores: InfluenceScores | None,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        RecordStore(tmp_path).save(record, scores)
    assert files(tmp_path) == []


# ----------------------------------------------------------------------- revisions and versions


def test_recomputing_adds_a_revision_and_edits_nothing(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    first = store.save(make_record(), make_scores(0))
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    second = store.save(make_record(), make_scores(1))
    assert (first.revision, second.revision) == (1, 2)
    assert all((tmp_path / name).read_bytes() == data for name, data in before.items())
    assert newest(store.scan().records) == [second]
    assert torch.equal(store.load_scores(first).values, make_scores(0).values)


def test_a_revision_is_not_reused_even_if_its_record_is_unreadable(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(make_record(), make_scores())
    (path,) = (tmp_path / "records").rglob("*.json")
    path.write_text("{")
    assert store.save(make_record(), make_scores()).revision == 2
    assert path.read_text() == "{"


def find(store: RecordStore, record: RunRecord) -> RunRecord | None:
    return store.find(**{name: getattr(record, name) for name in IDENTITY})


@pytest.mark.parametrize("name", IDENTITY)
def test_every_part_of_the_identity_tells_records_apart(tmp_path: Path, name: str) -> None:
    store = RecordStore(tmp_path)
    one = make_record()
    old = getattr(one, name)
    new = old + 1 if isinstance(old, int) else old + "x" if name != "target" else "queries"
    two = replace(one, **{name: new})
    a = store.save(one, make_scores())
    assert find(store, two) is None
    values = make_scores()
    b = store.save(two, replace(values, target=two.target) if name == "target" else values)
    assert (a.revision, b.revision) == (1, 1)
    assert find(store, one) == a
    assert find(store, two) == b


def test_find_gives_the_newest_readable_revision(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(failed(), None)
    second = store.save(make_record(), make_scores())
    assert find(store, make_record()) == second
    (path,) = (tmp_path / "records").rglob("*--r2.json")
    path.write_text(path.read_text()[:50])
    found = find(store, make_record())
    assert found is not None
    assert (found.revision, found.status) == (1, "failed")


def test_newest_keeps_the_highest_method_version_of_a_cell() -> None:
    records = [
        make_record(version=1, revision=3),
        make_record(version=2, revision=1),
        make_record(version=2, revision=2),
        make_record(version=1, seed=1),
        make_record(version=1, estimator_hash="other"),
    ]
    kept = newest(records)
    assert kept == newest(reversed(records))
    assert {(r.seed, r.estimator_hash[:5], r.version, r.revision) for r in kept} == {
        (0, "feedf", 2, 2),
        (1, "feedf", 1, 1),
        (0, "other", 1, 1),
    }


def test_newest_lets_a_failure_before_the_data_were_known_count_only_if_it_is_the_last() -> None:
    done = make_record(created="2025-01-02")
    assert newest([done, failed(data_sha256="", created="2025-01-01")]) == [done]
    late = failed(data_sha256="", created="2025-01-03")
    assert newest([done, late]) == [late]


# -------------------------------------------------------------------------- crashes, full disks


# Processes are forked from a server that imported torch once: a fresh interpreter takes seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "pytest", "fine_bench.store.records"])


def start(work: Callable[..., None], *arguments: object) -> Any:
    process = CONTEXT.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def die_before_naming(root: Path, suffix: str) -> None:
    link = os.link
    files_module._link = lambda a, b: os._exit(9) if b.suffix == suffix else link(a, b)
    RecordStore(root).save(make_record(seed=1), make_scores(1))


def save_many(root: Path, n: int, ready: Any = None) -> None:
    store = RecordStore(root)
    if ready is not None:
        ready.set()
    for i in range(n):
        store.save(make_record(), make_scores(i, n=2000))


def test_a_crash_before_the_rename_leaves_no_record_and_is_cleaned(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(make_record(), make_scores())
    reference = files(tmp_path)
    for suffix in (".safetensors", ".json"):
        process = start(die_before_naming, tmp_path, suffix)
        process.join(60)
        assert process.exitcode == 9
        left = set(files(tmp_path)) - set(reference)
        assert any(name.endswith(".tmp") for name in left)
        scan = store.scan()
        assert [r.seed for r in scan.records] == [0]
        assert scan.problems == []
    # the scores of the second crash stand there without a record; they are not in the way
    saved = store.save(make_record(seed=1), make_scores(2))
    assert saved.revision == 1
    assert torch.equal(store.load_scores(saved).values, make_scores(2).values)
    assert len(files(tmp_path)) == len(reference) + 2


def test_the_temporary_file_of_a_living_writer_stays(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(make_record(), make_scores())
    folder = next((tmp_path / "records").rglob("*.json")).parent
    alive, old = folder / f".{os.getppid()}-aa.tmp", folder / f".{os.getppid()}-bb.tmp"
    alive.write_text("")
    old.write_text("")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    store.save(make_record(), make_scores())
    assert alive.exists()
    assert not old.exists()


@pytest.mark.parametrize("nth", [1, 2])
def test_disk_full_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    store = RecordStore(tmp_path)
    kept = store.save(make_record(), make_scores())
    before = files(tmp_path)
    calls = 0
    write = files_module._write_whole

    def full(path: Path, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == nth:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(files_module, "_write_whole", full)
    suffix = ".safetensors" if nth == 1 else ".json"
    with pytest.raises(StoreError, match=rf"seed1--.*{suffix}: No space left on device"):
        store.save(make_record(seed=1), make_scores())
    assert files(tmp_path) == before
    assert store.scan().records == [kept]
    assert store.save(make_record(seed=1), make_scores()).revision == 1


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "records").write_text("a file")
    with pytest.raises(StoreError, match="could not make the folder"):
        RecordStore(tmp_path).save(failed(), None)


def test_without_hard_links_nothing_is_overwritten_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    store = RecordStore(tmp_path)
    revisions = [store.save(make_record(), make_scores(i)).revision for i in range(3)]
    assert revisions == [1, 2, 3]
    assert len(store.scan().records) == 3


def test_without_locks_a_taken_name_means_the_next_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "fcntl", None)
    monkeypatch.setattr(RecordStore, "_last_revision", staticmethod(lambda *_: 0))
    store = RecordStore(tmp_path)
    saved = [store.save(make_record(), make_scores(i)) for i in range(3)]
    assert [r.revision for r in saved] == [1, 2, 3]
    assert store.save(failed(), None).revision == 4
    # a name taken between scores and record: the scores move on with the record
    other = store.save(failed(seed=1), None)
    mine = store.save(make_record(seed=1), make_scores(5))
    assert (other.revision, mine.revision) == (1, 2)
    assert torch.equal(store.load_scores(mine).values, make_scores(5).values)
    assert len(list((tmp_path / "scores").rglob("*seed1*"))) == 1


def test_two_writers_on_one_folder_lose_nothing(tmp_path: Path) -> None:
    processes = [start(save_many, tmp_path, 40) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = RecordStore(tmp_path)
    scan = store.scan()
    assert scan.problems == []
    assert sorted(r.revision for r in scan.records) == list(range(1, 81))
    counts = Counter(scores_digest(store.load_scores(record)) for record in scan.records)
    assert list(counts.values()) == [2] * 40  # every one of 40 results, from both writers
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_writers_leave_whole_records_only(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for moment in (0.0, 0.001, 0.004, 0.007, 0.013, 0.019, 0.031, 0.05):
        ready = CONTEXT.Event()
        process = start(save_many, tmp_path, 100_000, ready)
        assert ready.wait(60)
        time.sleep(moment)
        process.kill()  # SIGKILL
        process.join(60)
        scan = store.scan()
        assert scan.problems == []
        for record in scan.records:
            store.load_scores(record)
        n = len(scan.records)
        assert sorted(r.revision for r in scan.records) == list(range(1, n + 1))
    store.save(make_record(), make_scores())
    assert not list(tmp_path.rglob("*.tmp"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(list(tmp_path.rglob("*.json")))


# -------------------------------------------------------------------------------------- damage


def change(path: Path, **changes: Any) -> None:
    payload = json.loads(path.read_text())
    path.write_text(json.dumps(payload | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "not whole JSON"),
        (lambda p: p.write_bytes(b""), "not whole JSON"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "not whole JSON"),
        (lambda p: p.write_text("[]"), "not a record"),
        (lambda p: change(p, format=2), "has format 2, this fine_bench reads format 1"),
        (lambda p: change(p, colour="red"), "unknown fields colour"),
        (lambda p: change(p, seed="one"), "seed must be int, got 'one'"),
        (lambda p: change(p, metrics={"auroc": "high"}), "must be a number, got 'high'"),
        (lambda p: change(p, status="lost"), "status must be finished"),
        (lambda p: p.write_text('{"format": 1, "task": "digits"}'), "a record missing"),
        (lambda p: p.write_text('{"format": 1, "kind": "consistency"}'), "not a consistency file"),
    ],
)
def test_a_damaged_record_is_named_and_the_rest_is_intact(
    tmp_path: Path, damage: Any, message: str
) -> None:
    store = RecordStore(tmp_path)
    store.save(make_record(seed=0), make_scores())
    kept = store.save(make_record(seed=1), make_scores())
    (path,) = (tmp_path / "records").rglob("*seed0*.json")
    damage(path)
    scan = store.scan()
    assert scan.records == [kept]
    (problem,) = scan.problems
    assert problem.startswith("records/digits/01234567/fine--self--seed0--")
    assert message in problem


def test_null_metrics_read_as_nan(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(make_record(), make_scores())
    change(next((tmp_path / "records").rglob("*.json")), metrics={"auroc": None})
    (record,) = store.scan().records
    assert math.isnan(record.metrics["auroc"])


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("part", ["values", "std_error", "header", "truncated", "foreign"])
def test_damaged_scores_are_refused_by_name(tmp_path: Path, part: str) -> None:
    store = RecordStore(tmp_path)
    scores = make_scores(std_error=torch.ones(1, 7))
    record = store.save(make_record(), scores)
    path = tmp_path / "scores" / record.scores_file
    if part in ("values", "std_error"):
        tensor = scores.values if part == "values" else scores.std_error
        assert tensor is not None
        flip(path, path.read_bytes().index(tensor.numpy().tobytes()))
    elif part == "header":
        flip(path, 3)
    elif part == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        other = store.save(make_record(seed=1), make_scores(1))
        path.write_bytes((tmp_path / "scores" / other.scores_file).read_bytes())
    with pytest.raises(StoreError, match=r"score file .*seed0.*safetensors .*damaged.*force=true"):
        store.load_scores(record)


def test_scores_that_are_not_there(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    record = store.save(make_record(), make_scores())
    (tmp_path / "scores" / record.scores_file).unlink()
    with pytest.raises(StoreError, match=r"score file .*seed0.* is missing"):
        store.load_scores(record)
    with pytest.raises(StoreError, match="is failed and has no scores"):
        store.load_scores(failed())
    with pytest.raises(StoreError, match="outside"):
        store.load_scores(replace(record, scores_file="../../secret.safetensors"))


# ------------------------------------------------------------------- consistency, environment


def make_consistency(**changes: Any) -> Consistency:
    base = Consistency(
        task="digits",
        setting="0123456789abcdef",
        estimator="fine",
        target="self",
        k=5,
        metric_version=1,
        scores={0: "aa", 1: "bb"},
        pairs={(0, 1): {"kendall": math.nan, "spearman": 1 / 3}},
        variation={"median": 0.25},
    )
    return replace(base, **changes)


def test_a_record_is_found_in_a_folder_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names in a folder are read once while it stays as it is, and never believed too long."""
    store = RecordStore(tmp_path)
    first = store.save(make_record(seed=0), make_scores(0))
    identity = {name: getattr(first, name) for name in IDENTITY}
    reads: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(
        "fine_bench.store.listing.os.listdir", lambda p: reads.append(str(p)) or listdir(p)
    )
    (folder,) = {path.parent for path in store.records.rglob("*.json")}
    long_ago = time.time() - 60
    os.utime(folder, (long_ago, long_ago))
    for _ in range(5):
        assert store.find(**identity) == first
        assert store.find(**{**identity, "seed": 9}) is None
        assert RecordStore(tmp_path).find(**identity) == first
    assert len(reads) == 1
    second = store.save(make_record(seed=0), make_scores(1))
    assert store.find(**identity) == second
    assert len(reads) == 2
    # just changed: whoever writes in the same tick would not show, so it is read every time
    third = store.save(make_record(seed=0), make_scores(2))
    stamp = folder.stat()
    assert store.find(**identity) == third
    (path,) = folder.glob("*--r3.json")
    path.rename(folder / "gone")
    os.utime(folder, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert store.find(**identity) == second


def test_consistency_cache_roundtrip(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    saved = make_consistency()
    path = store.save_consistency(saved)
    assert path.name.startswith("consistency--fine--self--")

    def look(c: Consistency) -> Consistency | None:
        key = asdict(c)
        del key["pairs"], key["variation"], key["sealed"]
        return store.find_consistency(**key)

    found = look(saved)
    assert repr(found) == repr(saved)
    assert look(replace(saved, k=6)) is None
    assert look(replace(saved, metric_version=2)) is None
    assert look(replace(saved, scores={0: "aa", 2: "bb"})) is None
    assert repr(store.scan().consistency) == repr([saved])
    path.write_text("{")
    assert look(saved) is None
    assert len(store.scan().problems) == 1
    store.save_consistency(saved)
    assert look(saved) is not None


def test_environment_says_what_ran_and_nothing_private() -> None:
    facts = environment()
    assert {"commit", "dirty", "python", "torch", "pytorch_lightning", "numpy", "scipy"} <= set(
        facts
    )
    assert {"fine_bench", "hydra", "cpu", "cores", "threads", "memory_gib", "platform", "gpu"} <= (
        set(facts)
    )
    # what decides bits, each with something to say on this machine
    assert set(BITS) <= set(facts)
    assert all(facts[name] not in ("", "unknown") for name in BITS if name != "kernel_options")
    text = json.dumps(facts, allow_nan=False)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text.replace("unknown", "")


def test_what_decides_bits_is_no_part_of_the_identity(tmp_path: Path) -> None:
    """A record of before the fields existed, and one of another machine, are the same cell."""
    store = RecordStore(tmp_path)
    old = store.save(make_record(environment={"cpu": "Abacus"}), make_scores(0))
    new = store.save(make_record(environment=environment()), make_scores(1))
    assert (old.revision, new.revision) == (1, 2)
    (kept,) = newest(store.scan().records)
    assert kept == new
    assert {"cpu_kernels", "blas", "threads"} <= set(kept.environment)


def test_kernels_that_the_user_chose_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert environment()["threads"] == 7
    facts = environment_module._fixed_environment.__wrapped__()
    assert "MKL_CBWR=COMPATIBLE" in facts["kernel_options"]
    assert facts["cpu_kernels"] == torch.backends.cpu.get_cpu_capability()


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    subprocess.run(command, check=True, capture_output=True)


def test_commit_and_dirty_flag_speak_of_the_source_tree(tmp_path: Path) -> None:
    package = tmp_path / "fine_bench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    unknown = {"commit": "unknown", "dirty": "unknown"}
    assert environment_module._git(package) == unknown
    git(tmp_path, "init")
    assert (
        environment_module._git(package) == unknown
    )  # a repository, but the package is not tracked in it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    clean = environment_module._git(package)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text("")
    assert environment_module._git(package)["dirty"] is False  # results are not source
    (package / "new.py").write_text("")
    assert environment_module._git(package)["dirty"] is True
