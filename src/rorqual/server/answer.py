"""From an engine's deltas of one completion to events: thought, text, tool calls, the end, what was used."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rorqual.engine.request import Delta, TokenLogprob
from rorqual.server.events import CallEnd, Event, Finish, Reason, Reasoning, Text
from rorqual.server.reasoning import Piece, ReasoningSplitter
from rorqual.server.tool_parser import ToolSplitter
from rorqual.server.tools import ToolFormat


@dataclass(frozen=True)
class Reading:
    """How the raw output of a turn is to be read. None: that part is not looked for."""

    thought_opened: bool | None = None  # None: a model that does not think
    tools: ToolFormat | None = None
    document: bool = False  # what does not begin with a call is a document, which may quote one
    one_call: bool = False  # stop counting after the first call
    named: bool = False  # a forced function finishes with "stop", as OpenAI's does


class Answer:
    """One completion being read."""

    def __init__(self, reading: Reading, token_bytes: Callable[[int], bytes], eos_ids: Sequence[int]) -> None:
        self._reading = reading
        self._token_bytes = token_bytes
        self._eos_ids = frozenset(eos_ids)
        opened = reading.thought_opened
        self._thought = ReasoningSplitter(opened=opened) if opened is not None else None
        self._tools = (
            ToolSplitter(reading.tools, document=reading.document) if reading.tools is not None else None
        )
        self._raw = 0  # bytes of text received
        self._token_ends = 0  # bytes of tokens received
        self._starts: list[int] = []  # where in the raw output each token begins
        self._logprobs: deque[tuple[int, int, TokenLogprob]] = deque()  # first and last byte of a token
        self.finished = False

    @property
    def completion_tokens(self) -> int:
        """Tokens received."""
        return len(self._starts)

    @property
    def reasoning_tokens(self) -> int:
        """Tokens that belong to the thought, its closing tag included."""
        if self._thought is None:
            return 0
        end = self._thought.thought_end
        if end is None:
            return len(self._starts) if self._thought.thinking else 0
        return sum(start < end for start in self._starts)

    def push(self, delta: Delta) -> list[Event]:
        """The events of one delta. The last ends with `Finish`."""
        self._count(delta)
        self._raw += len(delta.text.encode())
        events = self._read(delta.text)
        if delta.finish_reason is not None:
            self.finished = True
            events += self._flush(delta)
            events.append(Finish(self._reason(delta), delta.stop_text))
        return events

    def _count(self, delta: Delta) -> None:
        logprobs = iter(delta.logprobs)
        for token_id in delta.token_ids:
            self._starts.append(self._token_ends)
            logprob = next(logprobs, None)
            if token_id in self._eos_ids:
                continue
            end = self._token_ends + len(self._token_bytes(token_id))
            if logprob is not None:
                self._logprobs.append((self._token_ends, end, logprob))
            self._token_ends = end

    def _read(self, text: str) -> list[Event]:
        if not text:
            return []
        if self._thought is None:
            return self._content(text, self._raw)
        return [event for piece in self._thought.feed(text) for event in self._piece(piece)]

    def _flush(self, delta: Delta) -> list[Event]:
        events: list[Event] = []
        if self._thought is not None:
            events += [event for piece in self._thought.finish() for event in self._piece(piece)]
        if self._tools is not None:
            events += [
                Text(e.text, self._take_logprobs(self._raw))
                for e in self._tools.finish()
                if isinstance(e, Text)
            ]
        # Bytes that never became a character still have their tokens' log-probabilities.
        rest = self._take_logprobs(self._token_ends) if delta.stop_text is None else []
        if rest:
            last = next((e for e in reversed(events) if isinstance(e, (Text, Reasoning))), None)
            if last is None:
                last = Reasoning("") if self._thought is not None and self._thought.thinking else Text("")
                events.append(last)
            last.logprobs += rest
        return events

    def _piece(self, piece: Piece) -> list[Event]:
        begin = piece.end - len(piece.text.encode())
        while self._logprobs and self._logprobs[0][1] <= begin:
            self._logprobs.popleft()  # a tag or the white space around it
        if piece.section == "reasoning":
            return [Reasoning(piece.text, self._take_logprobs(piece.end))]
        return self._content(piece.text, piece.end)

    def _content(self, text: str, end: int) -> list[Event]:
        if self._tools is None:
            return [Text(text, self._take_logprobs(end))]
        if self._reading.one_call and self._tools.complete:
            return []
        events = self._tools.feed(text)
        if self._reading.one_call:
            events = _up_to_first_call(events)
        end -= len(self._tools.held.encode())
        for event in events:
            taken = self._take_logprobs(end)
            if isinstance(event, Text):
                event.logprobs = taken
        return events

    def _take_logprobs(self, end: int) -> list[TokenLogprob]:
        """Those of the tokens that begin before byte `end` and were not taken yet."""
        out = []
        while self._logprobs and self._logprobs[0][0] < end:
            out.append(self._logprobs.popleft()[2])
        return out

    def _reason(self, delta: Delta) -> Reason:
        if delta.finish_reason == "length":
            return "length"
        if self._tools is not None and self._tools.complete and not self._reading.named:
            return "tool_calls"
        return "stop"


def _up_to_first_call(events: list[Event]) -> list[Event]:
    for at, event in enumerate(events):
        if isinstance(event, CallEnd):
            return events[: at + 1]
    return events
