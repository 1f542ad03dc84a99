"""The store: one JSON file a record, one safetensors file its scores, both whole or absent.

Layout below the results folder (``setting8`` and ``digest8`` are the first eight hex digits)::

    records/<task>/<setting8>/<estimator>--<target>--seed<seed>--<digest8>--r<revision>.json
    records/<task>/<setting8>/consistency--<estimator>--<target>--<digest8>.json
    scores/<task>/<setting8>/<the record's file name>.safetensors
    published/<task>--<setting8>.jsonl

The first three are the working store, where runs write. What is published is packed below
``published/`` and read together with it (``published``, ``publication``).

A record's ``digest8`` covers its whole identity (task, setting, estimator, estimator_hash, method
version, target, seed, data_sha256), so different configurations never meet in one name. What a
record says is read from its content, and its name must follow from that.

A file is written under a temporary name in its own folder, flushed to the disk and then *linked*
to its final name, which fails when that name is taken: no record is overwritten or edited, a
recomputation takes the next free revision. Scores come before their record, so a record that
exists has whole scores. Files are data, never code: JSON and safetensors, no pickle.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors

from fine_bench.store.comparisons import Consistency, consistency_json
from fine_bench.store.digest import FORMAT
from fine_bench.store.files import (
    AbsentScoresError,
    StoreError,
    lock,
    make_folder,
    remove_leftovers,
    write_atomic,
    write_new,
)
from fine_bench.store.guarded import files_below, is_file, read_bytes, reason_of
from fine_bench.store.listing import files_of
from fine_bench.store.plausibility import check_size
from fine_bench.store.published import Entry, Published, published_entry, table_name
from fine_bench.store.record_json import (
    CELL,
    check_address,
    comparison_file,
    file_stem,
    key_of,
    parse,
    read,
    record_from,
    record_json,
    score_file,
    table_folder,
)
from fine_bench.store.scores import pack, scores_digest, unpack
from fine_bench.types import InfluenceScores, RunRecord

_ADDRESS = re.compile(r"--[0-9a-f]{8}--r\d+\.json$")


def now() -> str:
    """The time as ``RunRecord.created`` has it; later ones are larger as texts."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


@dataclass(frozen=True)
class Scan:
    """Everything readable below ``published/`` and ``records/``, and what was not.

    Attributes:
        records: all revisions of all records, the published ones first.
        problems: one line a file (or line of a packed file) that could not be read; the others
            are unaffected.
        consistency: the cached comparisons.
    """

    records: list[RunRecord]
    problems: list[str]
    consistency: list[Consistency]


