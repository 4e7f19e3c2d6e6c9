"""What a Responses request says, as a chat request.

The server keeps nothing: whatever would need an earlier or a stored response is refused by name. Tools that a
host would run (web search and the like) are not offered to the model; free-form tools become functions of one
text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from rorqual.server.faults import invalid
from rorqual.server.protocol import (
    ChatRequest,
    Function,
    FunctionCall,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    Positive,
    ResponseFormat,
    Temperature,
    Tool,
    ToolCall,
    TopP,
    UserId,
)

_FREE_FORM: dict[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_STATE = ("previous_response_id", "conversation", "prompt")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


class ReasoningOptions(Struct):
    effort: Effort | None = None
    summary: str | None = None


class TextFormat(Struct):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    """POST /v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    user_id: UserId | None = None


def to_chat(request: ResponsesRequest) -> tuple[ChatRequest, dict[str, str]]:
    """The chat request, and what kind of call each tool's calls are answered as ("function" or "custom")."""
    _refuse_state(request)
    kinds: dict[str, str] = {}
    tools = [_tool(entry, where, kinds) for entry, where in _flat(request.tools or [], "tools")]
    offered = [tool for tool in tools if tool is not None]
    chat = ChatRequest(
        model=request.model,
        messages=_messages(request),
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        tools=offered or None,
        tool_choice=_choice(request.tool_choice) if offered else None,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=_format(request.text),
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        logprobs=request.top_logprobs is not None or None,
        top_logprobs=request.top_logprobs,
        user_id=request.user_id,
        stream=request.stream,
    )
    return chat, kinds


def _refuse_state(request: ResponsesRequest) -> None:
    for name in _STATE:
        if getattr(request, name) is not None:
            message = f"{name}: this server keeps no responses; send the whole conversation in input"
            raise invalid(message, name, "unsupported_parameter")
    if request.store:
        raise invalid(
            "store=true: this server keeps no responses; send store: false", "store", "unsupported_value"
        )
    if request.background:
        raise invalid("background=true: responses are made while you wait", "background", "unsupported_value")
    if request.truncation == "auto":
        raise invalid("truncation='auto': a conversation is never cut", "truncation", "unsupported_value")


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    form = text.format
    if form.type != "json_schema":
        return ResponseFormat(form.type)
    if form.schema is None:
        raise invalid("text.format.schema is required", "text.format.schema", "missing_required_parameter")
    return ResponseFormat("json_schema", JsonSchema(form.schema, form.name, form.strict))


def _flat(tools: list[dict[str, Any]], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Tools one by one; a namespace holds more of them."""
    for i, tool in enumerate(tools):
        if tool.get("type") == "namespace" and isinstance(tool.get("tools"), list):
            yield from _flat([t for t in tool["tools"] if isinstance(t, dict)], f"{where}[{i}].tools")
        else:
            yield tool, f"{where}[{i}]"


def _tool(entry: dict[str, Any], where: str, kinds: dict[str, str]) -> Tool | None:
    kind, name = entry.get("type"), entry.get("name")
    if kind not in ("function", "custom"):
        return None
    if not isinstance(name, str):
        raise invalid(f"{where}.name is required", f"{where}.name", "missing_required_parameter")
    kinds[name] = kind
    fields = {**entry, "parameters": _FREE_FORM} if kind == "custom" else entry
    return Tool(_convert(fields, Function, where))


def _choice(choice: str | dict[str, Any] | None) -> Any:
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        return NamedTool(NamedFunction(str(choice.get("name"))))
    raise invalid(f"tool_choice={choice!r}: must be none, auto, required or a named function", "tool_choice")


def _messages(request: ResponsesRequest) -> list[Message]:
    out: list[Message] = []
    if request.instructions:
        out.append(Message("system", request.instructions))
    if isinstance(request.input, str):
        return [*out, Message("user", request.input)]
    if not request.input:
        raise invalid("input is empty; give a text or at least one item", "input")
    for i, item in enumerate(request.input):
        _take(item, f"input[{i}]", out)
    return out


def _take(item: dict[str, Any], where: str, out: list[Message]) -> None:
    """Add one item of the input; a thought and calls join the assistant turn that they belong to."""
    kind = item.get("type", "message")
    if kind == "message":
        message = _convert(item, Message, where)
        if message.role == "assistant" and _open_turn(out):
            out[-1].content = out[-1].text() + message.text()
        else:
            out.append(message)
    elif kind in ("function_call", "custom_tool_call"):
        name, call_id = _text(item, "name", where), _text(item, "call_id", where)
        arguments = item.get("arguments", "")
        if kind == "custom_tool_call":
            arguments = json.dumps({"input": item.get("input", "")}, ensure_ascii=False)
        call = ToolCall(FunctionCall(name, str(arguments)), call_id)
        turn = _assistant(out)
        turn.tool_calls = [*(turn.tool_calls or []), call]
    elif kind in ("function_call_output", "custom_tool_call_output"):
        content = _output(item.get("output"), where)
        out.append(Message("tool", content, tool_call_id=_text(item, "call_id", where)))
    elif kind == "reasoning":
        thought = _thought(item)
        if thought:
            out.append(Message("assistant", None, reasoning_content=thought))
    else:
        raise invalid(
            f"{where}.type={kind!r}: not an item that this server reads", f"{where}.type", "unsupported_value"
        )


def _open_turn(out: list[Message]) -> bool:
    """Whether the last message is an assistant turn of which only the thought is there yet."""
    return bool(out) and out[-1].role == "assistant" and out[-1].content is None and not out[-1].tool_calls


def _assistant(out: list[Message]) -> Message:
    if not out or out[-1].role != "assistant":
        out.append(Message("assistant", None))
    return out[-1]


def _thought(item: dict[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or []
    return "".join(str(p.get("text", "")) for p in parts if isinstance(p, dict))


def _output(output: Any, where: str) -> str:
    if isinstance(output, str):
        return output
    parts = output if isinstance(output, list) else []
    texts = [
        p.get("text")
        for p in parts
        if isinstance(p, dict) and p.get("type") in ("input_text", "output_text", "text")
    ]
    if not isinstance(output, list) or len(texts) != len(parts):
        raise invalid(f"{where}.output: must be text", f"{where}.output", "invalid_type")
    return "".join(str(t) for t in texts)


def _text(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str) or not value:
        raise invalid(f"{where}.{name} is required", f"{where}.{name}", "missing_required_parameter")
    return value


def _convert(value: dict[str, Any], kind: type[Any], where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as e:
        raise invalid(f"{where}: {e}", where, "invalid_type") from None
