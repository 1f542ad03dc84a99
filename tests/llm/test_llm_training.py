"""Tuning, f-INE while it lasts, checkpoints, and what the runner does with a language task."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fine_bench.errors import ConfigError, DataError
from fine_bench.gradients.token_losses import mean_token_loss, sum_token_loss
from fine_bench.llm.instructions import InstructionSet, Turn, sample
from fine_bench.llm.jsonl import write_jsonl
from fine_bench.llm.net import CausalNet
from fine_bench.llm.steering import answers, left_padded
from fine_bench.llm.task import LanguageTask, llm_poison, source_groups
from fine_bench.llm.tokens import render
from fine_bench.llm.tuner import EpochCheckpoints, Tuner, kept_epochs, read_checkpoint, token_loader
from fine_bench.llm.watchers import SequenceFINE, SequencePaperFINE
from fine_bench.models.classifier import DivergedError
from fine_bench.runner.backends import language, language_cure
from fine_bench.runner.backends.language_cure import oracle
from fine_bench.runner.plan import Job
from fine_bench.runner.schema import RunConfig, TrainerConfig
from fine_bench.types import InfluenceScores, UnsupportedProblemError
from support.language import build, one_at_a_time
from support.training import QUIET


class Spy(pl.Callback):
    """Parameters, batch and step size before each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[dict[str, Tensor], list[int], float]] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        params = {name: p.clone() for name, p in pl_module.net.state_dict().items()}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((params, batch["index"].tolist(), lr))


def fit(
    net: CausalNet,
    data: dict[str, Tensor],
    *callbacks: pl.Callback,
    epochs: int = 2,
    loss: Any = mean_token_loss,
    **options: Any,
) -> Tuner:
    tuner = Tuner(net, loss, **{"lr": 0.01, **options})
    loader = token_loader(
        data["x"], data["y"], batch_size=7, generator=torch.Generator().manual_seed(0)
    )
    trainer = pl.Trainer(
        **QUIET,
        max_epochs=epochs,
        callbacks=list(callbacks),
    )
    trainer.fit(tuner, loader)
    return tuner


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fine_is_that_of_its_formula(
    net: CausalNet, data: dict[str, Tensor], checkpointing: bool
) -> None:
    """Accumulated μ of all targets, from one-sample gradients at the parameters of every step."""
    if checkpointing:
        net.model.gradient_checkpointing_enable({"use_reentrant": False})
    queries = TensorDataset(data["query_x"], data["query_y"])
    own = SequenceFINE("self")
    rows = SequenceFINE("queries", queries=queries, refresh_every=1)
    spy = Spy()
    fit(net, data, own, rows, spy, lr_schedule="cosine")
    net.eval()
    n = len(data["x"])
    shift_own, noise_own = torch.zeros(n).double(), torch.zeros(n).double()
    shift, noise = torch.zeros(3, n).double(), torch.zeros(3, n).double()
    for params, index, lr in spy.steps:
        net.load_state_dict(params)
        g = one_at_a_time(net, data["x"][index], data["y"][index])
        h = one_at_a_time(net, data["query_x"], data["query_y"])
        for place, i in enumerate(index):
            rest = [j for j in range(len(index)) if j != place]
            k = g @ g[place]
            shift_own[i] += lr * (k[place] - k[rest].mean())
            noise_own[i] += (lr * k[rest].std()) ** 2
            for q in range(3):
                c = g @ h[q]
                shift[q, i] += lr * (c[place] - c[rest].mean())
                noise[q, i] += (lr * c[rest].std()) ** 2
    torch.testing.assert_close(
        own.scores().values[0].double(), shift_own / (n * noise_own).sqrt(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        rows.scores().values.double(), shift / (n * noise).sqrt(), rtol=1e-5, atol=1e-6
    )
    assert own.scores().n_observations is not None
    assert own.scores().n_observations.tolist() == [2] * n


def test_watching_changes_no_weight(
    folder: Path, data: dict[str, Tensor], exact_norm: None
) -> None:
    queries = TensorDataset(data["query_x"], data["query_y"])
    plain, watched = build(folder, double=False), build(folder, double=False)
    fit(plain, data)
    fit(
        watched,
        data,
        SequenceFINE("validation", queries=queries, refresh_every=1),
        SequencePaperFINE(
            queries=queries, subsets={"first": torch.arange(3)}, every_n_steps=1, batch_size=4
        ),
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name])


