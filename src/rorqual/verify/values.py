"""Python values as JSON, both ways, by content and not by what their classes say of themselves.

Code that is not trusted returns objects whose `__eq__`, `__repr__` or `__iter__` may lie. `encode` reads them with the
methods of the built-in types only; what is no built-in value becomes `Opaque` and equals nothing. `same`
compares what `decode` made, in a process where only trusted code runs.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 200  # of what comes back; each process that reads it on would need as much stack
MAX_DIGITS = 4000  # of a whole number in a result; reading more takes time that grows with its square


@dataclass(frozen=True, eq=False)
class Opaque:
    """A value without content of its own here. Equal to nothing, itself included."""

    kind: str

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def encode(value: Any) -> Any:
    """`value` as what `json.dumps` takes. Raises RecursionError for what is nested too deep."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if issubclass(kind, str):
        return str.__str__(value) if kind is str else "".join(str.__iter__(value))
    if issubclass(kind, int):
        plain = int.__index__(value)
        return plain if abs(plain) < 2**53 else {"int": hex(plain)}
    if issubclass(kind, float):
        real = float.__float__(value)
        return real if math.isfinite(real) else {"float": float.__repr__(real)}
    if issubclass(kind, list):
        return [encode(v) for v in list.__iter__(value)]
    if issubclass(kind, tuple):
        return {"tuple": [encode(v) for v in tuple.__iter__(value)]}
    if issubclass(kind, dict):
        return {"dict": [[encode(k), encode(v)] for k, v in dict.items(value)]}
    for base in (set, frozenset):
        if issubclass(kind, base):
            return {base.__name__: [encode(v) for v in base.__iter__(value)]}
    if issubclass(kind, (bytes, bytearray)):
        return {"bytes": bytes(memoryview(value)).hex()}
    if issubclass(kind, complex):
        return {"complex": [encode(complex.real.__get__(value)), encode(complex.imag.__get__(value))]}
    return {"opaque": str(kind.__name__)[:100]}


def decode(tree: Any) -> Any:
    """What `encode` was given. Raises ValueError, TypeError or RecursionError for any other tree."""
    if isinstance(tree, list):
        return [decode(v) for v in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise ValueError("not an encoded value")
    ((kind, body),) = tree.items()
    if kind == "opaque":
        return Opaque(str(body))
    if kind == "int":
        if not isinstance(body, str) or len(body) > MAX_DIGITS:
            raise ValueError("a whole number too long")
        return int(body, 16)
    if kind == "float":
        return float({"inf": "inf", "-inf": "-inf", "nan": "nan"}[body])
    if kind == "bytes":
        return bytes.fromhex(body)
    if not isinstance(body, list):
        raise ValueError(f"{kind}: not a list")
    if kind == "dict":
        return {decode(k): decode(v) for k, v in body}
    if kind == "complex":
        real, imag = map(decode, body)
        try:
            return complex(real, imag)
        except OverflowError as e:
            raise ValueError("a complex number too large") from e
    makers: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
    if kind not in makers:
        raise ValueError(f"{kind}: unknown")
    return makers[kind](decode(v) for v in body)


def loads(text: str) -> Any:
    """JSON from an untrusted process: plain numbers of bounded length only, nested to a bounded depth."""
    tree = json.loads(text, parse_int=_whole, parse_constant=_refuse)
    level = [tree]
    for _ in range(MAX_DEPTH):
        inner = [
            node.values() if isinstance(node, dict) else node
            for node in level
            if isinstance(node, (dict, list))
        ]
        level = [value for values in inner for value in values]
        if not level:
            return tree
    raise ValueError(f"nested deeper than {MAX_DEPTH}")


def same(found: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Equality of decoded values. A list is no tuple and True is not 1; 2.0 equals 2. Floats may differ by
    `tolerance`, relative or absolute."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, (int, float)) and isinstance(expected, (int, float)):
        if isinstance(found, int) and isinstance(expected, int):
            return found == expected
        try:
            return found == expected or (
                tolerance > 0 and math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
            )
        except OverflowError:
            return False
    if type(found) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(
            same(f, e, tolerance) for f, e in zip(found, expected, strict=True)
        )
    if isinstance(expected, dict):
        return {(type(k), k) for k in found} == {(type(k), k) for k in expected} and all(
            same(found[k], v, tolerance) for k, v in expected.items()
        )
    return bool(found == expected)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError("a whole number too long")
    return int(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text}: not JSON")
