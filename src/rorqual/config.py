"""Frozen dataclasses from files and dotted overrides: a default is written once, in the dataclass.

    config = load_config(TrainConfig, file="recipes/small.toml", overrides=["optim.lr=0.01", "steps=200"])

A key that the dataclass does not have, or a value of another type, is a `ConfigError` naming the dotted key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rorqual.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


def load_config(cls: type[T], file: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from an optional TOML or JSON file and `dotted.key=value` overrides (which win)."""
    tree: dict[str, Any] = read_tree(Path(file)) if file is not None else {}
    for override in overrides:
        key, sep, text = override.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"override {override!r}: write it as dotted.key=value")
        put(tree, key.strip(), scalar(text.strip()))
    return from_dict(cls, tree)


def read_tree(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as a tree of plain values."""
    if not path.is_file():
        raise ConfigError(f"config file {path.resolve()}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        tree = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (UnicodeDecodeError, ValueError) as e:
        raise ConfigError(f"config file {path.resolve()}: not valid {path.suffix or 'TOML'} ({e})") from e
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config file {path.resolve()}: the top level must be a table, not {type(tree).__name__}"
        )
    return tree


def from_dict(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build a (nested) dataclass, refusing unknown keys and values of another type."""
    assert dataclasses.is_dataclass(cls)
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    kwargs: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{where}.{key}" if where else key
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(names)}"
            raise ConfigError(f"{dotted}={value!r}: unknown key{hint}")
        kwargs[key] = _coerce(hints[key], value, dotted)
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in kwargs]
    if missing:
        raise ConfigError(f"{where or cls.__name__}: missing {', '.join(missing)}")
    return cls(**kwargs)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that `from_dict` and JSON take back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return str(value) if isinstance(value, Path) else value

    tree = plain(config)
    assert isinstance(tree, dict)
    return tree


def put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set `a.b.c` in a tree of dictionaries; raises ConfigError where `a` or `a.b` is a value."""
    *parents, leaf = dotted.split(".")
    for depth, name in enumerate(parents):
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(
                f"{'.'.join(parents[: depth + 1])}={child!r}: a value, so {dotted!r} has no place"
            )
        tree = child
    tree[leaf] = value


def scalar(text: str) -> Any:
    """`1`, `1e-3`, `true`, `null`, `[1, 2]`, `{"a": 1}` as JSON reads them; anything else is a string."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _coerce(hint: Any, value: Any, dotted: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in args:
            if option is type(None):
                continue
            try:
                return _coerce(option, value, dotted)
            except ConfigError as e:
                errors.append(e)
        raise errors[0] if len(errors) == 1 else ConfigError(f"{dotted}={value!r}: must be {_name(hint)}")
    if origin is Literal:
        if value not in args or isinstance(value, bool) != any(
            isinstance(a, bool) for a in args if a == value
        ):
            raise ConfigError(f"{dotted}={value!r}: must be one of {', '.join(map(repr, args))}")
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{dotted}={value!r}: must be a table")
        return from_dict(hint, value, dotted)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{dotted}={value!r}: must be a list")
        if origin is tuple and args and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise ConfigError(f"{dotted}={value!r}: must have {len(args)} items")
            return tuple(
                _coerce(a, v, f"{dotted}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True))
            )
        item = args[0] if args else Any
        items = [_coerce(item, v, f"{dotted}[{i}]") for i, v in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{dotted}={value!r}: must be a table")
        return {k: _coerce(args[1], v, f"{dotted}.{k}") if args else v for k, v in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{dotted}={value!r}: must be a finite number")
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is bool or not isinstance(value, bool):
        plain = origin or hint
        if isinstance(plain, type) and isinstance(value, plain):
            return value
    raise ConfigError(f"{dotted}={value!r}: must be {_name(hint)}, not {type(value).__name__}")


def _name(hint: Any) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}.get(
        getattr(hint, "__name__", ""), str(hint).replace("typing.", "")
    )
