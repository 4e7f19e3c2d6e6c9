"""What an Anthropic Messages request says, as a chat request."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

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
    Thinking,
    Tool,
    ToolCall,
    TopP,
)


class Block(Struct):
    """A block of content; which fields matter depends on the type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Any = None


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(Struct):
    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolChoice(Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Struct):
    user_id: Annotated[str, Meta(max_length=512)] | None = None  # whatever it holds: some clients send JSON


class CountRequest(Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    messages: list[Turn]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: Positive
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    metadata: Metadata | None = None
    mcp_servers: list[Any] | None = None


def to_chat(request: CountRequest) -> ChatRequest:
    """The chat request that means the same."""
    choice = request.tool_choice
    chat = ChatRequest(
        model=request.model,
        messages=_messages(request),
        tools=_tools(request.tools) or None,
        tool_choice=_choice(choice),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        thinking=request.thinking,
    )
    config = request.output_config
    if config is not None:
        chat.reasoning_effort = config.effort
        if config.format is not None:
            chat.response_format = ResponseFormat("json_schema", JsonSchema(config.format.schema))
    if isinstance(request, MessagesRequest):
        _sampling(request, chat)
    return chat


def _sampling(request: MessagesRequest, chat: ChatRequest) -> None:
    if request.mcp_servers:
        raise invalid("mcp_servers: this server runs no tools itself", "mcp_servers", "unsupported_parameter")
    chat.max_tokens = request.max_tokens
    chat.temperature = request.temperature
    chat.top_p = request.top_p
    chat.top_k = request.top_k
    chat.stop = request.stop_sequences
    chat.stream = request.stream
    chat.user_id = request.metadata.user_id if request.metadata is not None else None


def _tools(tools: list[AnthropicTool] | None) -> list[Tool]:
    out = []
    for i, tool in enumerate(tools or []):
        if tool.type not in (None, "custom"):
            where = f"tools[{i}].type"
            raise invalid(
                f"{where}={tool.type!r}: only tools that the client runs", where, "unsupported_value"
            )
        out.append(Tool(Function(tool.name, tool.description, tool.input_schema, tool.strict)))
    return out


def _choice(choice: ToolChoice | None) -> Any:
    if choice is None:
        return None
    if choice.type == "tool":
        if not choice.name:
            raise invalid("tool_choice.name is required", "tool_choice.name", "missing_required_parameter")
        return NamedTool(NamedFunction(choice.name))
    return "required" if choice.type == "any" else choice.type


def _messages(request: CountRequest) -> list[Message]:
    out: list[Message] = []
    if request.system:
        out.append(Message("system", _system(request.system)))
    for i, turn in enumerate(request.messages):
        where = f"messages[{i}]"
        if turn.role == "assistant":
            out.append(_assistant(turn, where))
        elif isinstance(turn.content, str):
            out.append(Message(turn.role, turn.content))
        else:
            out += _user(turn, turn.content, where)
    if out and out[-1].role == "assistant" and not out[-1].tool_calls:
        out[-1].prefix = True  # the client has begun the answer
    return out


def _system(system: str | list[Block]) -> str:
    if isinstance(system, str):
        return system
    return "\n\n".join(_block_text(block, f"system[{i}]") for i, block in enumerate(system))


def _assistant(turn: Turn, where: str) -> Message:
    if isinstance(turn.content, str):
        return Message("assistant", turn.content)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for j, block in enumerate(turn.content):
        if block.type == "tool_use":
            if not block.id or not block.name:
                raise invalid(f"{where}.content[{j}]: tool_use needs id and name", f"{where}.content[{j}]")
            arguments = json.dumps(block.input or {}, ensure_ascii=False)
            calls.append(ToolCall(FunctionCall(block.name, arguments), block.id))
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type != "redacted_thinking":
            texts.append(_block_text(block, f"{where}.content[{j}]"))
    return Message(
        "assistant", "".join(texts), tool_calls=calls or None, reasoning_content="".join(thoughts) or None
    )


def _user(turn: Turn, blocks: list[Block], where: str) -> list[Message]:
    """Tool results as turns of their own, then what the user said."""
    out: list[Message] = []
    texts: list[str] = []
    for j, block in enumerate(blocks):
        place = f"{where}.content[{j}]"
        if block.type == "tool_result":
            out.append(Message("tool", _result(block, place), tool_call_id=block.tool_use_id))
        else:
            texts.append(_block_text(block, place))
    if texts or not out:
        out.append(Message(turn.role, "\n".join(texts)))
    return out


def _result(block: Block, where: str) -> str:
    content = block.content
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise invalid(f"{where}.content: must be text or blocks", f"{where}.content", "invalid_type")
    texts = []
    for k, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise invalid(
                f"{where}.content[{k}]: this model reads only text",
                f"{where}.content[{k}]",
                "unsupported_value",
            )
        texts.append(str(part.get("text", "")))
    return "\n".join(texts)


def _block_text(block: Block, where: str) -> str:
    if block.type != "text":
        raise invalid(
            f"{where}.type={block.type!r}: this model reads only text", f"{where}.type", "unsupported_value"
        )
    if block.text is None:
        raise invalid(f"{where}.text is required", f"{where}.text", "missing_required_parameter")
    return block.text
