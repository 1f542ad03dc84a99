"""Finding, verifying and downloading MNIST, against small stand-ins and a server on 127.0.0.1."""

from __future__ import annotations

import gzip
import hashlib
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fine_bench.data import downloads, mnist
from fine_bench.errors import ConfigError, DataError

N_TRAIN, N_TEST = 40, 15


def stand_ins() -> dict[str, bytes]:
    """Four tiny IDX files under the names of the real ones."""
    rng = np.random.default_rng(0)
    contents = {}
    for name in mnist.FILES:
        n = N_TRAIN if name.startswith("train") else N_TEST
        if "images" in name:
            header = struct.pack(">4I", 0x0803, n, 28, 28)
            body = rng.integers(0, 256, n * 784, dtype=np.uint8).tobytes()
        else:
            header = struct.pack(">2I", 0x0801, n)
            body = (np.arange(n) % 10).astype(np.uint8).tobytes()
        contents[name] = header + body
    return contents


CONTENTS = stand_ins()
TRAIN_LABELS = "train-labels-idx1-ubyte"


def write_all(directory: Path, compress: bool = True) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in CONTENTS.items():
        if compress:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the stand-ins' checksums, no mirror but those a test names."""
    monkeypatch.delenv("FINE_BENCH_DATA", raising=False)
    monkeypatch.setattr(downloads, "cache_directory", lambda: tmp_path / "cache")
    checksums = {name: hashlib.md5(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(mnist, "FILES", checksums)
    monkeypatch.setattr(mnist, "MIRRORS", ())
    # a proxy of the environment must not stand between the tests and 127.0.0.1
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "mnist"


def assert_is_stand_in(data: mnist.Mnist) -> None:
    assert data.train_images.shape == (N_TRAIN, 28, 28)
    assert data.test_labels.shape == (N_TEST,)
    assert data.train_images.tobytes() == CONTENTS["train-images-idx3-ubyte"][16:]


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if "part" in path.name]


# --- where files are found


@pytest.mark.parametrize("layout", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("compress", [True, False])
def test_data_dir_layouts(cache: Path, tmp_path: Path, layout: str, compress: bool) -> None:
    write_all(tmp_path / "given" / layout, compress)
    assert_is_stand_in(mnist.load_mnist(tmp_path / "given", download=False))


@pytest.mark.parametrize("layout", ["", "mnist", "MNIST/raw"])
def test_environment_layouts(
    cache: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_all(tmp_path / "env" / layout)
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path / "env"))
    assert_is_stand_in(mnist.load_mnist(download=False))


def test_cache_is_searched_last(cache: Path, tmp_path: Path) -> None:
    write_all(cache)
    assert_is_stand_in(mnist.load_mnist(download=False))
    assert_is_stand_in(mnist.load_mnist(tmp_path / "empty", download=False))


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path / "env"))
    given, env = tmp_path / "given", tmp_path / "env"
    expected = [base / part for base in (given, env) for part in ("mnist", "", "MNIST/raw")]
    assert mnist.directories(given) == expected
    monkeypatch.setenv("FINE_BENCH_DATA", "")
    # an empty variable must not mean the current directory
    assert mnist.directories() == []
    assert mnist.cache() == downloads.cache_directory() / "mnist"
    assert downloads.cache_directory().name == "fine_bench"


def test_missing_and_not_allowed_to_download(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path / "env"))
    mirrors = ["http://one.invalid/", "http://two.invalid"]
    with pytest.raises(DataError, match="train-images-idx3-ubyte was not found") as caught:
        mnist.load_mnist(tmp_path / "given", download=False, mirrors=mirrors)
    message = str(caught.value)
    for directory in [*mnist.directories(tmp_path / "given"), cache]:
        assert f"{directory / 'train-images-idx3-ubyte'}\n" in message
        assert f"{directory / 'train-images-idx3-ubyte.gz'}\n" in message
    for mirror in ("http://one.invalid", "http://two.invalid"):
        assert f"{mirror}/train-images-idx3-ubyte.gz (not tried: download=False)" in message
    assert "FINE_BENCH_DATA" in message
    assert "task.download=true" in message


