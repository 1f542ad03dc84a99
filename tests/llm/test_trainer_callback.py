"""f-INE in Transformers' Trainer, against gradients of one example at a time in float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra llm is not installed: transformers")
pytest.importorskip("peft", reason="the extra llm is not installed: peft")

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from fine_bench.llm.trainer_callback import FINETrainerCallback, refuse_setting
from fine_bench.llm.trainer_losses import ModelLoss, divisor
from fine_bench.types import UnsupportedProblemError
from support.commands import environment

N, VOCABULARY = 23, 13


class Texts(Dataset[dict[str, Any]]):
    """Sequences of their own lengths; the first half of each is a prompt, if asked."""

    def __init__(self, kind: str, n: int = N, seed: int = 1, dtype: torch.dtype = torch.float64):
        g = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(2, VOCABULARY, (4 + i % 5,), generator=g) for i in range(n)]
        self.kinds = torch.randint(3, (n,), generator=g)
        self.numbers = torch.randn(n, generator=g, dtype=dtype)
        self.kind = kind

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = self.ids[i]
        labels: Any = self.kinds[i]
        if self.kind == "causal":
            labels = ids.clone()
            labels[: 1 + i % 3] = -100
        if self.kind == "regression":
            labels = self.numbers[i]
        return {"input_ids": ids, "labels": labels, "unknown column": "text", "index": 77}


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the longest of the batch. The Trainer has dropped what the model does not know."""
    assert all(item.keys() == {"input_ids", "labels"} for item in items)
    length = max(len(item["input_ids"]) for item in items)

    def padded(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, length - len(x)), value=value) if x.ndim else x

    ids = torch.stack([padded(item["input_ids"], 0) for item in items])
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.stack([padded(item["labels"], -100) for item in items]),
    }


def causal(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    return adapted(model, ["q_proj", "v_proj", "down_proj"], "CAUSAL_LM", dtype)


def classifier(labels: int = 3, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return adapted(BertForSequenceClassification(config), ["query", "value"], "SEQ_CLS", dtype)


def adapted(model: nn.Module, layers: list[str], task: str, dtype: torch.dtype) -> nn.Module:
    lora = LoraConfig(task_type=task, r=2, lora_alpha=4, target_modules=layers)
    found: nn.Module = get_peft_model(model, lora).to(dtype)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(2)
    for p in found.parameters():
        if p.requires_grad:
            p.data = 0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    return found


class Diary(TrainerCallback):  # type: ignore[misc]
    """The parameters before each step and the gradient of the step."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.grads: list[Tensor] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        trained = [p for p in kw["model"].parameters() if p.requires_grad]
        self.before.append([p.detach().clone() for p in trained])
        self.grads.append(torch.cat([p.grad.flatten() for p in trained]))
        self.rates.append(kw["optimizer"].param_groups[0]["lr"])


class Ordered(Trainer):  # type: ignore[misc]
    """Without shuffling, so that a test knows who is where."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "linear",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "use_cpu": True,
            **options,
        }
    )


