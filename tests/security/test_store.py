"""Files of a results folder that were damaged, edited or made to harm: named, and the rest goes on.

Each test is an attack that once stopped a reader, made it wait for ever, or was believed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fine_bench.commands import audit, report
from fine_bench.commands.leaderboard import main
from fine_bench.leaderboard.build import build
from fine_bench.retraining.bank import Bank
from fine_bench.store import files as files_module
from fine_bench.store.files import StoreError
from fine_bench.store.guarded import parse_json, read_bytes
from fine_bench.store.publication import publish
from fine_bench.store.record_json import score_file
from fine_bench.store.records import RecordStore, read_record
from fine_bench.types import InfluenceScores, RunRecord
from support.records import make_record

N = 40


def scores_of(seed: int, n: int = N) -> InfluenceScores:
    draw = torch.Generator().manual_seed(seed)
    return InfluenceScores(torch.randn(1, n, generator=draw), "fine", "self")


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    """Two seeds of one row, compared."""
    store = RecordStore(tmp_path / "results")
    for seed in (0, 1):
        metrics = {"auroc": 0.9, "n_bad": 4.0}
        store.save(make_record(seed=seed, metrics=metrics), scores_of(seed))
    assert not build(store).problems
    return store


def path_of(store: RecordStore, seed: int = 0) -> Path:
    (path,) = store.records.rglob(f"*--seed{seed}--*.json")
    return path


def comparison(store: RecordStore) -> Path:
    (path,) = store.records.rglob("consistency--*.json")
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGES = {
    "nested 200,000 deep": (b"[" * 200_000, "nested more than 64 levels"),
    "nested 900 deep": (b"[" * 900 + b"]" * 900, "nested more than 64 levels"),
    "a number of 400 digits": (
        b'{"format": 1, "training": {"n": 1' + b"0" * 400 + b"}}",
        "64 bits",
    ),
    "a number of 9,000 digits": (b'{"format": 1' + b"0" * 9000 + b"}", "not whole JSON"),
    "an infinity": (b'{"format": 1, "kind": "consistency", "k": Infinity}', "Infinity"),
    "1e999": (b'{"format": 1, "cost": {"seconds": 1e999}}', "too large for a float"),
    "half a character": (b'{"format": 1, "task": "\\ud800"}', "half a character"),
    "no UTF-8": (b'{"format": "\xff"}', "not whole JSON"),
    "cut": (b'{"format": 1, "task', "not whole JSON"),
    "empty": (b"", "not whole JSON"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_rest_goes_on(
    store: RecordStore, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = DAMAGES[damage]
    (path_of(store).parent / "x.json").write_bytes(content)
    assert main(["--results", str(store.root), "--format", "md"]) == 1
    shown = capsys.readouterr()
    assert "x.json" in shown.out + shown.err
    (problem,) = build(store).problems
    assert words in problem
    assert len(store.scan().records) == 2


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage != "empty"])
def test_a_damaged_packed_line_is_named_with_its_number(store: RecordStore, damage: str) -> None:
    publish(store)
    (table,) = store.published.folder.glob("*.jsonl")
    content, words = DAMAGES[damage]
    with table.open("ab") as file:
        file.write(content + b"\n")
    scan = RecordStore(store.root, published_only=True).scan()
    (problem,) = scan.problems
    assert f"{table.name}:4" in problem
    assert words in problem
    assert len(scan.records) == 2


@pytest.mark.parametrize("name", ["records/x.json", "published/x.jsonl"])
def test_a_pipe_is_not_waited_for(store: RecordStore, name: str) -> None:
    path = store.root / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    (problem,) = store.scan().problems
    assert name in problem
    assert "is a pipe" in problem
    with pytest.raises(ValueError, match="is a pipe"):
        read_bytes(path)


def test_a_folder_in_the_place_of_a_file(store: RecordStore) -> None:
    (store.records / "x.json").mkdir()
    (problem,) = store.scan().problems
    assert "x.json: is a folder" in problem


def test_a_score_file_that_is_a_pipe(store: RecordStore) -> None:
    record = read_record(path_of(store))
    path = store.scores / record.scores_file
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="damaged"):
        store.load_scores(record)


def test_a_folder_that_cannot_be_listed_is_not_empty(
    store: RecordStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, closed = os.scandir, path_of(store).parent

    def scandir(path: Any) -> Iterator[os.DirEntry[str]]:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)  # type: ignore[return-value]

    monkeypatch.setattr(os, "scandir", scandir)
    (problem,) = store.scan().problems
    assert "cannot be listed (Permission denied)" in problem
    assert closed.name in problem


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an AUROC of 7.5": (lambda r: r["metrics"].update(auroc=7.5), "auroc = 7.5"),
    "an AUROC below 0": (lambda r: r["metrics"].update(auroc=-0.1), "between 0 and 1"),
    "an infinite AUROC": (lambda r: r["metrics"].update(auroc="Infinity"), "between 0 and 1"),
    "half a bad example": (lambda r: r["metrics"].update(n_bad=2.5), "counts examples"),
    "infinitely many": (lambda r: r["metrics"].update(n_bad="Infinity"), "counts examples"),
    "a metric of text": (lambda r: r["metrics"].update(auroc="high"), "must be a number"),
    "another seed": (lambda r: r.update(seed=5), "names the scores"),
    "a later revision": (lambda r: r.update(revision=2), "names the scores"),
    "a revision without end": (lambda r: r.update(revision="Infinity"), "revision must be int"),
    "a score path of 5,000 letters": (lambda r: r.update(scores_file="x" * 5000), "its own"),
    "a score path outside": (lambda r: r.update(scores_file="../../x.safetensors"), "its own"),
    "no digest of the scores": (lambda r: r.pop("scores_sha256"), "needs the digest"),
    "no task": (lambda r: r.pop("task"), "task"),
    "a task's options as a list": (lambda r: r["config"].update(task=[1]), "config.task"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_record_is_named_and_left_out(store: RecordStore, name: str) -> None:
    change, words = EDITS[name]
    edit(path_of(store), change)
    scan = store.scan()
    (problem,) = scan.problems
    assert path_of(store).name in problem
    assert words in problem
    assert len(scan.records) == 1


def test_a_record_that_points_at_the_scores_of_another_seed(store: RecordStore) -> None:
    other = json.loads(path_of(store, 1).read_text())
    edit(
        path_of(store),
        lambda r: r.update({k: other[k] for k in ("scores_file", "scores_sha256")}),
    )
    (problem,) = store.scan().problems
    assert "points at the scores of another record" in problem
    one, two = (replace(make_record(seed=s), scores_sha256="0" * 64) for s in (0, 1))
    with pytest.raises(StoreError, match="not its own"):
        store.load_scores(replace(one, scores_file=score_file(two)))


def test_a_copied_record_with_a_later_date(store: RecordStore) -> None:
    path = path_of(store)
    copy = path.with_name(path.name.replace("--r1", "--r2"))
    copy.write_bytes(path.read_bytes())
    edit(copy, lambda r: (r.update(created="2999-01-01"), r["metrics"].update(auroc=1.0)))
    (problem,) = store.scan().problems
    assert copy.name in problem
    assert "does not say what its name says" in problem
    with pytest.raises(StoreError, match="does not say what its name says"):
        read_record(copy)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_scores_that_are_no_floating_point_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    store = RecordStore(tmp_path)
    scores = InfluenceScores((scores_of(0).values > 0).to(dtype), "fine", "self")
    record = store.save(make_record(), scores)
    with pytest.raises(StoreError, match="no floating-point numbers"):
        store.load_scores(record)


def test_seeds_that_score_other_numbers_of_examples(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed, n in ((0, 40), (1, 77)):
        store.save(make_record(seed=seed), scores_of(seed, n))
    (problem,) = build(store).problems
    assert "[40, 77] examples" in problem


@pytest.mark.parametrize(
    "says",
    [
        {"training": {"n_train": 40}},
        {"config": {"task": {"_target_": "fine_bench.data.digits.digits_mislabel", "n_train": 40}}},
    ],
)
def test_scores_of_another_number_of_examples_than_the_task_has(
    tmp_path: Path, says: dict[str, Any]
) -> None:
    store = RecordStore(tmp_path)
    assert store.load_scores(store.save(make_record(**says), scores_of(0))).values.shape == (1, 40)
    for seed in (1, 2):  # alike, so that comparing the seeds says nothing
        record = store.save(make_record(seed=seed, **says), scores_of(seed, 77))
        with pytest.raises(StoreError, match="scores 77 examples, its record's task has 40"):
            store.load_scores(record)


def test_what_another_package_calls_n_train_is_its_own(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    task = {"_target_": "mine.task", "n_train": 4}  # perhaps of each class
    assert store.load_scores(store.save(make_record(config={"task": task}), scores_of(0)))


# ----------------------------------------------------------------- records that lack something


def whole_record(seed: int, estimator: str = "fine") -> RunRecord:
    detected = {"auroc": 0.9, "average_precision": 0.8, "recall_at_rate": 0.7}
    group = {f"group/copies/{name}": 0.5 for name in ("mu", "lower", "upper", "mu_run", "index")}
    return make_record(
        seed=seed,
        estimator=estimator,
        metrics={**detected, **group, "n_bad": 4.0},
        cost={"seconds": 1.0},
        environment={"commit": "c0ffee", "dirty": False},
        training={"test_accuracy": 0.9, "seconds": 3.0},
        config={
            "task": {"n_train": N},
            "model": {"name": "mlp"},
            "trainer": {"lr": 0.1},
            "estimator": {"observable": "margin"},
        },
    )


REMOVED = {
    "a metric": ("metrics", "average_precision"),
    "a number of a group": ("metrics", "group/copies/mu"),
    "the number of bad examples": ("metrics", "n_bad"),
    "the costs": ("cost", "seconds"),
    "the commit": ("environment", "commit"),
    "an option that captions name": ("config", "task", "n_train"),
    "the test accuracy": ("training", "test_accuracy"),
}


@pytest.mark.parametrize("name", REMOVED)
def test_a_record_that_lacks_what_tables_and_report_read(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = RecordStore(tmp_path / "results")
    for seed in (0, 1):
        for estimator in ("fine", "tracin"):
            store.save(whole_record(seed, estimator), scores_of(seed + (estimator != "fine") * 9))
    assert not build(store).problems
    *sections, key = REMOVED[name]
    (path,) = store.records.rglob("fine--*--seed1--*.json")

    def remove(content: dict[str, Any]) -> None:
        for section in sections:
            content = content[section]
        del content[key]

    edit(path, remove)
    board = build(store)
    (problem,) = board.problems
    assert f"the record of seed 1 lacks {'.'.join(REMOVED[name])}, which" in problem
    assert {row.estimator for table in board.tables for row in table.rows} == {"fine", "tracin"}
    for command in (main, report.main):
        assert command(["--results", str(store.root)]) == 1
        assert "it was cut or edited" in " ".join("".join(capsys.readouterr()).split())
    if key == "group/copies/mu":
        asked = ["--results", str(store.root), "--task", "digits", "--group", "copies"]
        asked += ["--estimator", "fine"]
        assert audit.main(asked) == 2
        assert "lacks group/copies/mu" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------------- comparisons


def spearman(store: RecordStore) -> float:
    (table,) = build(store).tables
    return table.rows[0].stats["consistency_spearman"].mean


def test_an_edited_comparison_is_named_and_computed_again(store: RecordStore) -> None:
    truth = spearman(store)
    edit(comparison(store), lambda c: c["pairs"][0][2].update(spearman=0.99999))
    found = build(store)
    (problem,) = found.problems
    assert "was edited" in problem
    assert found.tables[0].rows[0].stats["consistency_spearman"].mean == truth
    assert spearman(store) == truth  # and it was written anew
    assert not build(store).problems


def test_a_comparison_without_a_digest_is_computed_again(store: RecordStore) -> None:
    truth = spearman(store)
    edit(
        comparison(store),
        lambda c: (c.pop("sha256"), c["pairs"][0][2].update(spearman=0.99999)),
    )
    assert spearman(store) == truth
    assert "sha256" in json.loads(comparison(store).read_text())


def test_an_old_comparison_whose_scores_are_gone_is_kept(store: RecordStore) -> None:
    truth = spearman(store)
    edit(comparison(store), lambda c: c.pop("sha256"))
    for path in store.scores.rglob("*.safetensors"):
        path.unlink()
    assert spearman(store) == truth


def test_a_comparison_that_cannot_be(store: RecordStore) -> None:
    edit(comparison(store), lambda c: (c.pop("sha256"), c["pairs"][0][2].update(kendall=3)))
    assert "kendall = 3" in store.scan().problems[0]
    edit(comparison(store), lambda c: c.update(k=4.5))
    assert "no whole number" in store.scan().problems[0]


# ---------------------------------------------------------------------------------------- others


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"n_train": Infinity, "n_query": 1}'])
def test_a_manifest_of_a_bank(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read"):
        Bank.open(tmp_path)


def test_a_manifest_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(StoreError, match="is a pipe"):
        Bank.open(tmp_path)


def test_a_read_only_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files_module, "_write_whole", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # refused even for what is not there
    with pytest.raises(StoreError, match="Read-only file system"):
        RecordStore(tmp_path).save(make_record(), scores_of(0))


def test_json_of_ours_is_read() -> None:
    text = '{"a": [1, -2.5, null, true, "Infinity", "ü"], "b": {"c": 18446744073709551615}}'
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1e999}', '{"a":-1E0999}', "[1e+400 ]", "1e400", "[1, 2e999\n]", '{"a": [3e308]}',
        '{"a": 100000000000000000000}', "[-99999999999999999999]", '["1e999", "e999"]',
        '{"a": 18446744073709551616}', '{"a": 1.00000000000000000000001}', "100000000000000000000",
        '["\\ud800"]', '["\\uD83D\\uDE00"]', "[" * 64 + "]" * 64, "[" * 64 + "1" + "]" * 64,
        "[" * 65 + "]" * 65, '{"a":' * 63 + "[[]]" + "}" * 63, '{"a":' * 64 + "1" + "}" * 64,
        "[" + "[1]," * 99 + "[[]]]", '"' + "[" * 99 + '"', "[NaN]",
    ],
)  # fmt: skip
def test_bytes_that_are_not_walked_are_judged_as_if_they_were(text: str) -> None:
    """A text is always walked through; bytes only where something in them may be refused."""

    def judged(given: str | bytes) -> str:
        try:
            return repr(parse_json(given))
        except ValueError as error:
            return f"refused: {error}"

    assert judged(text.encode()) == judged(text)


def test_a_record_of_a_long_name_is_saved(tmp_path: Path) -> None:
    record: RunRecord = make_record(task="t" * 300, estimator="e" * 300)
    store = RecordStore(tmp_path)
    store.save(record, scores_of(0))
    assert store.scan().records[0].task == "t" * 300


def test_an_emptied_packed_table_is_damage(
    store: RecordStore, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(store)
    (packed,) = (store.root / "published").glob("*.jsonl")
    packed.write_bytes(b"")
    assert main(["--results", str(store.root)]) == 1
    said = "".join(capsys.readouterr().out.split())
    assert f"{packed.name}:holdsnoline" in said


@pytest.mark.parametrize(
    ("key", "value"), [("bad", None), ("bad", "x"), ("bad", [7000]), ("design", []), ("design", 1)]
)
def test_facts_of_a_manifest_have_their_form(tmp_path: Path, key: str, value: Any) -> None:
    Bank.create(tmp_path, {"n_train": 4, "n_query": 1, "design": {"seed": 0}})
    edit(tmp_path / "manifest.json", lambda content: content.update({key: value}))
    with pytest.raises(StoreError, match=rf"manifest\.json cannot be read \({key}"):
        Bank.open(tmp_path)


def test_damage_is_not_replaced_by_what_is_published(
    store: RecordStore, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(store)
    path = path_of(store)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreError, match="is a pipe"):
        read_record(path)
    assert audit.main(["--results", str(store.root), "--task", "nope", "--example", "1"]) == 2
    assert path.name in capsys.readouterr().err