def test_missing_and_offline(cache: Path, tmp_path: Path) -> None:
    # port 9 (discard) of the loopback: refused at once, as a machine without network would be
    mirrors = ["http://127.0.0.1:9/a/", "http://127.0.0.1:9/b/"]
    with pytest.raises(DataError, match="was not found") as caught:
        mnist.load_mnist(tmp_path, mirrors=mirrors)
    message = str(caught.value)
    for mirror in mirrors:
        assert f"{mirror}train-images-idx3-ubyte.gz: " in message
    assert message.count("refused") == 2
    assert str(cache / "train-images-idx3-ubyte") in message
    assert "Put the file into one of these directories" in message
    assert leftovers(cache) == []


# --- damage


def test_a_damaged_file_of_the_users_is_never_passed_over(cache: Path, tmp_path: Path) -> None:
    given = write_all(tmp_path / "given")
    write_all(cache)
    path = given / f"{TRAIN_LABELS}.gz"
    damaged = bytearray(CONTENTS[TRAIN_LABELS])
    damaged[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(damaged)))
    with pytest.raises(DataError, match="is damaged: the MD5 of its uncompressed") as caught:
        mnist.load_mnist(given)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert mnist.FILES[TRAIN_LABELS] in message
    assert "Nothing was trained on it. Replace it with an intact copy, or delete it" in message

    path.write_bytes(gzip.compress(CONTENTS[TRAIN_LABELS])[:-5])
    with pytest.raises(DataError, match=r"ubyte\.gz is a damaged gzip archive"):
        mnist.load_mnist(given)
    path.unlink()  # what the message advises
    assert_is_stand_in(mnist.load_mnist(given))


