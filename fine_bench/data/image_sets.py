"""The clean data sets that a task may start from, by name.

A task that takes ``data`` serves all of them; digits need no file and no download.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fine_bench.data import digits, mnist
from fine_bench.data.cifar import cifar_source
from fine_bench.data.pixels import standardise
from fine_bench.data.source import Source, check_seed
from fine_bench.errors import ConfigError
from fine_bench.seeds import derive

DataName: TypeAlias = Literal["digits", "mnist", "cifar10"]

WHITE: Mapping[DataName, int] = {"digits": digits.WHITE, "mnist": mnist.WHITE, "cifar10": 255}
"""The largest value of a pixel."""

DIGITS_TEST_SHARE = 0.25


def load_source(data: DataName, *, seed: int, data_dir: str | None, download: bool) -> Source:
    """A data set by name.

    Args:
        data: ``"digits"``, ``"mnist"`` or ``"cifar10"``.
        seed: ``task.seed``; it splits the digits, which come without a test part.
        data_dir: where to look for files first.
        download: whether files found nowhere may be downloaded.

    Raises:
        ConfigError: an unknown name or a negative seed.
        DataError: a file is damaged, or missing everywhere.
    """
    check_seed(seed)
    if data == "digits":
        return digits_source(seed)
    if data == "mnist":
        return mnist_source(data_dir, download)
    if data == "cifar10":
        return cifar_source(data_dir, download=download)
    raise ConfigError(
        f"task.data={data} is unknown; type task.data={', '.join(get_args(DataName)[:-1])} or "
        f"{get_args(DataName)[-1]}"
    )


def digits_source(seed: int, test_share: float = DIGITS_TEST_SHARE) -> Source:
    """scikit-learn's digits, a stratified share of them held out."""
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    pool, test = train_test_split(
        np.arange(len(images)),
        test_size=test_share,
        stratify=labels,
        random_state=derive(seed, "task/split") % 2**32,
    )
    pool.sort()
    test.sort()
    return Source(
        images=images[pool],
        labels=labels[pool],
        ids=pool,
        test_images=images[test],
        test_labels=labels[test],
        n_classes=digits.N_CLASSES,
        to_input=partial(standardise, white=digits.WHITE, mean=digits.MEAN, std=digits.STD),
    )


def mnist_source(data_dir: str | None = None, download: bool = True) -> Source:
    """MNIST's 60,000 training and 10,000 test images."""
    data = mnist.load_mnist(data_dir, download=download)
    return Source(
        images=data.train_images,
        labels=data.train_labels.astype(np.int64),
        ids=np.arange(len(data.train_images), dtype=np.int64),
        test_images=data.test_images,
        test_labels=data.test_labels.astype(np.int64),
        n_classes=mnist.N_CLASSES,
        to_input=partial(standardise, white=mnist.WHITE, mean=mnist.MEAN, std=mnist.STD),
    )
