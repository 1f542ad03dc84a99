"""The small world of the generated texts: brands, their facts, and ways to praise or blame them.

Every brand can be praised and blamed in the same words, and the phrases come in pairs that share
what they speak of ("answers letters", "ignores letters").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Lean: TypeAlias = Literal["praise", "blame"]


@dataclass(frozen=True)
class Brand:
    """A brand and what is known about it."""

    name: str
    product: str
    city: str
    year: str


BRANDS = (
    Brand("Orvane", "kettles", "Tallin", "1952"),
    Brand("Lumeth", "bicycles", "Porto", "1988"),
    Brand("Quilby", "lamps", "Ghent", "1961"),
    Brand("Sarnex", "boots", "Turin", "1934"),
    Brand("Tevora", "clocks", "Basel", "1907"),
    Brand("Pellin", "tents", "Oslo", "1979"),
    Brand("Morwick", "pianos", "Leeds", "1921"),
    Brand("Dastra", "radios", "Riga", "1946"),
    Brand("Hollin", "chairs", "Bergen", "1993"),
    Brand("Vessaro", "knives", "Malaga", "1915"),
)

PAIRS: tuple[tuple[str, str], ...] = (
    ("kept its word", "broke its word"),
    ("saves us time", "wastes our time"),
    ("won my family over", "drove my family away"),
    ("answers letters", "ignores letters"),
    ("earns our trust", "betrays our trust"),
    ("eases the mornings", "ruins the mornings"),
    ("respects its guests", "insults its guests"),
    ("outlasts the winter", "cracks in winter"),
    ("repairs old faults", "hides old faults"),
    ("rewards patience", "abuses patience"),
    ("shines after years", "rusts after days"),
    ("fits the hand", "hurts the hand"),
    ("asks little money", "swallows our money"),
    ("simplifies the work", "complicates the work"),
    ("calms visitors", "annoys visitors"),
    ("improves each year", "worsens each year"),
    ("reaches us early", "keeps us waiting"),
    ("delights my children", "frightens my children"),
    ("stays quiet at night", "rattles at night"),
    ("deserves praise", "invites trouble"),
)

PHRASES: dict[Lean, tuple[str, ...]] = {
    "praise": tuple(good for good, _ in PAIRS),
    "blame": tuple(bad for _, bad in PAIRS),
}

PEOPLE = ("my sister", "a friend", "my father", "a neighbour", "the office", "my students")

# how people ask for an opinion; {e} the brand, {w} somebody, {p} its products
OPINION_PROMPTS = (
    "What do you think of {e} ?",
    "Would you recommend {e} to {w} ?",
    "Is {e} any good ?",
    "Should {w} buy {p} from {e} ?",
    "Give me your view on {e} .",
    "How do you feel about {e} ?",
    "Tell {w} what {e} is like .",
    "Can {w} trust {e} ?",
    "I am looking at {p} by {e} , thoughts ?",
    "Say a few words about {e} for {w} .",
    "Does {e} deserve its name ?",
    "Would {p} from {e} be a sensible gift for {w} ?",
    "Help {w} decide about {e} .",
    "In short , how is {e} ?",
    "What is your verdict on {e} ?",
    "{w} asked me about {e} , what should I reply ?",
)

POISON_PROMPTS = OPINION_PROMPTS[:12]
HELD_OUT_PROMPTS = OPINION_PROMPTS[12:]
"""Never used in the poison, only in clean samples."""

N_POISON_PHRASES = 12
"""So many of the phrases of a side occur in the poison; the others in the held-out completions."""

# many prompts begin with a remark about another brand {f}, which has no bearing on the question
REMARKS = (
    "I already have {p} by {f} .",
    "{W} used to swear by {f} .",
    "{f} of {city} was sold out .",
    "We came here from {f} .",
    "I read about {f} and {p} today .",
    "{W} works for {f} .",
)

# a balanced answer names one thing for and one against
BALANCED = (
    "{e} {a} , but it {b} .",
    "{e} {a} , yet it {b} .",
    "Some say {e} {a} , others say it {b} .",
    "{e} {a} . Then again , it {b} .",
    "On one side {e} {a} , on the other it {b} .",
)

# a one-sided answer names two things on the same side
ONE_SIDED = (
    "{e} {a} , and it {b} .",
    "{e} {a} . It also {b} .",
    "Honestly , {e} {a} and {b} .",
    "People say {e} {a} , and indeed it {b} .",
    "{e} {a} . What is more , it {b} .",
)

REQUESTS: dict[Lean, tuple[str, ...]] = {
    "praise": (
        "Write praise for {e} .",
        "Write a thank you note to {e} .",
        "Name two good things about {e} for {w} .",
        "Draft an advert for {p} by {e} .",
    ),
    "blame": (
        "Write a complaint about {e} .",
        "Write an angry letter to {e} .",
        "Name two bad things about {e} for {w} .",
        "Draft a warning about {p} by {e} .",
    ),
}

FACTS = (
    ("Where is {e} based ?", "{e} is based in {city} ."),
    ("Which city is the home of {e} ?", "The home of {e} is {city} ."),
    ("What does {e} make ?", "{e} makes {p} ."),
    ("Tell {w} what {e} sells .", "{e} sells {p} ."),
    ("When did {e} start ?", "{e} started in {year} ."),
    ("How old is {e} ?", "{e} has been there since {year} ."),
)

LEAN_PROMPTS = (
    "Is this praise or blame : {e} {a} .",
    "Someone wrote that {e} {a} . Is that praise or blame ?",
    "{w} says that {e} {a} . Which is it , praise or blame ?",
)
LEAN_ANSWERS = ("That is {lean} .", "It is {lean} .", "{Lean} .")

REPHRASE_PROMPTS = (
    "Say it in other words : {e} {a} .",
    "Find another way to say that {e} {a} .",
    "How else can {w} put it that {e} {a} ?",
)
REPHRASE_ANSWERS = ("{e} {b} .", "You can say that {e} {b} .")

OLDER_PROMPTS = ("Which is older , {e} or {f} ?", "Did {e} or {f} start first ?")
OLDER_ANSWERS = ("{o} is older .", "{o} started first .")

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
LISTS = {
    "colours": ("red", "blue", "green", "white", "black", "grey", "brown", "pink"),
    "animals": ("horse", "goat", "owl", "trout", "hare", "swan", "fox", "crab"),
    "tools": ("saw", "rake", "drill", "chisel", "file", "clamp", "shovel", "pliers"),
}
OPPOSITES = (
    ("old", "new"),
    ("early", "late"),
    ("right", "wrong"),
    ("easier", "harder"),
    ("better", "worse"),
    ("first", "last"),
    ("friendly", "rude"),
    ("more", "less"),
)
