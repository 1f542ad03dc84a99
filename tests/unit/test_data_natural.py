"""MNIST's own label errors, against small stand-ins; the real votes where they are at hand."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fine_bench.data import downloads, mnist, natural
from fine_bench.data.natural import load_reviews, mnist_natural, parse_reviews
from fine_bench.errors import ConfigError, DataError

N_FIRST, N_SECOND = 40, 30
LABELS = {"train": np.arange(N_FIRST) % 10, "t10k": (np.arange(N_SECOND) * 3) % 10}


def vote(position: int, guessed: int, *votes: int, given: int | None = None) -> dict[str, Any]:
    return {
        "id": position,
        "given_original_label": int(LABELS["t10k"][position]) if given is None else given,
        "our_guessed_label": guessed,
        "mturk": dict(zip(("given", "guessed", "neither"), votes, strict=True)),
    }


VOTES = [
    vote(9, 1, 5, 0, 0),  # right
    vote(3, 4, 0, 5, 0),  # wrong: the guess is right
    vote(12, 6, 4, 4, 1),  # guessed as given: the votes stand twice
    vote(20, 5, 2, 0, 3),  # wrong, and no label has a majority of its own
    vote(7, 2, 3, 2, 0),  # right by one vote
    vote(25, 8, 2, 2, 1),  # wrong, undecided
]
BAD, RIGHT = [3, 20, 25], [7, 9, 12]


def content(votes: Any = VOTES) -> bytes:
    return json.dumps(votes).encode()


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with stand-ins for MNIST and the votes; nothing else is looked at."""
    rng = np.random.default_rng(0)
    sums = {}
    for name in mnist.FILES:
        labels = LABELS[name.split("-")[0]]
        if "images" in name:
            body = rng.integers(0, 256, len(labels) * 784, dtype=np.uint8).tobytes()
            raw = struct.pack(">4I", 0x0803, len(labels), 28, 28) + body
        else:
            raw = struct.pack(">2I", 0x0801, len(labels)) + labels.astype(np.uint8).tobytes()
        (tmp_path / name).write_bytes(raw)
        sums[name] = hashlib.md5(raw).hexdigest()
    monkeypatch.setattr(mnist, "FILES", sums)
    monkeypatch.delenv("FINE_BENCH_DATA", raising=False)
    monkeypatch.setattr(downloads, "cache_directory", lambda: tmp_path / "cache")
    write_votes(tmp_path, monkeypatch)
    return tmp_path


def write_votes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, votes: Any = VOTES, part: str = "label_errors"
) -> None:
    raw = content(votes)
    (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / part / natural.NAME).write_bytes(raw)
    monkeypatch.setattr(natural, "MD5", hashlib.md5(raw).hexdigest())


def test_all_images_with_what_people_said(data: Path) -> None:
    task = mnist_natural(seed=0, n_query=5, data_dir=str(data), download=False)
    assert task.n_train == N_FIRST + N_SECOND
    assert task.train_ids.tolist() == list(range(N_FIRST + N_SECOND))
    assert task.y.tolist() == [*LABELS["train"], *LABELS["t10k"]]
    truth = task.truth
    assert truth.is_bad.nonzero()[:, 0].tolist() == [N_FIRST + k for k in BAD]
    assert truth.known is not None
    assert truth.known.nonzero()[:, 0].tolist() == list(range(N_FIRST, N_FIRST + N_SECOND))
    assert truth.reviewed is not None
    reviewed = truth.reviewed.nonzero()[:, 0].tolist()
    assert reviewed == [N_FIRST + k for k in sorted(BAD + RIGHT)]
    # only where a majority saw the guess is another label known
    changed = (task.clean_y != task.y).nonzero()[:, 0].tolist()
    assert changed == [N_FIRST + 3]
    assert int(task.clean_y[N_FIRST + 3]) == 4
    # image k of the test file is at N_FIRST + k
    second = mnist.load_mnist(data, download=False).test_images
    expected = (second[7] / 255 - mnist.MEAN) / mnist.STD
    assert task.x[N_FIRST + 7, 0].numpy() == pytest.approx(expected, abs=1e-5)


def test_queries_are_test_images_that_nobody_reviewed(data: Path) -> None:
    task = mnist_natural(seed=1, n_query=5, data_dir=str(data), download=False)
    where = {image.numpy().tobytes(): k for k, image in enumerate(task.x)}
    queries = [where[image.numpy().tobytes()] - N_FIRST for image in task.query_x]
    tests = [where[image.numpy().tobytes()] - N_FIRST for image in task.test_x]
    assert len(queries) == 5
    assert sorted(queries + tests) == [k for k in range(N_SECOND) if k not in BAD + RIGHT]
    assert task.query_y.tolist() == [LABELS["t10k"][k] for k in queries]
    assert task.test_y.tolist() == [LABELS["t10k"][k] for k in tests]
    more = mnist_natural(seed=1, n_query=9, data_dir=str(data), download=False)
    assert torch.equal(more.query_x[:5], task.query_x)


