"""The gallery and the groups of a task as HTML."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fine_bench.report.figures.titles import caption_of
from fine_bench.report.html.gallery import GroupLine, ShownExample
from fine_bench.report.html.images import PngEncoder, TaskExamples
from fine_bench.report.html.markup import Safe, join, number, p_value, tag, void
from fine_bench.retraining.truth import Truth


@dataclass(frozen=True)
class Gallery:
    """A row of the leaderboard with its largest examples, and its groups.

    Attributes:
        label, target: which row.
        examples: the largest first.
        groups: what it says of groups.
        title: what the target asks; without one the target's usual words.
        auroc: how well the row finds the bad examples; NaN where that is not known.
    """

    label: str
    target: str
    examples: Sequence[ShownExample]
    groups: Sequence[GroupLine] = ()
    title: str = ""
    auroc: float = math.nan

    @property
    def asks(self) -> str:
        """What its target asks, in words."""
        return self.title or caption_of(self.target, {})


FINDS = 0.6
"""AUROC from which a row is said to find something."""


def galleries_block(
    galleries: Sequence[Gallery], task_examples: TaskExamples, truth: Truth | None
) -> Safe:
    """All galleries of a task; the reason why images are missing stands above them."""
    notes: list[object] = []
    if not task_examples.has_images and task_examples.texts is None:
        why = (
            task_examples.reason
            or "the examples are no images, so only what is known of them is shown"
        )
        notes.append(tag("p", f"No images or texts: {why}.", class_="hint"))
    if truth is not None:
        notes.append(
            tag(
                "p",
                f"Retraining μ: {truth.published.n_models:,} models on random subsets "
                f"({100 * truth.keep:.0f} % of the data each), published half of the ground truth "
                f"{truth.name} version {truth.version}; ± is its standard error. It is in another "
                "unit than the scores: compare orders, not sizes.",
                class_="hint",
            )
        )
    encoder = (
        PngEncoder(task_examples.data)
        if task_examples.data is not None and task_examples.has_images
        else None
    )
    there = sorted(
        (gallery for gallery in galleries if gallery.examples),
        key=lambda gallery: -gallery.auroc if math.isfinite(gallery.auroc) else 0.0,
    )
    if not there:
        return tag("p", "No scores of single examples are at hand.", class_="hint")
    # beside a row that finds the bad examples, one that does not is folded away
    finding = [not gallery.auroc < FINDS for gallery in there]
    shown = [
        block
        if finds or not any(finding)
        else tag("details", tag("summary", f"{gallery.label}: finds nothing"), block)
        for gallery, finds in zip(there, finding, strict=True)
        for block in [_gallery(gallery, task_examples, encoder is not None)]
    ]
    if encoder is not None:
        each = sorted({example.index for gallery in there for example in gallery.examples})
        shown.append(_image_block(encoder, each))
    return join([*notes, *shown])


def _image_block(encoder: PngEncoder, examples: Sequence[int]) -> Safe:
    """The images of a task, each once, for the page's script: position → base64 of a PNG."""
    images = {i: base64.b64encode(encoder.png(i)).decode() for i in examples}
    return tag(
        "script",
        Safe(json.dumps(images, separators=(",", ":"))),
        type="application/json",
        class_="images",
    )


def _gallery(gallery: Gallery, task_examples: TaskExamples, images: bool) -> Safe:
    known = [e.planted for e in gallery.examples if e.planted is not None]
    words = f"the {len(gallery.examples)} examples with the largest |score|"
    if known:
        words += f", {sum(known)} of {len(known)} known to be bad"
    if math.isfinite(gallery.auroc):
        words += f"; over all that this row scores its AUROC is {number(gallery.auroc, 2)}"
    return join(
        [
            tag("h4", tag("code", gallery.label), f" · {gallery.asks}"),
            tag("p", f"{words[0].upper()}{words[1:]}."),
            tag(
                "ol",
                *(_card(e, task_examples, images) for e in gallery.examples),
                class_="gallery" if task_examples.texts is None else "gallery texts",
            ),
        ]
    )


def _card(example: ShownExample, task_examples: TaskExamples, images: bool) -> Safe:
    facts: list[tuple[object, object]] = []
    alt = f"training example {example.index}"
    data = task_examples.data
    if data is not None:
        names = task_examples.class_names or range(data.n_classes)
        given, clean = (names[int(labels[example.index])] for labels in (data.y, data.clean_y))
        facts.append(("given label", tag("strong", given)))
        if given != clean:
            facts.append(("true label", tag("strong", clean)))
        alt += f", given label {given}"
    facts.append(("score", _score(example)))
    facts += [
        (f"one run, seed {seed}", f"[{number(low, 2)}, {number(high, 2)}]")
        for seed, (low, high) in list(example.one_run.items())[:1]
    ]
    facts += [(f"p, seed {seed}", p_value(p)) for seed, p in list(example.p_values.items())[:1]]
    if example.truth is not None:
        t = example.truth
        facts.append(("retraining μ", f"{number(t.mu, 2)} ± {number(t.std_error, 2)}"))
        facts.append(("its rank", f"{t.rank:,} of {t.n:,}"))
    if task_examples.texts is not None:
        picture: Safe = join(
            tag("p", tag("span", who, class_="who"), words, class_="said")
            for who, words in task_examples.texts(example.index)
        )
    elif images:
        picture = void("img", data_image=example.index, alt=alt, class_="pixels", loading="lazy")
    else:
        picture = tag("div", f"#{example.index}", class_="blank", aria_hidden="true")
    words = {True: "known bad", False: "no known fault", None: "truth unknown"}[example.planted]
    kind = {True: "bad", False: "fine", None: "unknown"}[example.planted]
    return tag(
        "li",
        picture,
        tag("p", f"#{example.index:,} ", tag("span", words, class_=f"badge {kind}")),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)),
        class_=f"card {kind}",
    )


def between(lower: float, upper: float) -> str:
    """An interval in words: an end without a bound is ∞, and one that is unknown a dash."""
    ends = {math.inf: "∞", -math.inf: "−∞"}
    low, high = (ends.get(value) or number(value, 2) for value in (lower, upper))
    return "–" if low == high == "–" else f"{low} to {high}"


def _score(example: ShownExample) -> Safe:
    score = example.score
    mean = tag("strong", number(score.mean, 2))
    if score.lower == score.lower:
        return join([mean, f" [{number(score.lower, 2)}, {number(score.upper, 2)}]"])
    return mean


def groups(gallery: Gallery) -> Safe:
    """The paper's estimate for groups of examples, run by run."""
    head = (
        "group",
        "examples",
        "seed",
        "μ of one step",
        "95 % interval",
        "p-value",
        "μ of the run",
    )
    body = [
        tag(
            "tr",
            tag("th", line.name, scope="row"),
            tag("td", f"{line.size:,}"),
            tag("td", line.seed),
            tag("td", number(line.mu, 2)),
            tag("td", between(line.lower, line.upper)),
            tag("td", p_value(line.p_value)),
            tag("td", number(line.run_level, 1)),
        )
        for line in gallery.groups
    ]
    title = gallery.asks
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("span", tag("code", gallery.label), f" · {title}")),
            tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
            tag("tbody", *body),
            class_="plain groups",
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=f"groups, {title}",
    )
