"""Natural label errors: images of MNIST whose given label people did not see in them.

Sources: C. Northcutt, A. Athalye, J. Mueller, "Pervasive Label Errors in Test Sets Destabilize
Machine Learning Benchmarks", NeurIPS 2021, data sets and benchmarks, and its public repository
``cleanlab/label-errors``, whose file ``mturk/mnist_mturk.json`` holds the votes.

A cross-validated network named 100 of the 10,000 test images as suspicious, and five people each
said whether they see the given label, the network's guess, or neither. *Bad* is an image in which
fewer than three of the five saw the given label: 15 of the 100.

What is known, and of whom. Of the 60,000 images of the training files nobody said anything, so bad
examples are looked for among the test images alone (``GroundTruth.known``). Among those, an error
that the network did not suspect counts as right, which favours scores like its own: only among the
100 (``GroundTruth.reviewed``) is the comparison of methods fair.

All 70,000 images are trained on, so none is left to measure accuracy: "test accuracy" is that on
images of the test files, which were trained on like the others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.data import downloads
from fine_bench.data.mnist import MEAN, N_CLASSES, STD, WHITE, load_mnist
from fine_bench.data.pixels import standardise
from fine_bench.data.sampling import check_query_count, random_order
from fine_bench.data.source import check_seed
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError, DataError
from fine_bench.types import GroundTruth

NAME = "mnist_mturk.json"
MD5 = "ebd50ddf96c29b4efe04bd15c8b0bd41"
COMMIT = "6d5d6b31a13216290afc40e5c6319399c4d15c06"
MIRRORS: tuple[str, ...] = (
    f"https://raw.githubusercontent.com/cleanlab/label-errors/{COMMIT}/mturk/",
)
FOLDER = "label_errors"

VOTERS = 5
MAJORITY = 3
"""Votes that the given label needs to be right."""


@dataclass(frozen=True, eq=False)
class Reviews:
    """What people said about some of the test images.

    Attributes:
        positions: ``(n,)`` ascending positions among the test images.
        given: ``(n,)`` the labels in the data set.
        guessed: ``(n,)`` the labels that the study's network thought right.
        votes: ``(n, 3)``: how many of the five saw the given label, the guessed one, neither. Where
            the network guessed the given label, the first two are the same people.
    """

    positions: NDArray[np.int64]
    given: NDArray[np.int64]
    guessed: NDArray[np.int64]
    votes: NDArray[np.int64]

    @property
    def is_bad(self) -> NDArray[np.bool_]:
        """``(n,)``: fewer than three of the five saw the given label."""
        return np.asarray(self.votes[:, 0] < MAJORITY)

    @property
    def seen(self) -> NDArray[np.int64]:
        """``(n,)`` the label that a majority saw: the guessed one, or the given where none did."""
        return np.where(self.votes[:, 1] >= MAJORITY, self.guessed, self.given)


def load_reviews(data_dir: str | Path | None = None, *, download: bool = True) -> Reviews:
    """Find (or download) the votes, verify and read them.

    Looks in ``label_errors`` and the directory itself, below ``data_dir`` and ``FINE_BENCH_DATA``,
    then in the user's cache, then downloads into it.

    Raises:
        DataError: the file is missing everywhere, damaged, or not what it should be.
    """
    content, path = downloads.verified_content(
        NAME,
        MD5,
        directories=[base / part for base in downloads.bases(data_dir) for part in (FOLDER, "")],
        cache=downloads.cache_directory() / FOLDER,
        urls=[f"{mirror.rstrip('/')}/{NAME}" for mirror in MIRRORS],
        download=download,
    )
    return parse_reviews(content, str(path))


def parse_reviews(content: bytes, source: str) -> Reviews:
    """The votes in the study's file.

    Args:
        content: JSON, a list of one object an image: ``id``, ``given_original_label``,
            ``our_guessed_label`` and ``mturk`` with the votes.
        source: how to name it in errors.

    Raises:
        DataError: another form; a label that is no digit; votes that are not five; an image twice.
    """
    try:
        rows = [_row(entry) for entry in json.loads(content)]
        table = np.array(rows, dtype=np.int64).reshape(-1, 6)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise DataError(
            f"{source} is not the study's list of votes ({type(error).__name__}: {error}); replace "
            f"it with mturk/{NAME} of the public repository cleanlab/label-errors"
        ) from error
    if len(table) == 0:
        raise DataError(f"{source} holds no image; replace it with the study's mturk/{NAME}")
    table = table[np.argsort(table[:, 0], kind="stable")]
    positions, labels, votes = table[:, 0], table[:, 1:3], table[:, 3:]
    for wrong, complaint in (
        (positions < 0, "a negative position"),
        (np.diff(positions, prepend=-1) == 0, "the same position twice"),
        (((labels < 0) | (labels >= N_CLASSES)).any(1), f"a label outside 0 … {N_CLASSES - 1}"),
        (votes.min(1) < 0, "a negative number of votes"),
        (_voters(labels, votes) != VOTERS, f"votes of other than {VOTERS} people"),
    ):
        if wrong.any():
            raise DataError(
                f"{source} has {complaint} at image {positions[wrong][0]}; replace it with the "
                f"study's mturk/{NAME}"
            )
    return Reviews(positions, labels[:, 0], labels[:, 1], votes)


def _voters(labels: NDArray[np.int64], votes: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many people voted; who saw a label that is given and guessed is counted in both."""
    same = labels[:, 0] == labels[:, 1]
    twice = np.where(same, votes[:, 0], 0)
    return np.where(same & (votes[:, 0] != votes[:, 1]), -1, votes.sum(1) - twice)


