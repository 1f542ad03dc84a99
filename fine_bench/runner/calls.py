"""Sections of a configuration that are calls: a ``_target_`` and its keyword arguments.

Tasks, models and estimators are open sets. Each YAML file names a function or class, whose
signature says which keys there are and of what types, so adding one needs nothing here.

A configuration may come from a record of somebody else. So being code of an allowed package is not
enough: a task is a function that says it returns one, a model likewise, an estimator a class below
one of the two bases. A command or a helper is none of these, and is never called.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import pydantic
from hydra.utils import get_object
from torch import nn

from fine_bench.callback.base import InRunMethod
from fine_bench.data.task import makes_task, promised
from fine_bench.errors import ConfigError
from fine_bench.estimator import InfluenceEstimator
from fine_bench.llm.models import makes_language_model
from fine_bench.runner import addresses
from fine_bench.types import UnsupportedProblemError

ALWAYS_ALLOWED = ("fine_bench", "baselines")

Section: TypeAlias = Literal["task", "model", "estimators"]

KINDS: Mapping[Section, str] = {
    "task": "a task: a function `-> TaskData` of fine_bench.data, or `-> LanguageTask`",
    "model": "a model: a function of in_shape and n_classes `-> torch.nn.Module` of "
    "fine_bench.models, or `-> LanguageModel`",
    "estimators": "an estimator: a class below fine_bench.estimator.InfluenceEstimator, or below "
    "fine_bench.callback.base.InRunMethod",
}
"""What is called in a section."""

HOMES: Mapping[Section, tuple[str, ...]] = {
    "task": ("fine_bench.data.", "fine_bench.llm.task."),
    "model": ("fine_bench.models.", "fine_bench.llm.models."),
    "estimators": ("fine_bench.", "baselines."),
}
"""Where in our own packages it lies."""

# what the runner passes to a target itself, by section: no configuration key
RUNNER_PASSES: Mapping[str, frozenset[str]] = {
    "task": frozenset(),
    "model": frozenset({"in_shape", "n_classes"}),
    "estimators": frozenset({"target", "queries"}),
}


def target_of(
    options: Mapping[str, Any],
    where: str,
    packages: tuple[str, ...],
    section: Section | None = None,
) -> Any:
    """The function or class that ``_target_`` names, if it may be called in this place.

    Args:
        options: with ``_target_``.
        where: the options stand, for messages.
        packages: whose code may be called.
        section: what it has to be; without one, any of ``KINDS``.

    Raises:
        ConfigError: it is something else, cannot be imported, or is code of another package.
    """
    path = options.get("_target_")
    if not isinstance(path, str):
        raise ConfigError(f"{where}._target_ is missing; name a function or class there")
    if path.split(".")[0] not in packages:
        raise ConfigError(
            f"{where}._target_={path} lies outside of the packages {', '.join(packages)}; if you "
            f"trust it, type 'allow_packages=[{path.split('.')[0]}]'"
        )
    try:
        found = get_object(addresses.today(path))
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}._target_={path} cannot be imported: {error}") from error
    # a module of ours imports others: fine_bench.store.files.os.system is not ours to call
    home = str(getattr(found, "__module__", "") or "").split(".")[0]
    if home not in packages or not callable(found):
        raise ConfigError(
            f"{where}._target_={path} is no function or class of the packages "
            f"{', '.join(packages)}"
            + (f"; it comes from {home}, so if you trust it, type 'allow_packages=[{home}]'"
               if home and home not in packages else "; name one")
        )  # fmt: skip
    sections = get_args(Section) if section is None else (section,)
    if not any(_is_kind(found, kind, ours=home in ALWAYS_ALLOWED) for kind in sections):
        wanted = " or ".join(KINDS[kind] for kind in sections)
        raise ConfigError(f"{where}._target_={path} is not called here; name {wanted}")
    return found


def _is_kind(found: Any, section: Section, *, ours: bool) -> bool:
    """Whether a function or class is what a section calls.

    Functions of a package that the user allowed need no annotation, but it must not say otherwise.
    """
    if ours and not f"{found.__module__}.".startswith(HOMES[section]):
        return False
    if section == "estimators":
        return inspect.isclass(found) and issubclass(found, InfluenceEstimator | InRunMethod)
    if not ours and not inspect.isclass(found) and promised(found) is None:
        return inspect.isroutine(found)
    if section == "task":
        return makes_task(found)
    if inspect.isclass(found):
        return not ours and issubclass(found, nn.Module)
    made = promised(found)
    if made is None or not issubclass(made, nn.Module):
        return makes_language_model(found)
    return not ours or {"in_shape", "n_classes"} <= set(inspect.signature(found).parameters)


def check_call(
    options: Mapping[str, Any], where: str, section: Section, packages: tuple[str, ...]
) -> None:
    """Check a section's keys and types against the signature of its ``_target_``.

    Raises:
        ConfigError: an unknown key, a missing one or a value of a wrong type.
    """
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{where}={options!r:.40} is no section; give it a _target_ and its options, or leave "
            "it out"
        )
    if not isinstance(options.get("name", ""), str) or options.get("name") == "":
        raise ConfigError(
            f"{where}.name={options['name']!r:.40} is no name; type {where}.name=mine"
        )
    target = target_of(options, where, packages, section)
    for key, value in options.items():
        _check_nested(value, f"{where}.{key}", packages)
    passed = RUNNER_PASSES[section]
    signature = inspect.signature(target)
    hints = _hints(target)
    names = [
        p.name
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in passed
    ]
    for key, value in options.items():
        if key in ("_target_", "name"):
            continue
        if key not in names:
            raise ConfigError(f"{where}.{key} is unknown{suggest(key, names, where)}")
        if key == "seed" and value is None and section == "estimators":
            continue  # follows the run seed
        if key in hints:
            _check_type(value, hints[key], f"{where}.{key}")
    for parameter in signature.parameters.values():
        if (
            parameter.name in names
            and parameter.default is parameter.empty
            and parameter.name not in options
        ):
            raise ConfigError(
                f"{where}.{parameter.name} is missing; type {where}.{parameter.name}=…"
            )


def _check_nested(value: Any, where: str, packages: tuple[str, ...]) -> None:
    """Targets inside of options are limited like those of the sections."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            target_of(value, where, packages, "model" if where == "task.model" else None)
        for key, inner in value.items():
            _check_nested(inner, f"{where}.{key}", packages)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_nested(inner, f"{where}[{number}]", packages)


