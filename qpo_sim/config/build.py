"""From nested plain values to the typed dataclasses of a schema, with errors for people."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from qpo_sim.errors import InputError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], value: object, key: str = "") -> T:
    """Builds a dataclass from a mapping, checking names and types all the way down.

    Whole floats are taken for int fields (1e6), and plain numbers for str fields; nothing else is converted.

    Args:
      cls: dataclass; where it has subclasses, the value's `kind` picks one.
      value: mapping from field name to plain value.
      key: dotted name of the value, for errors; "" at the root.

    Raises:
      InputError: naming the full key, the value and the rule.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"{key or 'the configuration'} must hold named options, got {_show(value)}")
    cls = _of_kind(cls, value, key)
    known: dict[str, Field] = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for name in value:
        if name not in known:
            raise InputError(f"{_join(key, name)} is not an option: {did_you_mean(str(name), known)}")
    types_of = _hints(cls)
    built = {}
    for name, item in known.items():
        if name in value:
            built[name] = _convert(types_of[name], value[name], _join(key, name))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{_join(key, name)} is missing: give it a value")
    return cls(**built)


def is_in_schema(cls: type, key: str) -> bool:
    """Whether a dotted key could be set in a dataclass, whichever kinds are chosen; any name goes in a table."""
    possible: list[Any] = [cls]
    for part in key.split("."):
        possible = [inner for kind in possible for inner in _inside(kind, part)]
    return bool(possible)


def _inside(kind: Any, part: str) -> list[Any]:
    """Types that the part of this name can have inside a type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return [inner for arg in args for inner in _inside(arg, part)]
    if kind is Any:
        return [Any]
    if origin is dict:
        return [args[1]]
    if origin is tuple:
        return [args[0]] if part.isdigit() else []
    if isinstance(kind, type) and is_dataclass(kind):
        own = [_hints(kind)[part]] if part in _hints(kind) else []
        return own + [inner for sub in kind.__subclasses__() for inner in _inside(sub, part)]
    return []


def _of_kind(cls: type[T], value: Mapping, key: str) -> type[T]:
    kinds = {_hints(sub)["kind"].__args__[0]: sub for sub in cls.__subclasses__()}
    if not kinds:
        return cls
    kind = value.get("kind")
    if kind is None:
        raise InputError(f"{_join(key, 'kind')} is missing: {did_you_mean('', kinds)}")
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"{_join(key, 'kind')}={_show(kind)} is not known: {did_you_mean(str(kind), kinds)}")
    return kinds[kind]


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _join(key: str, name: object) -> str:
    # A message is one line, whatever a file names its keys.
    word = name if isinstance(name, str) and name.isprintable() else repr(name)
    return f"{key}.{word}" if key else word


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _convert(kind: Any, value: object, key: str) -> Any:
    if kind is Any:
        return _plain(value, key)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, key)
    if value is None:
        raise InputError(f"{key} is null: it must be {_describe(kind)}")
    if origin is Literal:
        return _convert_choice(args, value, key)
    if origin is dict:
        return _convert_table(args[1], value, key)
    if origin is tuple:
        return _convert_list(args, value, key)
    if isinstance(kind, type) and is_dataclass(kind):
        return build(kind, value, key)
    return _convert_scalar(kind, value, key)


def _plain(value: object, key: str) -> Any:
    # What a component's own builder will check: numbers, text, lists and tables of them.
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return _convert_table(Any, value, key)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _convert_list((Any, ...), value, key)
    if isinstance(value, int):
        return _convert_scalar(int, value, key)
    return _convert_scalar(str if isinstance(value, str) else float, value, key)


def _convert_union(args: tuple[Any, ...], value: object, key: str) -> Any:
    if value is None and type(None) in args:
        return None
    rest = [arg for arg in args if arg is not type(None)]
    tables = [arg for arg in rest if typing.get_origin(arg) is dict]
    others = [arg for arg in rest if arg not in tables]
    candidates = tables if isinstance(value, Mapping) and tables else others or tables
    return _convert(candidates[0], value, key)


def _convert_choice(options: tuple[Any, ...], value: object, key: str) -> Any:
    for option in options:
        # `True == 1`, so the type has to agree as well.
        if type(option) is type(value) and option == value:
            return option
    hint = did_you_mean(str(value), [str(option).lower() if isinstance(option, bool) else option for option in options])
    raise InputError(f"{key}={_show(value)} is not one of its choices: {hint}")


def _convert_table(kind: Any, value: object, key: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{key} must map names to values, such as {{BTC: 0.1}}, got {_show(value)}")
    for name in value:
        if not isinstance(name, str):
            raise InputError(f"{key} has the name {_show(name)}, which YAML does not read as text: put it in quotes")
        if not name or not name.isprintable():
            raise InputError(f"{key} has the name {_show(name)}: names must be printable text")
    return {name: _convert(kind, item, _join(key, name)) for name, item in value.items()}


def _convert_list(args: tuple[Any, ...], value: object, key: str) -> tuple:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InputError(f"{key} must be a list such as [a, b], got {_show(value)}")
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(value) != len(args):
        raise InputError(f"{key} must have {len(args)} entries, got {len(value)}: {_show(value)}")
    return tuple(
        _convert(kind, item, f"{key}[{place}]") for place, (kind, item) in enumerate(zip(args, value, strict=True))
    )


def _convert_scalar(kind: type, value: object, key: str) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and (is_number or (isinstance(value, str) and value.isprintable())):
        return str(value)
    if is_number and kind in (int, float):
        try:
            number = float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise InputError(f"{key} must be finite, got {_show(value)}")
        if kind is float:
            return number
        if number.is_integer():
            return int(value)  # type: ignore[arg-type]
    raise InputError(f"{key} must be {_describe(kind)}, got {_show(value)}")


def _describe(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return f"one of {', '.join(str(option) for option in typing.get_args(kind))}"
    if origin is dict:
        return "a table of names and values"
    if origin is tuple:
        return "a list"
    words = {bool: "true or false", str: "text on one line", int: "a whole number", float: "a number"}
    return words.get(kind, "a group of named options")