class RecordStore:
    """Records and scores below one results folder; see the module's text for the layout.

    What is published is read together with the working store, and written by ``publication``
    alone. Any number of processes may write into one folder. Locks between machines are those of
    the shared file system.

    Args:
        root: the results folder; made on the first write.
        published_only: read what is published and leave out the working store's records.
    """

    def __init__(self, root: Path | str, *, published_only: bool = False) -> None:
        self.root = Path(root)
        self.published = Published(self.root)
        self.published_only = published_only
        self.sources = ""  # what the last scan read, in words
        self.compared: list[Consistency] = []  # what this object has saved of them
        self.records = self.root / "records"
        self.scores = self.root / "scores"

    def save(self, record: RunRecord, scores: InfluenceScores | None) -> RunRecord:
        """Write scores, then the record, under the next free revision.

        Args:
            record: ``revision``, ``scores_file``, ``scores_sha256`` and ``created`` are filled
                here (a finished record needs *something* as ``scores_sha256`` to be born: pass
                ``scores_digest(scores)`` or ``PENDING``).
            scores: required for a finished record, ``None`` for the others.

        Returns:
            The record as written (and as ``scan`` will read it).

        Raises:
            ValueError: scores and record contradict each other.
            TypeError: the record holds something that JSON cannot.
            StoreError: the disk is full or the folder not writable; nothing was left behind.
        """
        if (scores is not None) != (record.status == "finished"):
            raise ValueError(
                f"{record.estimator}/{record.target} seed {record.seed} is {record.status} and "
                f"comes {'without' if scores is None else 'with'} scores; finished records have "
                "scores, failed and skipped ones have none"
            )
        sha, blob = "", None
        if scores is not None:
            sha, blob = scores_digest(scores), pack(scores)
            given = record.scores_sha256
            if len(given) == 64 and given != sha:
                raise ValueError(f"the record names scores {given[:8]}…, given were {sha[:8]}…")
            if scores.target != record.target:
                raise ValueError(f"the record's target is {record.target!r}, {scores.target!r} not")
        record = replace(record, scores_sha256=sha, scores_file="", created=now(), format=FORMAT)
        record_from(json.loads(record_json(record)))  # refuse before anything is written

        table, stem = table_folder(record.task, record.setting), file_stem(record)
        folder, score_folder = self.records / table, self.scores / table
        make_folder(folder)
        if blob is not None:
            make_folder(score_folder)
        with lock(folder) as locked:
            remove_leftovers(folder, locked)
            remove_leftovers(score_folder, locked)
            last = max(self._last_revision(folder, stem), self._published_revision(record))
            revision = last + 1
            while True:
                name = f"{stem}--r{revision}"
                score_path = score_folder / f"{name}.safetensors"
                whole = replace(record, revision=revision)
                if blob is not None:
                    whole = replace(whole, scores_file=score_file(whole))
                try:
                    self._add(whole, folder / f"{name}.json", score_path, blob, locked)
                except FileExistsError:  # another writer was faster: the next one is ours
                    revision += 1
                    continue
                return record_from(json.loads(record_json(whole)))

    @staticmethod
    def _add(
        record: RunRecord, path: Path, score_path: Path, blob: bytes | None, locked: bool
    ) -> None:
        if blob is not None:
            if locked:  # scores without a record: their writer was killed between the two files
                with contextlib.suppress(OSError):  # writing says why this disk refuses
                    score_path.unlink(missing_ok=True)
            write_new(score_path, blob)
        try:
            write_new(path, record_json(record))
        except BaseException as error:
            # these scores are ours; they stay only if their record made it under its name
            if blob is not None and (isinstance(error, FileExistsError) or not path.exists()):
                score_path.unlink(missing_ok=True)
            raise

    @staticmethod
    def _last_revision(folder: Path, stem: str) -> int:
        """Highest revision in use, be its file readable or not."""
        found = (re.search(r"--r(\d+)\.json$", path.name) for path in folder.glob(f"{stem}--r*"))
        return max((int(match[1]) for match in found if match), default=0)

    def _is_published(self, record: RunRecord) -> bool:
        table = self.published.table(table_name(record.task, record.setting))
        same = table.by_identity.get(key_of(record), ())
        return any(r.revision == record.revision for r in same)

    def _published_revision(self, record: RunRecord) -> int:
        """Highest published revision of the record's identity; 0 without one."""
        table = self.published.table(table_name(record.task, record.setting))
        same = table.by_identity.get(key_of(record), ())
        return max((r.revision for r in same), default=0)

    def entries(self) -> tuple[list[Entry], list[Entry], list[str]]:
        """What is published, what the working store has besides, and what cannot be read.

        A file below ``records/`` that says what a published line says is the same entry. The order
        depends on the names and the content of the files alone; temporary files are ignored.
        """
        published: list[Entry] = []
        own: list[Entry] = []
        problems: list[str] = []
        for table in self.published.tables():
            published += table.entries
            problems += table.problems
        known = {entry.key: entry for entry in published}
        files: list[Path] = []
        if not self.published_only:
            files, hidden = files_below(self.records, ".json")
            problems += [
                f"{folder.relative_to(self.root).as_posix()}: its files cannot be listed ({reason})"
                for folder, reason in hidden
            ]
        for path in files:
            where = path.relative_to(self.root).as_posix()
            try:
                text = read_bytes(path)
                entry = Entry(parse(text), text, where, packed=False)
                check_address(where.removeprefix("records/"), entry.found)
            except OSError as error:
                problems.append(f"{where}: cannot be read ({reason_of(error)})")
                continue
            except ValueError as error:
                problems.append(f"{where}: {error}")
                continue
            same = known.get(entry.key) if known else None
            if same is None or same.line != entry.line:
                own.append(entry)
        return published, own, problems

    def scan(self) -> Scan:
        """Read everything; what cannot be read becomes a line in ``problems``."""
        published, own, problems = self.entries()
        found = [entry.found for entry in (*published, *own)]
        records = [f for f in found if isinstance(f, RunRecord)]
        n_published = sum(isinstance(entry.found, RunRecord) for entry in published)
        self.sources = (
            f"{n_published:,} published records, {len(records) - n_published:,} of your own"
        )
        # what is published is trusted: git, not a digest in the line, says who changed it
        kept = [
            replace(e.found, sealed=True) for e in published if isinstance(e.found, Consistency)
        ]
        kept += [entry.found for entry in own if isinstance(entry.found, Consistency)]
        return Scan(records, problems, kept)

    def find(
        self,
        *,
        task: str,
        setting: str,
        estimator: str,
        estimator_hash: str,
        version: int,
        data_sha256: str,
        target: str,
        seed: int,
    ) -> RunRecord | None:
        """The newest revision of one identity, whatever its status; ``None`` when there is none.

        Reads only the published table and the files of that identity. A damaged file among them is
        passed over here (and named by ``scan``), so that its cell is computed again.
        """
        wanted = RunRecord(
            task, setting, estimator, estimator_hash, version, target, seed, "failed", "-",
            data_sha256=data_sha256,
        )  # fmt: skip
        table = self.published.table(table_name(task, setting))
        found = list(table.by_identity.get(key_of(wanted), ()))
        folder = self.records / table_folder(task, setting)
        for path in () if self.published_only else files_of(folder, file_stem(wanted)):
            with contextlib.suppress(ValueError):
                record = read(path)
                if isinstance(record, RunRecord) and key_of(record) == key_of(wanted):
                    found.append(record)
        return max(found, key=lambda record: (record.revision, record.created), default=None)

    def has_scores(self, record: RunRecord) -> bool:
        """Whether the score file of a record is here; ``load_scores`` says whether it is whole."""
        return record.scores_file == score_file(record) and is_file(
            self.scores / record.scores_file
        )

    def load_scores(self, record: RunRecord) -> InfluenceScores:
        """The scores of a finished record, verified bit for bit.

        Raises:
            StoreError: no scores belong to the record, or their file is missing or damaged.
            AbsentScoresError: the record is published, and its scores are not here.
        """
        who = f"{record.estimator}/{record.target} seed {record.seed}"
        if not record.scores_file:
            raise StoreError(f"{who} is {record.status} and has no scores")
        path = self.scores / record.scores_file
        if not path.resolve().is_relative_to(self.scores.resolve()):
            raise StoreError(f"{who} names the score file {path}, which is outside {self.scores}")
        if record.scores_file != score_file(record):
            raise StoreError(f"{who} names the score file {path}, which is not its own")
        if not os.path.lexists(path):  # what is no regular file is damaged, not absent
            missing = f"the score file {path} of {who} is missing"
            if self._is_published(record):
                raise AbsentScoresError(
                    f"{missing}; published scores come in an archive: unpack it with `fine-bench "
                    "publish --unpack ARCHIVE`, or recompute with force=true"
                )
            raise StoreError(f"{missing}; recompute with force=true")
        try:
            scores = unpack(path)
            check_size(record.training, record.config, scores.values.shape[1])
        except (safetensors.SafetensorError, KeyError, ValueError, OSError) as error:
            raise StoreError(
                f"the score file {path} of {who} is damaged ({error}); recompute with force=true"
            ) from error
        if scores_digest(scores) != record.scores_sha256 or scores.target != record.target:
            raise StoreError(
                f"the score file {path} of {who} is damaged: its values are not those of the "
                "record; recompute with force=true"
            )
        return scores

    def save_consistency(self, consistency: Consistency) -> Path:
        """Cache a comparison. Its name follows from what was compared, so it may be replaced."""
        path = self.records / comparison_file(consistency)
        write_atomic(path, consistency_json(consistency))
        self.compared.append(consistency)
        return path

    def find_consistency(
        self,
        *,
        task: str,
        setting: str,
        estimator: str,
        target: str,
        scores: Mapping[int, str],
        k: int,
        metric_version: int,
    ) -> Consistency | None:
        """The cached comparison of exactly these scores (seed → digest); ``None`` if unreadable.

        Its pairs may be some of them only: the others are kept with fewer seeds.
        """
        wanted = Consistency(task, setting, estimator, target, k, metric_version, scores, {})
        table = self.published.table(table_name(task, setting))
        found: list[RunRecord | Consistency] = [entry.found for entry in table.entries]
        if not self.published_only:
            with contextlib.suppress(ValueError):
                found.append(read(self.records / comparison_file(wanted)))
        for one in found:
            if isinstance(one, Consistency) and replace(one, pairs={}, variation={}) == wanted:
                return one
        return None


