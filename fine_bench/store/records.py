"""The store: one JSON file a record, one safetensors file its scores, both whole or absent.

Layout below the results folder (``setting8`` and ``digest8`` are the first eight hex digits)::

    records/<task>/<setting8>/<estimator>--<target>--seed<seed>--<digest8>--r<revision>.json
    records/<task>/<setting8>/consistency--<estimator>--<target>--<digest8>.json
    scores/<task>/<setting8>/<the record's file name>.safetensors

A record's ``digest8`` covers its whole identity (task, setting, estimator, estimator_hash, method
version, target, seed, data_sha256), so different configurations never meet in one name. The name
is only an address: what a record says is read from its content.

A file is written under a temporary name in its own folder, flushed to the disk and then *linked*
to its final name, which fails when that name is taken: no record is overwritten or edited, a
recomputation takes the next free revision. Scores come before their record, so a record that
exists has whole scores. Files are data, never code: JSON and safetensors, no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fine_bench.types import InfluenceScores, RunRecord, Target

# Windows has no fcntl; the exclusive link then protects alone
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

FORMAT = 1
IDENTITY = (
    "task",
    "setting",
    "estimator",
    "estimator_hash",
    "version",
    "target",
    "seed",
    "data_sha256",
)
CELL = ("task", "setting", "estimator", "target", "seed", "estimator_hash")
PENDING = "pending"
"""May stand for ``scores_sha256`` in a finished record that ``RecordStore.save`` will fill."""

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_STALE_SECONDS = 24 * 3600


class StoreError(RuntimeError):
    """A file of the store is missing or damaged, or could not be written. The message names it."""


# ------------------------------------------------------------------------------------ encoding


def _encode(value: Any, where: str = "") -> Any:
    """``value`` as strict JSON; NaN and infinities become ``"NaN"``, ``"Infinity"``, ...."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, str):
        if value in _NOT_FINITE:
            raise ValueError(
                f"{where or 'value'} is the string {value!r}, which the store keeps for numbers "
                "that are not finite; pass the number or another word"
            )
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy or torch scalar
        return _encode(value.item(), where)
    raise TypeError(
        f"{where or 'value'} is a {type(value).__name__}, which JSON cannot hold; pass numbers, "
        "strings, lists and mappings"
    )


def _decode(value: Any) -> Any:
    """Inverse of ``_encode`` up to tuples, which come back as lists."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _json(encoded: Any) -> bytes:
    text = json.dumps(encoded, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False)
    return (text + "\n").encode()


def _record_json(record: RunRecord) -> bytes:
    payload = {f.name: getattr(record, f.name) for f in fields(record)}
    # words stay as they are: a reason may well be "NaN", and only mappings are decoded
    return _json({k: v if isinstance(v, str) else _encode(v, k) for k, v in payload.items()})


def digest(obj: Any) -> str:
    """SHA-256 (64 hex digits) of ``obj`` as canonical JSON: sorted keys, no white space."""
    text = json.dumps(
        _encode(obj), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _number(value: Any) -> float:
    """A metric or a cost: a number, where ``null`` too means NaN."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a metric or cost must be a number, got {value!r}")
    return float(value)


def _record_from(payload: Mapping[str, Any]) -> RunRecord:
    """The record that a JSON object describes; ``ValueError`` says what is wrong with it."""
    kinds = {"str": str, "Status": str, "int": int}  # annotations of RunRecord; the rest: mappings
    known = {f.name: kinds.get(str(f.type), dict) for f in fields(RunRecord)}
    unknown = sorted(set(payload) - set(known))
    if unknown:
        raise ValueError(f"unknown fields {', '.join(unknown)}")
    values: dict[str, Any] = {}
    for name, value in payload.items():
        kind = known[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name} must be {kind.__name__}, got {value!r:.60}")
        values[name] = _decode(value) if kind is dict else value
    for name in ("metrics", "cost"):
        values[name] = {key: _number(item) for key, item in values.get(name, {}).items()}
    try:
        return RunRecord(**values)
    except TypeError as error:
        raise ValueError(str(error).replace("RunRecord.__init__()", "a record")) from None