def test_unreadable_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = write_all(tmp_path / "given")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check the path"):
        mnist.load_mnist(given)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_damaged_cache_is_replaced_by_a_verified_download(
    cache: Path, server: tuple[Path, str], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    root, url = server
    write_all(root)
    write_all(cache)
    (cache / f"{TRAIN_LABELS}.gz").unlink()
    path = cache / f"{TRAIN_LABELS}{suffix}"
    path.write_bytes(b"nonsense")
    with caplog.at_level(logging.WARNING):
        assert_is_stand_in(mnist.load_mnist(mirrors=[url]))
    assert f"{path} is damaged" in caplog.text
    assert "Replaced by a verified download" in caplog.text
    kept = cache / f"{TRAIN_LABELS}.gz"
    assert gzip.decompress(kept.read_bytes()) == CONTENTS[TRAIN_LABELS]
    assert not (cache / TRAIN_LABELS).exists()
    assert leftovers(cache) == []
    assert_is_stand_in(mnist.load_mnist(download=False))


def test_damaged_cache_is_left_alone_when_the_download_is_damaged_too(
    cache: Path, server: tuple[Path, str]
) -> None:
    root, url = server
    write_all(root)
    (root / f"{TRAIN_LABELS}.gz").write_bytes(b"<html>please log in</html>")
    write_all(cache)
    path = cache / f"{TRAIN_LABELS}.gz"
    path.write_bytes(b"nonsense")
    for download, reason in (
        (True, f"the download from {url}/{TRAIN_LABELS}.gz is damaged"),
        (False, "not tried: download=False"),
    ):
        with pytest.raises(DataError, match="in the cache and could not be replaced") as caught:
            mnist.load_mnist(mirrors=[url], download=download)
        assert str(caught.value).startswith(f"{path} is damaged")
        assert reason in str(caught.value)
        assert path.read_bytes() == b"nonsense"
        assert leftovers(cache) == []


# --- downloads


def test_download_fills_the_cache(
    cache: Path, server: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    root, url = server
    write_all(root)
    with caplog.at_level(logging.INFO):
        assert_is_stand_in(mnist.load_mnist(mirrors=[url + "/"]))
    assert f"downloading {url}/{TRAIN_LABELS}.gz" in caplog.text
    assert sorted(path.name for path in cache.iterdir()) == sorted(f"{n}.gz" for n in CONTENTS)
    assert_is_stand_in(mnist.load_mnist(download=False))


def test_second_mirror_after_a_missing_and_a_corrupted_file(
    cache: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = server
    first = write_all(root / "first")
    (first / "train-images-idx3-ubyte.gz").unlink()
    (first / f"{TRAIN_LABELS}.gz").write_bytes(gzip.compress(b"something else"))
    truncated = first / "t10k-images-idx3-ubyte.gz"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    write_all(root / "second")
    monkeypatch.setattr(mnist, "MIRRORS", (f"{url}/first/", f"{url}/second/"))
    assert_is_stand_in(mnist.load_mnist())
    assert leftovers(cache) == []

    # the same without a second mirror: nothing unverified may stay behind
    for path in cache.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="404"):
        mnist.load_mnist(mirrors=[f"{url}/first"])
    assert list(cache.iterdir()) == []


def test_an_archive_unpacked_on_the_way_is_kept_under_the_plain_name(
    cache: Path, server: tuple[Path, str]
) -> None:
    root, url = server
    for name, content in CONTENTS.items():
        (root / f"{name}.gz").write_bytes(content)
    assert_is_stand_in(mnist.load_mnist(mirrors=[url]))
    assert sorted(path.name for path in cache.iterdir()) == sorted(CONTENTS)


def test_cache_that_cannot_be_written(cache: Path, server: tuple[Path, str]) -> None:
    root, url = server
    write_all(root)
    cache.parent.write_text("a file where the cache should be")
    with pytest.raises(DataError, match=r"cannot be written .*FINE_BENCH_DATA"):
        mnist.load_mnist(mirrors=[url])


# --- the task


def test_task_on_stand_ins(cache: Path, tmp_path: Path) -> None:
    write_all(tmp_path)
    task = mnist.mnist_mislabel(seed=3, n_query=5, data_dir=str(tmp_path), download=False)
    assert task.name == "mnist_mislabel"
    assert task.x.shape == (N_TRAIN, 1, 28, 28)
    assert task.query_x.shape == (5, 1, 28, 28)
    assert task.test_x.shape == (N_TEST - 5, 1, 28, 28)
    assert task.truth.n_bad == 8
    pixels = np.frombuffer(CONTENTS["train-images-idx3-ubyte"][16:], np.uint8)
    expected = (torch.tensor(pixels.reshape(N_TRAIN, 1, 28, 28)) / 255.0 - 0.1307) / 0.3081
    torch.testing.assert_close(task.x, expected)
    assert task.clean_y.tolist() == [i % 10 for i in range(N_TRAIN)]
    with pytest.raises(ConfigError, match=r"task\.n_query=15"):
        mnist.mnist_mislabel(seed=3, n_query=15, data_dir=str(tmp_path))


def test_the_real_mnist(mnist_dir: Path) -> None:
    data = mnist.load_mnist(mnist_dir, download=False)
    assert data.train_images.shape == (60_000, 28, 28)
    assert data.test_images.shape == (10_000, 28, 28)
    counts = np.bincount(data.train_labels).tolist()
    assert counts == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    scaled = data.train_images / np.float32(255)
    assert round(float(scaled.mean(dtype=np.float64)), 4) == mnist.MEAN
    assert round(float(scaled.std(dtype=np.float64)), 4) == mnist.STD


def test_a_sample_of_the_real_mnist(mnist_dir: Path) -> None:
    task = mnist.mnist_mislabel(seed=0, n_train=300, n_query=50, data_dir=str(mnist_dir))
    assert task.x.shape == (300, 1, 28, 28)
    assert task.truth.n_bad == 60
    assert len(task.test_x) == 9_950
    source = mnist.load_mnist(mnist_dir)
    ids = task.train_ids.numpy()
    np.testing.assert_array_equal(source.train_labels[ids], task.clean_y.numpy())
    raw = (task.x * mnist.STD + mnist.MEAN) * 255
    torch.testing.assert_close(
        raw[:, 0], torch.tensor(source.train_images[ids], dtype=torch.float32), atol=1e-3, rtol=0
    )
    assert float(raw.min()) == pytest.approx(0, abs=1e-4)
