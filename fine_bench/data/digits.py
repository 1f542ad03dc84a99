"""Hand-written digits of 8 × 8 pixels, embedded in scikit-learn: a task without a download.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository (its test part, 1,797 images of 17 grey levels).
"""

from __future__ import annotations

from functools import partial

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fine_bench.data.mislabel import mislabel_task
from fine_bench.data.pixels import standardise
from fine_bench.data.source import Source, check_seed
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.seeds import derive

N_CLASSES = 10
WHITE = 16
# mean and standard deviation of all pixels of the 1,797 images, scaled to [0, 1]
MEAN = 0.3053
STD = 0.3760


def digits_mislabel(
    *,
    seed: int,
    n_train: int | None = None,
    noise_rate: float = 0.2,
    n_query: int = 100,
    test_share: float = 0.25,
) -> TaskData:
    """The mislabelling task on scikit-learn's digits, images ``(n, 1, 8, 8)``.

    Args:
        seed: ``task.seed``: split, sample, flips and queries.
        n_train: number of training images; None takes all of the training part (1,347).
        noise_rate: share of training labels flipped uniformly to another class.
        n_query: clean query images, taken from the test part (450).
        test_share: share of the images in the test part, stratified by class.

    Raises:
        ConfigError: anything impossible among these, with what to type instead.
    """
    check_seed(seed)
    digits = load_digits()
    images = digits.images.astype(np.uint8)
    labels = digits.target.astype(np.int64)
    n = len(images)
    # either part must be able to hold an image of every class
    smallest, largest = N_CLASSES / n, 1 - N_CLASSES / n
    if not smallest <= test_share <= largest:
        raise ConfigError(
            f"task.test_share is the share of the {n} images that is held out, from "
            f"{smallest:.3f} to {largest:.3f}; got {test_share}. Type for instance "
            "task.test_share=0.25"
        )
    pool, test = train_test_split(
        np.arange(n),
        test_size=test_share,
        stratify=labels,
        random_state=derive(seed, "task/split") % 2**32,
    )
    pool.sort()
    test.sort()
    source = Source(
        images=images[pool],
        labels=labels[pool],
        ids=pool,
        test_images=images[test],
        test_labels=labels[test],
        n_classes=N_CLASSES,
        to_input=partial(standardise, white=WHITE, mean=MEAN, std=STD),
    )
    return mislabel_task(
        "digits_mislabel",
        source,
        seed=seed,
        n_train=n_train,
        noise_rate=noise_rate,
        n_query=n_query,
    )
