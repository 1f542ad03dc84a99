"""The IDX reader: round trips, and every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fine_bench.data.idx import parse_idx, read_idx
from fine_bench.errors import DataError


def idx_bytes(array: np.ndarray, dtype: int = 0x08) -> bytes:
    """The format written from its description."""
    sizes = b"".join(struct.pack(">I", size) for size in array.shape)
    return bytes([0, 0, dtype, array.ndim]) + sizes + array.tobytes()


ARRAY = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)))
def test_parses_what_was_written(array: np.ndarray) -> None:
    parsed = parse_idx(idx_bytes(array), "memory")
    assert parsed.dtype == np.uint8
    np.testing.assert_array_equal(parsed, array)


@pytest.mark.parametrize("compress", [False, True])
def test_reads_plain_and_gzip_whatever_the_name(tmp_path: Path, compress: bool) -> None:
    content = idx_bytes(ARRAY)
    for name in ("a-idx3-ubyte", "a-idx3-ubyte.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if compress else content)
        np.testing.assert_array_equal(read_idx(path), ARRAY)
        np.testing.assert_array_equal(read_idx(str(path)), ARRAY)


def test_result_is_writable(recwarn: pytest.WarningsRecorder) -> None:
    parsed = parse_idx(idx_bytes(ARRAY), "memory")
    torch.from_numpy(parsed)[0] = 7
    assert (parsed[0] == 7).all()
    assert not recwarn


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is truncated: 0 bytes"),
        (b"\0\0\x08", "is truncated: 3 bytes"),
        (b"<!DOCTYPE html>", "is not an IDX file: it begins with 3c 21 44 4f"),
        (idx_bytes(ARRAY, dtype=0x0D), "IDX type 0x0d; only unsigned bytes"),
        (b"\0\0\x08\0", "states zero dimensions"),
        (idx_bytes(ARRAY)[:10], "its header of 3 dimensions alone has 16"),
        (idx_bytes(ARRAY)[:-1], r"is truncated: 39 bytes, its header \(2, 3, 4\) promises 40"),
        (idx_bytes(ARRAY) + b"xy", "has 2 trailing bytes"),
        (b"\0\0\x08\x04" + b"\xff" * 16, "is truncated: 20 bytes"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


@given(st.data())
def test_any_truncation_of_a_gzip_file_is_refused(data: st.DataObject) -> None:
    archive = gzip.compress(idx_bytes(ARRAY))
    cut = data.draw(st.integers(2, len(archive) - 1))
    from fine_bench.data.downloads import uncompressed

    with pytest.raises(DataError, match=r"images\.gz is a damaged gzip archive"):
        uncompressed(archive[:cut], "images.gz")


def test_damaged_gzip_files_are_refused_by_name(tmp_path: Path) -> None:
    archive = bytearray(gzip.compress(idx_bytes(np.zeros((50, 50), np.uint8))))
    archive[len(archive) // 2] ^= 0xFF
    path = tmp_path / "images.gz"
    path.write_bytes(bytes(archive))
    with pytest.raises(DataError, match=r"images\.gz is a damaged gzip archive"):
        read_idx(path)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be read .*check the path"):
        read_idx(tmp_path / "nowhere")