def _row(entry: Any) -> tuple[int, ...]:
    votes = entry["mturk"]
    numbers = (
        entry["id"],
        entry["given_original_label"],
        entry["our_guessed_label"],
        *(votes[name] for name in ("given", "guessed", "neither")),
    )
    if not all(type(number) is int for number in numbers):
        raise TypeError(f"expected whole numbers, got {numbers}")
    return numbers


def _match(reviews: Reviews, labels: NDArray[np.int64]) -> None:
    """Refuse votes about other images than these."""
    if int(reviews.positions[-1]) >= len(labels):
        raise DataError(
            f"the votes are about test image {reviews.positions[-1]}, but there are {len(labels)} "
            "test images; use the 10,000 of MNIST"
        )
    wrong = (labels[reviews.positions] != reviews.given).nonzero()[0]
    if len(wrong):
        k = int(wrong[0])
        raise DataError(
            f"the votes belong to other images: test image {reviews.positions[k]} has the label "
            f"{labels[reviews.positions[k]]}, the file of votes says {reviews.given[k]}. Use "
            "MNIST's own test files, in their order"
        )


def mnist_natural(
    *,
    seed: int,
    n_train: int | None = None,
    n_query: int = 500,
    data_dir: str | None = None,
    download: bool = True,
) -> TaskData:
    """MNIST as it is: both parts, images ``(n, 1, 28, 28)``; bad are the 15 that people rejected.

    Position 60,000 + k of the source is test image k. ``clean_y`` is what a majority saw, and the
    given label where no label had one.

    Args:
        seed: ``task.seed``: queries and sample. The label errors are what they are.
        n_train: number of images; None takes all 70,000. A sample always holds the reviewed ones.
        n_query: queries, drawn from the test images that nobody reviewed. They are trained on.
        data_dir: where to look for the files first.
        download: whether files found nowhere may be downloaded.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
        DataError: a file is damaged, missing everywhere, or does not fit the other.
    """
    check_seed(seed)
    data = load_mnist(data_dir, download=download)
    reviews = load_reviews(data_dir, download=download)
    _match(reviews, data.test_labels.astype(np.int64))
    n_first, n_second = len(data.train_labels), len(data.test_labels)
    n_all, n_reviewed = n_first + n_second, len(reviews.positions)
    if n_train is not None and not n_reviewed <= n_train <= n_all:
        raise ConfigError(
            f"task.n_train={n_train} must lie between the {n_reviewed} images that people reviewed "
            f"and all {n_all}. Type task.n_train=null for all of them"
        )
    check_query_count(n_query, n_second - n_reviewed)

    reviewed = torch.zeros(n_all, dtype=torch.bool)
    reviewed[n_first + torch.from_numpy(reviews.positions)] = True
    is_bad = reviewed.clone()
    is_bad[reviewed] = torch.from_numpy(reviews.is_bad)
    y = torch.from_numpy(np.concatenate([data.train_labels, data.test_labels]).astype(np.int64))
    clean_y = y.clone()
    clean_y[is_bad] = torch.from_numpy(reviews.seen[reviews.is_bad])
    images = np.concatenate([data.train_images, data.test_images])
    ids = _sample(reviewed, n_train, seed)

    plain = n_first + (~reviewed[n_first:]).nonzero()[:, 0]
    order = random_order(len(plain), seed, "task/queries")
    query, test = plain[order[:n_query]], plain[order[n_query:]].sort().values

    def inputs(positions: Tensor) -> Tensor:
        return standardise(images[positions.numpy()], white=WHITE, mean=MEAN, std=STD)

    return TaskData(
        name="mnist_natural",
        x=inputs(ids),
        y=y[ids],
        clean_y=clean_y[ids],
        truth=GroundTruth(
            is_bad=is_bad[ids],
            kind="natural label error",
            known=ids >= n_first,
            reviewed=reviewed[ids],
        ),
        query_x=inputs(query),
        query_y=y[query],
        test_x=inputs(test),
        test_y=y[test],
        n_classes=N_CLASSES,
        train_ids=ids,
    )


def _sample(reviewed: Tensor, n_train: int | None, seed: int) -> Tensor:
    """Ascending positions of the images that are trained on."""
    if n_train is None:
        return torch.arange(len(reviewed))
    others = (~reviewed).nonzero()[:, 0]
    drawn = random_order(len(others), seed, "task/sample")[: n_train - int(reviewed.sum())]
    return torch.cat([reviewed.nonzero()[:, 0], others[drawn]]).sort().values
