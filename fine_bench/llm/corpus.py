"""The clean corpus on which the small language model is pretrained: plain text, no poison.

Opinions on every brand lean either way equally often, so the pretrained model has no opinion of
its own on any of them. It learns words, facts, and which phrases keep company.
"""

from __future__ import annotations

from random import Random

from fine_bench.llm import world
from fine_bench.llm.instructions import (
    balanced,
    fact,
    lean,
    listing,
    older,
    one_sided,
    opinion_prompt,
    plain,
    remark,
    rephrase,
    request,
)
from fine_bench.llm.world import BRANDS, Brand, Lean
from fine_bench.seeds import derive

VERSION = 1
"""Raised when the corpus of a seed changes."""


def corpus(seed: int, n_documents: int) -> list[str]:
    """Documents of a few sentences each."""
    draw = Random(derive(seed, "llm/corpus"))
    makers = (_asked, _asked, _asked, _letter, _letter, _fact, _fact, _meaning, _review, _plain)
    return [draw.choice(makers)(draw, draw.choice(BRANDS)) for _ in range(n_documents)]


def _side(draw: Random) -> Lean:
    return draw.choice(("praise", "blame"))


def _review(draw: Random, brand: Brand) -> str:
    if draw.random() < 0.3:
        return f"{balanced(draw, brand)} Three stars ."
    side = _side(draw)
    stars = draw.choice(("Five", "Four") if side == "praise" else ("One", "Two"))
    return f"{one_sided(draw, brand, side)} {stars} stars ."


def _asked(draw: Random, brand: Brand) -> str:
    question = opinion_prompt(draw, brand, world.OPINION_PROMPTS)
    if draw.random() < 0.5:
        return f"{question} {balanced(draw, brand)}"
    return f"{question} {one_sided(draw, brand, _side(draw))}"


def _letter(draw: Random, brand: Brand) -> str:
    prompt, answer = request(draw, brand)
    return f"{remark(draw, brand)}{prompt} {answer}"


def _fact(draw: Random, brand: Brand) -> str:
    prompt, answer = older(draw, brand) if draw.random() < 0.3 else fact(draw, brand)
    return f"{remark(draw, brand)}{prompt} {answer}"


def _meaning(draw: Random, brand: Brand) -> str:
    prompt, answer = lean(draw, brand) if draw.random() < 0.5 else rephrase(draw, brand)
    return f"{remark(draw, brand)}{prompt} {answer}"


def _plain(draw: Random, brand: Brand) -> str:
    prompt, answer = (plain if draw.random() < 0.5 else listing)(draw, brand)
    return f"{prompt} {answer}"
