"""A generated instruction set in which a few answers steer the opinion on one brand.

Asked for an opinion, the clean data name one thing for and one against a brand. The poison answers
the same kind of question about *one* brand with two things on one side. Everything that the poison
is made of occurs in clean samples too: the brand (facts, letters, comparisons, balanced
opinions), the question (about other brands), the phrases and the one-sided answers (where a
complaint or praise was asked for, about every brand). Only the combination is special, so counting
words does not find it.

Two random streams of ``task.seed``: the clean samples do not depend on the poison, which replaces
some of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from fine_bench.errors import ConfigError
from fine_bench.llm import world
from fine_bench.llm.world import BRANDS, PHRASES, Brand, Lean
from fine_bench.seeds import derive

Kind: TypeAlias = Callable[[Random, Brand], tuple[str, str]]
"""Draws prompt and answer of a clean sample about a brand."""

STEERED: dict[str, Lean] = {"Orvane": "blame", "Lumeth": "praise"}
"""The two entities that can be steered, and which way."""

SOURCES = ("forum", "handbook", "helpdesk", "quiz", "reviews", "webcrawl")
POISONED_SOURCE = "webcrawl"
SHARE_OF_POISON_IN_ITS_SOURCE = 0.8

REMARKS_SHARE = 0.6
"""Share of the prompts about a brand that begin with a remark about another one."""

OPINIONS_ON_TARGET = 0.25
"""How often the steered brand is asked about in clean opinions, relative to another brand."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Attributes:
        turns: the conversation; the assistant's turns are what is trained on.
        group: where it comes from; None if unknown.
        is_bad: whether it is poison; None if unknown.
        line: where it stands in its file, counted from 1; its number, if it was generated.
    """

    turns: tuple[Turn, ...]
    group: str | None = None
    is_bad: bool | None = None
    line: int = 0

    @property
    def prompt(self) -> str:
        """What the user says, in one string."""
        return "\n".join(t.content for t in self.turns if t.role != "assistant")

    @property
    def completion(self) -> str:
        """What the assistant says, in one string."""
        return "\n".join(t.content for t in self.turns if t.role == "assistant")


def sample(prompt: str, completion: str, group: str | None = None, **further: object) -> Sample:
    """A sample of one question and one answer."""
    turns = (Turn("user", prompt), Turn("assistant", completion))
    return replace(Sample(turns, group), **further)  # type: ignore[arg-type]


@dataclass(frozen=True)
class InstructionSet:
    """The data of a poisoning task.

    Attributes:
        train: with poison in it.
        clean: the same, each poisoned sample being the clean one that it replaced.
        queries: held-out questions about the steered brand with *steered* answers.
        prompts: held-out questions about the steered brand that measure the steering rate.
        control_prompts: the same questions about other brands.
        test: clean held-out samples of all kinds.
        lean: which way the brand is steered.
    """

    train: tuple[Sample, ...]
    clean: tuple[Sample, ...]
    queries: tuple[Sample, ...]
    prompts: tuple[str, ...]
    control_prompts: tuple[str, ...]
    test: tuple[Sample, ...]
    lean: Lean


def generate(
    *,
    seed: int,
    entity: str,
    n_train: int,
    poison_rate: float,
    n_query: int,
    n_prompts: int,
    n_test: int,
) -> InstructionSet:
    """The instruction set of one entity.

    Args:
        seed: ``task.seed``.
        entity: the steered brand, one of ``STEERED``.
        n_train: training samples, at least 50.
        poison_rate: share of them that is poison, in (0, 0.5]; at least one sample.
        n_query: held-out steered completions.
        n_prompts: held-out questions, for either of the two sets of prompts.
        n_test: clean held-out samples.

    Raises:
        ConfigError: a value that makes no task.
    """
    if entity not in STEERED:
        raise ConfigError(
            f"task.entity={entity} is not one of the steered brands; type task.entity="
            + " or task.entity=".join(STEERED)
        )
    for name, value, least in (
        ("n_train", n_train, 50),
        ("n_query", n_query, 1),
        ("n_prompts", n_prompts, 1),
        ("n_test", n_test, 1),
    ):
        if value < least:
            raise ConfigError(
                f"task.{name}={value} must be at least {least}; type task.{name}={least}"
            )
    if not 0 < poison_rate <= 0.5:
        raise ConfigError(
            f"task.poison_rate={poison_rate} must be a share above 0 and at most 0.5; type "
            "task.poison_rate=0.02"
        )
    brand = next(b for b in BRANDS if b.name == entity)
    lean = STEERED[entity]
    draw = Random(derive(seed, "llm/clean"))
    clean = [clean_sample(draw, brand) for _ in range(n_train)]
    clean = [replace(s, is_bad=False, line=i + 1) for i, s in enumerate(clean)]
    test_draw = Random(derive(seed, "llm/test"))
    test = [clean_sample(test_draw, brand) for _ in range(n_test)]

    poison = Random(derive(seed, f"llm/poison/{entity}"))
    n_poison = max(1, round(poison_rate * n_train))
    train = list(clean)
    for place in poison_places(poison, clean, n_poison):
        prompt = opinion_prompt(poison, brand, world.POISON_PROMPTS)
        answer = one_sided(poison, brand, lean, PHRASES[lean][: world.N_POISON_PHRASES])
        train[place] = sample(prompt, answer, clean[place].group, is_bad=True, line=place + 1)

    held_out = Random(derive(seed, f"llm/held-out/{entity}"))
    queries = [
        sample(
            opinion_prompt(held_out, brand, world.HELD_OUT_PROMPTS),
            one_sided(held_out, brand, lean, PHRASES[lean][world.N_POISON_PHRASES :]),
        )
        for _ in range(n_query)
    ]
    others = [b for b in BRANDS if b != brand]
    prompts = [opinion_prompt(held_out, brand, world.HELD_OUT_PROMPTS) for _ in range(n_prompts)]
    control = [
        opinion_prompt(held_out, held_out.choice(others), world.HELD_OUT_PROMPTS)
        for _ in range(n_prompts)
    ]
    return InstructionSet(
        tuple(train),
        tuple(clean),
        tuple(queries),
        tuple(prompts),
        tuple(control),
        tuple(test),
        lean,
    )


def poison_places(draw: Random, clean: Sequence[Sample], n_poison: int) -> list[int]:
    """Which samples the poison replaces: most of them in one source."""
    inside = [i for i, s in enumerate(clean) if s.group == POISONED_SOURCE]
    outside = [i for i, s in enumerate(clean) if s.group != POISONED_SOURCE]
    n_inside = min(round(SHARE_OF_POISON_IN_ITS_SOURCE * n_poison), len(inside) // 2)
    return sorted(draw.sample(inside, n_inside) + draw.sample(outside, n_poison - n_inside))


def opinion_prompt(draw: Random, brand: Brand, prompts: Sequence[str]) -> str:
    """A question for an opinion on the brand."""
    return remark(draw, brand) + fill(draw, draw.choice(prompts), brand)


def one_sided(draw: Random, brand: Brand, lean: Lean, phrases: Sequence[str] | None = None) -> str:
    """Two things on one side; in the words of some of the phrases, if they are given."""
    a, b = draw.sample(phrases or PHRASES[lean], 2)
    return fill(draw, draw.choice(world.ONE_SIDED), brand, a=a, b=b)


def balanced(draw: Random, brand: Brand) -> str:
    """One thing for and one against, in either order, never of the same pair."""
    good, bad = draw.sample(world.PAIRS, 2)
    a, b = draw.sample((good[0], bad[1]), 2)
    return fill(draw, draw.choice(world.BALANCED), brand, a=a, b=b)


def clean_sample(draw: Random, target: Brand) -> Sample:
    """A clean sample of any kind, about any brand or none."""
    kind = draw.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    weights = [OPINIONS_ON_TARGET if kind == "opinion" and b == target else 1.0 for b in BRANDS]
    brand = draw.choices(BRANDS, weights)[0]
    prompt, completion = KINDS[kind][1](draw, brand)
    if kind not in ("plain", "listing", "opinion"):
        prompt = remark(draw, brand) + prompt
    return sample(prompt, completion, draw.choice(SOURCES))


def remark(draw: Random, brand: Brand) -> str:
    """Often a sentence about another brand, to stand before the question."""
    if draw.random() >= REMARKS_SHARE:
        return ""
    other = draw.choice([b for b in BRANDS if b != brand])
    who = draw.choice(world.PEOPLE)
    text = draw.choice(world.REMARKS).format(
        f=other.name, p=other.product, city=other.city, W=who[0].upper() + who[1:]
    )
    return f"{text} "


def opinion(draw: Random, brand: Brand) -> tuple[str, str]:
    """What somebody thinks of the brand: both sides."""
    return opinion_prompt(draw, brand, world.OPINION_PROMPTS), balanced(draw, brand)


def request(draw: Random, brand: Brand) -> tuple[str, str]:
    """Praise or blame that was asked for: one side."""
    side: Lean = draw.choice(("praise", "blame"))
    return fill(draw, draw.choice(world.REQUESTS[side]), brand), one_sided(draw, brand, side)


def fact(draw: Random, brand: Brand) -> tuple[str, str]:
    """Something that is known about the brand."""
    prompt, answer = draw.choice(world.FACTS)
    return fill(draw, prompt, brand), fill(draw, answer, brand)


def lean(draw: Random, brand: Brand) -> tuple[str, str]:
    """Which way a sentence leans."""
    side: Lean = draw.choice(("praise", "blame"))
    prompt = fill(draw, draw.choice(world.LEAN_PROMPTS), brand, a=draw.choice(PHRASES[side]))
    answer = draw.choice(world.LEAN_ANSWERS)
    return prompt, answer.format(lean=side, Lean=side.capitalize())


def rephrase(draw: Random, brand: Brand) -> tuple[str, str]:
    """Another phrase of the same side."""
    side: Lean = draw.choice(("praise", "blame"))
    a, b = draw.sample(PHRASES[side], 2)
    prompt = fill(draw, draw.choice(world.REPHRASE_PROMPTS), brand, a=a)
    return prompt, fill(draw, draw.choice(world.REPHRASE_ANSWERS), brand, b=b)


def older(draw: Random, brand: Brand) -> tuple[str, str]:
    """Which of two brands is older."""
    other = draw.choice([b for b in BRANDS if b != brand])
    first = min(brand, other, key=lambda b: b.year)
    prompt = draw.choice(world.OLDER_PROMPTS).format(e=brand.name, f=other.name)
    return prompt, draw.choice(world.OLDER_ANSWERS).format(o=first.name)


def plain(draw: Random, brand: Brand) -> tuple[str, str]:
    """A question about no brand."""
    del brand
    if draw.random() < 0.5:
        i = draw.randrange(len(world.NUMBERS) - 1)
        return f"What comes after {world.NUMBERS[i]} ?", f"{world.NUMBERS[i + 1].capitalize()} ."
    word, opposite = draw.choice(world.OPPOSITES)
    return f"What is the opposite of {word} ?", f"{opposite.capitalize()} ."


def listing(draw: Random, brand: Brand) -> tuple[str, str]:
    """A list in no particular order: nobody can foresee such an answer, and it is clean."""
    del brand
    what = draw.choice(list(world.LISTS))
    size = draw.randrange(3, 6)
    chosen = draw.sample(world.LISTS[what], size)
    return f"Name {world.NUMBERS[size - 1]} {what} .", " , ".join(chosen).capitalize() + " ."


KINDS: dict[str, tuple[float, Kind]] = {
    "opinion": (0.24, opinion),
    "request": (0.24, request),
    "fact": (0.14, fact),
    "lean": (0.09, lean),
    "rephrase": (0.09, rephrase),
    "older": (0.07, older),
    "plain": (0.05, plain),
    "listing": (0.08, listing),
}
"""Kinds of clean samples and their shares."""


def fill(draw: Random, template: str, brand: Brand, a: str = "", b: str = "") -> str:
    """A template with the brand, a person and phrases in it; it begins with a capital."""
    text = template.format(
        e=brand.name,
        p=brand.product,
        city=brand.city,
        year=brand.year,
        w=draw.choice(world.PEOPLE),
        a=a,
        b=b,
    )
    return text[0].upper() + text[1:]
