"""The gallery and the groups of a task as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fine_bench.report.figures.benchmark import TARGET_TITLES
from fine_bench.report.html.gallery import Exhibit, GroupLine
from fine_bench.report.html.images import Album, Painter
from fine_bench.report.html.markup import Safe, data_uri, join, number, p_value, tag, void
from fine_bench.retraining.truth import Truth


@dataclass(frozen=True)
class Room:
    """A row of the leaderboard with its largest examples, and its groups."""

    label: str
    target: str
    exhibits: Sequence[Exhibit]
    groups: Sequence[GroupLine] = ()


def gallery(rooms: Sequence[Room], album: Album, truth: Truth | None) -> Safe:
    """All galleries of a task; the reason why images are missing stands above them."""
    notes: list[object] = []
    if not album.has_images and album.texts is None:
        why = album.reason or "the examples are no images, so only what is known of them is shown"
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
    painter = Painter(album.data) if album.data is not None and album.has_images else None
    shown = [_room(room, album, painter) for room in rooms if room.exhibits]
    if not shown:
        return tag("p", "No scores of single examples are at hand.", class_="hint")
    return join([*notes, *shown])


def _room(room: Room, album: Album, painter: Painter | None) -> Safe:
    known = [e.planted for e in room.exhibits if e.planted is not None]
    words = f"the {len(room.exhibits)} examples with the largest |score|"
    if known:
        words += f", {sum(known)} of {len(known)} planted as bad"
    title = TARGET_TITLES.get(room.target, f"target {room.target}")
    return join(
        [
            tag("h4", tag("code", room.label), f" · {title}"),
            tag("p", f"{words[0].upper()}{words[1:]}."),
            tag(
                "ol",
                *(_card(e, album, painter) for e in room.exhibits),
                class_="gallery" if album.texts is None else "gallery texts",
            ),
        ]
    )


def _card(exhibit: Exhibit, album: Album, painter: Painter | None) -> Safe:
    facts: list[tuple[object, object]] = []
    alt = f"training example {exhibit.index}"
    data = album.data
    if data is not None:
        given, clean = int(data.y[exhibit.index]), int(data.clean_y[exhibit.index])
        facts.append(("given label", tag("strong", given)))
        if given != clean:
            facts.append(("true label", tag("strong", clean)))
        alt += f", given label {given}"
    facts.append(("score", _score(exhibit)))
    facts += [
        (f"one run, seed {seed}", f"[{number(low, 2)}, {number(high, 2)}]")
        for seed, (low, high) in list(exhibit.one_run.items())[:1]
    ]
    facts += [(f"p, seed {seed}", p_value(p)) for seed, p in list(exhibit.p_values.items())[:1]]
    if exhibit.truth is not None:
        t = exhibit.truth
        facts.append(("retraining μ", f"{number(t.mu, 2)} ± {number(t.std_error, 2)}"))
        facts.append(("its rank", f"{t.rank:,} of {t.n:,}"))
    if album.texts is not None:
        picture: Safe = join(
            tag("p", tag("span", who, class_="who"), words, class_="said")
            for who, words in album.texts(exhibit.index)
        )
    elif painter is None:
        picture = tag("div", f"#{exhibit.index}", class_="blank", aria_hidden="true")
    else:
        source = data_uri("image/png", painter.png(exhibit.index))
        picture = void("img", src=source, alt=alt, class_="pixels", loading="lazy")
    words = {True: "planted", False: "not planted", None: "truth unknown"}[exhibit.planted]
    kind = {True: "bad", False: "fine", None: "unknown"}[exhibit.planted]
    return tag(
        "li",
        picture,
        tag("p", f"#{exhibit.index:,} ", tag("span", words, class_=f"badge {kind}")),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts)),
        class_=f"card {kind}",
    )


def _score(exhibit: Exhibit) -> Safe:
    score = exhibit.score
    mean = tag("strong", number(score.mean, 2))
    if score.lower == score.lower:
        return join([mean, f" [{number(score.lower, 2)}, {number(score.upper, 2)}]"])
    return mean


def groups(room: Room) -> Safe:
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
        for line in room.groups
    ]
    title = TARGET_TITLES.get(room.target, f"target {room.target}")
    return tag(
        "div",
        tag(
            "table",
            tag("caption", tag("code", room.label), f" · {title}"),
            tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
            tag("tbody", *body),
            class_="plain",
        ),
        class_="scroll",
        role="region",
        tabindex="0",
        aria_label=f"groups, {title}",
    )
