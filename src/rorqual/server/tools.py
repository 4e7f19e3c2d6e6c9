"""Tool calls in the forms that models write them: one definition for the prompt, the grammar and the parser.

- `Hermes`: `<tool_call>` around `{"name": …, "arguments": …}` (Qwen, Hermes, and any model without a form of
  its own, for which the tools are described in the system message). - `DeepSeek`: the full-width markers of
  DeepSeek-V3 and R1 (a fenced JSON block) and of V3.1 (bare JSON).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual.server.events import CallArguments, CallEnd, CallStart, Event, Text
from rorqual.server.grammar import inline_schema, supported
from rorqual.server.json_scanner import JsonScanner
from rorqual.server.markers import partial_end

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class ToolSpec:
    """A function on offer. `strict`: its schema must be kept or the request refused."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def schema(self) -> dict[str, Any]:
        """What its arguments must look like; always an object. A schema that no grammar can keep falls back
        to any object, which only a tool that is not strict reaches.
        """
        schema = self.parameters or _ANY_OBJECT
        if "type" not in schema and "$ref" not in schema:
            schema = {"type": "object", **schema}
        return schema if supported(schema) else _ANY_OBJECT

    def openai(self) -> dict[str, Any]:
        """As a chat template expects it."""
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters or _ANY_OBJECT,
        }
        return {"type": "function", "function": function}