def _hints(target: Callable[..., Any]) -> Mapping[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    return typing.get_type_hints(function)


def _check_type(value: Any, hint: Any, where: str) -> None:
    try:
        adapter: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(
            hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True)
        )
    except pydantic.errors.PydanticUserError:  # a hint that only means something in Python
        return
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise ConfigError(f"{where}={value} has a wrong type: {problem}") from error


def suggest(key: str, names: list[str], where: str) -> str:
    """What to type instead of an unknown key."""
    prefix = f"{where}." if where else ""
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; {where or 'the configuration'} has: {', '.join(names)}"


def build(
    options: Mapping[str, Any], where: str, packages: tuple[str, ...], /, *args: Any, **passed: Any
) -> Any:
    """Call the ``_target_`` with its options; a refusal names the section.

    Raises:
        ConfigError: the target refused an option, or wanted to end the process.
        UnsupportedProblemError: it is a method that does not serve what is asked of it.
    """
    section = where.partition(".")[0]
    target = target_of(options, where, packages, _section(section))
    own = {k: v for k, v in options.items() if k not in ("_target_", "name")}
    try:
        return target(*args, **own, **passed)
    except (ConfigError, UnsupportedProblemError):
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {error}") from error
    except SystemExit as error:
        raise ConfigError(f"{where}: it wanted to end the process ({error})") from error


def _section(name: str) -> Section | None:
    return next((section for section in get_args(Section) if section == name), None)
