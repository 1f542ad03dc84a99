"""Weights and tokenizers in the format of the Hugging Face hub, and what is needed to use them.

Everything that can be known beforehand is checked before anything is downloaded or trained: the
packages, the files, the GPU and the memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fine_bench.errors import ConfigError, DataError

GIB = 2**30

PARAMETERS = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
}
"""Sizes of models that may not be on this machine yet."""

GPU_ABOVE = 500_000_000
"""A model with more parameters is tuned on a GPU, or not at all."""

WORKING_SPACE = 3 * GIB
"""Beside the weights: LoRA matrices with their optimiser state, activations of a short batch with
gradient checkpointing, and its logits. Longer batches need more."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True)
class Need:
    """What a model asks of a machine.

    Attributes:
        path: name on the hub or local folder.
        bytes_per_weight: of the frozen weights.
        four_bit: whether they are quantised.
        download: whether the hub may be asked.
        allow_cpu: whether a large model may run without a GPU.
    """

    path: str
    bytes_per_weight: float
    four_bit: bool = False
    download: bool = False
    allow_cpu: bool = False


@dataclass(frozen=True)
class Machine:
    """What a machine has.

    Attributes:
        gpu_bytes: free memory of the first GPU; None without one.
        ram_bytes: free main memory.
        bitsandbytes: whether that package is installed.
    """

    gpu_bytes: int | None
    ram_bytes: int
    bitsandbytes: bool


def this_machine() -> Machine:
    """The machine that this runs on."""
    gpu = int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    ram = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(gpu, ram, importlib.util.find_spec("bitsandbytes") is not None)


def require_packages() -> None:
    """Refuse to go on without Transformers and PEFT.

    Raises:
        ConfigError: with the command that installs them.
    """
    missing = [
        name
        for name in ("transformers", "peft", "tokenizers")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            f"language models need {', '.join(missing)}, not installed here; type "
            "pip install 'transformers>=5,<6' peft tokenizers"
        )


def check(need: Need, machine: Machine | None = None) -> None:
    """Refuse what cannot work. Nothing is downloaded.

    Raises:
        ConfigError: packages, GPU or memory are missing.
        DataError: weights or tokenizer are missing.
    """
    require_packages()
    machine = machine or this_machine()
    folder = _local(need.path)
    if folder is None and not need.download:
        size, memory = _size_on_disk(need.path), _memory_of(need, machine)
        raise DataError(
            f"model.path={need.path} is neither a folder nor in the hub's cache on this machine. "
            f"Type model.download=true to fetch it{size} (models with a licence need it accepted "
            "on huggingface.co and `hf auth login`), or model.path=/folder/with/the/weights"
            + memory
        )
    if folder is not None:
        _check_files(folder)
    count = PARAMETERS.get(need.path) if folder is None else count_parameters(folder)
    if need.four_bit and (machine.gpu_bytes is None or not machine.bitsandbytes):
        what = "a GPU" if machine.gpu_bytes is None else "the package bitsandbytes"
        raise ConfigError(
            f"model.load_in_4bit=true needs {what}, which this machine does not have; type "
            + (
                "model.load_in_4bit=false"
                if machine.gpu_bytes is None
                else "pip install bitsandbytes"
            )
        )
    if count is None:
        return  # of unknown size, and still on the hub
    required = int(count * need.bytes_per_weight) + (WORKING_SPACE if count > GPU_ABOVE else 0)
    if machine.gpu_bytes is None and count > GPU_ABOVE and not need.allow_cpu:
        raise ConfigError(
            f"{need.path} has {count / 1e9:.1f} billion parameters and there is no GPU here: "
            f"tuning it takes one with about {required / GIB:.0f} GiB of free memory "
            f"(model.load_in_4bit=true: {(count * 0.6 + WORKING_SPACE) / GIB:.0f} GiB). On a CPU "
            "it would take weeks; if you mean it, type model.allow_cpu=true"
        )
    have = machine.ram_bytes if machine.gpu_bytes is None else machine.gpu_bytes
    if required > have:
        where = "main memory" if machine.gpu_bytes is None else "GPU memory"
        way_out = "a smaller model" if need.four_bit else "model.load_in_4bit=true on a GPU"
        raise ConfigError(
            f"{need.path} with {count / 1e9:.2f} billion parameters needs about "
            f"{required / GIB:.1f} GiB of {where}, {have / GIB:.1f} GiB are free; use {way_out}, "
            "or free some"
        )


def is_name(path: object) -> bool:
    """Whether it can only be a name on the hub, and no folder of this disk."""
    return (
        isinstance(path, str)
        and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
        and not Path(path).exists()
    )


def locate(path: str, *, download: bool = False) -> Path:
    """The folder of a model; fetched from the hub only if that is allowed.

    Raises:
        DataError: it is not there, or not whole.
    """
    folder = _local(path)
    if folder is None:
        if not download:
            raise DataError(f"model.path={path} is not on this machine; type model.download=true")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, ignore_patterns=["*.pth", "original/*"]))
        except Exception as error:  # the hub's errors have no common ancestor
            raise DataError(f"model.path={path} could not be fetched: {error}") from error
    _check_files(folder)
    return folder


def _local(path: str) -> Path | None:
    """The folder of a model on this machine, or None."""
    given = Path(path).expanduser()
    if given.is_dir():
        return given
    if given.is_absolute() or path.startswith((".", "~")):
        raise DataError(f"model.path={path} is no folder; name one with config.json in it")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise DataError(f"model.path={path} is neither a folder nor a name: {error}") from error


def _check_files(folder: Path) -> None:
    """Refuse a folder in which something is missing."""
    missing = []
    if not (folder / "config.json").is_file():
        missing.append("config.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    index = folder / "model.safetensors.index.json"
    if not any((folder / name).is_file() for name in _WEIGHTS):
        missing.append("model.safetensors (the weights)")
    elif index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        missing += sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise DataError(
            f"{folder} is no complete model in the hub's format: it lacks {', '.join(missing)}; "
            "copy the whole folder, or save with model.save_pretrained and "
            "tokenizer.save_pretrained"
        )


def _size_on_disk(path: str) -> str:
    count = PARAMETERS.get(path)
    return "" if count is None else f", about {count * 2 / GIB:.0f} GiB"


def _memory_of(need: Need, machine: Machine) -> str:
    """What a known model that is not here will need once it is."""
    count = PARAMETERS.get(need.path)
    if count is None or count <= GPU_ABOVE:
        return ""
    gpu = "there is no GPU"
    if machine.gpu_bytes is not None:
        gpu = f"{machine.gpu_bytes / GIB:.0f} GiB are free"
    required = (count * need.bytes_per_weight + WORKING_SPACE) / GIB
    return f". Tuning it takes a GPU with about {required:.0f} GiB of free memory; here {gpu}"


def count_parameters(folder: Path) -> int:
    """Number of parameters, from the configuration alone."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise DataError(
            f"{folder}: config.json is not that of a language model: {error}"
        ) from error
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_model(
    folder: Path, *, dtype: torch.dtype, four_bit: bool, device: torch.device | str
) -> Any:
    """The causal language model in a folder, on a device."""
    from transformers import AutoModelForCausalLM

    # code beside the weights is never run
    options: dict[str, Any] = {
        "dtype": dtype, "local_files_only": True, "trust_remote_code": False
    }  # fmt: skip
    if torch.device(device).type != "cpu":
        options["device_map"] = {"": str(device)}
    if four_bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    model.config.use_cache = False
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' progress bars and advice do not help the reader of a run."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of one library about another
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
