"""IDX, the format of MNIST: a big-endian header and raw values.

    bytes 0-1   zero
    byte  2     type of the values (0x08: unsigned byte)
    byte  3     number of dimensions d
    4d bytes    sizes, 32-bit big-endian
    the rest    values, the last index fastest

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fine_bench.data.downloads import read_bytes
from fine_bench.errors import DataError

UNSIGNED_BYTE = 0x08


def parse_idx(content: bytes, source: str) -> NDArray[np.uint8]:
    """The array in an uncompressed IDX file of unsigned bytes.

    Args:
        content: the whole uncompressed file.
        source: how to name it in errors.

    Returns:
        A writable copy, of the shape that the header states.

    Raises:
        DataError: wrong magic number, values of another type, fewer or more bytes than stated.
    """
    if len(content) < 4:
        raise DataError(
            f"{source} is truncated: {len(content)} bytes, an IDX header has at least 8"
        )
    if content[:2] != b"\0\0":
        raise DataError(
            f"{source} is not an IDX file: it begins with {content[:4].hex(' ')}, expected two "
            "zero bytes"
        )
    dtype, n_dims = content[2], content[3]
    if dtype != UNSIGNED_BYTE:
        raise DataError(
            f"{source} holds values of IDX type 0x{dtype:02x}; only unsigned bytes (0x08) are read"
        )
    if n_dims == 0:
        raise DataError(f"{source} states zero dimensions; an IDX array has at least one")
    header = 4 + 4 * n_dims
    if len(content) < header:
        raise DataError(
            f"{source} is truncated: {len(content)} bytes, its header of {n_dims} dimensions "
            f"alone has {header}"
        )
    shape = struct.unpack(f">{n_dims}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) < expected:
        raise DataError(
            f"{source} is truncated: {len(content)} bytes, its header {shape} promises {expected}"
        )
    if len(content) > expected:
        raise DataError(
            f"{source} has {len(content) - expected} trailing bytes: {len(content)} bytes, its "
            f"header {shape} promises {expected}"
        )
    # a copy, because an array over immutable bytes is read-only, which torch warns about
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape).copy()


def read_idx(path: str | Path) -> NDArray[np.uint8]:
    """``parse_idx`` of a plain or gzip-compressed file; errors name the file."""
    path = Path(path)
    return parse_idx(read_bytes(path), str(path))
