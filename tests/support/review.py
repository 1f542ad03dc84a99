"""A small table for the review page."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
from PIL import Image

CLASSES = ("cat", "dog", "=2+3 <b>")


def png(row: int) -> bytes:
    """Noise of 12 by 12 pixels."""
    file = io.BytesIO()
    pixels = np.random.default_rng(row).integers(0, 255, (12, 12), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def review_table(n: int, seed: int = 0) -> pd.DataFrame:
    """``n`` rows in the order of their suspicion, some of them without μ or suggestion."""
    draw = np.random.default_rng(seed)
    label = draw.integers(0, 3, n)
    suggested = pd.Series([CLASSES[k] for k in (label + draw.integers(1, 3, n)) % 3], dtype=object)
    mu = draw.normal(1, 2, n)
    mu[3::50] = np.nan
    suggested[4::50] = None
    return pd.DataFrame(
        {
            "row": draw.permutation(n),
            "name": [f"img_{i}.png" for i in range(n)],
            "label": [CLASSES[k] for k in label],
            "suggested": suggested,
            "score": np.sort(draw.random(n))[::-1],
            "rank": np.arange(1, n + 1),
            "runs_found": draw.integers(0, 4, n),
            "runs": 3,
            "repeats": mu % 1.0,
            "p_label": draw.random(n),
            "mu": mu,
            "mu_low": mu - 0.7,
            "mu_high": mu + 0.7,
        }
    )