def run(
    model: nn.Module,
    train: Dataset[Any],
    folder: Path,
    *callbacks: TrainerCallback,
    kind: type[Trainer] = Ordered,
    resume: Any = None,
    **options: Any,
) -> Trainer:
    named = {k: options.pop(k) for k in ("compute_loss_func", "eval_dataset") if k in options}
    trainer = kind(
        model,
        arguments(folder, **options),
        train_dataset=train,
        data_collator=collate,
        callbacks=list(callbacks),
        **named,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def windows(accumulate: int, epochs: int = 2) -> Iterator[list[list[int]]]:
    """The micro-batches of each step."""
    batches = [list(range(i, min(i + 4, N))) for i in range(0, N, 4)]
    for _ in range(epochs):
        for i in range(0, len(batches), accumulate):
            yield batches[i : i + accumulate]


def own_loss(model: Any, item: dict[str, Any]) -> Tensor:
    """The sum over an example's labels, from the example alone."""
    logits = model(input_ids=item["input_ids"][None]).logits[0]
    labels = item["labels"]
    if labels.is_floating_point():
        return (logits[0] - labels).square()
    if labels.ndim:
        return F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
    return F.cross_entropy(logits[None], labels[None])


def expected(
    model: nn.Module, train: Texts, diary: Diary, accumulate: int, queries: Texts | None = None
) -> Tensor:
    """The formula of ``fine.accumulator``; what divides a step is solved from its gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    rows = 1
    shift, variance = torch.zeros(rows, N, dtype=torch.float64), torch.zeros(rows, N).double()

    def gradient(item: dict[str, Any]) -> Tensor:
        grads = torch.autograd.grad(own_loss(model, item), trained)
        return torch.cat([g.flatten() for g in grads])

    for step, window in enumerate(windows(accumulate)):
        for p, value in zip(trained, diary.before[step], strict=True):
            p.data = value.clone()
        index = [i for batch in window for i in batch]
        g = torch.stack([gradient(train[i]) for i in index])
        # the weight of each micro-batch in the step's gradient, by least squares
        sums = torch.stack([torch.stack([g[index.index(i)] for i in b]).sum(0) for b in window])
        weights = torch.linalg.lstsq(sums.T, diary.grads[step][:, None]).solution[:, 0]
        assert torch.allclose(sums.T @ weights, diary.grads[step], atol=1e-7)
        w = torch.cat([weight.expand(len(b)) for weight, b in zip(weights, window, strict=True)])
        m = len(index)
        r = m * w
        rho = r.square().mean().sqrt()
        if queries is None:
            c = g @ g.T
        else:
            direction = torch.stack([gradient(queries[q]) for q in range(len(queries))]).mean(0)
            c = (g @ direction).expand(m, m)
        others = ~torch.eye(m, dtype=torch.bool)
        for a, i in enumerate(index):
            k = c[a][others[a]]
            eta = diary.rates[step] * rho
            shift[0, i] += eta * (r[a] / rho) * (c[a, a] - k.mean())
            variance[0, i] += (eta * k.std()) ** 2
    return shift / (N * variance).sqrt()


@pytest.mark.any_trainer("Transformers' Trainer, a causal model with LoRA")
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_causal_model(accumulate: int, tmp_path: Path) -> None:
    """The loss is the mean over the labelled tokens of all micro-batches of a step."""
    train, model = Texts("causal"), causal()
    diary, callback = Diary(), FINETrainerCallback()
    run(model, train, tmp_path, callback, diary, gradient_accumulation_steps=accumulate)
    mu, _ = callback.loop._schedule.accumulator.mu()
    wanted = expected(model, train, diary, accumulate)
    torch.testing.assert_close(mu, wanted, rtol=1e-6, atol=1e-9)
    assert callback.scores().values.shape == (1, N)


@pytest.mark.any_trainer("Transformers' Trainer, a causal model with LoRA")
def test_a_causal_model_that_is_trained_as_a_whole(tmp_path: Path) -> None:
    """GPT-2: its class's name says nothing of its loss, and embedding and head are one matrix."""
    torch.manual_seed(0)
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **small, **still)).double()
    train, diary, callback = Texts("causal"), Diary(), FINETrainerCallback()
    run(model, train, tmp_path, callback, diary, gradient_accumulation_steps=2)
    mu, _ = callback.loop._schedule.accumulator.mu()
    torch.testing.assert_close(mu, expected(model, train, diary, 2), rtol=1e-4, atol=1e-7)