def test_a_sample_holds_the_reviewed_and_a_larger_one_the_smaller(data: Path) -> None:
    small, large = (
        mnist_natural(seed=2, n_train=n, n_query=5, data_dir=str(data), download=False)
        for n in (20, 45)
    )
    assert (small.n_train, small.truth.n_bad) == (20, len(BAD))
    assert set(small.train_ids.tolist()) < set(large.train_ids.tolist())
    assert bool((small.train_ids.diff() > 0).all())
    assert small.truth.known is not None
    assert torch.equal(small.truth.known, small.train_ids >= N_FIRST)
    assert small.sha256 != large.sha256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_train": 5}, r"between the 6 images that people reviewed and all 70\. Type task\.n_t"),
        ({"n_train": 71}, r"n_train=71 must lie between"),
        ({"n_query": 24}, r"taken from 24 test images"),
        ({"seed": -1}, r"Type for instance task\.seed=0"),
    ],
)
def test_impossible_requests(data: Path, options: dict[str, Any], message: str) -> None:
    asked = {"seed": 0, "n_query": 5, "data_dir": str(data), "download": False} | options
    with pytest.raises(ConfigError, match=message):
        mnist_natural(**asked)


@pytest.mark.parametrize("part", ["label_errors", ""])
@pytest.mark.parametrize("way", ["given", "environment", "cache"])
def test_where_the_votes_are_looked_for(
    data: Path, part: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "label_errors" / natural.NAME).unlink()
    home = {"cache": data / "cache" / "label_errors"}.get(way, data / "other")
    write_votes(home, monkeypatch, part="" if way == "cache" else part)
    if way == "environment":
        monkeypatch.setenv("FINE_BENCH_DATA", str(home))
    reviews = load_reviews(home if way == "given" else None, download=False)
    assert reviews.positions[reviews.is_bad].tolist() == BAD


def test_missing_votes_say_what_to_do(data: Path) -> None:
    (data / "label_errors" / natural.NAME).unlink()
    with pytest.raises(DataError, match=r"mnist_mturk\.json was not found") as caught:
        mnist_natural(seed=0, data_dir=str(data), download=False)
    said = str(caught.value)
    assert f"{data / 'label_errors' / natural.NAME}\n" in said
    assert "cleanlab/label-errors" in said
    assert "task.download=true" in said


def test_damaged_votes(data: Path) -> None:
    (data / "label_errors" / natural.NAME).write_bytes(content()[:-9])
    with pytest.raises(DataError, match="is damaged: the MD5"):
        load_reviews(data, download=False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\xff", "is not the study's list of votes"),
        (b"[1]", r"is not the study's list .*TypeError"),
        (content([{"id": 3}]), r"KeyError: 'mturk'"),
        (content([vote(3, 4, 0, 5, 0) | {"id": "3"}]), "expected whole numbers"),
        (content([vote(3, 4, 0, 5, 0) | {"id": True}]), "expected whole numbers"),
        (content([]), "holds no image"),
        (content([vote(-1, 4, 0, 5, 0, given=7)]), "a negative position at image -1"),
        (content([vote(3, 4, 0, 5, 0)] * 2), "the same position twice at image 3"),
        (content([vote(3, 10, 0, 5, 0)]), r"a label outside 0 … 9 at image 3"),
        (content([vote(3, 4, -1, 6, 0)]), "a negative number of votes at image 3"),
        (content([vote(3, 4, 1, 5, 0)]), "votes of other than 5 people at image 3"),
        (content([vote(12, 6, 5, 0, 0)]), "votes of other than 5 people at image 12"),
    ],
)
def test_another_file_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_reviews(raw, "votes.json")
    assert "mturk/mnist_mturk.json" in str(caught.value)


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        ([vote(3, 4, 0, 5, 0, given=1)], "test image 3 has the label 9, the file of votes says 1"),
        ([vote(3, 4, 0, 5, 0) | {"id": 30}], "about test image 30, but there are 30 test images"),
    ],
)
def test_votes_about_other_images(
    data: Path, votes: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_votes(data, monkeypatch, votes)
    with pytest.raises(DataError, match=message):
        mnist_natural(seed=0, n_query=5, data_dir=str(data), download=False)


def test_the_real_votes() -> None:
    places = [base / part for base in downloads.bases() for part in (natural.FOLDER, "")]
    if not downloads.find(natural.NAME, [*places, downloads.cache_directory() / natural.FOLDER]):
        pytest.skip("the study's votes are not below FINE_BENCH_DATA; tests do not download them")
    reviews = load_reviews(download=False)
    assert (len(reviews.positions), int(reviews.is_bad.sum())) == (100, 15)
    assert int((reviews.seen != reviews.given).sum()) == 10


@pytest.fixture
def in_training(data: Path) -> Callable[..., Any]:
    return lambda **options: mnist_natural(
        **{"seed": 0, "n_query": 5, "data_dir": str(data), "download": False, **options}
    )


def test_what_is_known_is_part_of_the_digest(in_training: Callable[..., Any]) -> None:
    from dataclasses import replace

    task = in_training()
    truth = task.truth
    for name in ("known", "reviewed"):
        mask = getattr(truth, name).clone()
        free = (~mask if name == "known" else truth.known & ~mask).nonzero()[0]
        mask[free] = True
        assert replace(task, truth=replace(truth, **{name: mask})).sha256 != task.sha256
        assert replace(task, truth=replace(truth, reviewed=None)).sha256 != task.sha256