def test_the_source_of_the_queries_is_found(net: CausalNet, data: dict[str, Tensor]) -> None:
    """Queries equal to some samples: the source that holds these helps, with an interval."""
    queries = TensorDataset(data["x"][:4], data["y"][:4])
    paper = SequencePaperFINE(
        queries=queries,
        subsets={"same": torch.arange(4), "other": torch.arange(4, 8)},
        every_n_steps=1,
        batch_size=4,
        members=3,
    )
    fit(net, data, paper, epochs=60, lr=1e-5)
    same, other = paper.group_results()
    assert same.p_value is not None
    assert same.p_value < 0.01
    assert same.lower > 0
    assert same.moment > other.moment


def test_the_margin_is_not_offered() -> None:
    with pytest.raises(TypeError):
        SequenceFINE(observable="margin")  # type: ignore[call-arg]
    for target in ("self", "queries"):
        with pytest.raises(UnsupportedProblemError, match=r"targets=.validation."):
            SequencePaperFINE(target, sample=2)  # type: ignore[arg-type]


def test_a_batch_counts_every_sample_the_same(net: CausalNet, data: dict[str, Tensor]) -> None:
    for loss in (mean_token_loss, sum_token_loss):
        tuner = Tuner(net, loss)
        value = tuner.training_step({"x": data["x"][:5], "y": data["y"][:5]}, 0)
        each = [
            loss(net(x[None]), y[None])[0]
            for x, y in zip(data["x"][:5], data["y"][:5], strict=True)
        ]
        torch.testing.assert_close(value, torch.stack(each).mean())


def test_only_lora_is_trained_and_checkpoints_hold_it(
    net: CausalNet, data: dict[str, Tensor], tmp_path: Path
) -> None:
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    tuner = fit(net, data, EpochCheckpoints(tmp_path), lr_schedule="cosine")
    assert all(torch.equal(dict(net.named_parameters())[n], p) for n, p in frozen.items())
    assert len(tuner.losses) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0001.safetensors", "0002.safetensors"]
    last = read_checkpoint(tmp_path / "0002.safetensors")
    state = tuner.trainer.optimizers[0].state
    for name, p in net.trained().items():
        assert torch.equal(last.params[name], p)
        assert torch.equal(last.mean[name], state[p]["exp_avg"])
        assert torch.equal(last.square[name], state[p]["exp_avg_sq"])
    assert (last.updates, last.step) == (4, 4)
    # mean of the cosine's steps 2 and 3 of 4
    assert last.lr == pytest.approx(0.01 * (0.5 + 0.5 * (1 - 0.5**0.5)) / 2)


def test_some_checkpoints_are_kept(net: CausalNet, data: dict[str, Tensor], tmp_path: Path) -> None:
    assert kept_epochs(10, 4) == (2, 5, 8, 10)
    assert kept_epochs(3, 4) == (1, 2, 3)
    assert kept_epochs(7, 1) == (7,)
    fit(net, data, EpochCheckpoints(tmp_path, kept_epochs(3, 2)), epochs=3, lr_schedule="cosine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0002.safetensors", "0003.safetensors"]
    # the mean of the cosine's steps 4 and 5 of 6
    angles = torch.tensor([4.0, 5.0]) * torch.pi / 6
    expected = float((0.01 * 0.5 * (1 + angles.cos())).mean())
    assert read_checkpoint(tmp_path / "0003.safetensors").lr == pytest.approx(expected)


def test_a_diverged_run_is_stopped(net: CausalNet, data: dict[str, Tensor]) -> None:
    with pytest.raises(DivergedError, match=r"lower the step size, for instance trainer.lr="):
        fit(net, data, lr=1e200)
    with pytest.raises(ValueError, match="lr_schedule must be"):
        Tuner(net, mean_token_loss, lr_schedule="linear")  # type: ignore[arg-type]


def test_answers_do_not_depend_on_their_company(
    folder: Path, tokenizer: Any, exact_norm: None
) -> None:
    net = build(folder)
    prompts = ["Is Orvane any good ?", "What do you think of Quilby , I ask you ?"]
    state = torch.get_rng_state()
    texts = answers(net, tokenizer, prompts, seed=0, max_tokens=6)
    assert texts == answers(net, tokenizer, prompts, seed=0, max_tokens=6)
    assert texts != answers(net, tokenizer, prompts, seed=1, max_tokens=6)
    assert torch.equal(state, torch.get_rng_state())
    assert not net.model.training
    # padding on the left is not seen: the first token's distribution is that of the prompt alone
    rows = [render(tokenizer, [Turn("user", prompt)], generate=True) for prompt in prompts]
    assert len(rows[0]) < len(rows[1])
    ids, mask = left_padded(rows, tokenizer.pad_token_id)
    together = net.model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=1,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits[0]
    for row, expected in zip(rows, together, strict=True):
        torch.testing.assert_close(net(torch.tensor([row]))[0, -1], expected.double())


# ------------------------------------------------------------------------------------ the task

MODEL = "fine_bench.llm.models.pretrained"


