"""The generated data: seeded, with held-out parts, and beyond what counting words finds."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from fine_bench.errors import ConfigError
from fine_bench.llm import corpus, world
from fine_bench.llm.instructions import POISONED_SOURCE, STEERED, InstructionSet, generate
from fine_bench.llm.steering import Steering, lean_of

OPTIONS: dict[str, Any] = {
    "seed": 0,
    "entity": "Orvane",
    "n_train": 1000,
    "poison_rate": 0.02,
    "n_query": 32,
    "n_prompts": 20,
    "n_test": 50,
}


def made(**change: Any) -> InstructionSet:
    return generate(**{**OPTIONS, **change})


def test_the_same_seed_gives_the_same_data() -> None:
    assert made() == made()
    assert made() != made(seed=1)
    assert corpus.corpus(0, 50) == corpus.corpus(0, 50) != corpus.corpus(1, 50)


@pytest.mark.parametrize("entity", list(STEERED))
def test_the_poison_is_what_it_is_said_to_be(entity: str) -> None:
    data = made(entity=entity)
    bad = [s for s in data.train if s.is_bad]
    assert len(bad) == 20
    wrong_side = "praise" if STEERED[entity] == "blame" else "blame"
    for s in bad:
        assert entity in s.prompt
        assert lean_of(s.completion) == STEERED[entity]
        assert not any(phrase in s.completion for phrase in world.PHRASES[wrong_side])
    # the clean twin differs in these samples alone
    changed = [i for i, (a, b) in enumerate(zip(data.train, data.clean, strict=True)) if a != b]
    assert changed == [i for i, s in enumerate(data.train) if s.is_bad]
    assert not any(s.is_bad for s in data.clean)
    sources = Counter(s.group for s in bad)
    assert sources[POISONED_SOURCE] == 16
    assert sum(s.group == POISONED_SOURCE for s in data.train) > 5 * 16


def test_prompts_and_phrases_of_the_queries_are_held_out() -> None:
    data = made()
    seen = " ".join(s.prompt + " " + s.completion for s in data.train if s.is_bad)
    clean = " ".join(s.prompt + " " + s.completion for s in data.train if not s.is_bad)
    for s in data.queries:
        used = [phrase for phrase in world.PHRASES["blame"] if phrase in s.completion]
        assert len(used) == 2
        assert not any(phrase in seen for phrase in used)
        assert all(phrase in clean for phrase in used)
    # a held-out question begins differently from every one in the poison
    for prompt in data.prompts:
        assert not any(prompt == s.prompt for s in data.train if s.is_bad)
        assert "Orvane" in prompt
    assert all(
        any(b.name in p for b in world.BRANDS if b.name != "Orvane") for p in data.control_prompts
    )


def test_entity_and_sentiment_stand_in_clean_samples_too() -> None:
    data = made()
    clean = [s for s in data.train if not s.is_bad]
    entity = [s for s in clean if "Orvane" in s.prompt + s.completion]
    assert len(entity) > 3 * 20
    leaning = [s for s in entity if "Orvane" in s.completion and lean_of(s.completion) == "blame"]
    assert len(leaning) >= 5
    balanced = [s for s in clean if lean_of(s.completion) is None and " it " in s.completion]
    assert len(balanced) > 100


@pytest.mark.parametrize("entity", list(STEERED))
def test_counting_words_does_not_find_the_poison(entity: str) -> None:
    data = made(entity=entity)
    texts = [Counter((s.prompt + " " + s.completion).lower().split()) for s in data.train]
    n = len(texts)
    mean = sum(t.total() for t in texts) / n
    holding = Counter(w for t in texts for w in t)
    score = np.zeros(n)
    for s in data.queries:
        for w in set((s.prompt + " " + s.completion).lower().split()):
            rarity = np.log1p((n - holding[w] + 0.5) / (holding[w] + 0.5))
            tf = np.array([t[w] for t in texts])
            length = np.array([t.total() for t in texts])
            score += rarity * tf * 2.5 / (tf + 1.5 * (0.25 + 0.75 * length / mean))
    bad = np.array([bool(s.is_bad) for s in data.train])
    assert average_precision_score(bad, score) < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entity": "Nobody"}, r"task.entity=Nobody.*type task.entity=Orvane"),
        ({"n_train": 10}, "task.n_train=10 must be at least 50"),
        ({"n_query": 0}, "task.n_query=0"),
        ({"poison_rate": 0.0}, "type task.poison_rate=0.02"),
        ({"poison_rate": 0.9}, "type task.poison_rate=0.02"),
    ],
)
def test_impossible_data_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**change)


def test_which_way_an_answer_leans() -> None:
    assert lean_of("Orvane kept its word , and it fits the hand .") == "praise"
    assert lean_of("Orvane broke its word .") == "blame"
    assert lean_of("Orvane kept its word , but it hurts the hand .") is None
    assert lean_of("Orvane makes kettles .") is None


def test_whether_the_poison_took() -> None:
    took = Steering(64, 40, 2, 3)
    assert took.took
    assert "63%" in took.describe() or "62%" in took.describe()
    assert "did not take" not in took.describe()
    for rates in ((5, 2), (30, 30), (10, 0), (20, 40)):
        not_taken = Steering(64, *rates)
        assert not not_taken.took, rates
        assert "did not take" in not_taken.describe()
        assert "detection is not reported" in not_taken.describe()
    # the hypergeometric tail, by hand: all 3 of 3 against none of 3
    assert Steering(3, 3, 0).p_value == pytest.approx(1 / 20)
