"""Groups of training examples that are worth an influence of their own.

They are part of a task's data but of no digest: they follow from what the digest covers, and
change no score of a single example.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fine_bench.seeds import stream

N_NEIGHBOURS = 16
"""Size of the group of near-duplicates."""

N_CENTRES = 1000
"""Candidates for the centre of that group."""


def mislabel_groups(
    images: Tensor, clean_y: Tensor, given_y: Tensor, n_classes: int, seed: int
) -> dict[str, Tensor]:
    """The groups of a mislabelling task, each as ascending positions.

    - ``flips_<a>_to_<b>``: all flips of the most frequent ordered pair of true and given class
      (of equally frequent ones, the first).
    - ``random_clean``: as many correctly labelled examples, drawn uniformly.
    - ``near_duplicates``: the correctly labelled example and its 15 nearest correctly labelled
      neighbours of the same class by the Euclidean distance of pixels, for that of up to 1,000
      randomly drawn centres whose 15th neighbour is nearest. (The image sets hold next to no exact
      duplicates. Distances between all pairs would take minutes on 60,000 images.)

    A group that the data are too small for is left out.

    Args:
        images: ``(n, ...)`` inputs.
        clean_y, given_y: ``(n,)`` labels before and after the flips.
        n_classes: number of classes.
        seed: ``task.seed``.
    """
    n = len(clean_y)
    groups: dict[str, Tensor] = {}
    flipped = clean_y != given_y
    clean = (~flipped).nonzero()[:, 0]
    if bool(flipped.any()):
        pairs = clean_y * n_classes + given_y
        counts = torch.bincount(pairs[flipped], minlength=n_classes**2)
        top = int(counts.argmax())
        flips = (flipped & (pairs == top)).nonzero()[:, 0]
        groups[f"flips_{top // n_classes}_to_{top % n_classes}"] = flips
        if len(flips) < len(clean):
            order = torch.randperm(len(clean), generator=stream(seed, "task/groups/clean"))
            groups["random_clean"] = clean[order[: len(flips)]].sort().values
    tight = _tightest(images.flatten(1), clean_y, clean, seed)
    if tight is not None and len(tight) < n:
        groups["near_duplicates"] = tight
    return groups


def _tightest(pixels: Tensor, labels: Tensor, clean: Tensor, seed: int) -> Tensor | None:
    order = torch.randperm(len(clean), generator=stream(seed, "task/groups/centres"))
    centres = clean[order[:N_CENTRES]]
    best, group = float("inf"), None
    for label in torch.unique(labels[centres]).tolist():
        members = clean[labels[clean] == label]
        if len(members) < N_NEIGHBOURS:
            continue
        mine = centres[labels[centres] == label]
        nearest = torch.cdist(pixels[mine], pixels[members]).topk(N_NEIGHBOURS, largest=False)
        radius = nearest.values[:, -1]
        first = int(radius.argmin())
        if float(radius[first]) < best:
            best, group = float(radius[first]), members[nearest.indices[first]]
    return None if group is None else group.sort().values
