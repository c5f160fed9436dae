# SPDX-License-Identifier: MIT
"""TOML tables become frozen attrs values, or every fault of the file is named at once: nothing is half-read.

A key is a field of the class, its default is the field's, its type is the field's annotation. Each problem reads
`key.path: expected ..., found ...`; an unknown key comes with the nearest one that exists. The classes know nothing
of TOML: what their own validators raise (ValueError, TypeError) is reported under the table they guard, or under one
key of it where the text starts with `key: `.

Understood annotations: bool, int, float, str, FilePath, Literal, `X | None`, tuple[X, ...], tuple[str, int]
(an address and a port, written "192.0.2.1:53"), dict[str, X] and attrs classes.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, cast

import attrs

FilePath = Annotated[str, "path"]
"""A path; read relative to the directory of the configuration file. "" means none."""

HostPort = tuple[str, int]


class Without:
    """`Annotated[Settings, Without("hostname")]`: these fields are no keys, somebody else sets them."""

    def __init__(self, *names: str) -> None:
        self.names = names


T = TypeVar("T")
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


def keys_of(section: type, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys that a table read into this class may hold, with their annotations."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        field.name: hints[field.name] for field in attrs.fields(section) if field.init and field.name not in without
    }


def section_of(hint: Any) -> tuple[type | None, tuple[str, ...]]:
    """The attrs class that a key's table is read into, and the fields that are no keys of it; None for no table."""
    without: tuple[str, ...] = ()
    if typing.get_origin(hint) is Annotated:
        hint, *notes = typing.get_args(hint)
        without = tuple(name for note in notes if isinstance(note, Without) for name in note.names)
    return (hint if isinstance(hint, type) and attrs.has(hint) else None), without


def read_table(section: type[T], table: Any, reading: Reading, where: str = "", without: tuple[str, ...] = ()) -> T:
    """Build `section` from a TOML table. What is wrong lands in `reading.problems`; the value then means nothing.

    The fields named in `without` are no keys of the table.
    """
    if not isinstance(table, dict):
        return cast(T, reading.complain(where, f"expected a table, found {_show(table)}"))
    keys = keys_of(section, without)
    before = len(reading.problems)
    values = {}
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        if name not in keys:
            reading.complain(path, _unknown(name, keys))
            continue
        read = _read_value(keys[name], value, reading, path)
        if read is not _MISSING:
            values[name] = read
    for field in attrs.fields(cast(Any, section)):
        if field.name in keys and field.name not in table and field.default is attrs.NOTHING:
            reading.complain(
                f"{where}.{field.name}" if where else field.name, f"missing: expected {expected(keys[field.name])}"
            )
    if len(reading.problems) > before:
        return cast(T, _MISSING)
    try:
        return section(**values)
    except (ValueError, TypeError) as problem:
        # attrs' own validators put the attribute and the value behind the text; only the text is for people.
        text = str(problem.args[0]) if problem.args else str(problem)
        key, colon, rest = text.partition(": ")
        if colon and key in keys:
            where, text = f"{where}.{key}" if where else key, rest
        return cast(T, reading.complain(where, text))


def expected(hint: Any) -> str:
    """What a key of this annotation wants, for people."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(expected(argument) for argument in arguments if argument is not type(None))
    if hint == HostPort:
        return 'a string as "192.0.2.1:53" or "[2001:db8::1]:53"'
    if origin is tuple:
        return f"a list, each {expected(arguments[0])}"
    if origin in (dict, Mapping):
        return f"a table, each value {expected(arguments[1])}"
    if section_of(hint)[0] is not None:
        return "a table"
    names = {bool: "true or false", int: "a whole number, 0 or more", float: "a number, 0 or more", str: "a string"}
    return "a path (a string)" if hint is FilePath else names.get(hint, str(hint))


def _read_value(hint: Any, value: Any, reading: Reading, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
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
    inner_section, without = section_of(hint)
    if inner_section is not None:
        return read_table(inner_section, value, reading, where, without)
    if origin is Literal:
        ok = isinstance(value, str) and value in arguments
    elif hint is float and type(value) in (int, float):
        ok, value = math.isfinite(value) and value >= 0, float(value)
    elif hint is int:
        ok = type(value) is int and value >= 0
    elif hint is FilePath and isinstance(value, str):
        return os.path.normpath(os.path.join(reading.directory, value)) if value and value != "-" else value
    else:
        ok = hint in (bool, str) and type(value) is hint and "\x00" not in str(value)
    return value if ok else reading.complain(where, f"expected {expected(hint)}, found {_show(value)}")


def _unknown(name: str, keys: dict[str, Any]) -> str:
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
