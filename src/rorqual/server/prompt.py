"""From a conversation to the tokens of a prompt, through the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    text, shield, opened = _write(model, messages, tools, thinking, generate)
    return Prompt(shield.uncover(text), shield.encode(text, model.tokenizer), opened)


def render_each(
    model: Served, shared: Sequence[Message], lasts: Sequence[Message], *, thinking: bool | None = None
) -> Iterator[list[int]]:
    """Ids of a conversation with each of `lasts` as its last message. What they share is read once, as it may be a
    whole book."""
    head, shield, _ = _write(model, shared, (), thinking, False)
    head_ids = shield.encode(head, model.tokenizer)
    for last in lasts:
        text, shield, _ = _write(model, [*shared, last], (), thinking, True)
        if text.startswith(head):
            yield head_ids + shield.encode(text[len(head) :], model.tokenizer)
        else:
            yield shield.encode(text, model.tokenizer)


def _write(
    model: Served,
    messages: Sequence[Message],
    tools: Sequence[ToolSpec],
    thinking: bool | None,
    generate: bool,
) -> tuple[str, Shield, bool]:
    """The conversation as its template writes it, what covers its markers, and whether it ends inside a thought."""
    if model.template is None:
        raise invalid(
            f"the model {model.name!r} has no chat template; use /v1/completions",
            "model",
            "unsupported_value",
        )
    template = model.template
    form, native = model.tool_format
    in_play = bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
    plain = [_plain(message, keep_thought=in_play) for message in messages]
    if "reasoning_content" not in template.source:
        plain = [_thought_as_text(message) for message in plain]
    native = native and form.template_lists_tools
    if in_play and not native:
        plain = form.describe(plain, tools)
    plain = [_with_calls(message, form.history) for message in plain]
    listed = [tool.openai() for tool in tools] if tools and native else None
    shield = Shield(model.special_texts)
    prefix = plain[-1]["content"] if messages[-1].prefix else None

    def written(said: list[dict[str, Any]], listed: list[dict[str, Any]] | None) -> str:
        try:
            return template.render(
                shield.cover(said),
                tools=shield.cover(listed),
                add_generation_prompt=generate and prefix is None,
                thinking=thinking,
            )
        except TokenizerError as e:
            raise invalid(f"the chat template refuses these messages: {e}", "messages") from None

    text = written(plain, listed)
    # A message may quote the tags: only those of the template itself say where a thought begins.
    tags = Shield((OPEN, CLOSE))
    own = tags.cover(plain), tags.cover(listed)
    opened = opened_by(text if own == (plain, listed) else written(*own), prefix)
    return text, shield, opened


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