@pytest.mark.any_trainer("Transformers' Trainer, a sequence classifier")
@pytest.mark.parametrize(
    ("kind", "accumulate"), [("classes", 1), ("classes", 4), ("regression", 2)]
)
def test_a_classifier(kind: str, accumulate: int, tmp_path: Path) -> None:
    """BERT takes the mean over each micro-batch, and the Trainer may not divide by their number."""
    train, model = Texts(kind), classifier(3 if kind == "classes" else 1)
    diary, callback = Diary(), FINETrainerCallback()
    run(model, train, tmp_path, callback, diary, gradient_accumulation_steps=accumulate)
    mu, _ = callback.loop._schedule.accumulator.mu()
    wanted = expected(model, train, diary, accumulate)
    torch.testing.assert_close(mu, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_queries(kind: str, tmp_path: Path) -> None:
    train, model = Texts(kind), causal() if kind == "causal" else classifier()
    queries = Texts(kind, 4, seed=5)
    diary = Diary()
    callback = FINETrainerCallback(
        "validation", queries=Items(queries), query_weighting=None, refresh_every=1
    )
    run(model, train, tmp_path, callback, diary, gradient_accumulation_steps=2)
    mu, _ = callback.loop._schedule.accumulator.mu()
    wanted = expected(model, train, diary, 2, queries)
    torch.testing.assert_close(mu, wanted, rtol=1e-4, atol=1e-7)


class Items(Dataset[dict[str, Any]]):
    """Items as the collate function gets them."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.texts[i]
        return {name: item[name] for name in ("input_ids", "labels")}


QUESTIONS: dict[str, dict[str, Any]] = {
    "self": {},
    "validation": {"target": "validation", "queries": Items(Texts("causal", 4, 5))},
    "snapshots": {"schedule": "snapshot"},
    "every third": {"observe_every": 3},
}


def values(callback: FINETrainerCallback) -> Tensor:
    return callback.scores().values


@pytest.mark.any_trainer("Transformers' Trainer that goes on from a checkpoint")
@pytest.mark.parametrize("steps", [6, 8])
def test_a_run_resumes(steps: int, tmp_path: Path) -> None:
    """From a checkpoint at an epoch's end (6 steps), and from one within an epoch."""

    def make() -> list[FINETrainerCallback]:
        return [FINETrainerCallback(**question) for question in QUESTIONS.values()]

    options = {"save_strategy": "steps", "save_steps": steps, "num_train_epochs": 3}
    whole, again = make(), make()
    one = run(causal(), Texts("causal"), tmp_path, *whole, **options, save_total_limit=None)
    folder = tmp_path / f"checkpoint-{steps}"
    assert len(list(folder.glob("fine-*.pt"))) == len(QUESTIONS)
    two = run(causal(), Texts("causal"), tmp_path, *again, **options, resume=str(folder))
    assert torch.equal(flat(one.model), flat(two.model))
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(values(a), values(b))
        assert values(a).abs().max() > 1e-3
    other = FINETrainerCallback(contrast="removal")
    with pytest.warns(UserWarning, match=f"begins at step {steps} of the run"):
        run(causal(), Texts("causal"), tmp_path, other, **options, resume=str(folder))


def flat(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("question", QUESTIONS)
def test_watching_changes_no_weight(question: str, tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "optim": "adamw_torch"}
    plain = run(causal(), Texts("causal"), tmp_path, kind=Trainer, **options)
    callback = FINETrainerCallback(**QUESTIONS[question])
    watched = run(causal(), Texts("causal"), tmp_path, callback, kind=Trainer, **options)
    assert torch.equal(flat(plain.model), flat(watched.model))
    assert values(callback).abs().max() > 1e-3
    hooks = [m._forward_pre_hooks or m._forward_hooks for m in watched.model.modules()]
    assert not any(hooks)


def test_callbacks_side_by_side_are_as_alone(tmp_path: Path) -> None:
    alone = []
    for question in QUESTIONS.values():
        alone.append(FINETrainerCallback(**question))
        run(causal(), Texts("causal"), tmp_path, alone[-1])
    together = [FINETrainerCallback(**question) for question in QUESTIONS.values()]
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": Texts("causal", 6, 9)}
    workers = {"dataloader_num_workers": 1}
    run(causal(), Texts("causal"), tmp_path, *together, **evaluated, **workers)
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(values(one), values(other))


def test_margins_of_a_classifier(tmp_path: Path) -> None:
    train = Texts("classes", dtype=torch.float32)
    callback = FINETrainerCallback(observable="margin")
    run(classifier(dtype=torch.float32), train, tmp_path, callback, gradient_accumulation_steps=2)
    assert values(callback).abs().max() > 1e-2


@pytest.mark.any_trainer("Transformers' Trainer in 16 bit")
def test_16_bit(tmp_path: Path) -> None:
    found = []
    for options in ({}, {"bf16": True}):
        callback = FINETrainerCallback()
        model, train = causal(torch.float32), Texts("causal", dtype=torch.float32)
        run(model, train, tmp_path, callback, gradient_accumulation_steps=2, **options)
        found.append(values(callback))
    assert torch.corrcoef(torch.cat(found))[0, 1] > 0.99


@pytest.mark.any_trainer("Transformers' Trainer with a loss of one's own")
def test_losses_that_are_no_sums_are_refused(tmp_path: Path) -> None:
    def smoothed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels, label_smoothing=0.1)

    def spread(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs.logits, labels) + outputs.logits.var(0).sum()

    def each(logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction)

    train = Texts("classes")
    for loss in (smoothed, spread):
        with pytest.raises(UnsupportedProblemError, match="is not a sum of the examples' losses"):
            run(classifier(), train, tmp_path, FINETrainerCallback(), compute_loss_func=loss)
    stated, by_trainer = FINETrainerCallback(loss=each), FINETrainerCallback()
    run(classifier(), train, tmp_path, stated, compute_loss_func=smoothed)
    run(classifier(), train, tmp_path, by_trainer, label_smoothing_factor=0.1)
    torch.testing.assert_close(values(stated), values(by_trainer), rtol=1e-4, atol=1e-5)


@pytest.mark.any_trainer("Transformers' Trainer on several devices, or compiled")
@pytest.mark.parametrize("name", ["n_gpu", "world_size", "deepspeed", "torch_compile"])
def test_settings_that_are_refused(name: str) -> None:
    plain = {"n_gpu": 1, "world_size": 1, "deepspeed": None, "fsdp": [], "torch_compile": False}
    refuse_setting(SimpleNamespace(**plain))
    with pytest.raises(UnsupportedProblemError, match="in one process on one device"):
        refuse_setting(SimpleNamespace(**{**plain, name: 2}))


def test_what_has_no_positions_is_refused(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from (Items(Texts("causal"))[i] for i in range(N))

    with pytest.raises(UnsupportedProblemError, match="use a map-style train_dataset"):
        run(causal(), Stream(), tmp_path, FINETrainerCallback(), kind=Trainer, max_steps=2)
    with pytest.raises(RuntimeError, match=r"pass the callback to Trainer\(callbacks"):
        FINETrainerCallback().scores()


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    run(causal(), Texts("causal"), tmp_path, FINETrainerCallback(), **options)
    folder = tmp_path / "checkpoint-3"
    (path,) = folder.glob("fine-*.pt")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        run(causal(), Texts("causal"), tmp_path, FINETrainerCallback(), resume=str(folder))


def test_without_the_extra_it_is_said() -> None:
    code = """
import sys
sys.modules["transformers"] = None
from fine_bench.llm.trainer_callback import FINETrainerCallback
try:
    FINETrainerCallback()
except ModuleNotFoundError as error:
    assert "pip install 'transformers>=5,<6' peft tokenizers" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [1.0, 12.0], ids=["new", "memorised"])
def test_the_divisor_is_read_off_the_gradient(dtype: torch.dtype, known: float) -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.randint(9, (6, 7), generator=g)
    y[:, :3] = -100
    wanted = F.one_hot(y.clamp_min(0), 9).roll(-1, 1)
    logits = (torch.randn(6, 7, 9, generator=g) + known * wanted).to(dtype).requires_grad_()
    loss = ModelLoss(shifts=True)
    for scale, number in ((1.0, 24.0), (1024.0, 96.0)):
        total = loss(logits.float(), y, "sum") / number * scale
        (grad,) = torch.autograd.grad(total, logits)
        for thorough in (False, True):
            found = divisor(loss, logits.detach(), grad, y, scale=scale, thorough=thorough)
            assert found == pytest.approx(number, rel=0.03 if dtype == torch.bfloat16 else 1e-4)
    (grad,) = torch.autograd.grad(loss(logits.float(), y, "none").square().sum(), logits)
    with pytest.raises(UnsupportedProblemError, match="not a sum of the examples' losses"):
        divisor(loss, logits.detach(), grad, y, scale=1.0, thorough=False)
    assert divisor(loss, logits.detach(), grad, y.fill_(-100), scale=1.0, thorough=False) is None


def test_losses_of_numbers_and_of_several_labels() -> None:
    logits, numbers = torch.randn(5, 1).double(), torch.randn(5).double()
    torch.testing.assert_close(
        ModelLoss()(logits, numbers, "mean"), F.mse_loss(logits[:, 0], numbers)
    )
    logits, labels = torch.randn(5, 3).double(), torch.randint(2, (5, 3)).double()
    torch.testing.assert_close(
        ModelLoss()(logits, labels, "mean"), F.binary_cross_entropy_with_logits(logits, labels)
    )
    with pytest.raises(UnsupportedProblemError, match="are not those of a classifier"):
        ModelLoss()(torch.zeros(5, 4, 3), torch.zeros(5, dtype=torch.int64))
