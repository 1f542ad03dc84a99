"""The training examples themselves, images or texts, where their data set lies on this disk.

A record names the function that made its data. It is called again only if it is one of
``fine_bench.data`` or the language task, never with permission to download, and what it returns
counts only if its digest is the record's: other data would show other examples.
"""

from __future__ import annotations

import importlib
import inspect
import io
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fine_bench.data import cifar
from fine_bench.data.task import TaskData, makes_task
from fine_bench.errors import ConfigError, DataError
from fine_bench.gradients.token_losses import IGNORED, PAD
from fine_bench.llm import hub, models
from fine_bench.llm.models import makes_language_model
from fine_bench.llm.task import LanguageTask

PACKAGES = ("fine_bench.data.", "fine_bench.llm.task.")
MODELS = "fine_bench.llm.models."
NOT_TAKEN = ("_target_", "name", "data_dir", "path", "queries_path", "test_path")
"""What a record does not decide: where files lie on this disk."""


class Texts:
    """The samples of a language task as words, read back from their tokens."""

    def __init__(self, task: LanguageTask) -> None:
        self.task = task
        self.tokenizer: Any = task.model.tokenizer()

    def __call__(self, example: int) -> list[tuple[str, str]]:
        """What is said, turn by turn: ``("prompt", …)`` or ``("answer", …)`` and the words."""
        x, y = self.task.x[example], self.task.y[example]
        x, y = x[x != PAD], y[x != PAD]
        trained = (y != IGNORED).tolist()
        turns: list[tuple[str, str]] = []
        for answers, places in groupby(range(len(x)), key=lambda i: trained[i]):
            words = self.tokenizer.decode(x[list(places)].tolist(), skip_special_tokens=True)
            if words.strip():
                turns.append(("answer" if answers else "prompt", words.strip()))
        return turns


@dataclass(frozen=True)
class TaskExamples:
    """A task's data for looking at, or the reason why there are none."""

    data: TaskData | None
    reason: str = ""
    texts: Texts | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Words for the labels; none where the labels are digits anyway."""
        name = "" if self.data is None else self.data.name
        return cifar.CLASS_NAMES if name.startswith("cifar10") else ()

    @property
    def has_images(self) -> bool:
        """Whether the examples are grey or coloured images."""
        return self.data is not None and self.data.x.ndim == 4 and self.data.x.shape[1] in (1, 3)


def task_examples(options: Mapping[str, Any], sha256: str) -> TaskExamples:
    """The data that a record's ``config.task`` describes.

    Args:
        options: ``_target_`` and its keyword arguments.
        sha256: digest that the data must have.
    """
    path = str(options.get("_target_", ""))
    module, _, name = path.rpartition(".")
    if not path.startswith(PACKAGES):
        where = path or "no function"
        return TaskExamples(
            None, f"the records name {where} as their task, which is not called here"
        )
    try:
        make = getattr(importlib.import_module(module), name)
        if not makes_task(make) or not f"{make.__module__}.".startswith(PACKAGES):
            raise AttributeError(f"{path} is no task")
        wanted = inspect.signature(make).parameters
        own = {k: v for k, v in options.items() if k not in NOT_TAKEN}
        if "download" in wanted:
            own["download"] = False
        model = own.get("model")
        if isinstance(model, Mapping):
            chosen = str(model.get("_target_", ""))
            if not chosen.startswith(MODELS):
                return TaskExamples(None, f"the records name {chosen}, which is not called")
            if not makes_language_model(getattr(models, chosen.removeprefix(MODELS), None)):
                raise AttributeError(f"{chosen} is no language model")
            if not hub.is_name(model.get("path", "a/name")):
                raise ConfigError(f"model.path={model['path']} is a place on the disk, no name")
            own["model"] = {k: v for k, v in model.items() if k != "download"}
        data = make(**own)
        if isinstance(data, LanguageTask) and sha256 in (data.sha256, data.record_sha256):
            return TaskExamples(None, texts=Texts(data))
    except DataError as error:
        return TaskExamples(
            None,
            "the data set is not on this disk, so the examples are shown without their images or "
            "texts (set FINE_BENCH_DATA): "
            + str(error).splitlines()[0].removesuffix(". Looked at:"),
        )
    except (Exception, SystemExit) as error:  # what a record says may go wrong in any way
        return TaskExamples(None, f"this version cannot make the data of the records: {error}")
    if not isinstance(data, TaskData) or data.sha256 != sha256:
        return TaskExamples(
            None, "the data made here have another digest than those of the records"
        )
    return TaskExamples(data)


class PngEncoder:
    """PNG files of examples, all on the grey scale of the whole training set."""

    def __init__(self, data: TaskData) -> None:
        self.x = data.x
        channels = self.x.shape[1]
        flat = self.x.transpose(0, 1).reshape(channels, -1)
        self.low = flat.min(1).values.view(channels, 1, 1)
        self.high = flat.max(1).values.view(channels, 1, 1)

    def pixels(self, example: int) -> NDArray[np.uint8]:
        """``(height, width)`` of grey or ``(height, width, 3)`` of coloured images.

        Each channel reaches from its least to its largest value in the data.
        """
        span = (self.high - self.low).clamp_min(1e-12)
        unit = (self.x[example] - self.low) / span
        values: NDArray[np.uint8] = (255 * unit).round().clamp(0, 255).byte().numpy()
        return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))

    def png(self, example: int) -> bytes:
        """The example as a PNG file, one pixel a pixel."""
        file = io.BytesIO()
        Image.fromarray(self.pixels(example)).save(file, "PNG", optimize=True)
        return file.getvalue()
