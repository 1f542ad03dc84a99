"""Published records: packed, read beside the working store, never altered; archives of scores."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fine_bench.commands.publish import main
from fine_bench.errors import DataError
from fine_bench.store import files as files_module
from fine_bench.store import publication
from fine_bench.store.comparisons import Consistency
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.publication import publish, set_aside
from fine_bench.store.published import file_text, one_line
from fine_bench.store.record_json import IDENTITY
from fine_bench.store.records import RecordStore, newest, read_record
from fine_bench.store.score_archive import check_archive, unpack_archive, write_archive
from fine_bench.store.scores import scores_digest
from fine_bench.types import InfluenceScores, RunRecord
from support.records import make_record

SETTING = "0123456789abcdef"


def make_scores(seed: int = 0, n: int = 40) -> InfluenceScores:
    draw = torch.Generator().manual_seed(seed)
    return InfluenceScores(
        torch.randn(1, n, generator=draw),
        "fine",
        "self",
        n_observations=torch.full((n,), 7),
        extras={"truth/is_bad": torch.arange(n) < 4, "big": torch.tensor([2**40])},
    )


def published_record(**changes: object) -> RunRecord:
    metrics = {"auroc": 0.1 + 0.2, "average_precision": float("nan")}
    return make_record(**{"setting": SETTING, "metrics": metrics, **changes})


def comparison(**changes: object) -> Consistency:
    pairs = {(0, 1): {"spearman": 1 / 3}}
    base = Consistency("digits", SETTING, "fine", "self", 5, 1, {0: "aa", 1: "bb"}, pairs)
    return replace(base, **changes)


def fill(store: RecordStore, seeds: range = range(3)) -> list[RunRecord]:
    saved = [store.save(published_record(seed=seed), make_scores(seed)) for seed in seeds]
    store.save_consistency(comparison())
    return saved


def only_published(root: Path) -> RecordStore:
    """The store as a fresh clone has it."""
    shutil.rmtree(root / "records")
    shutil.rmtree(root / "scores", ignore_errors=True)
    return RecordStore(root)


def bytes_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def find(store: RecordStore, record: RunRecord) -> RunRecord | None:
    return store.find(**{name: getattr(record, name) for name in IDENTITY})


# ------------------------------------------------------------------------------------ packing


def test_a_packed_line_is_its_file(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    before = bytes_of(tmp_path / "records")
    done = publish(store)
    assert (done.records, done.comparisons, done.new_records, done.new_comparisons) == (3, 1, 3, 1)
    assert done.files == done.written == (tmp_path / "published" / "digits--01234567.jsonl",)
    assert done.size == done.files[0].stat().st_size
    entries = store.published.table("digits--01234567.jsonl").entries
    assert {entry.name: file_text(entry.line) for entry in entries} == before
    assert all(one_line(file_text(entry.line)) == entry.line for entry in entries)
    assert bytes_of(tmp_path / "records") == before  # the working store is left as it is


def test_publishing_twice_changes_nothing(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    publish(store)
    before = bytes_of(tmp_path)
    done = publish(RecordStore(tmp_path))
    assert (done.new_records, done.new_comparisons, done.written) == (0, 0, ())
    assert bytes_of(tmp_path) == before


def test_new_records_come_into_their_place_and_old_lines_stay(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    saved = fill(store, range(2, 11, 8))  # seeds 2 and 10
    publish(store)
    (path,) = (tmp_path / "published").glob("*.jsonl")
    old = path.read_text().splitlines()
    again = store.save(published_record(seed=2), make_scores(5))
    early = store.save(published_record(seed=0, estimator="aum"), make_scores(6))
    assert publish(store).new_records == 2
    lines = path.read_text().splitlines()
    found = [json.loads(line) for line in lines]
    shown = [(f["estimator"], f.get("seed", "pairs"), f.get("revision")) for f in found]
    assert shown == [
        ("aum", 0, 1),
        ("fine", 2, 1),
        ("fine", 2, 2),
        ("fine", 10, 1),
        ("fine", "pairs", None),
    ]
    assert [line for line in lines if line in old] == old
    clone = only_published(tmp_path)
    assert newest(clone.scan().records) == [early, again, saved[1]]


def test_what_is_replaced_is_set_aside_and_no_table_changes(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for revision in range(2):
        for seed in range(3):
            metrics = {"auroc": 0.8 + seed / 100 + revision / 10, "n_bad": 4.0}
            record = published_record(seed=seed, metrics=metrics)
            store.save(record, make_scores(seed + 10 * revision))
        assert main(["--results", str(tmp_path)]) == 0
    published = tmp_path / "published"
    (path,) = published.glob("*.jsonl")
    before, lines = bytes_of(published), path.read_bytes().splitlines()
    assert len(lines) == 8  # 3 + 3 records, a comparison of each three

    done = set_aside(store)
    aside = tmp_path / "superseded" / path.name
    assert (done.records, done.comparisons, done.written) == (3, 1, (aside,))
    moved, left = aside.read_bytes().splitlines(), path.read_bytes().splitlines()
    assert sorted(moved + left) == sorted(lines)
    assert done.size == aside.stat().st_size
    assert {json.loads(line).get("revision", 2) for line in left} == {2}
    again = set_aside(store)
    assert (again.records, again.comparisons, again.size, again.written) == (0, 0, 0, ())

    # earlier revisions in the working store do not come back, and the tables stay
    assert main(["--results", str(tmp_path)]) == 0
    after = bytes_of(published)
    assert path.read_bytes().splitlines() == left
    assert {name: text for name, text in after.items() if name != path.name} == {
        name: text for name, text in before.items() if name != path.name
    }
    # the next revision counts on
    saved = store.save(published_record(seed=0), make_scores(77))
    assert saved.revision == 3


def test_an_interruption_while_setting_aside_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RecordStore(tmp_path)
    for number in range(2):
        store.save(published_record(seed=0), make_scores(number))
    publish(store)
    (path,) = (tmp_path / "published").glob("*.jsonl")
    lines = path.read_bytes()

    def full(target: Path, data: bytes) -> None:
        if target.parent.name == "published":
            raise StoreError("no space left")
        write_atomic(target, data)

    with monkeypatch.context() as patched:
        patched.setattr(publication, "write_atomic", full)
        with pytest.raises(StoreError, match="no space"):
            set_aside(store)
    assert path.read_bytes() == lines
    set_aside(store)
    aside = tmp_path / "superseded" / path.name
    assert aside.read_bytes() + path.read_bytes() == lines  # revision 1 once, then revision 2


def test_tables_are_published_apart(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    store.save(published_record(task="mnist"), make_scores())
    assert [p.name for p in publish(store, ["mnist"]).written] == ["mnist--01234567.jsonl"]
    assert [p.name for p in publish(store).written] == ["digits--01234567.jsonl"]
    with pytest.raises(DataError, match="no records of cifar; there are: digits, mnist"):
        publish(store, ["cifar"])


def test_a_contradiction_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    publish(store)
    before = bytes_of(tmp_path / "published")
    path = next((tmp_path / "records").rglob("*seed1*.json"))
    path.write_text(path.read_text().replace("0.30000000000000004", "0.9"))
    store.save(published_record(seed=7), make_scores(7))
    with pytest.raises(StoreError, match=r"seed1.*--r1\.json says something else than published/"):
        publish(store)
    assert bytes_of(tmp_path / "published") == before
    # both are read until then, and what is published can still be had
    scan = store.scan()
    assert sorted(r.seed for r in scan.records) == [0, 1, 1, 2, 7]
    assert store.sources == "3 published records, 2 of your own"


def test_records_of_uncommitted_code_are_refused_by_name(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.save(published_record(environment={"dirty": True}), make_scores())
    with pytest.raises(StoreError, match=r"fine--self--seed0.*uncommitted changes"):
        publish(store)
    assert list((tmp_path / "published").iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    publish(store)
    store.save(published_record(seed=7), make_scores(7))
    before = bytes_of(tmp_path / "published")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files_module, "_write_whole", full)
    with pytest.raises(StoreError, match=r"could not write .*jsonl: No space left"):
        publish(store)
    assert bytes_of(tmp_path / "published") == before


# ------------------------------------------------------------------------------------ reading


def test_a_clone_reads_what_is_published(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    saved = fill(store)
    failed = store.save(
        published_record(seed=9, status="failed", reason="NaN", scores_sha256=""), scores=None
    )
    publish(store)
    clone = only_published(tmp_path)
    scan = clone.scan()
    assert repr(scan.records) == repr([*saved, failed])
    assert (scan.problems, scan.consistency) == ([], [comparison()])
    assert clone.sources == "4 published records, 0 of your own"
    assert repr(find(clone, saved[1])) == repr(saved[1])
    assert find(clone, published_record(seed=4)) is None
    key = comparison()
    wanted = {k: getattr(key, k) for k in ("task", "setting", "estimator", "target", "scores", "k")}
    assert clone.find_consistency(**wanted, metric_version=1) == key
    assert clone.find_consistency(**wanted, metric_version=2) is None
    assert not (tmp_path / "records").exists()


def test_own_records_count_further_and_the_newest_wins(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    publish(store)
    clone = only_published(tmp_path)
    mine = clone.save(published_record(seed=1), make_scores(11))
    assert mine.revision == 2
    assert find(clone, mine) == mine
    assert [r for r in newest(clone.scan().records) if r.seed == 1] == [mine]
    assert clone.sources == "3 published records, 1 of your own"
    assert torch.equal(clone.load_scores(mine).values, make_scores(11).values)
    alone = RecordStore(tmp_path, published_only=True)
    assert [r.revision for r in alone.scan().records] == [1, 1, 1]
    assert getattr(find(alone, mine), "revision", None) == 1


def test_absent_scores_say_where_they_are_to_be_had(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    record = fill(store)[0]
    publish(store)
    with pytest.raises(StoreError, match=r"missing.*fine-bench publish --unpack.*force=true"):
        only_published(tmp_path).load_scores(record)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[:100], "not whole JSON"),
        (lambda line: "<<<<<<< HEAD", "not whole JSON"),
        (lambda line: line.replace('"format":1', '"format":2'), "has format 2"),
        (lambda line: line.replace('"seed":1', '"seed":"one"'), "seed must be int"),
    ],
)
def test_a_damaged_line_is_named_and_the_rest_goes_on(
    tmp_path: Path, damage: Callable[[str], str], message: str
) -> None:
    store = RecordStore(tmp_path)
    saved = fill(store)
    publish(store)
    clone = only_published(tmp_path)
    (path,) = (tmp_path / "published").glob("*.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], damage(lines[1]), *lines[2:]]) + "\n")
    scan = clone.scan()
    assert [r.seed for r in scan.records] == [0, 2]
    (problem,) = scan.problems
    assert problem.startswith("published/digits--01234567.jsonl:2: ")
    assert message in problem
    assert find(clone, saved[1]) is None  # so that its cell is computed again
    before = path.read_bytes()
    clone.save(published_record(seed=8), make_scores(8))
    with pytest.raises(StoreError, match=r"jsonl:2: (.|\n)*damaged line, which would be lost"):
        publish(clone)
    assert path.read_bytes() == before


def test_two_lines_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    fill(store)
    publish(store)
    (path,) = (tmp_path / "published").glob("*.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0], lines[1].replace("0.3000", "0.4000")]) + "\n")
    (problem,) = only_published(tmp_path).scan().problems
    assert "jsonl:6: says something else of the same revision than published/" in problem


def test_a_published_record_is_read_by_the_name_of_its_file(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    saved = fill(store)
    publish(store)
    names = sorted((tmp_path / "records").rglob("*.json"))
    only_published(tmp_path)
    assert [repr(read_record(path)) for path in names[1:]] == [repr(r) for r in saved]
    with pytest.raises(StoreError, match="compares seeds"):
        read_record(names[0])
    with pytest.raises(StoreError, match=r"there is no record .*results/published"):
        read_record(names[1].with_name("other.json"))


# ----------------------------------------------------------------------------------- archives


def test_scores_go_into_an_archive_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "results")
    saved = fill(store)
    watched = torch.tensor([1, 5])
    some = replace(make_scores(3), watched=watched, n_observations=None)
    saved.append(store.save(published_record(seed=3), some))
    store.save(published_record(task="own"), make_scores(99))  # stays unpublished
    publish(store, ["digits"])
    before = bytes_of(tmp_path / "results" / "scores" / "digits")
    path = tmp_path / "scores.tar"
    report = write_archive(store, path)
    assert (report.good, report.complete) == (4, True)
    write_archive(store, tmp_path / "again.tar")
    assert path.read_bytes() == (tmp_path / "again.tar").read_bytes()
    write_archive(store, tmp_path / "small.tar.gz")
    assert (tmp_path / "small.tar.gz").stat().st_size < path.stat().st_size
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["digits--01234567.safetensors"]
    with pytest.raises(StoreError, match=r"already there.*--force"):
        write_archive(store, path)
    with pytest.raises(StoreError, match="is a folder"):
        write_archive(store, tmp_path, force=True)
    (tmp_path / "link.tar").symlink_to(path)
    path.write_bytes(b"old")
    assert write_archive(store, tmp_path / "link.tar", force=True).complete
    assert (tmp_path / "link.tar").is_symlink()
    assert path.read_bytes() == (tmp_path / "again.tar").read_bytes()

    clone = only_published(tmp_path / "results")
    assert check_archive(clone, path).complete
    assert not (tmp_path / "results" / "scores").exists()
    report = unpack_archive(clone, tmp_path / "small.tar.gz")
    assert (report.good, report.written, report.complete) == (4, 4, True)
    assert bytes_of(tmp_path / "results" / "scores" / "digits") == before
    assert [scores_digest(clone.load_scores(r)) for r in saved] == [r.scores_sha256 for r in saved]
    assert unpack_archive(clone, path).written == 0


def test_shared_and_wide_tensors_are_stored_once_and_narrow(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "results")
    for seed in range(6):
        store.save(published_record(seed=seed), make_scores(seed, n=20_000))
    publish(store)
    write_archive(store, tmp_path / "scores.tar")
    values, counts, bad = 6 * 4 * 20_000, 4 * 20_000, 20_000
    size = (tmp_path / "scores.tar").stat().st_size
    assert values + counts + bad < size < values + counts + bad + 20_000


def test_a_wrong_archive_is_named(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "results")
    saved = fill(store)
    publish(store)
    path = tmp_path / "scores.tar"
    write_archive(store, path)
    data = bytearray(path.read_bytes())
    data[data.index(make_scores(1).values.numpy().tobytes())] ^= 1
    (tmp_path / "wrong.tar").write_bytes(data)
    report = check_archive(store, tmp_path / "wrong.tar")
    assert (report.good, report.missing) == (2, ())
    assert report.wrong == (f"{saved[1].scores_file}: values is not what was written",)
    (tmp_path / "none.tar").write_bytes(path.read_bytes()[:3000])
    with pytest.raises(StoreError, match="no archive of scores"):
        check_archive(store, tmp_path / "none.tar")
    with pytest.raises(StoreError, match="no archive of scores"):
        check_archive(store, tmp_path / "absent.tar")

    # what is there under a name is kept, and named if it is something else
    file = tmp_path / "results" / "scores" / saved[2].scores_file
    file.write_bytes(b"mine")
    report = unpack_archive(store, path)
    assert (report.good, report.written) == (2, 0)
    assert report.wrong == (
        f"{saved[2].scores_file}: something else is there under that name; move it away",
    )
    assert file.read_bytes() == b"mine"
    # a record published later is missing from it
    later = store.save(published_record(seed=5), make_scores(5))
    publish(store)
    assert check_archive(store, path).missing == (later.scores_file,)


# ------------------------------------------------------------------------------------ command


def test_comparisons_are_published_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came with the second call where records were published before anybody compared them."""
    root = tmp_path / "results"
    store = RecordStore(root)
    arguments = ["--results", str(root), "--task", "digits"]

    def add(seed: int) -> None:
        metrics = {"auroc": 0.8, "average_precision": 0.5, "n_bad": 4.0}
        store.save(published_record(seed=seed, metrics=metrics), make_scores(seed))

    def numbers() -> list[tuple[int, int]]:
        entries = store.published.table("digits--01234567.jsonl").entries
        found = [e.found for e in entries if isinstance(e.found, Consistency)]
        return sorted(pair for one in found for pair in one.pairs)

    for seed in range(2):
        add(seed)
    publish(store)  # records alone, as long as there was no comparison of theirs
    assert numbers() == []
    capsys.readouterr()
    assert main(arguments) == 0
    assert "new: 0 records, 1 comparisons" in capsys.readouterr().out
    assert numbers() == [(0, 1)]
    before = bytes_of(root / "published")
    assert main(arguments) == 0
    assert "new: 0 records, 0 comparisons" in capsys.readouterr().out
    assert bytes_of(root / "published") == before

    # a run that goes on writes a record between the look and the packing
    from fine_bench.store import publication

    packs = publication.publish

    def late(*given: object, **named: object) -> publication.Publication:
        if not named:
            add(2)
        return packs(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(publication, "publish", late)
    add(3)
    assert main(arguments) == 0
    assert "new: 2 records, 2 comparisons" in capsys.readouterr().out
    assert numbers() == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    # what the tables say is packed, all of it
    monkeypatch.undo()
    before = bytes_of(root / "published")
    only_published(root)
    assert main(arguments) == 0
    assert bytes_of(root / "published") == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "results"
    arguments = ["--results", str(root)]
    assert main(arguments) == 2
    assert "no records below" in capsys.readouterr().err
    store = RecordStore(root)
    for seed in range(3):
        metrics = {"auroc": 0.8 + seed / 100, "average_precision": 0.5, "n_bad": 4.0}
        store.save(published_record(seed=seed, metrics=metrics), make_scores(seed))
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "published: 3 records and 1 comparisons of seeds in 1 files" in out
    assert "new: 3 records, 1 comparisons" in out
    published = root / "published"
    names = ["digits--01234567.jsonl", "leaderboard.csv", "leaderboard.md", "summary.md"]
    assert sorted(path.name for path in published.iterdir()) == names
    assert not (root / "leaderboard.md").exists()
    before = bytes_of(published)

    assert main([*arguments, "--scores", str(tmp_path / "s.tar")]) == 0
    only_published(root)
    assert main(arguments) == 0  # from the packed records alone, without scores
    assert bytes_of(published) == before
    capsys.readouterr()
    assert main([*arguments, "--scores", str(tmp_path / "t.tar")]) == 1
    assert "missing: digits/01234567/fine--self--seed0" in capsys.readouterr().err
    assert not (tmp_path / "t.tar").exists()
    assert main([*arguments, "--scores", str(tmp_path / "s.tar"), "--force"]) == 1
    assert (tmp_path / "s.tar").stat().st_size  # no score is here: the old archive stays
    assert main([*arguments, "--check", str(tmp_path / "s.tar")]) == 0
    assert "3 of 3 scores of published records verify" in capsys.readouterr().out
    assert main([*arguments, "--unpack", str(tmp_path / "s.tar")]) == 0
    assert "written: 3 score files" in capsys.readouterr().out
    assert main([*arguments, "--task", "cifar"]) == 2
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--check", "a", "--unpack", "b"])
    assert end.value.code == 2
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "Exit status" in capsys.readouterr().out
