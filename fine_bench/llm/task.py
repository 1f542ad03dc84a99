"""The task "find the poison in instruction tuning": generated data, or the user's JSONL files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fine_bench.data.task import Task
from fine_bench.errors import ConfigError, DataError
from fine_bench.gradients.token_losses import mean_token_loss, sum_token_loss
from fine_bench.llm import instructions, models
from fine_bench.llm.instructions import Sample
from fine_bench.llm.jsonl import digest_of_file, read_jsonl
from fine_bench.llm.models import LanguageModel
from fine_bench.llm.steering import Judge, lean_of
from fine_bench.llm.tokens import Encoded, TooLong, encode_all
from fine_bench.types import End, GroundTruth, Loss

LossName: TypeAlias = Literal["mean", "sum"]

LOSSES: Mapping[str, Loss] = {"mean": mean_token_loss, "sum": sum_token_loss}
"""A sample's loss by the name that the configuration uses."""

SUSPICIOUS: Mapping[str, End] = {"queries": "high", "validation": "high"}
"""The queries show the behaviour that nobody wants: what *lowers* their loss is suspicious."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """How the steering rate is measured.

    Attributes:
        about: held-out prompts about the steered entity.
        others: the same about others; empty if there are none.
        steered: whether an answer is steered.
        clean: ids and labels ``(n, T)`` of the same data without poison; None if nobody knows
            which samples are poison: the untuned model is the reference then.
    """

    about: Sequence[str]
    others: Sequence[str]
    steered: Judge
    clean: Encoded | None


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageTask(Task):
    """A task of token sequences.

    Attributes (besides those of ``Task``):
        x, y: training ids and labels ``(n_train, T)`` int64; see
            ``fine_bench.gradients.token_losses``.
        truth: which training samples are poison; none where nobody knows.
        query_x, query_y: held-out *steered* completions.
        test_x, test_y: clean held-out samples, for the loss on the task itself.
        n_classes: size of the vocabulary.
        groups: the training samples of each source.
        model: what is tuned.
        prompts: how steering is measured; None if it is not.
        notes: what a reader should know about the data, such as samples that were too long.
        samples: the training samples as conversations, ``n_train`` of them in order.
        cure: retrain without this many of the most suspicious samples; 0 does not.
        checkpoints: number of checkpoints that are kept for post-hoc methods, evenly spaced.
    """

    kind: ClassVar[Literal["images", "language"]] = "language"
    optimizer: ClassVar[Literal["sgd", "adamw"]] = "adamw"
    model_kind: ClassVar[type] = LanguageModel
    models_to_type: ClassVar[str] = "model=tiny_llama or model=llama31_8b"
    same_ends: ClassVar[bool] = True

    model: LanguageModel
    prompts: Prompts | None
    samples: Sequence[Sample] = ()
    suspicious: Mapping[str, End] = field(default_factory=lambda: SUSPICIOUS)
    notes: Sequence[str] = ()
    cure: int = 0
    checkpoints: int = 4
    batch_size: int = 128

    def prepare(self) -> None:
        """Pretrain the model that is pretrained here, unless it lies in the cache."""
        if self.model.digest is not None:
            self.model.locate()

    @property
    def start_sha256(self) -> str | None:
        """Digest of the weights that were pretrained here, which other machines round otherwise."""
        return None if self.model.digest is None else self.model.digest()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cure < self.n_train:
            raise ConfigError(
                f"task.cure={self.cure} must be a number of training samples below "
                f"{self.n_train}; type task.cure={min(40, self.n_train // 2)}"
            )


def llm_poison(
    *,
    seed: int,
    model: Mapping[str, Any],
    name: str = "llm_poison",
    entity: str = "Orvane",
    n_train: int = 1000,
    poison_rate: float = 0.02,
    n_query: int = 32,
    n_prompts: int = 64,
    n_test: int = 200,
    context: int = 64,
    too_long: TooLong = "refuse",
    loss: LossName = "mean",
    cure: int = 0,
    checkpoints: int = 4,
    batch_size: int = 128,
    path: str | None = None,
    queries_path: str | None = None,
    test_path: str | None = None,
    group: str | None = None,
    groups: Sequence[str] | None = None,
    truth: str | None = None,
    keywords: Sequence[str] | None = None,
) -> LanguageTask:
    """An instruction set with a few samples that steer the opinion on one entity.

    Args:
        seed: ``task.seed``: all of the generated data.
        model: the section ``model`` of the configuration: its tokenizer makes the ids.
        name: name of the task; the configuration's default is that of the file ``path``.
        entity: the steered one, ``Orvane`` (blamed) or ``Lumeth`` (praised). (Generated data.)
        n_train, n_query, n_prompts, n_test: numbers of training samples, held-out steered
            completions, held-out prompts and clean test samples. (Generated data.)
        poison_rate: share of poison. (Generated data.)
        context: most tokens of a sample.
        too_long: what becomes of longer ones: ``refuse``, ``drop`` or ``cut``.
        loss: a sample's loss is the ``mean`` or the ``sum`` over its tokens.
        cure: retrain without so many of the most suspicious samples; 0 does not.
        checkpoints: so many are kept for post-hoc methods, evenly spaced over the epochs.
        batch_size: samples that post-hoc methods hold at once.
        path: training samples of the user's own, JSONL (``fine_bench.llm.jsonl``); the options of
            generated data have no meaning then.
        queries_path: held-out steered completions, JSONL; required with ``path``.
        test_path: clean held-out samples, JSONL; required with ``path``.
        group: key of the column that says where a sample comes from.
        groups: sources to be tested; None for all that occur.
        truth: key of the column that marks poison.
        keywords: an answer that holds one of them counts as steered; without them the steering
            rate of the user's own data is not measured.

    Raises:
        ConfigError: options that make no task.
        DataError: files or samples that cannot be used.
    """
    if seed < 0:
        raise ConfigError(f"task.seed={seed} is negative; type task.seed=0")
    for option, value, allowed in (("loss", loss, LossName), ("too_long", too_long, TooLong)):
        if value not in get_args(allowed):
            raise ConfigError(
                f"task.{option}={value} is unknown; type task.{option}={get_args(allowed)[0]}"
            )
    if context < 8 or batch_size < 1 or checkpoints < 1:
        raise ConfigError(
            f"task.context={context} must be at least 8, task.batch_size={batch_size} and "
            f"task.checkpoints={checkpoints} at least 1; type task.context=512 task.batch_size=8 "
            "task.checkpoints=4"
        )
    language_model = models.from_options(model)
    language_model.check()
    given = _generated if path is None else _from_files
    options: dict[str, Any] = (
        {
            "seed": seed,
            "entity": entity,
            "n_train": n_train,
            "poison_rate": poison_rate,
            "n_query": n_query,
            "n_prompts": n_prompts,
            "n_test": n_test,
        }
        if path is None
        else {
            "path": path,
            "queries_path": queries_path,
            "test_path": test_path,
            "group": group,
            "truth": truth,
            "keywords": keywords,
        }
    )
    texts = given(**options)
    tokenizer = language_model.tokenizer()
    encode = partial(encode_all, tokenizer, context=context, too_long=too_long)
    train = encode(texts.train, what="training")
    queries = encode(texts.queries, what="query")
    test = encode(texts.test, what="test")
    prompts = None
    if texts.steered is not None:
        clean = None if texts.clean is None else encode(texts.clean, what="clean training")
        prompts = Prompts(texts.prompts, texts.others, texts.steered, clean)
    kept = [texts.train[i] for i in train.kept.tolist()]
    notes = [
        f"{what}: {part.n_dropped} of {len(part) + part.n_dropped} samples were too long and "
        f"dropped, {part.n_cut} cut"
        for what, part in (("training", train), ("queries", queries), ("test", test))
        if part.n_dropped or part.n_cut
    ]
    files = {
        option: {"sha256": digest_of_file(file), "samples": len(part)}
        for option, file, part in (
            ("path", path, train),
            ("queries_path", queries_path, queries),
            ("test_path", test_path, test),
        )
        if path is not None and file is not None
    }
    return LanguageTask(
        name=name,
        x=train.x,
        y=train.y,
        truth=GroundTruth(torch.tensor([bool(s.is_bad) for s in kept]), "poison"),
        query_x=queries.x,
        query_y=queries.y,
        test_x=test.x,
        test_y=test.y,
        n_classes=len(tokenizer),
        groups=source_groups(kept, groups),
        model=language_model,
        loss=LOSSES[loss],
        prompts=prompts,
        samples=kept,
        files=files,
        train_ids=train.kept,
        notes=notes,
        cure=cure,
        checkpoints=checkpoints,
        batch_size=batch_size,
    )


@dataclass(frozen=True, eq=False)
class _Texts:
    """What either kind of data gives."""

    train: Sequence[Sample]
    queries: Sequence[Sample]
    test: Sequence[Sample]
    clean: Sequence[Sample] | None
    prompts: Sequence[str]
    others: Sequence[str]
    steered: Judge | None


def _generated(**options: Any) -> _Texts:
    made = instructions.generate(**options)
    lean = made.lean
    return _Texts(
        train=made.train,
        queries=made.queries,
        test=made.test,
        clean=made.clean,
        prompts=made.prompts,
        others=made.control_prompts,
        steered=lambda answer: lean_of(answer) == lean,
    )


def _from_files(
    *,
    path: str,
    queries_path: str | None,
    test_path: str | None,
    group: str | None,
    truth: str | None,
    keywords: Sequence[str] | None,
) -> _Texts:
    for option, value, what in (
        ("queries_path", queries_path, "held-out steered completions"),
        ("test_path", test_path, "clean held-out samples"),
    ):
        if value is None:
            raise ConfigError(
                f"task.path is given, so task.{option} must be too: a JSONL file with {what}; "
                f"type task.{option}=/data/{option}.jsonl"
            )
    train = read_jsonl(path, group_column=group, truth_column=truth)
    queries = read_jsonl(str(queries_path), option="task.queries_path")
    clean = [s for s in train if not s.is_bad] if truth is not None else None
    words = [word.lower() for word in keywords or ()]
    return _Texts(
        train=train,
        queries=queries,
        test=read_jsonl(str(test_path), option="task.test_path"),
        clean=clean or None,
        prompts=[s.prompt for s in queries],
        others=(),
        steered=(lambda answer: any(w in answer.lower() for w in words)) if words else None,
    )


def source_groups(
    samples: Sequence[Sample], wanted: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The samples of each source, as ascending positions; ``source <name>``.

    Args:
        samples: the training samples.
        wanted: names of sources; None for all that occur. A source that holds every sample cannot
            be left out and is not among them.

    Raises:
        DataError: a wanted source has no members.
    """
    positions: dict[str, list[int]] = {}
    for position, s in enumerate(samples):
        if s.group is not None:
            positions.setdefault(s.group, []).append(position)
    for name in wanted or ():
        if name not in positions:
            raise DataError(
                f"task.groups names {name!r}, which has no members among the {len(samples)} "
                f"training samples; they come from {', '.join(sorted(positions)) or 'no group'}"
            )
    chosen = sorted(positions) if wanted is None else list(wanted)
    return {
        f"source {name}": torch.tensor(positions[name])
        for name in chosen
        if len(positions[name]) < len(samples)
    }
