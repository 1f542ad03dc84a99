"""Which language model is tuned, and how: two functions for ``model=…``.

Both give a ``LanguageModel``: a folder in the format of the Hugging Face hub, and the LoRA matrices
that are put beside its weights (Hu et al., arXiv:2106.09685). The tiny one pretrains itself into
such a folder the first time; whatever comes after does not know which of the two it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch

from fine_bench.data.task import promised
from fine_bench.errors import ConfigError
from fine_bench.llm import hub, pretraining
from fine_bench.llm.net import CausalNet
from fine_bench.llm.pretraining import Tiny
from fine_bench.seeds import derive

Precision: TypeAlias = Literal["float32", "bfloat16"]

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of a Llama block."""


@dataclass(frozen=True)
class Lora:
    """The matrices that are trained: W x + (alpha / rank) B A x, A random and B zero at first.

    There is no dropout: a sample's gradient would depend on the draw.
    """

    rank: int = 8
    alpha: int = 16
    targets: Sequence[str] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"model.lora_rank={self.rank} must be at least 1; type 8")
        if self.alpha < 1:
            raise ConfigError(f"model.lora_alpha={self.alpha} must be at least 1; type 16")
        if not self.targets:
            raise ConfigError("model.lora_targets is empty; type 'model.lora_targets=[q_proj]'")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A model to be tuned.

    Attributes:
        name: for tables.
        locate: gives the folder of the weights (and makes the tiny one).
        tokenizer: gives the model's own tokenizer.
        check: refuses what cannot work, before anything is downloaded or trained.
        lora: what is trained.
        precision: of the frozen weights; the LoRA matrices are float32.
        four_bit: quantise the frozen weights (needs bitsandbytes and a GPU).
        checkpointing: compute activations again instead of keeping them.
        digest: of the frozen weights where they are pretrained here, empty before they are; None
            where they come from elsewhere.
    """

    name: str
    locate: Callable[[], Path]
    tokenizer: Callable[[], Any]
    check: Callable[[], None]
    lora: Lora
    precision: Precision = "float32"
    four_bit: bool = False
    checkpointing: bool = False
    digest: Callable[[], str] | None = None

    def build(self, seed: int, device: torch.device | str = "cpu") -> CausalNet:
        """Frozen weights with freshly initialised LoRA matrices.

        Args:
            seed: of the initialisation.
            device: where the weights go.
        """
        model = hub.load_model(
            self.locate(),
            dtype=cast(torch.dtype, getattr(torch, self.precision)),
            four_bit=self.four_bit,
            device=device,
        )
        return with_lora(model, self.lora, seed, checkpointing=self.checkpointing)


def with_lora(model: Any, lora: Lora, seed: int, *, checkpointing: bool = False) -> CausalNet:
    """The model, frozen, with LoRA matrices beside its linear layers.

    Raises:
        ConfigError: a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    known = {name.rsplit(".")[-1] for name, _ in model.named_modules()}
    unknown = sorted(set(lora.targets) - known)
    if unknown:
        linear = {n.rsplit(".")[-1] for n, m in model.named_modules() if hasattr(m, "in_features")}
        raise ConfigError(
            f"model.lora_targets={unknown} are no layers of this model; it has {sorted(linear)}"
        )
    if checkpointing:
        # the other kind of checkpointing would cut the graph that hooks read
        with hub.quiet():
            model.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), hub.quiet():
        torch.manual_seed(derive(seed, "initialisation"))
        return CausalNet(get_peft_model(model, config))


