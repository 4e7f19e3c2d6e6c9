"""A default is written once, in a dataclass; files and overrides are checked against it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from rorqual.config import from_dict, load_config, to_dict
from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 10
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    limit: int | None = None
    inner: Inner = field(default_factory=Inner)


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('name = "x"\nsteps = 3\n[inner]\nlr = 1\n')
    config = load_config(Outer, file, ["steps=5", "inner.betas=[0.8, 0.9]", "limit=7", "kind=b"])
    assert config == Outer("x", 5, "b", False, 7, Inner(1.0, (0.8, 0.9)))
    assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=5", "did you mean 'steps'"),
        ("steps=4.5", "steps=4.5: must be a whole number"),
        ("steps=four", "steps='four': must be a whole number"),
        ("steps=true", "steps=True: must be a whole number"),
        ("kind=c", "kind='c': must be one of 'a', 'b'"),
        ("inner.rate=1", "inner.rate=1: unknown key"),
        ("inner=3", "inner=3: must be a table"),
        ("steps.x=3", "steps={'x': 3}: must be a whole number"),
        ("inner.betas=[1]", "must have 2 items"),
        ("flag=1", "flag=1: must be true or false"),
        ("steps", "dotted.key=value"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_rule(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        load_config(Outer, None, ["name=x", override])


def test_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="missing name"):
        load_config(Outer)


@pytest.mark.parametrize("content", ["name = ", "[", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"c\.toml"):
        load_config(Outer, file)


def test_a_missing_file_is_named_by_its_whole_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "no.toml")):
        load_config(Outer, tmp_path / "no.toml")
