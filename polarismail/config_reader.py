# SPDX-License-Identifier: MIT
"""TOML tables become frozen attrs values, or every fault of the file is named at once: nothing is half-read.

A key is a field of the class, its default is the field's, its type is the field's annotation. Each problem reads
`key.path: expected ..., found ...`; an unknown key comes with the nearest one that exists. The classes know nothing
of TOML: what their own validators raise (ValueError, TypeError) is reported under the table they guard, or under one
key of it where the text starts with `key: `.

Understood annotations: bool, int, float, str, FilePath, Literal, `X | None`, tuple[X, ...], tuple[str, int]
(an address and a port, written "192.0.2.1:53"), dict[str, X], attrs classes; `false` for a table that may be None.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, cast

import attrs

FilePath = Annotated[str, "path"]
"""A path; read relative to the directory of the configuration file. "" means none."""

HostPort = tuple[str, int]


class Without:
    """`Annotated[Settings, Without("hostname", "routing.own_names")]`: these fields are no keys, somebody else sets them."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Flat:
    """`Annotated[Settings, Flat("routing")]`: the keys of this field's class stand beside the others, not in a table."""

    def __init__(self, *names: str) -> None:
        self.names = names


_MISSING = object()


@attrs.define
class Reading:
    """What is known while one file is read: where relative paths start, and the problems found so far."""

    directory: str
    problems: list[str] = attrs.field(factory=list)

    def complain(self, where: str, text: str) -> Any:
        """Note one problem under its key path."""
        self.problems.append(f"{where}: {text}" if where else text)
        return _MISSING


@attrs.frozen
class Key:
    """One key of a table: the annotation it is read by, its default, and the field path that it sets."""

    hint: Any
    default: Any
    path: tuple[str, ...]


def keys_of(hint: Any, before: tuple[str, ...] = ()) -> dict[str, Key]:
    """The keys that a table read into this annotation may hold."""
    section, without, flat = _section(hint)
    assert section is not None
    hints = typing.get_type_hints(section, include_extras=True)
    keys: dict[str, Key] = {}
    for field in attrs.fields(cast(Any, section)):
        inner = hints[field.name]
        below = [name.removeprefix(f"{field.name}.") for name in without if name.startswith(f"{field.name}.")]
        if below:
            inner = Annotated[inner, Without(*below)]
        if field.name in flat:
            keys |= keys_of(inner, (*before, field.name))
        elif field.init and field.name not in without:
            keys[field.name] = Key(inner, _default(field), (*before, field.name))
    return keys


def is_table(hint: Any) -> bool:
    """Whether a key of this annotation is a table that is read into an attrs class."""
    return _section(hint)[0] is not None


def _section(hint: Any) -> tuple[type | None, tuple[str, ...], tuple[str, ...]]:
    without: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        without = tuple(name for note in notes if isinstance(note, Without) for name in note.names)
        flat = tuple(name for note in notes if isinstance(note, Flat) for name in note.names)
    return (hint if isinstance(hint, type) and attrs.has(hint) else None), without, flat


def _default(field: Any) -> Any:
    return field.default.factory() if isinstance(field.default, attrs.Factory) else field.default  # type: ignore[arg-type]


def read_table(hint: Any, table: Any, reading: Reading, where: str = "") -> Any:
    """Build a value of the annotation from a TOML table. What is wrong lands in `reading.problems`; the value then means
    nothing."""
    if not isinstance(table, dict):
        return reading.complain(where, f"expected a table, found {_show(table)}")
    keys = keys_of(hint)
    before = len(reading.problems)
    values: dict[tuple[str, ...], Any] = {}
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        if name not in keys:
            reading.complain(path, _unknown(name, keys))
            continue
        read = _read_value(keys[name].hint, value, reading, path)
        if read is not _MISSING:
            values[keys[name].path] = read
    for name, key in keys.items():
        if key.default is attrs.NOTHING and name not in table:
            reading.complain(f"{where}.{name}" if where else name, f"missing: expected {expected(key.hint)}")
    if len(reading.problems) > before:
        return _MISSING
    try:
        return _build(hint, values)
    except (ValueError, TypeError) as problem:
        # attrs' own validators put the attribute and the value behind the text; only the text is for people.
        text = str(problem.args[0]) if problem.args else str(problem)
        name, colon, rest = text.partition(": ")
        if colon and name in keys:
            where, text = f"{where}.{name}" if where else name, rest
        return reading.complain(where, text)


