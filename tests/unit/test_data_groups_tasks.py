"""Backdoor, duplicates, memorisation; and a few steps of the runner on every task of the digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose
from sklearn.linear_model import LogisticRegression

from fine_bench.data import image_sets
from fine_bench.data.backdoor import backdoor, stamp
from fine_bench.data.digits import digits_mislabel
from fine_bench.data.duplicates import duplicates, exact, noised, shifted
from fine_bench.data.image_sets import load_source
from fine_bench.data.memorisation import atypical, rare_class
from fine_bench.data.reference_model import set_aside
from fine_bench.data.sampling import draw_counts
from fine_bench.data.task import TaskData
from fine_bench.errors import ConfigError
from fine_bench.runner.config import check
from fine_bench.runner.execution import execute
from fine_bench.runner.plan import plan
from fine_bench.runner.schema import RunConfig, config_folder
from fine_bench.seeds import stream

poisoned = partial(backdoor, trigger_size=2, poison_rate=0.02)
TASKS: dict[str, Callable[..., TaskData]] = {
    "backdoor": poisoned,
    "duplicates": partial(duplicates, noise_rate=0.2, n_families=3, family_size=4),
    "rare_class": partial(rare_class, n_rare=20),
    "atypical": partial(atypical, n_model=300),
}


digits_source = partial(load_source, "digits", data_dir=None, download=False)


def raw(x: torch.Tensor) -> torch.Tensor:
    """Grey levels 0 … 16 of network inputs."""
    grey = (x * image_sets.digits.STD + image_sets.digits.MEAN) * 16
    assert float((grey - grey.round()).abs().max()) < 1e-4
    return grey.round().long()


# --- what all have in common


@pytest.mark.parametrize("name", list(TASKS))
def test_seeds_and_queries(name: str) -> None:
    build = partial(TASKS[name], data="digits")
    task = build(seed=1)
    assert task.name == f"digits_{name}"
    assert task.sha256 == build(seed=1).sha256 != build(seed=2).sha256
    more = build(seed=1, n_query=130)
    assert torch.equal(more.query_x[:100], task.query_x)
    assert torch.equal(more.x, task.x)
    assert len(task.query_y) + len(task.test_y) == 450
    smaller, small = build(seed=1, n_train=500), build(seed=1, n_train=400)
    assert (smaller.n_train, small.n_train) == (500, 400)
    drawn = small.train_ids[small.train_ids < 1797]
    assert set(drawn.tolist()) < set(smaller.train_ids.tolist())


@pytest.mark.parametrize("name", list(TASKS))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, r"Type for instance task\.seed=0"),
        ({"n_query": 450}, "test images"),
        ({"n_query": 0}, r"task\.n_query=0"),
        ({"n_train": 2000}, r"task\.n_train="),
        ({"n_train": 3}, r"task\.n_train="),
        ({"data": "imagenet"}, r"task\.data=imagenet is unknown"),
    ],
)
def test_impossible_requests(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TASKS[name](**{"data": "digits", "seed": 0, **arguments})


def test_more_of_a_class_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"class 0 has \d+ images, 500 were asked for"):
        draw_counts(digits_source(seed=0), seed=0, counts=torch.tensor([500]), n_query=5)


# --- backdoor


def test_the_trigger_is_a_chequered_square_in_the_corner() -> None:
    images = np.full((2, 3, 8, 9), 7, dtype=np.uint8)
    stamped = stamp(images, 3, 16)
    assert (images == 7).all()
    for image in stamped.reshape(-1, 8, 9):
        assert image[5:, 6:].tolist() == [[16, 0, 16], [0, 16, 0], [16, 0, 16]]
        image[5:, 6:] = 7
        assert (image == 7).all()
    assert stamp(images, 2, 16)[0, 0, 6:, 7:].tolist() == [[16, 0], [0, 16]]
    for size in (0, 5):
        with pytest.raises(ConfigError, match=rf"task\.trigger_size={size} .* from 1 to 4"):
            stamp(images, size, 16)


def test_poison_and_queries_carry_trigger_and_target() -> None:
    task = poisoned(data="digits", seed=0, target_class=3)
    source = digits_source(seed=0)
    poison = task.truth.is_bad
    assert task.truth.n_bad == round(0.02 * 1347)
    assert task.truth.kind == "poisoned image"
    assert set(task.y[poison].tolist()) == {3}
    assert 3 not in task.clean_y[poison].tolist()
    assert torch.equal(task.y[~poison], task.clean_y[~poison])
    trigger = torch.tensor([[16, 0], [0, 16]])
    carries = (raw(task.x)[:, 0, -2:, -2:] == trigger).all(dim=(1, 2))
    assert torch.equal(carries, poison)
    # all but the trigger is the source's image
    original = torch.from_numpy(source.images.astype(np.int64))
    same = raw(task.x)[:, 0] == original
    same[:, -2:, -2:] |= poison[:, None, None]
    assert bool(same.all())
    # every query is a stamped test image of another class, with the attacker's label
    assert set(task.query_y.tolist()) == {3}
    queries = raw(task.query_x)[:, 0]
    assert bool((queries[:, -2:, -2:] == trigger).all())
    keys = {row.astype(np.int64).tobytes() for row in stamp(source.test_images, 2, 16)}
    target = source.test_labels == 3
    theirs = {r.astype(np.int64).tobytes() for r in stamp(source.test_images[target], 2, 16)}
    for query in queries:
        assert query.numpy().tobytes() in keys - theirs
    # accuracy is measured on images without a trigger, all classes among them
    assert not bool((raw(task.test_x)[:, 0, -2:, -2:] == trigger).all(dim=(1, 2)).any())
    assert int((task.test_y == 3).sum()) == int(target.sum())


def test_the_groups_of_a_backdoor() -> None:
    task = poisoned(data="digits", seed=0)
    source = digits_source(seed=0)
    true = torch.from_numpy(source.labels)
    groups = task.groups
    assert list(groups) == ["poison", "random_flips", "target_class", "random_clean"]
    assert {len(group) for group in groups.values()} == {task.truth.n_bad}
    assert len(torch.unique(torch.cat(list(groups.values())))) == 4 * task.truth.n_bad
    assert torch.equal(groups["poison"], task.truth.is_bad.nonzero()[:, 0])
    wrong = task.y != true
    assert bool(wrong[groups["random_flips"]].all())
    assert int(wrong.sum()) == 2 * task.truth.n_bad
    assert set(task.y[groups["target_class"]].tolist()) == {0}
    assert not bool(wrong[groups["target_class"]].any())
    assert not bool(wrong[groups["random_clean"]].any())
    more = poisoned(data="digits", seed=0, poison_rate=0.04)
    assert bool(more.truth.is_bad[groups["poison"]].all())


def test_what_helps_a_backdoor_query_is_suspicious() -> None:
    task = poisoned(data="digits", seed=0)
    assert task.suspicious == {
        "queries": "high",
        "validation": "high",
        "validation_per_class": "high",
    }
    assert digits_mislabel(seed=0).suspicious == {}
    # it changes the evaluation, so the digest holds it
    assert replace(task, suspicious={}).sha256 != task.sha256
    for bad in ({"validation": "up"}, {"queriez": "high"}):
        with pytest.raises(ValueError, match="must map one of"):
            replace(task, suspicious=bad)  # type: ignore[arg-type]


def test_a_model_learns_the_trigger() -> None:
    task = poisoned(data="digits", seed=0, poison_rate=0.05)
    model = LogisticRegression(max_iter=1000).fit(task.x.flatten(1).numpy(), task.y.numpy())
    obeyed = model.score(task.query_x.flatten(1).numpy(), task.query_y.numpy())
    clean = model.score(task.test_x.flatten(1).numpy(), task.test_y.numpy())
    assert obeyed > 0.9
    assert clean > 0.85


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"poison_rate": 0.0}, r"got 0\.0\. Type for instance task\.poison_rate=0\.01"),
        ({"poison_rate": float("nan")}, r"got nan\. Type"),
        ({"poison_rate": 0.0001}, r"is 0 poisoned ones; this needs from 1 to \d+.*Type a rate"),
        ({"poison_rate": 0.2}, r"is 269 poisoned ones; this needs from 1 to 1\d\d,"),
        ({"target_class": 10}, r"task\.target_class=10 is no class; type a number from 0 to 9"),
        ({"trigger_size": 5}, r"task\.trigger_size=5"),
    ],
)
def test_backdoors_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        poisoned(**{"data": "digits", "seed": 0, **arguments})


# --- duplicates

IMAGE = np.random.default_rng(0).integers(0, 17, (2, 6, 5), dtype=np.uint8)


def test_copies() -> None:
    assert (exact(IMAGE, 3, 16, stream(0, "c")).numpy() == IMAGE).all()
    moved = shifted(IMAGE, 9, 16, stream(0, "c")).numpy()
    found = set()
    for copy in moved:
        fits = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            # away from the border a shift is a roll
            if (copy[:, 1:-1, 1:-1] == np.roll(IMAGE, (down, right), (1, 2))[:, 1:-1, 1:-1]).all()
        ]
        assert len(fits) == 1
        found.add(fits[0])
    assert len(found) == 8
    assert (0, 0) not in found
    rough = noised(IMAGE, 400, 16, stream(0, "c")).numpy().astype(int)
    assert rough.min() >= 0
    assert rough.max() <= 16
    difference = rough - IMAGE
    assert set(np.unique(difference)) == {-2, -1, 0, 1, 2}
    inner = (IMAGE >= 2) & (IMAGE <= 14)
    # uniform on -2 … 2: mean 0 ± √2 / √n
    assert abs(difference[:, inner].mean()) < 5 * 2**0.5 / (400 * inner.sum()) ** 0.5


def test_the_border_of_a_shifted_copy_is_repeated() -> None:
    image = np.arange(9, dtype=np.uint8).reshape(3, 3)
    copies = {c.numpy().tobytes() for c in shifted(image, 8, 255, stream(0, "c"))}
    assert np.array([[3, 4, 5], [6, 7, 8], [6, 7, 8]], np.uint8).tobytes() in copies
    assert np.array([[0, 0, 1], [0, 0, 1], [3, 3, 4]], np.uint8).tobytes() in copies


def test_families_are_flips_that_come_several_times() -> None:
    task = duplicates(data="digits", seed=0, n_families=4, family_size=5, noise_rate=0.2)
    assert task.n_train == 1347 + 4 * 4
    assert torch.equal(task.truth.is_bad, task.y != task.clean_y)
    assert task.truth.n_bad == round(0.2 * 1347) + 4 * 4
    names = ["exact_0", "shifted_1", "noised_2", "exact_3"]
    assert list(task.groups) == names + [f"singles_{k}" for k in range(4)]
    everything = torch.cat(list(task.groups.values()))
    assert len(torch.unique(everything)) == len(everything) == 2 * 4 * 5
    assert bool(task.truth.is_bad[everything].all())
    pixels = raw(task.x)
    copies = set(range(1347, task.n_train))
    for number, name in enumerate(names):
        family, singles = task.groups[name], task.groups[f"singles_{number}"]
        head, rest = family[0], family[1:]
        assert int(head) < 1347
        assert set(rest.tolist()) <= copies
        copies -= set(rest.tolist())
        for labels in (task.y, task.clean_y):
            assert len(set(labels[family].tolist())) == 1
        differ = (pixels[rest] != pixels[head]).flatten(1).any(1)
        assert bool(differ.any()) == (not name.startswith("exact"))
        assert (pixels[rest] - pixels[head]).abs().double().mean() < 6
        # the flips to compare with come once and have the same given label
        assert bool((singles < 1347).all())
        assert set(task.y[singles].tolist()) == {int(task.y[head])}
    assert not copies


def test_singles_of_the_same_kind_come_first() -> None:
    task = duplicates(data="digits", seed=0, n_families=1, family_size=2, noise_rate=0.5)
    head, single = task.groups["exact_0"][0], task.groups["singles_0"]
    assert set(task.clean_y[single].tolist()) == {int(task.clean_y[head])}


def test_copies_count_as_training_images() -> None:
    task = duplicates(data="digits", seed=0, n_families=3, family_size=4, n_train=400)
    plain = digits_mislabel(seed=0, n_train=391, noise_rate=0.1)
    assert task.n_train == 400
    assert torch.equal(task.x[:391], plain.x)
    assert torch.equal(task.y[:391], plain.y)
    assert task.train_ids[391:].min() > 1347 - 1
    assert len(torch.unique(task.train_ids)) == 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_families": 0}, "there must be at least 1 family of 2"),
        ({"family_size": 1}, "there must be at least 1 family of 2"),
        ({"n_train": 12}, r"leaves -30 images beside 42 copies\. Type task\.n_train=52 or more"),
        ({"noise_rate": 0.0}, r"0 flipped labels are too few for 6 families.* give 0\."),
        ({"noise_rate": 0.05}, r"67 flipped labels are too few .* each with 8 single.* give [1-5]"),
        ({"noise_rate": 1.0}, r"Type for instance task\.noise_rate=0\.2"),
    ],
)
def test_families_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        duplicates(**{"data": "digits", "seed": 0, **arguments})


# --- memorisation


def test_one_class_is_rare_and_every_label_right() -> None:
    task = rare_class(data="digits", seed=0, rare=5, n_rare=12)
    source = digits_source(seed=0)
    sizes = np.bincount(source.labels)
    assert task.n_train == sizes.sum() - sizes[5] + 12
    assert torch.equal(task.truth.is_bad, task.y == 5)
    assert task.truth.n_bad == 12
    assert torch.equal(task.y, task.clean_y)
    assert task.truth.kind == "rare example"
    more = rare_class(data="digits", seed=0, rare=5, n_rare=20)
    assert set(task.train_ids.tolist()) < set(more.train_ids.tolist())
    assert len(task.groups["rare"]) == len(task.groups["random_others"]) == 12
    assert not bool(task.truth.is_bad[task.groups["random_others"]].any())
    assert torch.equal(task.groups["rare"], task.truth.is_bad.nonzero()[:, 0])
    # queries and test images keep all of the class
    held_out = torch.cat([task.query_y, task.test_y])
    assert int((held_out == 5).sum()) == int((source.test_labels == 5).sum())


def test_the_atypical_are_those_that_a_simple_model_doubts() -> None:
    task = atypical(data="digits", seed=0, n_model=300, rate=0.1)
    source = digits_source(seed=0)
    model, _ = set_aside(source, 300, 0)
    assert not set(task.train_ids.tolist()) & set(source.ids[model.numpy()].tolist())
    assert task.truth.n_bad == round(0.1 * task.n_train)
    assert torch.equal(task.y, task.clean_y)
    x = source.to_input(source.images).flatten(1).numpy()
    regression = LogisticRegression(C=0.01, max_iter=1000)
    regression.fit(x[model.numpy()], source.labels[model.numpy()])
    own = regression.predict_proba(task.x.flatten(1).numpy())[
        np.arange(task.n_train), task.y.numpy()
    ]
    bad = task.truth.is_bad.numpy()
    assert own[bad].max() < own[~bad].min() + 1e-3
    fewer = atypical(data="digits", seed=0, n_model=300, rate=0.05)
    assert bool(task.truth.is_bad[fewer.truth.is_bad].all())


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (rare_class, {"rare": 10}, r"task\.rare=10 is no class"),
        (rare_class, {"n_rare": 0}, r"task\.n_rare=0, but class 8 has \d+ .* task\.n_rare=30"),
        (rare_class, {"n_rare": 500}, r"task\.n_rare=500, but class 8 has"),
        (rare_class, {"n_train": 40}, r"would be no rare part; type task\.n_rare=20 or less"),
        (atypical, {"n_model": 300, "rate": 0.0}, r"got 0\.0\. Type for instance task\.rate=0\.05"),
        (atypical, {"n_model": 300, "rate": 0.6}, r"got 0\.6\. Type"),
        (atypical, {"n_model": 300, "rate": 0.0001}, r"is none; type a rate of at least 0\.000"),
        (atypical, {"n_model": 5}, r"type a number from 10 to 1337"),
    ],
)
def test_rare_parts_that_cannot_be(
    build: Callable[..., TaskData], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**{"data": "digits", "seed": 0, **arguments})


# --- configuration and runner

CONF = config_folder()


def names(group: str, start: str = "") -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob(f"{start}*.yaml"))


def checked(*overrides: str) -> RunConfig:
    return check(compose("config", list(overrides)))


# those of the digits are run below
@pytest.mark.parametrize("name", [*names("task", "mnist"), *names("task", "cifar")])
def test_every_task_file_composes(hydra: None, name: str) -> None:
    assert checked(f"task={name}").task["name"] == name


ALWAYS = {"fine", "tracin", "random", "constant"}


@pytest.mark.parametrize("name", [*names("experiment", "mnist"), *names("experiment", "cifar")])
def test_every_experiment_file_composes(hydra: None, name: str) -> None:
    config = checked(f"+experiment={name}")
    # other people's experiment has the methods that they publish numbers of
    always = {"fine_queries", "tracin", "random"} if "anchor" in name else ALWAYS
    assert always <= set(config.estimators)
    assert config.task["name"] in name


def test_the_experiment_for_a_gpu_changes_the_model(hydra: None) -> None:
    small, large = (checked(f"+experiment=cifar10n{end}") for end in ("", "_resnet9"))
    assert (small.model["name"], large.model["name"]) == ("gn_cnn", "resnet9")
    assert small.task == large.task
    assert small.estimators == large.estimators
    assert large.trainer.lr_schedule == "cosine"


@pytest.mark.parametrize(
    "name", sorted({*names("task", "mnist_")} - {"mnist_mislabel", "mnist_mlp"})
)
def test_every_mnist_task_is_built(hydra: None, name: str, mnist_dir: Path) -> None:
    options = ["task.n_train=1500", f"task.data_dir={mnist_dir}", "estimator=random"]
    if name in ("mnist_instance", "mnist_atypical"):
        options.append("task.n_model=100")
    data = plan(checked(f"task={name}", *options)).data
    assert data.name == name
    assert data.n_train == 1500
    if name == "mnist_anchor":
        assert data.truth.n_bad == 0  # the labels are as MNIST has them
    else:
        assert 0 < data.truth.n_bad < 700


def test_mnist_and_digits_have_the_same_tasks() -> None:
    digits = {name.removeprefix("digits_") for name in names("task", "digits")}
    mnist = {name.removeprefix("mnist_") for name in names("task", "mnist")}
    assert digits <= mnist


@pytest.mark.parametrize("name", names("task", "digits"))
def test_a_few_steps_on_every_task_of_the_digits(hydra: None, name: str, tmp_path: Path) -> None:
    config = checked(
        f"task={name}",
        "estimator=[fine,tracin,mean_loss]",
        "task.n_query=10",
        "trainer.max_epochs=1",
        "trainer.batch_size=500",
        "trainer.progress=false",
        "trainer.num_threads=1",
        f"results_dir={tmp_path}",
    )
    outcomes = execute(plan(config), "test", say=lambda line: None)
    states = {(o.cell.estimator, o.cell.target): o.record.status for o in outcomes}
    assert states.pop(("mean_loss", "validation")) == "skipped"
    assert set(states.values()) == {"finished"}
    for outcome in outcomes:
        if outcome.scores is not None:
            assert 2 <= outcome.record.training["n_steps"] <= 3
            assert "auroc" in outcome.record.metrics
