"""Tool calls found in an answer as it streams, whatever the cuts between its pieces."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Protocol

from rorqual.server.events import CallArguments, CallEnd, CallStart, Event, Text
from rorqual.server.json_scanner import JsonScanner
from rorqual.server.markers import partial_end

if TYPE_CHECKING:
    from rorqual.server.tools import DeepSeek, ToolFormat


class CallParser(Protocol):
    """Reads a region of calls after its opening."""

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        """Events so far; and, once the region is over, the text after it (None until then)."""


class ToolSplitter:
    """Splits an answer into text and calls, whatever the cuts between the pieces it is fed.

    White space next to a call belongs to neither. A call that is not valid JSON is closed where it goes
    wrong: its markup never becomes text, and it does not count as a call. With `document` an answer that does not
    begin with a call is text to its end.
    """

    def __init__(self, form: ToolFormat, *, document: bool = False) -> None:
        self._form = form
        self._document: bool | None = None if document else False  # None: the beginning will tell
        self._held = ""
        self._parser: CallParser | None = None
        self._calls_seen = False
        self._next_index = 0
        self.complete = 0  # calls that ended as valid JSON

    @property
    def held(self) -> str:
        """Text that is not yet known to be text."""
        return self._held

    def feed(self, text: str) -> list[Event]:
        """The next piece of the answer."""
        out: list[Event] = []
        while text:
            if self._parser is None:
                text = self._plain(text, out)
                continue
            events, rest = self._parser.feed(text)
            out += [self._count(e) for e in events]
            if rest is None:
                return out
            self._parser, text = None, rest
        return out

    def finish(self) -> list[Event]:
        """The answer is over: what was held back was text after all, unless white space after a call."""
        held, self._held = self._held, ""
        if held and not (self._calls_seen and not held.strip()):
            return [Text(held)]
        return []

    def _plain(self, text: str, out: list[Event]) -> str:
        """Emit text up to a call; returns what follows the call's opening."""
        self._held += text
        if self._document is None:
            start = self._held.lstrip()
            if self._form.begin.startswith(start) and start != self._form.begin:
                return ""
            self._document = not start.startswith(self._form.begin)
        if self._document:
            out.append(Text(self._held))
            self._held = ""
            return ""
        at = self._held.find(self._form.begin)
        if at >= 0:
            before, rest = self._held[:at].rstrip(), self._held[at + len(self._form.begin) :]
            if before:
                out.append(Text(before))
            self._held = ""
            self._parser, self._calls_seen = self._form.parser(), True
            return rest
        keep = partial_end(self._held, self._form.begin)
        sure = self._held[: len(self._held) - keep].rstrip()
        if sure:
            out.append(Text(sure))
            self._held = self._held[len(sure) :]
        return ""

    def _count(self, event: Event) -> Event:
        if isinstance(event, CallStart):
            event.index = self._next_index
            self._next_index += 1
        elif isinstance(event, (CallArguments, CallEnd)):
            event.index = self._next_index - 1
            self.complete += isinstance(event, CallEnd)
        return event


class _Call:
    """One call whose name is known: arguments are passed on as they come, while they are valid JSON."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()
        self.over = False

    def feed(self, text: str, out: list[Event]) -> str:
        """Returns the text after the arguments."""
        used = self._scanner.feed(text)
        piece = text[:used]
        if piece:
            out.append(CallArguments(0, piece))
        if self._scanner.done:
            self.over = True
            out.append(CallEnd(0))
        self.over = self.over or self._scanner.bad
        return text[used:]


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


class HermesParser:
    def __init__(self, end: str) -> None:
        self._end = end
        self._head = ""
        self._body = JsonScanner()
        self._call: _Call | None = None
        self._tail = ""
        self._skipping = False

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        out: list[Event] = []
        if not self._skipping and self._call is None:
            text = self._read_head(text, out)
        if self._call is not None and not self._call.over:
            text = self._call.feed(text, out)
            self._skipping = self._call.over
        if not self._skipping:
            return out, None
        self._tail += text
        at = self._tail.find(self._end)
        if at >= 0:
            return out, self._tail[at + len(self._end) :]
        self._tail = self._tail[-len(self._end) :]
        return out, None

    def _read_head(self, text: str, out: list[Event]) -> str:
        """Until the name is known and the arguments begin; a body in another order is read whole."""
        self._head += text
        match = _HEAD.match(self._head)
        if match and _known_name(match.group(1)):
            out.append(CallStart(0, json.loads(match.group(1))))
            self._call = _Call()
            return self._head[match.end() :]
        used = self._body.feed(text)
        if self._body.done or self._body.bad:
            self._skipping = True
            if self._body.done:
                self._whole(self._head[: len(self._head) - len(text) + used], out)
            return text[used:]
        return ""

    def _whole(self, body: str, out: list[Event]) -> None:
        call = json.loads(body)
        arguments = call.get("arguments", call.get("parameters")) if isinstance(call, dict) else None
        if isinstance(arguments, str):
            arguments = parsed(arguments)
        if isinstance(arguments, dict) and isinstance(call.get("name"), str):
            text = json.dumps(arguments, ensure_ascii=False)
            out += [CallStart(0, call["name"]), CallArguments(0, text), CallEnd(0)]


class DeepSeekParser:
    def __init__(self, form: DeepSeek) -> None:
        self._form = form
        self._buffer = ""
        self._state = "between"  # between, head, arguments, tail
        self._call = _Call()
        separator = re.escape(form.separator)
        name = r"\s*([^<\n]+?)\s*"
        pattern = (
            rf"[^<]*{separator}{name}```json\s*(?=\{{)" if form.fenced else rf"{name}{separator}\s*(?=\{{)"
        )
        self._head = re.compile(pattern)

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        out: list[Event] = []
        self._buffer += text
        while True:
            if self._state == "arguments":
                self._buffer = self._call.feed(self._buffer, out)
                if not self._call.over:
                    return out, None
                self._state = "tail"
            elif self._state == "head" and (match := self._head.match(self._buffer)):
                out.append(CallStart(0, match.group(1)))
                self._buffer = self._buffer[match.end() :]
                self._call, self._state = _Call(), "arguments"
            else:
                found = self._next_marker()
                if found is None:
                    return out, None
                if found == self._form.end:
                    return out, self._buffer
                self._state = "head" if found == self._form.call_begin else "between"

    def _next_marker(self) -> str | None:
        """Skip past the next marker and say which it was; so goes a head that never became a call."""
        markers = (self._form.call_begin, self._form.call_end, self._form.end)
        places = [(at, m) for m in markers if (at := self._buffer.find(m)) >= 0]
        if not places:
            if self._state != "head":
                self._buffer = self._buffer[-max(map(len, markers)) :]
            return None
        at, marker = min(places)
        self._buffer = self._buffer[at + len(marker) :]
        return marker


def _known_name(quoted: str) -> bool:
    try:
        return isinstance(json.loads(quoted), str)
    except ValueError:
        return False


def parsed(arguments: str) -> Any:
    """JSON text as a value; text that is none stays text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments
