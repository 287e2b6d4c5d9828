"""Everything that decides a training run: one TOML file, one dataclass for each of its tables.

    [run]
    folder = "runs/style"
    steps = 2000

A key that does not exist is an error that names the nearest one that does. What a run was really started with, defaults
included, is written into its folder as `settings.toml` and into the metadata of the model it makes.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from .tables import AdapterTable, DataTable, FlowTable, ModelTable, OptimizerTable, RunTable, SampleTable, TextTable

__all__ = ["Settings", "differences", "read_settings", "settings_from", "to_toml"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """A whole run, one attribute for each table of the file."""

    run: RunTable
    data: DataTable
    model: ModelTable = dataclasses.field(default_factory=ModelTable)
    text: TextTable = dataclasses.field(default_factory=TextTable)
    adapter: AdapterTable = dataclasses.field(default_factory=AdapterTable)
    flow: FlowTable = dataclasses.field(default_factory=FlowTable)
    optimizer: OptimizerTable = dataclasses.field(default_factory=OptimizerTable)
    samples: SampleTable = dataclasses.field(default_factory=SampleTable)

    def __post_init__(self) -> None:
        if self.adapter.kind != "none":
            if not self.model.start_from:
                raise ValueError(f"[adapter] kind is {self.adapter.kind!r}, but [model] start_from names no model")
            if self.optimizer.name == "muon":
                raise ValueError("[optimizer] name 'muon' moves whole weights: take 'adamw' for an adapter")


def read_settings(path: Path, changes: Mapping[str, str] | None = None) -> Settings:
    """The settings in a TOML file.

    Args:
        path: of the file; relative paths in it count from the working directory.
        changes: "run.steps" -> "500", which stand above the file.

    Raises:
        FileNotFoundError, ValueError: no such file, no TOML, unknown tables or keys, values of another type.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {path}: `python -m zigma train --list` names those shipped")
    toml = _toml()
    try:
        tables = toml.loads(path.read_text(encoding="utf-8-sig"))
        for key, text in (changes or {}).items():
            table, _, name = key.partition(".")
            if isinstance(tables.setdefault(table, {}), dict):  # what is none is refused below
                tables[table][name] = _value_of(toml, text)
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML ({error}): look at that line") from error
    return settings_from(tables)


def _toml() -> types.ModuleType:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError as error:
        raise ImportError("reading TOML needs the package tomli below Python 3.11: pip install tomli") from error
    return tomli


def _value_of(toml: types.ModuleType, text: str) -> Any:
    try:
        return toml.loads(f"value = {text}")["value"]
    except toml.TOMLDecodeError:
        return text  # --set run.precision=fp32 needs no quotes


def settings_from(tables: Mapping[str, Any]) -> Settings:
    """Settings of tables as a TOML file or a run's record has them; ValueError as `read_settings`."""
    hints = get_type_hints(Settings)
    _known("the file", "table", tables, hints)
    made = {}
    for name, table in hints.items():
        given = tables.get(name, {})
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r}, expected a table: [{name}]")
        fields = get_type_hints(table)
        _known(f"[{name}]", "key", given, fields)
        made[name] = table(**{key: _typed(f"[{name}] {key}", value, fields[key]) for key, value in given.items()})
    return Settings(**made)


def _known(where: str, what: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected {', '.join(known)}"
            raise ValueError(f"{where} has the unknown {what} {key!r}: {hint}")


def _typed(where: str, value: Any, hint: Any) -> Any:
    """The value as the field has it; whole numbers count as numbers, lists as tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for one in inner:
            try:
                return _typed(where, value, one)
            except ValueError:
                continue
        raise ValueError(f"{where} is {value!r}, expected {' or '.join(_name(one) for one in inner)}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(where, item, inner[0]) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{where} is {value!r}, expected {_name(hint)}")


def _name(hint: Any) -> str:
    names = {str: "a text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint) or ("a list" if get_origin(hint) is tuple else "a table")


def to_toml(settings: Settings) -> str:
    """The settings with every default, as a file that `read_settings` reads again."""
    lines = []
    for name, table in dataclasses.asdict(settings).items():
        lines.append(f"[{name}]")
        nested = {key: value for key, value in table.items() if isinstance(value, dict)}
        lines += [f"{key} = {_written(value)}" for key, value in table.items() if key not in nested]
        for key, value in nested.items():
            lines += ["", f"[{name}.{key}]", *(f"{inner} = {_written(item)}" for inner, item in value.items())]
        lines.append("")
    return "\n".join(lines)


def _written(value: Any) -> str:
    """As TOML; JSON's texts, numbers, booleans and lists are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


def differences(old: Settings, new: Settings) -> list[str]:
    """'[run] steps: 1000 -> 2000' of everything in which two settings differ."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        f"[{table}] {key}: {before[table][key]} -> {after[table][key]}"
        for table in before
        for key in before[table]
        if before[table][key] != after[table][key]
    ]