# -------------------------------------------------------------------------------------- scores


def _tensor_digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    name = str(data.dtype).removeprefix("torch.")
    state = hashlib.sha256(f"{name} {tuple(data.shape)} ".encode())
    state.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def scores_digest(scores: InfluenceScores) -> str:
    """SHA-256 over dtype, shape and bytes of ``scores.values``: equal only when bit-identical.

    Scores of some examples only: over that and over which ones they are.
    """
    values = _tensor_digest(scores.values)
    if scores.watched is None:
        return values
    return digest([values, _tensor_digest(scores.watched)])


def _pack(scores: InfluenceScores) -> bytes:
    """The safetensors file of ``scores``; the same scores always give the same bytes."""
    tensors = {"values": scores.values}
    if scores.std_error is not None:
        tensors["std_error"] = scores.std_error
    if scores.n_observations is not None:
        tensors["n_observations"] = scores.n_observations
    if scores.watched is not None:
        tensors["watched"] = scores.watched
    tensors |= {f"extra.{name}": tensor for name, tensor in scores.extras.items()}
    # cloned, because safetensors refuses tensors that share memory
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}
    about = {"method": scores.method, "target": scores.target, "version": str(scores.version)}
    about |= {f"sha256.{name}": _tensor_digest(tensor) for name, tensor in tensors.items()}
    blob = safetensors.torch.save(tensors, metadata=about)
    # safetensors orders the metadata by a hash that differs between processes: sort it
    end = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[end:]


def _unpack(path: Path) -> InfluenceScores:
    with safetensors.safe_open(path, framework="pt") as file:
        about = file.metadata() or {}
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if about.get(f"sha256.{name}") != _tensor_digest(tensor):
            raise ValueError(f"{name} is not what was written")
    return InfluenceScores(
        values=tensors["values"],
        method=about["method"],
        target=cast(Target, about["target"]),
        std_error=tensors.get("std_error"),
        n_observations=tensors.get("n_observations"),
        version=int(about["version"]),
        extras={k.removeprefix("extra."): v for k, v in tensors.items() if k.startswith("extra.")},
        watched=tensors.get("watched"),
    )


# --------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold ``folder`` against other writers; the system lets go when a process dies.

    Yields False where the system or the file system has no such locks. The exclusive link then
    still protects every record; only leftovers of killed writers are treated more carefully.
    """
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


def _flush_folder(folder: Path) -> None:
    """Make a new name in ``folder`` survive a power cut, where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write_whole(path: Path, data: bytes) -> None:
    """Write and flush; a function of its own so that tests can let the disk be full."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(temporary: Path, final: Path) -> None:
    """Give a whole file its final name; ``FileExistsError`` when the name is taken."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # No hard links here (FAT, some network disks): the lock keeps look-then-rename exclusive.
        if final.exists():
            raise FileExistsError(errno.EEXIST, "already there", str(final)) from None
        os.replace(temporary, final)