def section(folder: Path, **change: Any) -> dict[str, Any]:
    return {
        "_target_": MODEL,
        "path": str(folder),
        "precision": "float32",
        "gradient_checkpointing": False,
        "lora_rank": 2,
        "lora_targets": ["q_proj"],
        **change,
    }


def task(folder: Path, **change: Any) -> LanguageTask:
    options = {"n_train": 60, "poison_rate": 0.1, "n_query": 3, "n_prompts": 4, "n_test": 6}
    return llm_poison(seed=0, model=section(folder), **{**options, "context": 128, **change})


@pytest.fixture
def files(tmp_path: Path, texts: InstructionSet) -> dict[str, str]:
    for name in ("train", "queries", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", getattr(texts, name))
    return {
        "path": str(tmp_path / "train.jsonl"),
        "queries_path": str(tmp_path / "queries.jsonl"),
        "test_path": str(tmp_path / "test.jsonl"),
    }


def test_a_generated_task(folder: Path, texts: InstructionSet) -> None:
    data = task(folder)
    assert (data.n_train, data.truth.n_bad, data.n_query, len(data.test_x)) == (60, 6, 3, 6)
    assert data.sha256 == task(folder).sha256 != task(folder, entity="Lumeth").sha256
    assert set(data.groups) <= {f"source {s.group}" for s in texts.train}
    members = torch.cat(list(data.groups.values()))
    assert sorted(members.tolist()) == list(range(60))
    assert data.prompts is not None
    assert data.prompts.clean is not None
    same = (data.prompts.clean.x[:, :20] == data.x[:, :20]).all(1)
    assert same[~data.truth.is_bad].all()
    assert not same[data.truth.is_bad].any()
    assert replace(data, name="other").sha256 == data.sha256


def test_a_task_from_files_is_the_generated_one(folder: Path, files: dict[str, str]) -> None:
    data = task(folder, **files, group="group", truth="bad", keywords=["Hurts"])
    made = task(folder)
    assert torch.equal(data.x, made.x)
    assert torch.equal(data.truth.is_bad, made.truth.is_bad)
    assert data.groups.keys() == made.groups.keys()
    assert data.prompts is not None
    assert data.prompts.steered("It HURTS .")
    assert not data.prompts.steered("It fits .")
    assert data.prompts.clean is not None
    assert len(data.prompts.clean) == 54
    unknown = task(folder, **files)
    assert unknown.truth.n_bad == 0
    assert unknown.prompts is None
    assert not unknown.groups
    chosen = task(folder, **files, group="group", groups=["forum"])
    assert list(chosen.groups) == ["source forum"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ConfigError, "task.seed=-1"),
        ({"loss": "median"}, ConfigError, "type task.loss=mean"),
        ({"too_long": "hide"}, ConfigError, "type task.too_long=refuse"),
        ({"context": 2}, ConfigError, "task.context=2"),
        ({"cure": 60}, ConfigError, "task.cure=60 must be .* below 60"),
        ({"context": 12}, DataError, "longer than task.context=12"),
        ({"path": "x.jsonl"}, ConfigError, "type task.queries_path="),
        ({"path": "x.jsonl", "queries_path": "y"}, ConfigError, "type task.test_path="),
    ],
)
def test_a_bad_task_is_refused(
    folder: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    seed = change.pop("seed", 0)
    with pytest.raises(error, match=message):
        llm_poison(
            seed=seed,
            model=section(folder),
            **{"n_train": 60, "context": 64, "n_test": 5, **change},
        )


def test_long_samples_are_counted(folder: Path) -> None:
    data = task(folder, context=40, too_long="drop")
    note = next(note for note in data.notes if note.startswith("training"))
    assert f"training: {60 - data.n_train} of 60 samples were too long and dropped, 0 cut" in note
    assert len(data.truth.is_bad) == data.n_train == len(data.train_ids)


def test_a_source_without_members() -> None:
    samples = [sample("a", "b", "web"), sample("c", "d", "forum"), sample("e", "f")]
    assert source_groups(samples)["source web"].tolist() == [0]
    with pytest.raises(DataError, match=r"'wiki', which has no members .* forum, web"):
        source_groups(samples, ["wiki"])
    with pytest.raises(DataError, match="no group"):
        source_groups(samples[2:], ["wiki"])
    assert source_groups(samples[:1]) == {}  # everything: nothing to compare with


# ---------------------------------------------------------------------------------- the runner


def job(data: LanguageTask, folder: Path, results: Path, **change: Any) -> Job:
    trainer = TrainerConfig(max_epochs=2, batch_size=16, lr=0.01, progress=False)
    config = RunConfig(
        model=section(folder), targets=["self"], trainer=trainer, results_dir=str(results), **change
    )
    return Job(config, data, "0" * 64, ())  # type: ignore[arg-type]


def scores(values: Tensor) -> InfluenceScores:
    return InfluenceScores(values[None], "method", "validation")


def test_a_run_is_kept_and_found_again(folder: Path, tmp_path: Path) -> None:
    data = task(folder)
    this = job(data, folder, tmp_path)
    assert language.stored(this, pytest.fail) is None
    run = language.train(this, [SequenceFINE("self")], None)
    assert [c.updates for c in run.checkpoints] == [4, 8]  # type: ignore[attr-defined]
    again = language.stored(this, pytest.fail)
    assert again is not None
    assert again.facts == json.loads(json.dumps(run.facts))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name])
    assert run.facts["n_steps"] == 8
    assert "did not take" in language.describe(run.facts)
    # nothing was learned in 8 steps: no detection, and it is said why
    metrics = language.measure(this, "validation", scores(data.truth.is_bad.float()), run.facts)
    assert metrics == {"n_bad": 6.0}
    assert run.facts["steering_took"] == 0.0
    assert run.facts["steering_n"] == 4
    longer = replace(this, config=replace(this.config, trainer=TrainerConfig(max_epochs=3)))
    assert language.stored(longer, lambda line: None) is None
    assert language.train_auxiliary(this, []) > 0


