"""What a model and a neighbour search are given: numbers, from images, tables, texts and arrays.

Nothing here looks at a label, so it may be fitted on all rows: what is out of sample stays that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fine_bench.errors import ConfigError, DataError
from fine_bench.runner.clean.data_files import standardise
from fine_bench.runner.clean.inputs.items import Items

VOCABULARY = 5000
"""Words that TF–IDF keeps, the most frequent."""
LENGTH = 12.0
"""Euclidean length of a text's TF–IDF vector: at it the step size of the other kinds fits."""
CATEGORIES = 50
"""Values of one categorical column that get a column of their own; rarer ones share one."""
LARGEST = 1e150
"""Numbers beyond have no square in float64."""
NEIGHBOUR_SIZE = 64


def features(items: Items, encoder: str | None = None) -> Tensor:
    """Inputs of the model, ``(n, ...)`` float32.

    Images ``(n, channels, height, width)`` with mean 0 and standard deviation 1 over all pixels;
    tables ``(n, columns)``: numbers standardised, missing ones the median beside a column that says
    so, categories one column a value; texts TF–IDF ``(n, words)``, or what ``encoder`` makes of
    them; arrays standardised column by column.

    Args:
        items: of any kind.
        encoder: for texts: a folder in the hub's format, or a name of ``sentence-transformers``.

    Raises:
        ConfigError: an encoder for other items than texts, or one that cannot be had.
        DataError: texts without a word that two of them share.
    """
    if encoder is not None and items.kind != "text":
        raise ConfigError(f"--encoder {encoder} goes with texts; these are {items.kind}")
    if items.kind == "images":
        return standardise(np.moveaxis(np.asarray(items.content, dtype=np.float64), -1, 1))
    if items.kind == "table":
        return torch.from_numpy(encoded_table(items.content).astype(np.float32))
    if items.kind == "text":
        if encoder is not None:
            return standardise(encoded_texts(items.content, encoder))
        return torch.from_numpy((LENGTH * tf_idf(items.content)).astype(np.float32))
    return standardise(np.asarray(items.content, dtype=np.float64))


def encoded_table(table: pd.DataFrame) -> NDArray[np.float64]:
    """Numbers and categories as numbers, ``(n, columns)``.

    Raises:
        DataError: numbers so large that they have no standard deviation.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = [c for c in table.columns if pd.api.types.is_numeric_dtype(table[c])]
    words = [c for c in table.columns if c not in numbers]
    for column in numbers:
        if (table[column].abs() > LARGEST).any():
            raise DataError(
                f"column {column} reaches {table[column].abs().max():.3g}, whose square is no "
                "number; divide it, or leave it out with --drop"
            )
    transformer = ColumnTransformer(
        [
            (
                "numbers",
                make_pipeline(
                    SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True),
                    StandardScaler(),
                ),
                numbers,
            ),
            (
                "categories",
                make_pipeline(
                    SimpleImputer(strategy="constant", fill_value="(missing)"),
                    OneHotEncoder(
                        max_categories=CATEGORIES, handle_unknown="ignore", sparse_output=False
                    ),
                ),
                words,
            ),
        ]
    )
    # pandas' own marks of what is missing are no category to scikit-learn
    plain = table.astype(dict.fromkeys(words, object))
    plain = plain.where(plain.notna(), np.nan)
    return np.asarray(transformer.fit_transform(plain), dtype=np.float64)


def tf_idf(texts: list[str]) -> NDArray[np.float64]:
    """TF–IDF of the words, rows of length 1, ``(n, words)``.

    Raises:
        DataError: no word that two texts share.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectoriser = TfidfVectorizer(sublinear_tf=True, max_features=VOCABULARY, min_df=2)
    try:
        return np.asarray(vectoriser.fit_transform(texts).toarray(), dtype=np.float64)
    except ValueError as error:  # scikit-learn's for an empty vocabulary
        raise DataError(
            "no word of two letters or more stands in two of the texts, so nothing can be learnt "
            "from their words; use --encoder"
        ) from error


def encoded_texts(texts: list[str], encoder: str) -> NDArray[np.float64]:
    """Texts as vectors of a pretrained network, ``(n, width)``; nothing is downloaded for a folder.

    Raises:
        ConfigError: no such folder, or ``sentence-transformers`` is not installed.
    """
    if Path(encoder).expanduser().is_dir():
        from fine_bench.llm.text_vectors import text_vectors

        return text_vectors(texts, Path(encoder).expanduser())
    from fine_bench.runner.clean.inputs.tables import require

    library: Any = require(
        "sentence_transformers", f"--encoder {encoder} is no folder but a name", "fine_bench[clean]"
    )
    try:
        model = library.SentenceTransformer(encoder)
    except Exception as error:  # the hub's and the library's many
        raise ConfigError(
            f"--encoder {encoder} cannot be loaded ({type(error).__name__}: {error}); name a "
            "folder in the hub's format"
        ) from error
    return np.asarray(model.encode(texts, show_progress_bar=False), dtype=np.float64)


def neighbour_vectors(x: Tensor, seed: int = 0) -> NDArray[np.float64]:
    """Vectors in which near means alike: at most 64 principal components, ``(n, width)``.

    Args:
        x: inputs of the model.
        seed: of the randomised decomposition.
    """
    from sklearn.decomposition import PCA

    flat = x.flatten(1).double().numpy()
    size = min(NEIGHBOUR_SIZE, *flat.shape)
    if flat.shape[1] <= size:
        return np.asarray(flat, dtype=np.float64)
    found = PCA(size, svd_solver="randomized", random_state=seed).fit_transform(flat)
    return np.asarray(found, dtype=np.float64)
