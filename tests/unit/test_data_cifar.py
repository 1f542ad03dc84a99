"""CIFAR-10 and its human labels, against small stand-ins and a server on 127.0.0.1."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fine_bench.data import cifar, cifar10n, downloads
from fine_bench.errors import ConfigError, DataError

N_BATCH, N_TEST = 40, 30
FILES = (*cifar.TRAIN_FILES, cifar.TEST_FILE)


def records(n: int, seed: int) -> bytes:
    """``n`` images of noise whose labels go through the classes."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 256, (n, cifar.RECORD), dtype=np.uint8)
    rows[:, 0] = rng.permutation(np.arange(n) % 10)
    return rows.tobytes()


CONTENTS = {
    name: records(N_TEST if name == cifar.TEST_FILE else N_BATCH, k) for k, name in enumerate(FILES)
}


def labels_in(content: bytes) -> NDArray[np.int64]:
    return np.frombuffer(content, np.uint8).reshape(-1, cifar.RECORD)[:, 0].astype(np.int64)


TRUE = np.concatenate([labels_in(CONTENTS[name]) for name in cifar.TRAIN_FILES])


def human(clean: NDArray[np.int64] = TRUE) -> dict[str, NDArray[np.int64]]:
    """Label sets of which the k-th is wrong at every (k + 3)-th position."""
    found = {"clean_label": clean.copy()}
    for k, name in enumerate(cifar10n.COLUMNS.values()):
        found[name] = clean.copy()
        found[name][:: k + 3] = (clean[:: k + 3] + k + 1) % 10
    return found


def archive(contents: dict[str, bytes] = CONTENTS) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = archive()


def write(directory: Path, *names: str, compress: bool = False) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names or FILES:
        if compress:
            (directory / f"{name}.gz").write_bytes(gzip.compress(CONTENTS[name], 1))
        else:
            (directory / name).write_bytes(CONTENTS[name])
    return directory


def write_labels(directory: Path, **arrays: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / cifar10n.ARRAYS
    np.savez(path, **(arrays or human()))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the stand-in's checksum, no mirror but those a test names."""
    monkeypatch.delenv("FINE_BENCH_DATA", raising=False)
    monkeypatch.setattr(downloads, "cache_directory", lambda: tmp_path / "cache")
    monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(ARCHIVE).hexdigest())
    monkeypatch.setattr(cifar, "MIRRORS", ())
    monkeypatch.setattr(cifar10n, "MIRRORS", ())
    # a proxy of the environment must not stand between the tests and 127.0.0.1
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "cifar10"


def assert_is_stand_in(data: cifar.Cifar10, n_files: int = 5) -> None:
    assert data.train_images.shape == (n_files * N_BATCH, 3, 32, 32)
    assert data.test_images.shape == (N_TEST, 3, 32, 32)
    np.testing.assert_array_equal(data.train_labels, TRUE[: n_files * N_BATCH])
    # byte 1 + c·1024 + 32·row + column of a record is the pixel
    raw = np.frombuffer(CONTENTS["data_batch_1.bin"], np.uint8).reshape(-1, cifar.RECORD)
    assert data.train_images[7, 2, 5, 9] == raw[7, 1 + 2 * 1024 + 32 * 5 + 9]


# --- images


@pytest.mark.parametrize("layout", ["", "cifar10", "cifar-10-batches-bin"])
@pytest.mark.parametrize("compress", [False, True])
def test_unpacked_files(
    tmp_path: Path, layout: str, compress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "given" / layout, compress=compress)
    assert_is_stand_in(cifar.load_cifar10(tmp_path / "given", download=False))
    monkeypatch.setenv("FINE_BENCH_DATA", str(tmp_path / "given"))
    assert_is_stand_in(cifar.load_cifar10(download=False))