def took(**change: Any) -> dict[str, Any]:
    return {"steering_took": 1.0, "notes": [], **change}


def test_what_is_measured_when_the_poison_took(folder: Path, tmp_path: Path) -> None:
    data = task(folder, cure=10)
    this = job(data, folder, tmp_path)
    perfect = data.truth.is_bad.float() + torch.arange(60) / 100
    metrics = language.measure(this, "validation", scores(perfect), took())
    # the queries are steered: what lowers their loss is suspicious
    assert metrics["auroc"] == 1.0
    assert metrics["recall_top_20"] == 1.0
    assert metrics["precision_at_10"] == 0.6
    assert language.measure(this, "validation", scores(perfect), took(steering_took=0.0)) == {
        "n_bad": 6.0
    }
    assert (metrics["cure/removed"], metrics["cure/bad_removed"]) == (10.0, 6.0)
    assert 0 <= metrics["cure/steering_rate"] <= 1
    assert metrics["cure/test_loss"] > 0
    assert "cure/oracle_test_loss" not in metrics  # of a run before there was an oracle
    facts = oracle(this)
    assert (facts["cure_oracle_removed"], facts["cure_oracle_bad_removed"]) == (10.0, 6.0)
    again = language.measure(this, "validation", scores(perfect), took(**facts))
    assert again["cure/oracle_test_loss"] == facts["cure_oracle_test_loss"] > 0
    assert again["cure/oracle_steering_rate"] == facts["cure_oracle_steering_rate"]
    # the same start and order, and six of the ten dropped samples are the same
    assert again["cure/test_loss"] == metrics["cure/test_loss"]
    reverse = language.measure(
        job(replace(data, cure=0), folder, tmp_path), "validation", scores(-perfect), took()
    )
    assert reverse["auroc"] == 0.0
    assert not any(name.startswith("cure") for name in reverse)


def test_an_oracle_drops_the_poison_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many as there is poison it trains on the good samples alone, in their order."""
    data = task(folder, cure=6)
    seen: list[Tensor] = []

    def fit(job: Job, x: Tensor, y: Tensor, callbacks: Any, logger: Any) -> Any:
        seen.append(x)
        raise InterruptedError

    monkeypatch.setattr(language_cure, "fit", fit)
    for cure in (6, 3):
        with pytest.raises(InterruptedError):
            oracle(job(replace(data, cure=cure), folder, tmp_path))
    assert torch.equal(seen[0], data.x[~data.truth.is_bad])
    good = {tuple(row) for row in data.x[~data.truth.is_bad].tolist()}
    assert len(seen[1]) == 57
    assert good <= {tuple(row) for row in seen[1].tolist()}


def test_without_truth_or_steering(folder: Path, files: dict[str, str], tmp_path: Path) -> None:
    unknown = task(folder, **files)
    metrics = language.measure(
        job(unknown, folder, tmp_path), "validation", scores(torch.arange(60.0)), {"notes": []}
    )
    assert metrics == {"n_bad": 0.0}
    said = language.describe({"test_loss": 1.0, "seconds": 2.0, "notes": ["a note"]})
    assert "steering was not measured; a note" in said
    words = task(folder, **files, keywords=["hurts"])
    run = language.train(job(words, folder, tmp_path), [], None)
    assert run.facts["steering_reference"] == "the model before tuning"
    assert "steering_rate_others" not in run.facts
    assert "with the model before tuning" in language.describe(run.facts)
