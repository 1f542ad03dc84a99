"""Figures inside the page: what each shows, and its image as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fine_bench.report.html.markup import Safe, data_uri, tag, void

LARGEST_SVG = 250_000
"""Bytes of an SVG beyond which the PNG is taken: samples by the thousand are heavy."""

DESCRIPTIONS: Mapping[str, tuple[str, str]] = {
    "detection_and_consistency": (
        "Detection against consistency",
        "How well a method finds the planted bad examples, and whether it finds the same ones in "
        "another run.",
    ),
    "recall_curves": (
        "Detection curves",
        "Share of the bad examples found when the most suspicious are inspected first, between the "
        "best possible order and a random one.",
    ),
    "fidelity_and_ceiling": (
        "Fidelity against its ceiling",
        "Agreement with the influence that retraining shows; the vertical lines are the highest "
        "values that the noise of that truth allows.",
    ),
    "cost_and_quality": (
        "Quality against cost",
        "Seconds beyond plain training. In these runs all methods shared one training.",
    ),
    "cost_and_stable_recall": (
        "Found in every run, against cost",
        "Share of the bad examples that are among the k most suspicious of every run, against "
        "seconds beyond plain training.",
    ),
    "consistency_by_source": (
        "Consistency by source",
        "How far scores agree between runs that differ in initialisation alone, in the order of "
        "the data alone, or in both.",
    ),
    "sensitivity": (
        "Hyperparameter sensitivity",
        "Marker: the method with its own options. Bar: lowest to highest over a preset range of "
        "options, nothing chosen by the truth.",
    ),
    "figure2_consistency": (
        "The same suspects in another run",
        "Jaccard@k between the k most suspicious examples of two runs.",
    ),
    "figure1_losses_vary": (
        "Training again moves losses and scores",
        "Runs that differ in their seed alone.",
    ),
    "tradeoff_curves": (
        "Trade-off curves",
        "What a test on one statistic can tell of a subset; lower means more influence.",
    ),
    "figure5_p_and_q": (
        "P and Q along a run",
        "The paper's statistic of batches with the subset (P) and without it (Q).",
    ),
    "figure4_crossing": (
        "Curves that cross, and their Gaussian limits",
        "Trade-off functions do not rank by themselves; many steps make Gaussians of them.",
    ),
    "agreement": (
        "The paper's estimator and the all-example one",
        "μ of one step against μ of a run, example by example.",
    ),
    "figure3_equal_means": (
        "Averages mislead",
        "Two influences with the same mean and different trade-off functions.",
    ),
}
"""By figure: heading and what it shows, in the order of the page."""

ORDER = tuple(DESCRIPTIONS)


@dataclass(frozen=True)
class PageFigure:
    """A figure for the page, or the reason why there is none.

    Attributes:
        figure: its kind, a key of ``SAYS``.
        name: of its files.
        svg, png: its bytes; empty when it was left out.
        reason: why it was.
    """

    figure: str
    name: str
    svg: bytes = b""
    png: bytes = b""
    reason: str = ""


PIXELS_A_POINT = 1.6
"""Of figures in the page: letters have one size, however many panels stand side by side."""

_WIDTH = re.compile(rb'<svg[^>]*?\swidth="([\d.]+)pt"')
_NUMBER = re.compile(rb"(-?\d+\.\d{2})\d+")
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_BETWEEN = re.compile(rb">\s+<")
_PATH = re.compile(rb'(?<= d=")[^"]*(?=")')


def slim(svg: bytes) -> bytes:
    """The same drawing in fewer bytes: no comments, path coordinates to a hundredth of a point."""
    svg = _BETWEEN.sub(b"><", _COMMENT.sub(b"", svg))
    return _PATH.sub(lambda found: b" ".join(_NUMBER.sub(rb"\1", found[0]).split()), svg)


def width_of(svg: bytes) -> int | None:
    """Width of a drawing in the page, in pixels; None where it does not say."""
    found = _WIDTH.search(svg)
    return None if found is None else round(PIXELS_A_POINT * float(found[1]))


def figure_block(item: PageFigure) -> Safe:
    """A figure with its heading, or the reason why it is not there."""
    heading, says = DESCRIPTIONS.get(item.figure, (item.name, ""))
    if not item.svg:
        return tag("li", tag("strong", heading), ": ", item.reason)
    small = slim(item.svg)
    source = (
        data_uri("image/svg+xml", small)
        if len(small) <= LARGEST_SVG or not item.png
        else data_uri("image/png", item.png)
    )
    return tag(
        "figure",
        tag("figcaption", tag("h4", heading), tag("p", says)),
        tag(
            "div",
            void(
                "img",
                src=source,
                alt=f"{heading}. {says}",
                loading="lazy",
                width=width_of(item.svg),
            ),
            class_="scroll paper",
            role="region",
            tabindex="0",
            aria_label=heading,
        ),
        class_="drawing",
    )
