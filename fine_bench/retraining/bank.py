"""A bank on the disk: a folder that only grows.

Layout::

    manifest.json                                     what bank this is
    sets/<sha256 of the name>.json                    a set of the part "definition"
    <part>/<subset>-<run>+<models>--<sha256>.safetensors

A chunk holds some models of one part with all their numbers, memberships packed as bits. Its name
is that of its first model, how many models it holds and the first 16 hex digits of the SHA-256 of
its bytes: no chunk can overwrite another one, and one that was damaged or cut short is recognised.
Every file is written under a temporary name and renamed: it is whole or absent. A killed run
loses the models in training and nothing else; several processes may add to one bank at once.

The manifest says which task, data, model, recipe and design the models belong to. A bank of
anything else is refused, and the refusal names what differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fine_bench.retraining.design import PARTS, Model, Part
from fine_bench.retraining.identity import as_json, bank_folder, differences
from fine_bench.retraining.outputs import BankModels
from fine_bench.store.digest import digest
from fine_bench.store.environment import environment
from fine_bench.store.files import StoreError, write_atomic
from fine_bench.store.guarded import is_file, parse_json, read_bytes, read_json

FORMAT = 1
_ABOUT = ("format", "created", "environment", "bad")
_STALE_SECONDS = 24 * 3600
_VALUES = ("loss", "margin", "query_loss", "query_margin")


def _check_about(manifest: Mapping[str, Any]) -> None:
    """What readers of a bank take from its manifest besides the identity that chunks are held to.

    Raises:
        KeyError, ValueError: missing, or of another form.
    """
    bad, n_train = manifest["bad"], manifest["n_train"]
    if not isinstance(bad, list) or not all(type(i) is int and 0 <= i < n_train for i in bad):
        raise ValueError(f"bad must be positions below {n_train}, got {str(bad)[:60]}")
    if not isinstance(manifest.get("design", {}), dict):
        raise ValueError(f"design must be a mapping, got {str(manifest['design'])[:60]}")


class Bank:
    """A bank's folder. Made by ``create`` or ``open``.

    Attributes:
        folder: where it is.
        manifest: which bank it is (``identity``), and when and where it was begun.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def create(
        cls, folder: Path | str, identity: Mapping[str, Any], bad: Sequence[int] = ()
    ) -> Bank:
        """Begin a bank, or open the one that is there.

        Args:
            folder: its own folder.
            identity: what its models belong to: at least ``n_train`` and ``n_query``, and
                everything else that must be the same in all of them, as JSON can hold it.
            bad: positions of the planted bad examples; noted, for whoever reads the bank.

        Raises:
            StoreError: the folder holds another bank.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            about = {
                "format": FORMAT,
                "created": datetime.now(UTC).isoformat(),
                "environment": environment(),
                "bad": [int(i) for i in bad],
            }
            write_atomic(folder / "manifest.json", _json({**identity, **about}))
        return cls.open(folder, identity)

    @classmethod
    def open(cls, folder: Path | str, expected: Mapping[str, Any] | None = None) -> Bank:
        """Open a bank.

        Args:
            folder: its own folder.
            expected: the identity that it must have; None takes whatever it is.

        Raises:
            StoreError: there is none, it was written by another version, or it is another bank.
        """
        folder = Path(folder)
        path = folder / "manifest.json"
        try:
            manifest = read_json(path)
            for name in ("n_train", "n_query"):
                if type(manifest[name]) is not int or manifest[name] < 1:
                    raise ValueError(f"{name} must be a number of examples, got {manifest[name]!r}")
            _check_about(manifest)
        except FileNotFoundError:
            raise StoreError(
                f"{folder} holds no bank: there is no manifest.json in it; train one with "
                "fine-bench bank"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}); restore it from a copy, or move the folder "
                "away to begin anew"
            ) from error
        if manifest.get("format") != FORMAT:
            raise StoreError(
                f"{path} has format {manifest.get('format')!r}, this fine_bench reads format "
                f"{FORMAT}; read it with the version that wrote it"
            )
        bank = cls(folder, manifest)
        if expected is not None and (found := differences(bank.identity, as_json(expected))):
            raise StoreError(
                f"{folder} is another bank: {'; '.join(found)}. Choose another folder for this one"
            )
        return bank

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its models belong to."""
        return {key: value for key, value in self.manifest.items() if key not in _ABOUT}

    @property
    def _mark(self) -> str:
        return digest(self.identity)[:16]

    # ------------------------------------------------------------------------------- chunks

    def add(self, models: Sequence[Model], values: BankModels) -> Path:
        """Store trained models of one part, in this order.

        Raises:
            ValueError: models of several parts, or arrays that do not fit the bank.
            StoreError: the disk refused; nothing of it is stored then.
        """
        parts = {model.part for model in models}
        shape = (len(models), self.identity["n_train"], self.identity["n_query"])
        given = (len(values), values.n_train, values.query_loss.shape[1])
        if len(parts) != 1 or given != shape:
            raise ValueError(
                f"a chunk holds models of one part, and (models, examples, queries) = {shape} in "
                f"this bank; got parts {sorted(parts)} and {given}"
            )
        part = parts.pop()
        tensors: dict[str, NDArray[Any]] = {
            "subset": values.subset,
            "run": np.array([model.run for model in models], dtype=np.int64),
            "seed": values.seed,
            "members": np.packbits(values.members, axis=1),
        }
        tensors |= {name: getattr(values, name) for name in _VALUES}
        # one key only: safetensors keeps several in no fixed order
        about = {"fine_bench": json.dumps({"format": FORMAT, "bank": self._mark, "part": part})}
        blob = safetensors.numpy.save(
            {name: np.ascontiguousarray(array) for name, array in tensors.items()}, about
        )
        first = models[0]
        name = f"{first.subset:06d}-{first.run:04d}+{len(models)}--{_sha(blob)}.safetensors"
        path = self.folder / part / name
        write_atomic(path, blob)
        return path

    def present(self, part: Part) -> set[tuple[int, int]]:
        """The ``Model.key`` of every model that is stored.

        Raises:
            StoreError: naming a chunk that is damaged or does not belong here.
        """
        keys: set[tuple[int, int]] = set()
        for path in self._chunks(part):
            with self._reading(path):
                if not is_file(path):  # a pipe is not waited for
                    raise ValueError("is no regular file")
                with safetensors.safe_open(path, framework="np") as file:
                    self._check_metadata(path, part, file.metadata())
                    subset, run = file.get_tensor("subset"), file.get_tensor("run")
                keys |= set(zip(subset.tolist(), run.tolist(), strict=True))
        return keys

    def load(self, part: Part, at_least: int = 1) -> BankModels:
        """All models of a part, by subset and run, each chunk verified by its digest.

        Args:
            part: which.
            at_least: fewest models to be content with.

        Raises:
            StoreError: a chunk is damaged, there are too few models, or (part "single") an example
                is in all models or in none, so that they say nothing about it.
        """
        n = int(self.identity["n_train"])
        rows: dict[tuple[int, int], tuple[int, int]] = {}
        chunks: list[dict[str, NDArray[Any]]] = []
        for path in self._chunks(part):
            with self._reading(path):
                blob = read_bytes(path)
                if _sha(blob) != path.stem.rsplit("--", 1)[-1]:
                    raise ValueError("its bytes are not those that were written")
                with safetensors.safe_open(path, framework="np") as file:
                    self._check_metadata(path, part, file.metadata())
                chunk = safetensors.numpy.load(blob)
                keys = self._keys(chunk)
            for row, key in enumerate(keys):
                rows.setdefault(key, (len(chunks), row))  # two processes may train the same model
            chunks.append(chunk)
        if len(rows) < at_least:
            raise StoreError(
                f"the part {part!r} of {self.folder} holds {len(rows)} models, at least {at_least} "
                "are needed; run fine-bench bank with more of them"
            )
        where = [rows[key] for key in sorted(rows)]
        arrays: dict[str, NDArray[Any]] = {}
        for name in ("subset", "seed", *_VALUES):
            arrays[name] = np.stack([chunks[c][name][r] for c, r in where])
        packed = np.stack([chunks[c]["members"][r] for c, r in where])
        members = np.unpackbits(packed, axis=1, count=n).astype(np.bool_)
        if part == "single":
            self._check_variation(members)
        return BankModels(members=members, **arrays)

    def _keys(self, chunk: Mapping[str, NDArray[Any]]) -> list[tuple[int, int]]:
        """Of a chunk's models; ``ValueError`` or ``KeyError`` where its arrays do not fit."""
        n, n_query = int(self.identity["n_train"]), int(self.identity["n_query"])
        m = len(chunk["subset"])
        columns = dict.fromkeys(("loss", "margin"), n) | dict.fromkeys(_VALUES[2:], n_query)
        shapes: dict[str, tuple[int, ...]] = {name: (m, columns[name]) for name in _VALUES}
        shapes |= {"members": (m, -(-n // 8)), "seed": (m,), "run": (m,), "subset": (m,)}
        for name, shape in shapes.items():
            if chunk[name].shape != shape:
                raise ValueError(f"{name} has shape {chunk[name].shape}, this bank needs {shape}")
        return list(zip(chunk["subset"].tolist(), chunk["run"].tolist(), strict=True))

    def part(self, part: Part) -> BankModels | None:
        """All models of a part (see ``load``), or None if there are none yet."""
        return self.load(part) if self._chunks(part) else None

    def _check_variation(self, members: NDArray[np.bool_]) -> None:
        n_in = members.sum(axis=0)
        constant = np.flatnonzero((n_in == 0) | (n_in == len(members)))
        if len(constant):
            i = int(constant[0])
            state = "all of the models have" if n_in[i] else "none of the models has"
            raise StoreError(
                f"{state} example {i} (and {len(constant) - 1} more are like it): {len(members)} "
                f"models in {self.folder} do not tell anything about it; train more, for instance "
                f"bank.models={2 * len(members) + 8}"
            )

    def _chunks(self, part: Part) -> list[Path]:
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, got {part!r}")
        return sorted(
            path for path in (self.folder / part).glob("*.safetensors") if path.name[0] != "."
        )

    @contextlib.contextmanager
    def _reading(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (safetensors.SafetensorError, LookupError, ValueError, OSError) as error:
            raise StoreError(
                f"the chunk {path} is damaged or incomplete ({error}); delete it and run "
                "fine-bench bank again: only its models are trained anew"
            ) from error

    def _check_metadata(self, path: Path, part: Part, metadata: Mapping[str, str] | None) -> None:
        about = parse_json((metadata or {}).get("fine_bench", "{}"))
        if not isinstance(about, dict):
            raise ValueError("its header is no mapping")
        if about.get("format") != FORMAT:
            raise StoreError(
                f"the chunk {path} has format {about.get('format')!r}, this fine_bench reads "
                f"format {FORMAT}; read it with the version that wrote it"
            )
        if (about.get("bank"), about.get("part")) != (self._mark, part):
            raise StoreError(
                f"the chunk {path} belongs to another bank or part; move it back to where it was"
            )

    # --------------------------------------------------------------------------------- sets

    def sets(self) -> dict[str, tuple[int, ...]]:
        """The sets of the part "definition": name → ascending positions, in order of the names.

        Raises:
            StoreError: a file that holds one is damaged.
        """
        found: dict[str, tuple[int, ...]] = {}
        for path in (self.folder / "sets").glob("[!.]*.json"):
            try:
                content = read_json(path)
                found[str(content["name"])] = tuple(map(int, content["positions"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"{path} is damaged ({error}); restore it from a copy, or delete it and run "
                    "fine-bench bank again"
                ) from error
        return dict(sorted(found.items()))

    def add_sets(self, sets: Mapping[str, Sequence[int]]) -> None:
        """Add sets to those that are there.

        Raises:
            StoreError: a name stands for other positions already.
        """
        known = self.sets()
        for name, positions in sets.items():
            given = tuple(sorted(int(i) for i in positions))
            if known.get(name, given) != given:
                raise StoreError(
                    f"the set {name!r} of {self.folder} holds {len(known[name])} other positions; "
                    "give this one another name"
                )
            if name not in known:
                path = self.folder / "sets" / f"{_sha(name.encode())}.json"
                write_atomic(path, _json({"name": name, "positions": given}))

    def remove_leftovers(self) -> None:
        """Remove what writers that were killed left behind more than a day ago."""
        for path in self.folder.rglob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def find_bank(root: Path | str, identity: Mapping[str, Any]) -> Bank:
    """The bank of this identity below ``root``.

    Raises:
        StoreError: there is none; the message says how those that are there differ.
    """
    folder = bank_folder(root, identity)
    if (folder / "manifest.json").exists():
        return Bank.open(folder, identity)
    others = []
    for path in sorted(Path(root).glob("*/manifest.json")):
        with contextlib.suppress(StoreError):
            other = Bank.open(path.parent)
            found = differences(other.identity, as_json(identity))
            others.append(f"\n  {path.parent.name}: {'; '.join(found)}")
    raise StoreError(
        f"no bank of this task, data, model, recipe and design below {root}; train one with "
        "fine-bench bank." + (" Those that are there:" + "".join(others)) * bool(others)
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def _sha(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()[:16]