def test_the_first_few_training_files_are_enough(tmp_path: Path) -> None:
    write(tmp_path, "data_batch_1.bin", "data_batch_2.bin", cifar.TEST_FILE)
    assert_is_stand_in(cifar.load_cifar10(tmp_path, download=False), n_files=2)


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (("data_batch_1.bin", "data_batch_3.bin", "test_batch.bin"), "data_batch_2.bin"),
        (("data_batch_2.bin", "test_batch.bin"), "data_batch_1.bin"),
        (("data_batch_1.bin",), "test_batch.bin"),
        (("test_batch.bin",), "data_batch_1.bin"),
    ],
)
def test_gaps_are_refused(tmp_path: Path, names: tuple[str, ...], missing: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(DataError, match=f"holds a part of CIFAR-10, but not {missing}.*Add the"):
        cifar.load_cifar10(tmp_path, download=False)


def test_damaged_records_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "data_batch_2.bin"
    path.write_bytes(CONTENTS[path.name][:-5])
    with pytest.raises(DataError, match=r"data_batch_2\.bin has 122915 bytes.*no whole number"):
        cifar.load_cifar10(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes"):
        cifar.load_cifar10(tmp_path)
    wrong = bytearray(CONTENTS[path.name])
    wrong[3 * cifar.RECORD] = 10
    path.write_bytes(bytes(wrong))
    with pytest.raises(DataError, match=r"data_batch_2\.bin has the label 10 at image 3;"):
        cifar.load_cifar10(tmp_path)
    path.unlink()
    (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(CONTENTS[path.name])[:-9])
    with pytest.raises(DataError, match="damaged gzip archive"):
        cifar.load_cifar10(tmp_path)


def test_the_archive_is_verified_and_read_in_place(tmp_path: Path) -> None:
    path = tmp_path / cifar.ARCHIVE
    path.write_bytes(ARCHIVE)
    assert_is_stand_in(cifar.load_cifar10(tmp_path, download=False))
    assert [p.name for p in tmp_path.iterdir()] == [cifar.ARCHIVE]
    path.write_bytes(ARCHIVE[:-1])
    with pytest.raises(DataError, match=r"is damaged: its MD5 .* expected .*Replace it with"):
        cifar.load_cifar10(tmp_path)


def test_an_archive_without_a_file_and_one_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / cifar.ARCHIVE
    few = archive({name: CONTENTS[name] for name in FILES[1:]})
    for content in (few, b"no archive"):
        path.write_bytes(content)
        monkeypatch.setattr(cifar, "ARCHIVE_MD5", hashlib.md5(content).hexdigest())
        with pytest.raises(DataError, match=r"cannot be read \(.*\); delete it or replace it"):
            cifar.load_cifar10(tmp_path)


def test_an_unreadable_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / cifar.ARCHIVE).write_bytes(ARCHIVE)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check"):
        cifar.load_cifar10(tmp_path)


def test_download_after_two_bad_mirrors(cache: Path, server: tuple[Path, str]) -> None:
    root, url = server
    for folder, content in (("b", ARCHIVE[:-1]), ("c", ARCHIVE)):
        (root / folder).mkdir()
        (root / folder / cifar.ARCHIVE).write_bytes(content)
    mirrors = [f"{url}/a/", f"{url}/b", f"{url}/c"]
    with pytest.raises(DataError, match="was not found") as caught:
        cifar.load_cifar10(mirrors=mirrors[:2])
    assert "404" in str(caught.value)
    assert f"{url}/b/{cifar.ARCHIVE}: MD5 hash" in str(caught.value)
    assert not list(cache.iterdir())  # nothing unverified stays behind
    assert_is_stand_in(cifar.load_cifar10(mirrors=mirrors))
    assert_is_stand_in(cifar.load_cifar10(download=False))
    (cache / cifar.ARCHIVE).write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged: its MD5"):
        cifar.load_cifar10(download=False)
    assert_is_stand_in(cifar.load_cifar10(mirrors=mirrors[2:]))


def test_missing_and_not_allowed_to_download(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match="was not found") as caught:
        cifar.load_cifar10(tmp_path, download=False, mirrors=["http://one.invalid/"])
    message = str(caught.value)
    for place in [*cifar.directories(tmp_path), cache]:
        assert str(place) in message
    assert f"http://one.invalid/{cifar.ARCHIVE} (not tried: download=False)" in message
    assert "FINE_BENCH_DATA" in message
    assert "task.download=true" in message


def test_standardised_channel_by_channel() -> None:
    images = np.frombuffer(CONTENTS["data_batch_1.bin"], np.uint8).reshape(-1, cifar.RECORD)[:, 1:]
    images = images.reshape(-1, 3, 32, 32)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (cifar.MEAN, cifar.STD))
    expected = ((images.astype(np.float64) / 255 - mean) / std).astype(np.float32)
    np.testing.assert_array_equal(cifar.standardise_channels(images).numpy(), expected)


# --- human labels


