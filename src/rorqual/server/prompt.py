"""From a conversation to the tokens of a prompt, through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.errors import TokenizerError
from rorqual.server.faults import invalid
from rorqual.server.models import Served
from rorqual.server.protocol import Message, Tool
from rorqual.server.reasoning import CLOSE, OPEN, opened_by
from rorqual.server.shield import Shield
from rorqual.server.tools import ToolSpec


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. `thought_opened`: it ends inside a thought."""

    text: str
    ids: list[int]
    thought_opened: bool


def check_messages(messages: Sequence[Message], where: str = "messages") -> None:
    """400 with the dotted path of the first message that makes no sense."""
    if not messages:
        raise invalid(f"{where} is empty; give at least one message", where)
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        path = f"{where}[{i}]"
        _check_content(message, path)
        if message.role == "assistant":
            call_ids |= {call.id for call in message.tool_calls or [] if call.id is not None}
        elif message.tool_calls:
            raise invalid(f"{path}.tool_calls: only an assistant message has them", f"{path}.tool_calls")
        if message.role == "tool":
            _check_result(message, call_ids, path)
        if message.prefix and (i != len(messages) - 1 or message.role != "assistant"):
            raise invalid(f"{path}.prefix: only for a last message of the assistant", f"{path}.prefix")


def _check_content(message: Message, path: str) -> None:
    if isinstance(message.content, list):
        for j, part in enumerate(message.content):
            if part.type not in ("text", "input_text", "output_text"):
                where = f"{path}.content[{j}].type"
                raise invalid(
                    f"{where}={part.type!r}: this model reads only text", where, "unsupported_value"
                )
            if part.text is None:
                where = f"{path}.content[{j}].text"
                raise invalid(f"{where} is required", where, "missing_required_parameter")
    if message.content is None and not (
        message.role == "assistant" and (message.tool_calls or message.reasoning_content)
    ):
        where = f"{path}.content"
        raise invalid(f"{where} is required", where, "missing_required_parameter")


def _check_result(message: Message, call_ids: set[str], path: str) -> None:
    where = f"{path}.tool_call_id"
    if not message.tool_call_id:
        raise invalid(f"{where} is required", where, "missing_required_parameter")
    if message.tool_call_id not in call_ids:
        raise invalid(f"{where}={message.tool_call_id!r}: no earlier assistant message made that call", where)


def specs(tools: Sequence[Tool] | None) -> list[ToolSpec]:
    """Tools of a chat request."""
    return [
        ToolSpec(
            t.function.name, t.function.description or "", t.function.parameters, bool(t.function.strict)
        )
        for t in tools or []
    ]


def render(
    model: Served,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec] = (),
    *,
    thinking: bool | None = None,
    generate: bool = True,
) -> Prompt:
    """The prompt of a conversation.

    A thought of an earlier turn is shown to the template only where tools are in play, as DeepSeek documents
    it; without tools it is left out. A last assistant message with `prefix` is left open, to be continued.
    """
    if model.template is None:
        raise invalid(
            f"the model {model.name!r} has no chat template; use /v1/completions",
            "model",
            "unsupported_value",
        )
    form, native = model.tool_format
    in_play = bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
    plain = [_plain(message, keep_thought=in_play) for message in messages]
    if "reasoning_content" not in model.template.source:
        plain = [_thought_as_text(message) for message in plain]
    native = native and form.template_lists_tools
    if in_play and not native:
        plain = form.describe(plain, tools)
    plain = [_with_calls(message, form.history) for message in plain]
    shield = Shield(model.special_texts)
    try:
        text = model.template.render(
            [shield.cover(message) for message in plain],
            tools=[shield.cover(tool.openai()) for tool in tools] if tools and native else None,
            add_generation_prompt=generate and not messages[-1].prefix,
            thinking=thinking,
        )
    except TokenizerError as e:
        raise invalid(f"the chat template refuses these messages: {e}", "messages") from None
    return Prompt(shield.uncover(text), shield.encode(text, model.tokenizer), opened_by(text))


def _plain(message: Message, *, keep_thought: bool) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    out: dict[str, Any] = {"role": role, "content": message.text()}
    thought = message.reasoning_content or message.reasoning
    if keep_thought and thought:
        out["reasoning_content"] = thought
    if message.name:
        out["name"] = message.name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    if message.prefix:
        out["prefix"] = True
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return out


def _thought_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """For templates that know no `reasoning_content`: between its tags, before the answer."""
    thought = message.pop("reasoning_content", None)
    if thought is None:
        return message
    return {**message, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{message['content']}"}


def _with_calls(message: dict[str, Any], history: Any) -> dict[str, Any]:
    """Arguments in the form (text or object) that the family's templates expect."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": history(call["function"]["name"], call["function"]["arguments"])}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
