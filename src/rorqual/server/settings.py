"""Everything about a server that is not its models."""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Limits and manners of a server. Sizes are bytes, times seconds."""

    max_body_bytes: int = 16 * 2**20
    max_open: int = 1024  # completions queued and running, for each engine
    keep_alive_s: float = 15.0  # a comment (stream) or a blank line when nothing was sent for so long
    drain_s: float = 30.0  # after SIGTERM, for what has begun
    request_timeout_s: float | None = None  # from arrival to the last token
    write_timeout_s: float = 120.0  # a reader that takes nothing for so long is dropped
    # From so many requests in a step on, each gets a chunk every `gather_s` seconds with what came, its first token and
    # its end at once: a chunk costs more than a token. 0: every token by itself
    gather_from: int = 16
    gather_s: float = 0.2
    allow_origins: tuple[str, ...] = ()  # browsers' origins that may call from another site; "*" for all
    reasoning_alias: bool = False  # `reasoning` beside `reasoning_content`

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_open"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("keep_alive_s", "request_timeout_s", "write_timeout_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name}={value}: must be above 0")
        for name in ("drain_s", "gather_from", "gather_s"):
            if not (value := getattr(self, name)) >= 0:
                raise ConfigError(f"{name}={value}: must be 0 or more")