def saved(content: Any, path: Path, *, old: bool = False) -> Path:
    """``torch.save``; ``old``: with the module name that versions of numpy before 2 wrote."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if not old:
        path.write_bytes(buffer.getvalue())
        return path
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    return path


@pytest.mark.parametrize("place", ["cifar10n", "cifar10", ""])
@pytest.mark.parametrize("kind", ["npz", "pt", "old pt", "tensors"])
def test_labels_are_found_and_read(tmp_path: Path, place: str, kind: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    if kind == "npz":
        path = write_labels(folder)
    elif kind == "tensors":
        tensors = {k: torch.from_numpy(v) for k, v in human().items()}
        path = saved(tensors, folder / cifar10n.OFFICIAL)
    else:
        path = saved(human(), folder / cifar10n.OFFICIAL, old=kind == "old pt")
    found, where = cifar10n.load_human_labels(tmp_path, download=False)
    assert where == path
    assert set(found) == set(human())
    for name, expected in human().items():
        np.testing.assert_array_equal(found[name], expected)


class Attack:
    """A pickle that would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / cifar10n.OFFICIAL
    saved({**human(), "more": Attack(mark)}, path)
    with pytest.raises(DataError, match=r"was not loaded, because unpickling can run code") as e:
        cifar10n.load_human_labels(tmp_path)
    assert "convert it in its directory: python -c" in str(e.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # it would have
    assert mark.exists()


def test_the_advised_conversion_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(human(), tmp_path / cifar10n.OFFICIAL)
    monkeypatch.chdir(tmp_path)
    exec(cifar10n.CONVERT.removeprefix('python -c "').removesuffix('"'))
    found, path = cifar10n.load_human_labels(tmp_path)
    assert path.name == cifar10n.ARRAYS
    np.testing.assert_array_equal(found["worse_label"], human()["worse_label"])


def test_damaged_label_files(tmp_path: Path) -> None:
    official = tmp_path / cifar10n.OFFICIAL
    for content in (b"nonsense", b""):
        official.write_bytes(content)
        with pytest.raises(DataError, match="damaged, or holds more than plain arrays"):
            cifar10n.load_human_labels(tmp_path)
    saved([1, 2], official)
    with pytest.raises(DataError, match="holds a list, expected arrays by name"):
        cifar10n.load_human_labels(tmp_path)
    path = write_labels(tmp_path)  # the arrays are preferred
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="is no archive of plain arrays"):
        cifar10n.load_human_labels(tmp_path)
    np.savez(path, **{**human(), "aggre_label": np.array([{}] * 200)})
    with pytest.raises(DataError, match="is no archive of plain arrays"):
        cifar10n.load_human_labels(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"worse_label": None}, "has no worse_label; it holds clean_label, aggre_label"),
        ({"aggre_label": TRUE[:-1]}, r"aggre_label in .* as many as clean_label has \(200\); got"),
        ({"aggre_label": TRUE.astype(float)}, "must hold one whole number an image.*float64"),
        ({"aggre_label": TRUE.reshape(2, -1)}, r"got int64 of shape \(2, 100\)"),
        ({"random_label2": TRUE + 1}, "must lie in 0 … 9, got 1 … 10"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arrays = {k: v for k, v in {**human(), **changes}.items() if v is not None}
    write_labels(tmp_path, **arrays)
    with pytest.raises(DataError, match=message):
        cifar10n.load_human_labels(tmp_path)


def test_labels_are_downloaded_and_verified(
    cache: Path, server: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, url = server
    monkeypatch.setattr(cifar10n, "MIRRORS", (url,))
    path = saved(human(), root / cifar10n.OFFICIAL)
    with pytest.raises(DataError, match="is damaged: the MD5") as caught:
        cifar10n.load_human_labels(tmp_path / "empty")
    assert f"{cifar10n.ARRAYS}, the same arrays without a pickle" in str(caught.value)
    monkeypatch.setattr(cifar10n, "OFFICIAL_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    found, where = cifar10n.load_human_labels()
    assert where == cache / cifar10n.OFFICIAL
    np.testing.assert_array_equal(found["aggre_label"], human()["aggre_label"])


# --- the task


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "cifar10")
    write_labels(tmp_path / "data" / "cifar10n")
    return tmp_path / "data"


@pytest.mark.parametrize("name", list(cifar10n.COLUMNS))
def test_human_errors_are_the_truth(data_dir: Path, name: cifar10n.LabelSet) -> None:
    task = cifar10n.cifar10n(
        seed=0, labels=name, n_train=None, n_query=5, data_dir=str(data_dir), download=False
    )
    assert task.x.shape == (200, 3, 32, 32)
    expected = human()[cifar10n.COLUMNS[name]]
    assert task.y.tolist() == expected.tolist()
    assert task.clean_y.tolist() == TRUE.tolist()
    assert task.truth.is_bad.tolist() == (expected != TRUE).tolist()
    assert task.truth.kind == "human label error"
    assert len(task.query_y) == 5
    assert len(task.test_y) == N_TEST - 5


def test_a_sample_keeps_images_and_labels_together(data_dir: Path) -> None:
    small, large = (
        cifar10n.cifar10n(seed=3, n_train=n, n_query=5, data_dir=str(data_dir), download=False)
        for n in (100, 150)
    )
    assert set(small.train_ids.tolist()) < set(large.train_ids.tolist())
    assert torch.equal(small.query_x, large.query_x)
    ids = small.train_ids.numpy()
    np.testing.assert_array_equal(small.clean_y.numpy(), TRUE[ids])
    np.testing.assert_array_equal(small.y.numpy(), human()["aggre_label"][ids])
    images = cifar.load_cifar10(data_dir).train_images[ids]
    assert torch.equal(small.x, cifar.standardise_channels(images))


def test_labels_of_another_order_or_length_are_refused(data_dir: Path) -> None:
    build = partial(cifar10n.cifar10n, seed=0, n_train=None, n_query=5, data_dir=str(data_dir))
    swapped = TRUE.copy()
    first = int((TRUE[:-1] != TRUE[1:]).nonzero()[0][4])
    swapped[[first, first + 1]] = TRUE[[first + 1, first]]
    write_labels(data_dir / "cifar10n", **human(swapped))
    message = (
        f"at position {first} its clean_label is {TRUE[first + 1]}, the image's own label is "
        rf"{TRUE[first]} \(2 of 200 differ\)"
    )
    with pytest.raises(DataError, match=message):
        build()
    write_labels(data_dir / "cifar10n", **human(TRUE[:-7]))
    with pytest.raises(DataError, match="has 193 labels for 200 training images"):
        build()
    write_labels(data_dir / "cifar10n", **human(np.append(TRUE, 1)))
    with pytest.raises(DataError, match=r"has 201 labels .* or the official 50000"):
        build()
    official = np.resize(TRUE, 50_000)
    write_labels(data_dir / "cifar10n", **human(official))
    assert build().n_train == 200


def test_classes_that_never_occur_are_refused(data_dir: Path) -> None:
    arrays = human()
    arrays["aggre_label"][arrays["aggre_label"] == 6] = 3
    write_labels(data_dir / "cifar10n", **arrays)
    with pytest.raises(ConfigError, match="class 6 never occurs among the human labels of these"):
        cifar10n.cifar10n(seed=0, n_train=None, n_query=5, data_dir=str(data_dir))
    with pytest.raises(ConfigError, match=r"never occurs among the true .*larger task\.n_train"):
        cifar10n.cifar10n(seed=0, n_train=11, n_query=5, data_dir=str(data_dir))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "best"}, r"task\.labels=best is unknown; type task\.labels=aggre"),
        ({"n_train": 201}, r"the pool has 200 training .*task\.n_train=200 or less.*null"),
        ({"n_query": 30}, r"task\.n_query=30, but .* 30 test images"),
        ({"seed": -1}, r"Type for instance task\.seed=0"),
    ],
)
def test_impossible_requests(data_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cifar10n.cifar10n(
            **{"seed": 0, "n_train": 200, "n_query": 5, "data_dir": str(data_dir), **arguments}
        )


def test_the_real_human_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error rates as the authors published them, over all 50,000 images."""
    monkeypatch.undo()  # the environment of the caller
    try:
        found, _ = cifar10n.load_human_labels(download=False)
    except DataError:
        pytest.skip("the labels of CIFAR-10N are not where FINE_BENCH_DATA points")
    rates = {
        name: float((found[column] != found["clean_label"]).mean())
        for name, column in cifar10n.COLUMNS.items()
    }
    published = {
        "aggre": 0.0903,
        "random1": 0.1723,
        "random2": 0.1812,
        "random3": 0.1764,
        "worse": 0.4021,
    }
    assert rates == pytest.approx(published, abs=5e-4)


def test_the_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    try:
        task = cifar10n.cifar10n(seed=0, n_train=500, n_query=20, download=False)
    except DataError:
        pytest.skip("CIFAR-10 and its human labels are not where FINE_BENCH_DATA points")
    assert task.x.shape == (500, 3, 32, 32)
    # the constants are those of these images: means within a few standard errors of a sample
    assert task.x.mean((0, 2, 3)).abs().max() < 0.1
    assert (task.x.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert 0.05 < task.truth.rate < 0.14
