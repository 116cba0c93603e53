"""Every default, constant number and preset equals the one recorded in `defaults.txt`.

Users' folders and published figures were made with these values, so a change must be visible in a commit. To record
changed values:

    python tests/test_defaults.py
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trimask.configs import policies, presets, studies
from trimask.tokenizers.storage import configuration

WRITTEN = Path(__file__).with_name("defaults.txt")
ELSEWHERE = ("torch_train", "torch_rollout", "llada_generate", "md4_train")
"""Scripts for Pythons with other code."""


def lines() -> Iterator[str]:
    for name in modules():
        module = importlib.import_module(name)
        yield from (f"{name}.{constant}" for constant in constants(module))
        for _, thing in sorted(vars(module).items()):
            if getattr(thing, "__module__", None) == name:
                yield from of_thing(thing)
    for name, preset in sorted(all_presets().items()):
        yield from (f"{name}: {what}" for what in said_in(preset))


def modules() -> Iterator[str]:
    project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    for name in project["tool"]["setuptools"]["packages"]:
        yield name
        # The first folder of its path: that of trimask goes on with the root, whose rooms have names of their own.
        for found in pkgutil.iter_modules(importlib.import_module(name).__path__[:1], f"{name}."):
            if found.name.rsplit(".", 1)[-1] not in ELSEWHERE:
                yield found.name


def of_thing(thing: Any) -> Iterator[str]:
    """Recorded lines of a class or a function: its defaults."""
    name = f"{thing.__module__}.{getattr(thing, '__qualname__', '')}"
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            for field in dataclasses.fields(thing):
                if has_default(field):
                    is_made = field.default is dataclasses.MISSING
                    yield f"{name}.{field.name} = {shown(field.default_factory() if is_made else field.default)}"
        for member_name, member in sorted(vars(thing).items()):
            member = getattr(member, "__func__", getattr(member, "func", member))  # class methods, cached properties
            is_made = member_name.startswith("__") and dataclasses.is_dataclass(thing)
            if callable(member) and not inspect.isclass(member) and not is_made:
                yield from of_function(f"{name}.{member_name}", member)
    elif callable(thing):
        yield from of_function(name, thing)


def constants(module: ModuleType) -> Iterator[str]:
    """Lines NAME = VALUE for the numbers, and the tables and configurations with numbers, that a module assigns."""
    source = Path(module.__file__).read_text() if module.__file__ else ""  # a folder has none
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and has_number(statement):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    value = getattr(module, node.id)
                    if is_literal(value):
                        yield f"{node.id} = {shown(value)}"


def has_number(statement: ast.AST) -> bool:
    return any(isinstance(node, ast.Constant) and type(node.value) in (int, float) for node in ast.walk(statement))


def is_literal(value: Any) -> bool:
    """Whether a value consists of numbers, strings and configurations alone."""
    if isinstance(value, Mapping):
        return is_literal((*value, *value.values()))
    if isinstance(value, tuple | list):
        return all(map(is_literal, value))
    if dataclasses.is_dataclass(value) and not inspect.isclass(value):
        return is_literal(vars(value))
    return isinstance(value, bool | int | float | str | None)


def said_in(config: Any) -> list[str]:
    """Fields in which a configuration differs from the defaults of its class."""
    needed = [field.name for field in dataclasses.fields(config) if not has_default(field)]
    plain = type(config)(**{field: type(getattr(config, field))() for field in needed})
    return configuration.changed_fields(plain, config)


def has_default(field: dataclasses.Field) -> bool:
    return not (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING)


def of_function(name: str, function: Any) -> Iterator[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    for parameter in parameters:
        if parameter.default is not inspect.Parameter.empty:
            yield f"{name}({parameter.name} = {shown(parameter.default)})"


def shown(default: Any) -> str:
    """A default as text, without memory addresses."""
    if isinstance(default, Mapping):
        return f"{{{', '.join(f'{shown(key)}: {shown(value)}' for key, value in default.items())}}}"
    if isinstance(default, tuple) and default:
        return f"({', '.join(map(shown, default))}{',' if len(default) == 1 else ''})"
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return f"{type(default).__name__}({'; '.join(said_in(default))})"
    if isinstance(default, float):
        return repr(float(f"{default:.12g}"))  # last digits of a power are the machine's
    if default == Path(sys.executable):
        return "this Python"
    if isinstance(default, functools.partial):
        return f"partial {shown(default.func)}"
    if callable(default) and hasattr(default, "__qualname__"):
        code = getattr(inspect.unwrap(default), "__code__", None)
        is_lambda = default.__name__ == "<lambda>"
        return f"a function of {code.co_varnames}" if is_lambda and code else default.__qualname__
    return str(np.asarray(default).tolist()) if hasattr(default, "dtype") else repr(default)


def all_presets() -> dict[str, Any]:
    found = {f"presets.{name}": make() for name, make in presets.PRESETS.items()}
    found |= {f"policies.{name}": make() for name, make in policies.POLICIES.items()}
    for name, study in studies.STUDIES.items():
        found |= {f"studies.{name}.{size}": make() for size, make in study.presets.items()}
    return found


def test_every_default_number_and_preset_is_as_written():
    written, found = WRITTEN.read_text().splitlines(), list(lines())
    changes = [line for line in difflib.unified_diff(written, found, lineterm="", n=0) if line[:2] not in ("--", "++")]
    if changes:
        pytest.fail("defaults differ from tests/defaults.txt; python tests/test_defaults.py takes them over:\n"
                    + "\n".join(changes[:50]))  # fmt: skip


if __name__ == "__main__":
    WRITTEN.write_text("".join(f"{line}\n" for line in lines()))
