"""Archives of published scores: written, checked and unpacked; they lie beside a release.

An archive is a tar file, compressed if its name ends with ``.gz``, with one safetensors file a
table, named as the packed records of the table (``published``). A tensor that several scores share,
such as ``truth/is_bad`` or the counts of observations, is stored once, and int64 whose numbers fit
is stored as int32. The header of each file says which tensors make up which scores::

    scores   {score file: {method, target, version, tensors: {name: digest}}}
    types    {digest: dtype as it was}

A tensor's digest covers its dtype, shape and bytes as they were, so unpacking gives back every bit
or names what it cannot. The same records and scores give the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fine_bench.store.files import (
    StoreError,
    check_output,
    make_folder,
    write_new,
    write_output,
)
from fine_bench.store.guarded import is_file, parse_json
from fine_bench.store.published import table_name
from fine_bench.store.records import RecordStore
from fine_bench.store.scores import (
    from_tensors,
    pack,
    scores_digest,
    tensor_digest,
    tensors_of,
)
from fine_bench.types import InfluenceScores, RunRecord, Target

_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class ArchiveReport:
    """What an archive holds of the published scores.

    Attributes:
        good: how many scores are there and verify bit for bit.
        missing: score files of published records that it does not have (writing: that are absent
            from the working store), by name.
        wrong: what is there and does not verify or cannot be put in place, one line each.
        written: files made now.
    """

    good: int
    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    written: int = 0

    @property
    def complete(self) -> bool:
        """Every published score is there and is what its record says."""
        return not self.missing and not self.wrong


def write_archive(store: RecordStore, path: Path, force: bool = False) -> ArchiveReport:
    """Write the scores of all published records into one file, as ``files.write_output`` does.

    Args:
        store: the results folder; every score is verified against its record when it is read.
        path: the archive. Without any score none is written.
        force: whether a file that is there may be replaced.

    Raises:
        StoreError: the file exists or cannot be written; nothing was done.
    """
    check_output(path, force)
    good, missing, wrong = 0, [], []
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, records in _tables(store):
            kept: dict[str, InfluenceScores] = {}
            for record in records:
                if not (store.scores / record.scores_file).is_file():
                    missing.append(record.scores_file)
                    continue
                try:
                    kept[record.scores_file] = store.load_scores(record)
                except StoreError as error:
                    wrong.append(str(error))
            if kept:
                blob = _table_blob(kept)
                member = tarfile.TarInfo(name)
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
            good += len(kept)
    if good:
        data = whole.getvalue()
        # without the time of day, so that the same scores give the same bytes
        data = gzip.compress(data, mtime=0) if path.suffix == ".gz" else data
        write_output(path, data, force)
    return ArchiveReport(good, tuple(missing), tuple(wrong), written=int(good > 0))


def check_archive(store: RecordStore, path: Path) -> ArchiveReport:
    """Hold every score of an archive against the ``scores_sha256`` of its published record.

    Raises:
        StoreError: no such file, or no archive.
    """
    return _read_archive(store, path, keep=False)


def unpack_archive(store: RecordStore, path: Path) -> ArchiveReport:
    """Put the scores of an archive where ``load_scores`` looks for them; others are left alone.

    Only score files that published records name are written, each verified before. One that is
    there already is kept; if it holds something else, it is named.

    Raises:
        StoreError: no such file, no archive, or a folder that cannot be written.
    """
    return _read_archive(store, path, keep=True)


def _read_archive(store: RecordStore, path: Path, keep: bool) -> ArchiveReport:
    good, written, missing, wrong = 0, 0, [], []
    try:
        if not is_file(path):
            raise ValueError("there is no such file")
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar.getmembers() if member.isfile()}
            for name, records in _tables(store):
                file = tar.extractfile(members[name]) if name in members else None
                table = _ArchiveTable(file.read()) if file is not None else None
                for record in records:
                    if table is None or record.scores_file not in table.index:
                        missing.append(record.scores_file)
                        continue
                    try:
                        scores = table.scores(record)
                        written += keep and _put(store, record, scores)
                        good += 1
                    except ValueError as error:
                        wrong.append(f"{record.scores_file}: {error}")
    except (
        OSError, EOFError, zlib.error, tarfile.TarError, safetensors.SafetensorError,
        ValueError, LookupError, TypeError, AttributeError, MemoryError,
    ) as error:  # fmt: skip
        raise StoreError(f"{path} is no archive of scores that can be read: {error}") from error
    return ArchiveReport(good, tuple(missing), tuple(wrong), written)


def _tables(store: RecordStore) -> Iterator[tuple[str, list[RunRecord]]]:
    """File name in the archive, and the published records that have scores."""
    found: dict[str, list[RunRecord]] = {}
    for table in store.published.tables():
        for entry in table.entries:
            if isinstance(entry.found, RunRecord) and entry.found.scores_file:
                name = table_name(entry.found.task, entry.found.setting)
                found.setdefault(name.replace(".jsonl", ".safetensors"), []).append(entry.found)
    yield from sorted(found.items())


def _table_blob(kept: dict[str, InfluenceScores]) -> bytes:
    tensors: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    index: dict[str, Any] = {}
    for file, scores in sorted(kept.items()):
        names = {}
        for name, tensor in tensors_of(scores).items():
            names[name] = key = tensor_digest(tensor)
            types[key] = str(tensor.dtype).removeprefix("torch.")
            tensors[key] = _narrow(tensor)
        index[file] = {
            "method": scores.method,
            "target": scores.target,
            "version": scores.version,
            "tensors": names,
        }
    # one key alone: safetensors orders several by a hash that differs between processes
    about = json.dumps({"scores": index, "types": types}, sort_keys=True, ensure_ascii=False)
    return safetensors.torch.save(tensors, metadata={"fine_bench": about})


def _narrow(tensor: Tensor) -> Tensor:
    """int64 as int32 where no number is lost."""
    data = tensor.detach().cpu().contiguous()
    if data.dtype != torch.int64 or data.numel() == 0:
        return data.clone()
    fits = _INT32.min <= int(data.min()) and int(data.max()) <= _INT32.max
    return data.to(torch.int32) if fits else data.clone()


class _ArchiveTable:
    """One table of an archive."""

    def __init__(self, blob: bytes) -> None:
        end = 8 + int.from_bytes(blob[:8], "little")
        about = parse_json(parse_json(blob[8:end])["__metadata__"]["fine_bench"])
        self.index: dict[str, Any] = about["scores"]
        self.types: dict[str, str] = about["types"]
        self.tensors: dict[str, Tensor] = safetensors.torch.load(blob)
        self._whole: dict[str, Tensor] = {}

    def _tensor(self, name: str, key: str) -> Tensor:
        """The tensor as it was; ``ValueError`` when it is not what the digest says."""
        if key not in self._whole:
            if key not in self.tensors or key not in self.types:
                raise ValueError(f"{name} is missing")
            tensor = self.tensors[key].to(getattr(torch, self.types[key]))
            if tensor_digest(tensor) != key:
                raise ValueError(f"{name} is not what was written")
            self._whole[key] = tensor
        return self._whole[key]

    def scores(self, record: RunRecord) -> InfluenceScores:
        """The scores of a record; ``ValueError`` when they are not those that it names."""
        entry = self.index[record.scores_file]
        tensors = {name: self._tensor(name, key) for name, key in entry["tensors"].items()}
        scores = from_tensors(
            tensors, entry["method"], cast(Target, entry["target"]), int(entry["version"])
        )
        if scores_digest(scores) != record.scores_sha256 or scores.target != record.target:
            raise ValueError("its values are not those of the record")
        return scores


def _put(store: RecordStore, record: RunRecord, scores: InfluenceScores) -> bool:
    """Write a score file that is not there; whether it was written."""
    path = store.scores / record.scores_file
    if not path.resolve().is_relative_to(store.scores.resolve()):
        raise ValueError(f"lies outside {store.scores}")
    blob = pack(scores)
    if path.is_file():
        if path.read_bytes() != blob:
            raise ValueError("something else is there under that name; move it away")
        return False
    make_folder(path.parent)
    write_new(path, blob)
    return True
