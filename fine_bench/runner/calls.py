"""Sections of a configuration that are calls: a ``_target_`` and its keyword arguments.

Tasks, models and estimators are open sets. Each YAML file names a function or class, whose
signature says which keys there are and of what types, so adding one needs nothing here.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import pydantic
from hydra.utils import get_object

from fine_bench.errors import ConfigError
from fine_bench.runner import addresses
from fine_bench.types import UnsupportedProblemError

ALWAYS_ALLOWED = ("fine_bench", "baselines")

# what the runner passes to a target itself, by section: no configuration key
RUNNER_PASSES: Mapping[str, frozenset[str]] = {
    "task": frozenset(),
    "model": frozenset({"in_shape", "n_classes"}),
    "estimators": frozenset({"target", "queries"}),
}


def target_of(options: Mapping[str, Any], where: str, packages: tuple[str, ...]) -> Any:
    """The function or class that ``_target_`` names, if its package is allowed."""
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
    except Exception as error:
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
    return found


def check_call(
    options: Mapping[str, Any], where: str, section: str, packages: tuple[str, ...]
) -> None:
    """Check a section's keys and types against the signature of its ``_target_``.

    Raises:
        ConfigError: an unknown key, a missing one or a value of a wrong type.
    """
    target = target_of(options, where, packages)
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
            target_of(value, where, packages)
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
        ConfigError: the target refused an option.
        UnsupportedProblemError: it is a method that does not serve what is asked of it.
    """
    target = target_of(options, where, packages)
    own = {k: v for k, v in options.items() if k not in ("_target_", "name")}
    try:
        return target(*args, **own, **passed)
    except (ConfigError, UnsupportedProblemError):
        raise
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{where}: {error}") from error
