"""Data files: found, verified by the MD5 of their uncompressed content, downloaded at need.

gzip archives of one content differ (time stamps, compression levels), so the content is what is
checked, on every read. MD5 guards against damage, not against an attacker; it is what the data
sets publish.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import pooch

from fine_bench.errors import DataError

log = logging.getLogger(__name__)

GZIP_MAGIC = b"\x1f\x8b"

# (connect, read) seconds: a machine without a network should hear about it soon.
TIMEOUT = (10.0, 60.0)


class _VerificationError(DataError):
    """The file was read; its content is not what it should be."""


def cache_directory() -> Path:
    """The user's cache of this package, where downloads are kept."""
    return Path(pooch.os_cache("fine_bench"))


def bases(data_dir: str | Path | None = None) -> list[Path]:
    """``data_dir`` if given, then what the environment variable ``FINE_BENCH_DATA`` names."""
    given = [data_dir, os.environ.get("FINE_BENCH_DATA")]
    return [Path(base).expanduser().absolute() for base in given if base]


def uncompressed(raw: bytes, source: str) -> bytes:
    """``raw``, gunzipped if it is a gzip archive.

    Told by the first two bytes and not by the file name: browsers and HTTP libraries unpack
    archives on the way without renaming them.

    Args:
        raw: content of a file.
        source: how to name it in errors.

    Raises:
        DataError: the archive is truncated or damaged.
    """
    if not raw.startswith(GZIP_MAGIC):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise _VerificationError(
            f"{source} is a damaged gzip archive ({error}); delete it or replace it with an "
            "intact copy"
        ) from error


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked; a ``DataError`` naming it when it cannot be read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    return uncompressed(raw, str(path))


def _verified(path: Path, md5: str, source: str | None = None) -> bytes:
    content = read_bytes(path)
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise _VerificationError(
            f"{source or path} is damaged: the MD5 of its uncompressed content ({len(content)} "
            f"bytes) is {found}, expected {md5}"
        )
    return content


def candidates(name: str, directory: Path) -> tuple[Path, Path]:
    """Where ``name`` may lie in a directory: plain or gzip-compressed."""
    return directory / name, directory / f"{name}.gz"


def find(name: str, directories: Sequence[Path]) -> Path | None:
    """The first file of that name, plain or gzip-compressed; None when there is none."""
    for directory in directories:
        for path in candidates(name, directory):
            if path.is_file():
                return path
    return None


def _download(
    name: str, md5: str, urls: Sequence[str], cache: Path
) -> tuple[Path, bytes] | list[str]:
    """Verified content and where it was kept, or one line for every mirror that failed."""
    failures: list[str] = []
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, temporary_name = tempfile.mkstemp(dir=cache, prefix=f".{name}.", suffix=".part")
    except OSError as error:
        raise DataError(
            f"{name} must be downloaded, but the cache {cache} cannot be written ({error.strerror})"
            "; make it writable, or put the data where the environment variable FINE_BENCH_DATA "
            "points"
        ) from error
    os.close(handle)
    temporary = Path(temporary_name)
    fetch = pooch.HTTPDownloader(timeout=TIMEOUT, chunk_size=1 << 16)
    try:
        for url in urls:
            log.info("downloading %s", url)
            try:
                fetch(url, str(temporary), None)
                content = _verified(temporary, md5, source=f"the download from {url}")
            # requests derives its errors from OSError, malformed addresses included
            except (OSError, DataError) as error:
                failures.append(f"{url}: {error}")
                continue
            is_gzip = temporary.open("rb").read(2) == GZIP_MAGIC
            kept = cache / (f"{name}.gz" if is_gzip else name)
            # verified under a temporary name, then renamed: a file in the cache is whole
            os.replace(temporary, kept)
            return kept, content
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    return failures


def verified_content(
    name: str,
    md5: str,
    *,
    directories: Sequence[Path],
    cache: Path,
    urls: Sequence[str],
    download: bool,
) -> tuple[bytes, Path]:
    """Uncompressed content of a data file, from disk or from a mirror, and where it now lies.

    Looks for ``name`` and ``name.gz`` in ``directories``, then in ``cache``, then downloads into
    ``cache``. Whatever is found is verified. A damaged file of the user's is never passed over
    in favour of another; a damaged file in the cache is replaced, with a warning, once a fresh
    download has verified, and is left alone otherwise.

    Args:
        name: file name without ``.gz``.
        md5: MD5 of the uncompressed content, hexadecimal.
        directories: the user's places, most specific first.
        cache: where downloads are kept.
        urls: mirrors, tried in order.
        download: whether mirrors may be asked.

    Raises:
        DataError: missing, unreadable or damaged, with everything that was tried.
    """
    path = find(name, directories)
    if path is not None:
        try:
            return _verified(path, md5), path
        except _VerificationError as error:
            raise DataError(
                f"{error}. Nothing was trained on it. Replace it with an intact copy, or delete "
                f"it: {name} is then looked for elsewhere and downloaded"
            ) from error

    damage = ""
    path = find(name, [cache])
    if path is not None:
        try:
            return _verified(path, md5), path
        except DataError as error:
            damage = f"{error}. Nothing was trained on it. "

    failures: list[str] = []
    if download:
        outcome = _download(name, md5, urls, cache)
        if isinstance(outcome, tuple):
            kept, content = outcome
            if path is not None:
                log.warning("%sReplaced by a verified download, %s", damage, kept)
                if path != kept:
                    path.unlink(missing_ok=True)
            return content, kept
        failures = outcome

    places = [f"  {place}" for folder in directories for place in candidates(name, folder)]
    if damage:
        headline = f"{damage}It is in the cache and could not be replaced"
        places.append(f"  {path} (damaged)")
    else:
        headline = f"{name} was not found"
        places += [f"  {place}" for place in candidates(name, cache)]
    if download:
        places += [f"  {failure}" for failure in failures]
    else:
        places += [f"  {url} (not tried: download=False)" for url in urls]
    advice = (
        "Put the file into one of these directories, or set the environment variable "
        "FINE_BENCH_DATA to the directory that holds it"
    )
    advice += "." if download else ", or allow the download with task.download=true."
    raise DataError("\n".join([f"{headline}. Looked at:", *places, advice]))