def _publish(final: Path, data: bytes, finish: Callable[[Path, Path], object]) -> None:
    """Write ``data`` whole under ``final``: all of it or nothing. ``finish`` moves it there."""
    temporary = final.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        _write_whole(temporary, data)
        finish(temporary, final)
        _flush_folder(final.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise StoreError(
            f"could not write {final}: {error.strerror or error}. Nothing was left under that "
            "name; make room or check the permissions, and run again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that may be replaced (tables, caches): readers see the old or the new one."""
    _make_folder(path.parent)
    _publish(path, data, os.replace)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"could not make the folder {folder}: {error.strerror}") from error


def _remove_leftovers(folder: Path, locked: bool) -> None:
    """Remove temporary files of writers that are gone.

    A file counts as left over when it is a day old, or when this process holds the folder's lock
    and no process with the writer's number runs here. Whoever still writes is never disturbed.
    """
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            old = time.time() - path.stat().st_mtime > _STALE_SECONDS
            writer = re.match(r"\.(\d+)-", path.name)
            if old or (locked and writer is not None and not _runs(int(writer[1]))):
                path.unlink()


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _slug(name: str) -> str:
    """``name`` as part of a file name. Names that differ may share one; the digest tells apart."""
    return re.sub(r"[^A-Za-z0-9_.+=,@-]", "_", name).lstrip(".")[:80] or "_"


# --------------------------------------------------------------------------------------- store


@dataclass(frozen=True)
class Consistency:
    """What comparing the seeds of one leaderboard row gave, kept so that tables outlive scores.

    Attributes:
        task, setting, estimator, target: the row.
        k: the k of Jaccard@k, the number of bad examples.
        metric_version: version of the metrics, raised when their values may change.
        scores: seed → digest of the scores compared.
        pairs: (seed_a, seed_b) with seed_a < seed_b → metric values by name.
        variation: summary of the per-example coefficient of variation over the seeds.
    """

    task: str
    setting: str
    estimator: str
    target: str
    k: int
    metric_version: int
    scores: Mapping[int, str]
    pairs: Mapping[tuple[int, int], Mapping[str, float]]
    variation: Mapping[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Covers what was compared: score digests by seed, k and metric version."""
        return consistency_digest(self.scores, self.k, self.metric_version)


def consistency_digest(scores: Mapping[int, str], k: int, metric_version: int) -> str:
    """Digest of the sorted score digests (with their seeds), k and the version of the metrics."""
    return digest([sorted([sha, seed] for seed, sha in scores.items()), k, metric_version])


def _consistency_from(payload: Mapping[str, Any]) -> Consistency:
    try:
        found = Consistency(
            **{name: str(payload[name]) for name in ("task", "setting", "estimator", "target")},
            k=int(payload["k"]),
            metric_version=int(payload["metric_version"]),
            scores={int(seed): str(sha) for seed, sha in payload["scores"].items()},
            pairs={
                (int(a), int(b)): {name: _number(x) for name, x in _decode(values).items()}
                for a, b, values in payload["pairs"]
            },
            variation={name: _number(x) for name, x in _decode(payload["variation"]).items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a consistency file: {type(error).__name__} {error}") from None
    if any(seed not in found.scores for pair in found.pairs for seed in pair):
        raise ValueError("compares seeds whose scores it does not name")
    return found


@dataclass(frozen=True)
class Scan:
    """Everything readable below ``records/``, and what was not.

    Attributes:
        records: all revisions of all records, ordered by file name.
        problems: one line a file that could not be read; the others are unaffected.
        consistency: the cached comparisons.
    """

    records: list[RunRecord]
    problems: list[str]
    consistency: list[Consistency]


class RecordStore:
    """Records and scores below one results folder; see the module's text for the layout.

    Any number of processes may write into one folder. Locks between machines are those of the
    shared file system.

    Args:
        root: the results folder; made on the first write.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
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
            sha, blob = scores_digest(scores), _pack(scores)
            given = record.scores_sha256
            if len(given) == 64 and given != sha:
                raise ValueError(f"the record names scores {given[:8]}…, given were {sha[:8]}…")
            if scores.target != record.target:
                raise ValueError(f"the record's target is {record.target!r}, {scores.target!r} not")
        created = datetime.now(UTC).isoformat(timespec="microseconds")
        record = replace(record, scores_sha256=sha, scores_file="", created=created, format=FORMAT)
        _record_json(record)  # refuse before anything is written

        place, stem = self._place(record.task, record.setting), self._stem(record)
        folder, score_folder = self.records / place, self.scores / place
        _make_folder(folder)
        if blob is not None:
            _make_folder(score_folder)
        with _lock(folder) as locked:
            _remove_leftovers(folder, locked)
            _remove_leftovers(score_folder, locked)
            revision = self._last_revision(folder, stem) + 1
            while True:
                name = f"{stem}--r{revision}"
                score_path = score_folder / f"{name}.safetensors"
                file = score_path.relative_to(self.scores).as_posix() if blob is not None else ""
                whole = replace(record, revision=revision, scores_file=file)
                try:
                    self._add(whole, folder / f"{name}.json", score_path, blob, locked)
                except FileExistsError:  # another writer was faster: the next one is ours
                    revision += 1
                    continue
                return _record_from(json.loads(_record_json(whole)))

    @staticmethod
    def _add(
        record: RunRecord, path: Path, score_path: Path, blob: bytes | None, locked: bool
    ) -> None:
        if blob is not None:
            if locked:  # scores without a record: their writer was killed between the two files
                score_path.unlink(missing_ok=True)
            _publish(score_path, blob, _link)
        try:
            _publish(path, _record_json(record), _link)
        except BaseException as error:
            # these scores are ours; they stay only if their record made it under its name
            if blob is not None and (isinstance(error, FileExistsError) or not path.exists()):
                score_path.unlink(missing_ok=True)
            raise

    @staticmethod
    def _place(task: str, setting: str) -> Path:
        return Path(_slug(task)) / _slug(setting[:8])

    @staticmethod
    def _stem(record: RunRecord) -> str:
        short = digest([getattr(record, name) for name in IDENTITY])[:8]
        row = f"{_slug(record.estimator)}--{_slug(record.target)}"
        return f"{row}--seed{record.seed}--{short}"

    @staticmethod
    def _last_revision(folder: Path, stem: str) -> int:
        """Highest revision in use, be its file readable or not."""
        found = (re.search(r"--r(\d+)\.json$", path.name) for path in folder.glob(f"{stem}--r*"))
        return max((int(match[1]) for match in found if match), default=0)

    def scan(self) -> Scan:
        """Read everything below ``records/``; what cannot be read becomes a line in ``problems``.

        Temporary files are ignored. The order depends on the names of the files alone.
        """
        records: list[RunRecord] = []
        problems: list[str] = []
        consistency: list[Consistency] = []
        for path in sorted(self.records.rglob("*.json")):
            if path.name.startswith("."):
                continue
            try:
                found = _read(path)
            except ValueError as error:
                problems.append(f"{path.relative_to(self.root).as_posix()}: {error}")
                continue
            if isinstance(found, RunRecord):
                records.append(found)
            else:
                consistency.append(found)
        return Scan(records, problems, consistency)

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

        Reads only the files of that identity. A damaged file among them is passed over here (and
        named by ``scan``), so that its cell is computed again.
        """
        wanted = RunRecord(
            task, setting, estimator, estimator_hash, version, target, seed, "failed", "-"
        )
        wanted = replace(wanted, data_sha256=data_sha256)
        found = []
        for path in (self.records / self._place(task, setting)).glob(f"{self._stem(wanted)}--r*"):
            with contextlib.suppress(ValueError):
                record = _read(path)
                if isinstance(record, RunRecord) and _key(record) == _key(wanted):
                    found.append(record)
        return max(found, key=lambda record: record.revision, default=None)

    def load_scores(self, record: RunRecord) -> InfluenceScores:
        """The scores of a finished record, verified bit for bit.

        Raises:
            StoreError: no scores belong to the record, or their file is missing or damaged.
        """
        who = f"{record.estimator}/{record.target} seed {record.seed}"
        if not record.scores_file:
            raise StoreError(f"{who} is {record.status} and has no scores")
        path = self.scores / record.scores_file
        if not path.resolve().is_relative_to(self.scores.resolve()):
            raise StoreError(f"{who} names the score file {path}, which is outside {self.scores}")
        if not path.is_file():
            raise StoreError(
                f"the score file {path} of {who} is missing; recompute with force=true"
            )
        try:
            scores = _unpack(path)
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
        path = self._consistency_path(consistency)
        payload = {f.name: getattr(consistency, f.name) for f in fields(consistency)}
        pairs = [[a, b, dict(values)] for (a, b), values in sorted(consistency.pairs.items())]
        payload |= {"format": FORMAT, "kind": "consistency", "pairs": pairs}
        write_atomic(path, _json(_encode(payload)))
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
        """The cached comparison of exactly these scores (seed → digest); ``None`` if unreadable."""
        wanted = Consistency(task, setting, estimator, target, k, metric_version, scores, {})
        try:
            found = _read(self._consistency_path(wanted))
        except ValueError:
            return None
        if isinstance(found, Consistency) and replace(found, pairs={}, variation={}) == wanted:
            return found
        return None

    def _consistency_path(self, key: Consistency) -> Path:
        name = f"consistency--{_slug(key.estimator)}--{_slug(key.target)}--{key.digest[:8]}.json"
        return self.records / self._place(key.task, key.setting) / name


def _key(record: RunRecord, names: Sequence[str] = IDENTITY) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in names)


def _read(path: Path) -> RunRecord | Consistency:
    """One file below ``records/``; ``ValueError`` says why it cannot be used."""
    try:
        payload = json.loads(path.read_bytes().decode())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"is not whole JSON ({error})") from None
    if not isinstance(payload, dict):
        raise ValueError("is not a record")
    if payload.get("format") != FORMAT:
        raise ValueError(
            f"has format {payload.get('format')!r}, this fine_bench reads format {FORMAT}; read "
            "it with the version that wrote it"
        )
    if payload.get("kind") == "consistency":
        return _consistency_from(payload)
    return _record_from(payload)


def read_record(path: Path | str) -> RunRecord:
    """One record from its file.

    Raises:
        StoreError: no such file, or not a record that this version reads; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise StoreError(
            f"there is no record {path}; records lie below results/records, one JSON file each"
        )
    try:
        found = _read(path)
    except ValueError as error:
        raise StoreError(f"{path} {error}") from error
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
        by_identity[_key(record)] = record
    by_cell: dict[tuple[Any, ...], list[RunRecord]] = {}
    for record in by_identity.values():
        by_cell.setdefault(_key(record, CELL), []).append(record)
    kept: list[RunRecord] = []
    for candidates in by_cell.values():
        version = max(record.version for record in candidates)
        candidates = [record for record in candidates if record.version == version]
        latest = max(candidates, key=lambda r: (r.created, r.data_sha256))
        if latest.data_sha256:
            kept += [record for record in candidates if record.data_sha256]
        else:
            kept.append(latest)
    return sorted(kept, key=_key)


# --------------------------------------------------------------------------------- environment


def environment() -> dict[str, Any]:
    """Where a number came from: commit, versions, hardware. No host name, no user's path.

    ``commit`` and ``dirty`` speak of the source tree of this package (its code and ``conf/``, not
    the results beside it), and are ``"unknown"`` when it is not a git checkout.
    """
    return {**_fixed_environment(), "threads": torch.get_num_threads()}


@cache  # the code that runs is the code that was imported, whatever is edited meanwhile
def _fixed_environment() -> dict[str, Any]:
    versions = {name: _version(name) for name in ("torch", "pytorch_lightning", "numpy", "scipy")}
    cuda = torch.cuda.is_available()
    return {
        **_git(Path(__file__).resolve().parents[1]),
        **versions,
        "hydra": _version("hydra-core"),
        "fine_bench": _version("fine_bench"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name(0) if cuda else "none",
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(package: Path) -> dict[str, Any]:
    """Commit and dirty flag of the tree that holds ``package``, if git tracks the package there."""
    # inside a git hook these variables point at another repository
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package.parent), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=clean, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        # an environment inside somebody's repository is not a checkout of this package
        git("ls-files", "--error-unmatch", f"{package.name}/__init__.py")
        source = [package.name, "baselines", "conf", "pyproject.toml"]
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", *source)),
        }
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return 0.0
