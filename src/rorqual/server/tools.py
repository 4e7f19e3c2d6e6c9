"""Tool calls in the forms that models write them: the prompt, the grammar and (with tool_parser) the parser.

- `Hermes`: `<tool_call>` around `{"name": …, "arguments": …}` (Qwen, Hermes, and any model without a form of
  its own, for which the tools are described in the system message). - `DeepSeek`: the full-width markers of
  DeepSeek-V3 and R1 (a fenced JSON block) and of V3.1 (bare JSON).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual.server.json_schema import inline_schema, supported
from rorqual.server.tool_parser import CallParser, DeepSeekParser, HermesParser, parsed

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
        """Lark rules of which `calls` is one call, or one or more; `opened`: `begin` has been written already.

        Arguments are documents of their own, so that references of their schemas (`#/…`) mean what they say.
        """

    def parser(self) -> CallParser:
        """A parser of what follows `begin`."""


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
        return {"name": name, "arguments": parsed(arguments)}

    def calls(self, tools: Sequence[ToolSpec], *, many: bool, opened: bool) -> str:
        begin, end = _lark(self.begin + "\n"), _lark("\n" + self.end)
        rest = f' ("\\n" {begin} body {end})*' if many else ""
        first = _lark("\n") if opened else begin
        rules = [
            f"calls: {first} body {end}{rest}",
            "body: " + " | ".join(f"body_{i}" for i in range(len(tools))),
            'blank: " "?',
        ]
        for i, tool in enumerate(tools):
            name = _lark(json.dumps(tool.name, ensure_ascii=False) + ",")
            head = f"{_lark(_NAME)} blank {name} blank {_lark(_ARGUMENTS)} blank"
            rules.append(f'body_{i}: {head} arguments_{i} "}}"')
            rules.append(f"arguments_{i}: {inline_schema(tool.schema())}")
        return "\n".join(rules)

    def parser(self) -> CallParser:
        return HermesParser(self.end)


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
            f"calls: {first} call{' (between call)*' if many else ''} {_lark(self.end)}",
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
        return DeepSeekParser(self)


HERMES = Hermes()
_NAME, _ARGUMENTS = '{"name":', '"arguments":'
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


def _lark(text: str) -> str:
    """A literal of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)