def read_record(path: Path | str) -> RunRecord:
    """One record from its file, or from the published line that says the same.

    Args:
        path: ``DIR/records/TASK/SETTING8/NAME.json``. Where there is no such file, the record of
            that name is looked for below ``DIR/published/``.

    Raises:
        StoreError: no such record, or none that this version reads; the message names it.
    """
    path = Path(path)
    found: RunRecord | Consistency | None = None
    if os.path.lexists(path):  # a pipe or a folder of its name is damage, not an absent record
        try:
            found = read(path)
            if _ADDRESS.search(path.name):
                check_address(
                    f"{table_folder(found.task, found.setting).as_posix()}/{path.name}", found
                )
        except ValueError as error:
            raise StoreError(f"{path} {error}") from error
    else:
        parents = path.absolute().parents
        if len(parents) > 3 and parents[2].name == "records":
            name = path.absolute().relative_to(parents[2]).as_posix()
            entry = published_entry(parents[3] / "published", name)
            found = entry.found if entry is not None else None
    if found is None:
        raise StoreError(
            f"there is no record {path}; records lie below results/records, one JSON file each, "
            "and published ones, under the same names, in results/published"
        )
    if not isinstance(found, RunRecord):
        raise StoreError(f"{path} compares seeds and is no record; name the record of one seed")
    return found


def newest(records: Iterable[RunRecord]) -> list[RunRecord]:
    """What counts: for every identity its newest revision, for every cell the highest version.

    A cell is (task, setting, estimator, target, seed, estimator_hash). A record that failed before
    its data were known has no data digest: it replaces the cell's other records when it is the
    most recent of them, and is dropped when it is not. Sorted, whatever the order of the input.
    """
    by_identity: dict[tuple[Any, ...], RunRecord] = {}
    for record in sorted(records, key=lambda r: (r.revision, r.created)):
        by_identity[key_of(record)] = record
    by_cell: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in by_identity.values():
        by_cell.setdefault(key_of(record, CELL), []).append(record)
    kept: list[RunRecord] = []
    for candidates in by_cell.values():
        version = max(record.version for record in candidates)
        candidates = [record for record in candidates if record.version == version]
        latest = max(candidates, key=lambda r: (r.created, r.data_sha256))
        if latest.data_sha256:
            kept += [record for record in candidates if record.data_sha256]
        else:
            kept.append(latest)
    return sorted(kept, key=key_of)
