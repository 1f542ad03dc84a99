"""Figures inside the page: what each shows, and its image as data."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fine_bench.report.html.markup import Safe, data_uri, tag, void

LARGEST_SVG = 150_000
"""Bytes of a compressed SVG beyond which a PNG is drawn: samples by the ten thousand are heavy."""

DESCRIPTIONS: Mapping[str, tuple[str, str]] = {
    "detection_and_consistency": (
        "Detection against consistency",
        "How well a method finds the known bad examples, and whether it finds the same ones in "
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
        figure: its kind, a key of ``DESCRIPTIONS``.
        name: of its file.
        svg: a compressed SVG (``packed``), or empty.
        png: a PNG in its place, or empty.
        width, height: of the drawing in the page, in pixels.
        reason: why it was left out.
    """

    figure: str
    name: str
    svg: bytes = b""
    png: bytes = b""
    width: int | None = None
    height: int | None = None
    reason: str = ""

    @property
    def drawn(self) -> bool:
        """Whether there is a drawing."""
        return bool(self.svg or self.png)


PIXELS_A_POINT = 1.6
"""Of figures in the page: letters have one size, however many panels stand side by side."""

_SIZE = re.compile(rb'<svg[^>]*?\swidth="([\d.]+)pt" height="([\d.]+)pt"')
_NUMBER = re.compile(rb"(-?\d+\.\d{2})\d+")
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_BETWEEN = re.compile(rb">\s+<")
_PATH = re.compile(rb'(?<= d=")[^"]*(?=")')


def slim(svg: bytes) -> bytes:
    """The same drawing in fewer bytes: no comments, path coordinates to a hundredth of a point."""
    svg = _BETWEEN.sub(b"><", _COMMENT.sub(b"", svg))
    return _PATH.sub(lambda found: b" ".join(_NUMBER.sub(rb"\1", found[0]).split()), svg)


def size_of(svg: bytes) -> tuple[int | None, int | None]:
    """Width and height of a drawing in the page, in pixels; None where it does not say."""
    found = _SIZE.search(svg[:2000])
    if found is None:
        return None, None
    return round(PIXELS_A_POINT * float(found[1])), round(PIXELS_A_POINT * float(found[2]))


def packed(svg: bytes) -> bytes:
    """A slim drawing, compressed; the same bytes for the same drawing."""
    return gzip.compress(slim(svg), 9, mtime=0)


def figure_block(item: PageFigure) -> Safe:
    """A figure with its heading, or the reason why it is not there.

    A compressed drawing stands in ``data-gz``, from where the page's script takes it when its page
    is shown.
    """
    heading, says = DESCRIPTIONS.get(item.figure, (item.name, ""))
    if not item.drawn:
        return tag("li", tag("strong", heading), ": ", item.reason)
    image = void(
        "img",
        src=None if item.svg else data_uri("image/png", item.png),
        data_gz=Safe(base64.b64encode(item.svg).decode()) if item.svg else None,
        alt=f"{heading}. {says}",
        loading="lazy",
        width=item.width,
        height=item.height,
    )
    return tag(
        "figure",
        tag("figcaption", tag("h4", heading), tag("p", says)),
        tag(
            "div",
            image,
            class_="scroll paper",
            role="region",
            tabindex="0",
            aria_label=heading,
        ),
        class_="drawing",
    )
