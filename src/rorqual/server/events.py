"""What a completion turns out to be, piece by piece: the same events make a stream and a whole answer."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from rorqual.engine.request import TokenLogprob


@dataclass
class Text:
    """A piece of the answer."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class Reasoning:
    """A piece of the thought before the answer."""

    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int
    name: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass
class CallEnd:
    """A call's arguments are whole, valid JSON."""

    index: int


Reason = Literal["stop", "length", "tool_calls"]


@dataclass
class Finish:
    """The end of one choice. `stop_text`: the stop string that ended it."""

    reason: Reason
    stop_text: str | None = None


Event = Text | Reasoning | CallStart | CallArguments | CallEnd | Finish