class ToolFormat(Protocol):
    """How one family of models writes calls."""

    begin: str  # text that opens a region of calls
    template_lists_tools: bool  # whether the family's own templates also list the tools on offer

    def describe(self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        """Messages for a template that knows no tools: the tools, calls and results as plain turns."""

    def history(self, name: str, arguments: str) -> dict[str, Any]:
        """An earlier call as a template that knows tools expects it."""

    def calls(self, tools: Sequence[ToolSpec], *, many: bool, opened: bool) -> str:
        """A Lark grammar of one call, or of one or more; `opened`: `begin` has been written already."""

    def parser(self) -> CallParser:
        """A parser of what follows `begin`."""


class CallParser(Protocol):
    """Reads a region of calls after its opening."""

    def feed(self, text: str) -> tuple[list[Event], str | None]:
        """Events so far; and, once the region is over, the text after it (None until then)."""


class Hermes:
    """`<tool_call>\\n{"name": "f", "arguments": {…}}\\n</tool_call>`, one region a call."""

    begin = "<tool_call>"
    template_lists_tools = True
    end = "</tool_call>"

    def write(self, name: str, arguments: str) -> str:
        """One call as the model would write it."""
        quoted = json.dumps(name, ensure_ascii=False)
        return f'{self.begin}\n{{"name": {quoted}, "arguments": {arguments}}}\n{self.end}'

    def describe(self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        out = [self._plain(message) for message in messages]
        if tools:
            lines = [json.dumps(tool.openai(), ensure_ascii=False) for tool in tools]
            text = _INSTRUCTIONS.format(
                tools="\n".join(lines), example=self.write("NAME", '{"ARGUMENT": "VALUE"}')
            )
            if out and out[0]["role"] == "system":
                out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
            else:
                out.insert(0, {"role": "system", "content": text})
        return out

    def _plain(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "tool":
            return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        calls = message.get("tool_calls")
        if not calls:
            return message
        written = "\n".join(self.write(c["function"]["name"], c["function"]["arguments"]) for c in calls)
        content = f"{message['content']}\n{written}" if message.get("content") else written
        return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": content}

    def history(self, name: str, arguments: str) -> dict[str, Any]:
        return {"name": name, "arguments": _parsed(arguments)}

    def calls(self, tools: Sequence[ToolSpec], *, many: bool, opened: bool) -> str:
        bodies = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.name}, "arguments": tool.schema()},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        begin, end = _lark(self.begin + "\n"), _lark("\n" + self.end)
        rest = f' ("\\n" {begin} body {end})*' if many else ""
        first = _lark("\n") if opened else begin
        rules = [
            f"start: {first} body {end}{rest}",
            "body: " + " | ".join(f"body_{i}" for i in range(len(bodies))),
        ]
        rules += [f"body_{i}: {inline_schema(_lift_definitions(body))}" for i, body in enumerate(bodies)]
        return "\n".join(rules)

    def parser(self) -> CallParser:
        return _HermesParser(self.end)


class DeepSeek:
    """`<｜tool▁calls▁begin｜>` around calls; `fenced` is the form of V3 and R1, bare that of V3.1."""

    begin = "<｜tool▁calls▁begin｜>"
    template_lists_tools = False
    end = "<｜tool▁calls▁end｜>"
    call_begin = "<｜tool▁call▁begin｜>"
    call_end = "<｜tool▁call▁end｜>"
    separator = "<｜tool▁sep｜>"

    def __init__(self, *, fenced: bool) -> None:
        self.fenced = fenced

    def describe(self, messages: list[dict[str, Any]], tools: Sequence[ToolSpec]) -> list[dict[str, Any]]:
        """The published templates write calls and results, but no list of tools: it goes in the system
        message.
        """
        if not tools:
            return messages
        listing = "\n".join(json.dumps(tool.openai()["function"], ensure_ascii=False) for tool in tools)
        text = f"## Tools\nYou may call these functions:\n{listing}"
        out = list(messages)
        if out and out[0]["role"] == "system":
            out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{text}"}
        else:
            out.insert(0, {"role": "system", "content": text})
        return out

    def history(self, name: str, arguments: str) -> dict[str, Any]:
        return {"name": name, "arguments": arguments}

    def calls(self, tools: Sequence[ToolSpec], *, many: bool, opened: bool) -> str:
        first = "" if opened else _lark(self.begin)
        rules = [
            f"start: {first} call{' (between call)*' if many else ''} {_lark(self.end)}",
            f"between: {_lark(chr(10))}?",
            "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
        ]
        for i, tool in enumerate(tools):
            if self.fenced:
                head = f"{self.call_begin}function{self.separator}{tool.name}\n```json\n"
                tail = f"\n```{self.call_end}"
            else:
                head, tail = f"{self.call_begin}{tool.name}{self.separator}", self.call_end
            rules.append(f"call_{i}: {_lark(head)} arguments_{i} {_lark(tail)}")
            rules.append(f"arguments_{i}: {inline_schema(tool.schema())}")
        return "\n".join(rules)

    def parser(self) -> CallParser:
        return _DeepSeekParser(self)


HERMES = Hermes()
_INSTRUCTIONS = """# Tools
You may call one or more functions to help with the user's request. Their descriptions are JSON, one a line:
<tools>
{tools}
</tools>
To call a function, write its name and arguments as JSON between these tags and nothing after them:
{example}"""


def format_of(template: str) -> tuple[ToolFormat, bool]:
    """The form that a chat template writes, and whether the template itself writes tools (else `describe`
    does).
    """
    if DeepSeek.begin in template:
        return DeepSeek(fenced="```json" in template), "tools" in template
    return HERMES, Hermes.begin in template and "tools" in template


class ToolSplitter:
    """Splits an answer into text and calls, whatever the cuts between the pieces it is fed.

    White space next to a call belongs to neither. A call that is not valid JSON is closed where it goes
    wrong: its markup never becomes text, and it does not count as a call.
    """

    def __init__(self, form: ToolFormat) -> None:
        self._form = form
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


class _HermesParser:
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
            arguments = _parsed(arguments)
        if isinstance(arguments, dict) and isinstance(call.get("name"), str):
            text = json.dumps(arguments, ensure_ascii=False)
            out += [CallStart(0, call["name"]), CallArguments(0, text), CallEnd(0)]


class _DeepSeekParser:
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


def _lark(text: str) -> str:
    """A literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _known_name(quoted: str) -> bool:
    try:
        return isinstance(json.loads(quoted), str)
    except ValueError:
        return False


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def _lift_definitions(body: dict[str, Any]) -> dict[str, Any]:
    """References of a nested schema (`#/$defs/x`) resolve at the root: definitions move there."""
    arguments = body["properties"]["arguments"]
    lifted = {key: arguments[key] for key in ("$defs", "definitions") if key in arguments}
    return {**body, **lifted}