def _build(hint: Any, values: dict[tuple[str, ...], Any]) -> Any:
    section = _section(hint)[0]
    hints = typing.get_type_hints(section, include_extras=True)
    own = {path[0]: value for path, value in values.items() if len(path) == 1}
    for name in {path[0] for path in values if len(path) > 1}:
        own[name] = _build(hints[name], {path[1:]: value for path, value in values.items() if path[0] == name})
    return cast(Any, section)(**own)


def expected(hint: Any) -> str:
    """What a key of this annotation wants, for people."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        choices = ", ".join(f'"{choice}"' for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin in (Union, types.UnionType):
        return " or ".join(expected(argument) for argument in arguments if argument is not type(None))
    if hint == HostPort:
        return 'a string as "192.0.2.1:53" or "[2001:db8::1]:53"'
    if origin is tuple:
        return f"a list, each {expected(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a table, each value {expected(arguments[1])}"
    if is_table(hint):
        return "a table"
    names = {bool: "true or false", int: "a whole number, 0 or more", float: "a number, 0 or more", str: "a string"}
    return "a path (a string)" if hint is FilePath else names.get(hint, str(hint))


def _read_value(hint: Any, value: Any, reading: Reading, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        inner, *others = (argument for argument in arguments if argument is not type(None))
        for argument in (inner, *others) if others else ():
            trial = Reading(reading.directory)
            read = _read_value(argument, value, trial, where)
            if not trial.problems:
                return read
        if others:
            return reading.complain(where, f"expected {expected(hint)}, found {_show(value)}")
        if value is False and is_table(inner):
            return None
        return _read_value(inner, value, reading, where)
    if hint == HostPort:
        host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
        fits = colon and port.isdecimal() and int(port) <= 65535 and (":" not in host or host[:1] + host[-1:] == "[]")
        return (
            (host.strip("[]"), int(port))
            if fits
            else reading.complain(where, f"expected {expected(hint)}, found {_show(value)}")
        )
    if origin is tuple and isinstance(value, list):
        read = [_read_value(arguments[0], item, reading, f"{where}[{at}]") for at, item in enumerate(value)]
        return _MISSING if _MISSING in read else tuple(read)
    if origin in (dict, Mapping) and isinstance(value, dict):
        entries = {name: _read_value(arguments[1], item, reading, f"{where}.{name}") for name, item in value.items()}
        return _MISSING if _MISSING in entries.values() else entries
    if is_table(hint):
        return read_table(hint, value, reading, where)
    if origin is Literal:
        ok = isinstance(value, str) and value in arguments
    elif hint is float and type(value) in (int, float):
        ok, value = math.isfinite(value) and value >= 0, float(value)
    elif hint is int:
        ok = type(value) is int and value >= 0
    elif hint is FilePath and isinstance(value, str) and "\x00" not in value:
        return os.path.normpath(os.path.join(reading.directory, value)) if value and value != "-" else value
    else:
        ok = hint in (bool, str) and type(value) is hint and "\x00" not in str(value)
    return value if ok else reading.complain(where, f"expected {expected(hint)}, found {_show(value)}")


def _unknown(name: str, keys: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, keys, n=1, cutoff=0.5)
    return "unknown key; " + (f'did you mean "{near[0]}"?' if near else f"expected one of: {', '.join(sorted(keys))}")


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
