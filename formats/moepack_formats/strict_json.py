"""JSON that is exactly what was asked for: no duplicate keys, no unknown fields, no surprises."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from typing import Any, NoReturn, TypeVar

from .errors import FormatError

T = TypeVar("T")

MAX_INTEGER = 2**63 - 1
_MAX_DIGITS = 20
_MAX_NAME = 200
# Neither a long value nor a deep one may cost more than the line it is shown in.
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def loads(data: bytes, where: object) -> Any:
    """Parse UTF-8 JSON that is one object, with no leading space and no key twice.

    Raises:
        FormatError: It is not; the message names ``where``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise FormatError(f"key {_short(key)} stands twice in the JSON", where=where)
                seen.add(key)
        return result

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS or digits == "-0":
            raise FormatError("JSON holds an impossible integer", where=where, got=_short(digits))
        return int(digits)

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    def refuse(constant: str) -> NoReturn:
        raise FormatError(f"JSON holds {_short(constant)}", where=where, wanted="finite numbers")

    if not data.startswith(b"{"):
        raise FormatError("JSON does not start with '{'", where=where, got=repr(data[:8]))
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_int=integer,
            parse_float=finite,
            parse_constant=refuse,
        )
        if "\\u" in text:
            # Half of a surrogate pair is a string that no file name or output can hold.
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise FormatError("JSON is not UTF-8", where=where, got=f"byte {error.start}") from None
    except UnicodeEncodeError:
        raise FormatError("JSON holds half of a surrogate pair", where=where) from None
    except RecursionError:
        raise FormatError("JSON is nested too deeply", where=where) from None
    except ValueError as error:
        raise FormatError(f"JSON does not parse: {error}", where=where) from None


def dumps(value: object, indent: int | None = None) -> str:
    """JSON of plain values or dataclasses, in field order, ASCII only: the same bytes each time."""

    def plain(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
        raise TypeError(f"{type(item).__name__} is not JSON")

    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, default=plain, indent=indent, separators=separators, allow_nan=False)


def decode(kind: type[T], value: Any, where: str) -> T:
    """Turn parsed JSON into the (nested) dataclass ``kind``, checking every field.

    Raises:
        FormatError: A field is missing, unknown or of another type; the message names it.
    """
    return typing.cast(T, _decode(kind, value, where))


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        _check(isinstance(value, list), "a list", value, where)
        if arguments[-1] is not Ellipsis:
            _check(len(value) == len(arguments), f"{len(arguments)} items", value, where)
            kinds = arguments
        else:
            kinds = (arguments[0],) * len(value)
        pairs = enumerate(zip(kinds, value, strict=True))
        return tuple(_decode(k, v, _inside(where, f"[{i}]")) for i, (k, v) in pairs)
    if origin is dict:
        _check(isinstance(value, dict), "an object", value, where)
        kind = arguments[1]
        return {key: _decode(kind, v, _inside(where, f".{key}")) for key, v in value.items()}
    if kind is int:
        exact = isinstance(value, int) and not isinstance(value, bool)
        _check(exact and 0 <= value <= MAX_INTEGER, "an integer from 0 to 2^63-1", value, where)
        return value
    _check(isinstance(value, kind), f"a {kind.__name__}", value, where)
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    _check(isinstance(value, dict), "an object", value, where)
    hints, required = _fields(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise FormatError(f"unknown field {_short(unknown[0])}", where=where)
    for name in required:
        if name not in value:
            raise FormatError(f"field {name!r} is missing", where=where)
    return kind(**{n: _decode(hints[n], v, _inside(where, f".{n}")) for n, v in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Types of a dataclass's fields, and the names of those without a default."""
    fields = dataclasses.fields(kind)
    required = tuple(field.name for field in fields if field.default is dataclasses.MISSING)
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields}, required


def _inside(where: str, step: str) -> str:
    """Where a member stands. Cut: a name of megabytes would be copied for every number in it."""
    return (where if len(where) <= _MAX_NAME else f"{where[:_MAX_NAME]}...") + step[:_MAX_NAME]


def _check(condition: bool, wanted: str, got: Any, where: str) -> None:
    if not condition:
        raise FormatError("a field has the wrong type", where=where, wanted=wanted, got=_short(got))


def _short(value: Any) -> str:
    return _REPR.repr(value)
