"""The gallery and the groups of a task as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fine_bench.report.figures.benchmark import TARGET_TITLES
from fine_bench.report.html.gallery import GroupLine, ShownExample
from fine_bench.report.html.images import PngEncoder, TaskExamples
from fine_bench.report.html.markup import Safe, data_uri, join, number, p_value, tag, void
from fine_bench.retraining.truth import Truth


@dataclass(frozen=True)
class Gallery:
    """A row of the leaderboard with its largest examples, and its groups."""

    label: str
    target: str
    examples: Sequence[ShownExample]
    groups: Sequence[GroupLine] = ()


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
    shown = [_gallery(gallery, task_examples, encoder) for gallery in galleries if gallery.examples]
    if not shown:
        return tag("p", "No scores of single examples are at hand.", class_="hint")
    return join([*notes, *shown])


def _gallery(gallery: Gallery, task_examples: TaskExamples, encoder: PngEncoder | None) -> Safe:
    known = [e.planted for e in gallery.examples if e.planted is not None]
    words = f"the {len(gallery.examples)} examples with the largest |score|"
    if known:
        words += f", {sum(known)} of {len(known)} planted as bad"
    title = TARGET_TITLES.get(gallery.target, f"target {gallery.target}")
    return join(
        [
            tag("h4", tag("code", gallery.label), f" · {title}"),
            tag("p", f"{words[0].upper()}{words[1:]}."),
            tag(
                "ol",
                *(_card(e, task_examples, encoder) for e in gallery.examples),
                class_="gallery" if task_examples.texts is None else "gallery texts",
            ),
        ]
    )


def _card(example: ShownExample, task_examples: TaskExamples, encoder: PngEncoder | None) -> Safe:
    facts: list[tuple[object, object]] = []
    alt = f"training example {example.index}"
    data = task_examples.data
    if data is not None:
        given, clean = int(data.y[example.index]), int(data.clean_y[example.index])
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
    elif encoder is None:
        picture = tag("div", f"#{example.index}", class_="blank", aria_hidden="true")
    else:
        source = data_uri("image/png", encoder.png(example.index))
        picture = void("img", src=source, alt=alt, class_="pixels", loading="lazy")
    words = {True: "planted", False: "not planted", None: "truth unknown"}[example.planted]
    kind = {True: "bad", False: "fine", None: "unknown"}[example.planted]
    return tag(
        "li",
        picture,
        tag("p", f"#{example.index:,} ", tag("span", words, class_=f"badge {kind}")),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)),
        class_=f"card {kind}",
    )


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
            tag("td", f"{number(line.lower, 2)} to {number(line.upper, 2)}"),
            tag("td", p_value(line.p_value)),
            tag("td", number(line.run_level, 1)),
        )
        for line in gallery.groups
    ]
    title = TARGET_TITLES.get(gallery.target, f"target {gallery.target}")
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("code", gallery.label), f" · {title}"),
            tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
            tag("tbody", *body),
            class_="plain",
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=f"groups, {title}",
    )
