"""What is evaluated and how."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.errors import ConfigError

HUMANEVAL = "humaneval"


@dataclass(frozen=True)
class EvalConfig:
    """Settings that make two results comparable: a comparison needs the same problems, so the same of these."""

    tasks: tuple[str, ...] = ()  # NAME or NAME:option=value,option=value of the task families, or humaneval
    text: tuple[Path, ...] = ()  # text files for bits per byte
    data: tuple[Path, ...] = ()  # folders of `rorqual data build`, whose held-out split is scored
    problems: int = 200  # of each family, or all that it has; of humaneval the first so many of its 164
    samples: int = 1  # completions of each problem; above 1 they give pass@k
    difficulty: int | None = None  # a family's level; none: its hardest
    seed: int = 1234
    temperature: float = 0.0
    max_tokens: int = 256
    chat: Literal["auto", "yes", "no"] = "auto"  # auto: through the chat template where the model has one
    window: int = 1024  # tokens scored in one piece for bits per byte, half of them context

    def __post_init__(self) -> None:
        for name in ("problems", "samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.window < 2:
            raise ConfigError(f"window={self.window}: must be 2 or more")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or more")
        if self.samples > 1 and self.temperature == 0:
            raise ConfigError(
                f"samples={self.samples} at temperature=0: all would be the same; give --temperature 0.8, say"
            )


def parse_task(spec: str) -> tuple[str, dict[str, Any]]:
    """`sums:terms=3,style=words` as a name and options."""
    name, _, rest = spec.partition(":")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, text = part.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"task {spec!r}: {part!r}: write NAME:option=value,option=value")
        try:
            options[key.strip()] = json.loads(text)
        except ValueError:
            options[key.strip()] = text.strip()
    return name.strip(), options