def tiny_llama(
    in_shape: Sequence[int] = (),
    n_classes: int = 0,
    *,
    name: str = "tiny_llama",
    hidden: int = 64,
    inner: int = 160,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = 1024,
    documents: int = 20_000,
    pretraining_steps: int = 1500,
    pretraining_batch: int = 24,
    pretraining_lr: float = 6e-3,
    pretraining_seed: int = 0,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_targets: Sequence[str] = TARGETS,
) -> LanguageModel:
    """A Llama of less than a million parameters that speaks the language of the generated data.

    Args:
        in_shape, n_classes: what the runner passes to every model; of no meaning here.
        name: for tables.
        hidden, inner, layers, heads: of Transformers' ``LlamaConfig``.
        vocabulary: of its own byte-level BPE tokenizer, at least 300.
        documents: size of the generated corpus that it is pretrained on, once.
        pretraining_steps, pretraining_batch, pretraining_lr, pretraining_seed: of AdamW on blocks
            of 64 tokens, with a cosine schedule.
        lora_rank, lora_alpha, lora_targets: see ``Lora``.
    """
    del in_shape, n_classes
    tiny = Tiny(
        hidden=hidden,
        inner=inner,
        layers=layers,
        heads=heads,
        vocabulary=vocabulary,
        documents=documents,
        steps=pretraining_steps,
        batch=pretraining_batch,
        lr=pretraining_lr,
        seed=pretraining_seed,
    )
    return LanguageModel(
        name=name,
        locate=partial(pretraining.folder_of, tiny),
        tokenizer=partial(pretraining.tokenizer_of, tiny),
        check=hub.require_packages,
        lora=Lora(lora_rank, lora_alpha, tuple(lora_targets)),
        digest=partial(pretraining.digest_of, tiny),
    )


def pretrained(
    in_shape: Sequence[int] = (),
    n_classes: int = 0,
    *,
    path: str,
    name: str | None = None,
    precision: Precision = "bfloat16",
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = True,
    download: bool = False,
    allow_cpu: bool = False,
    lora_rank: int = 8,
    lora_alpha: int = 16,
    lora_targets: Sequence[str] = TARGETS,
) -> LanguageModel:
    """A model by its name on the hub or from a local folder in the hub's format.

    Args:
        in_shape, n_classes: what the runner passes to every model; of no meaning here.
        path: name or folder.
        name: for tables; the last part of the path by default.
        precision: of the frozen weights.
        load_in_4bit: quantise them to four bits; needs bitsandbytes and a GPU.
        gradient_checkpointing: compute activations again in the backward pass: less memory, a
            third more time.
        download: fetch from the hub what is not on this machine.
        allow_cpu: also where the model is large and there is no GPU.
        lora_rank, lora_alpha, lora_targets: see ``Lora``.
    """
    del in_shape, n_classes
    lora = Lora(lora_rank, lora_alpha, tuple(lora_targets))
    need = hub.Need(
        path,
        bytes_per_weight=0.6 if load_in_4bit else 4 if precision == "float32" else 2,
        four_bit=load_in_4bit,
        download=download,
        allow_cpu=allow_cpu,
    )

    def tokenizer() -> Any:
        folder = hub.locate(path, download=download)
        # the size of a model that was on the hub until now may have been unknown
        hub.check(need)
        return hub.load_tokenizer(folder)

    return LanguageModel(
        name=name or path.rstrip("/").rsplit("/", 1)[-1],
        locate=partial(hub.locate, path, download=download),
        tokenizer=tokenizer,
        check=partial(hub.check, need),
        lora=lora,
        precision=precision,
        four_bit=load_in_4bit,
        checkpointing=gradient_checkpointing,
    )


def from_options(options: Mapping[str, Any]) -> LanguageModel:
    """The language model of a configuration's ``model`` section.

    Nothing is imported for it: a module of one's own is there when the configuration was checked.

    Raises:
        ConfigError: the section chooses something else.
    """
    where = str(options.get("_target_", ""))
    module, _, function = where.rpartition(".")
    make: Any = getattr(sys.modules.get(module), function, None)
    own = {key: value for key, value in options.items() if key != "_target_"}
    try:
        result = make(**own) if makes_language_model(make) else None
    except TypeError:  # a model of another kind wants other arguments
        result = None
    if not isinstance(result, LanguageModel):
        raise ConfigError(
            f"model._target_={where} is no language model; type model=tiny_llama or "
            "model=llama31_8b"
        )
    return result


def makes_language_model(function: Any) -> bool:
    """Whether it says that it makes a language model and takes what every model is given."""
    made = promised(function)
    if made is None or not issubclass(made, LanguageModel):
        return False
    return {"in_shape", "n_classes"} <= set(inspect.signature(function).parameters)
