"""The wire: request bodies as msgspec structs, and the one way in which a body becomes one of them.

A field of the wrong type or outside its range is a 400 that names the field by its dotted path. Unknown
fields are ignored, as every client sends some; those that would change the answer if honoured are refused by
name.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from rorqual.server.faults import ApiError, invalid

T = TypeVar("T", bound=Struct)

MAX_STOP = 16
MAX_TOOLS = 128
MAX_N = 64

Role = Literal["system", "developer", "user", "assistant", "tool"]
Temperature = Annotated[float, Meta(ge=0, le=2)]
TopP = Annotated[float, Meta(gt=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
UserId = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_\-]+$", max_length=512)]


class Part(Struct):
    """One piece of a message; only text is served."""

    type: str
    text: str | None = None


class FunctionCall(Struct):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Struct):
    """A call that an earlier assistant turn made."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Struct):
    """One turn of a conversation. `prefix`: the last assistant turn is to be continued."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool | None = None

    def text(self) -> str:
        """The parts' texts joined; None is the empty text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text or "" for part in self.content)


class Function(Struct):
    """A function that the model may call; `parameters` is a JSON Schema object."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Struct):
    """A tool of a chat request."""

    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Struct):
    name: str


class NamedTool(Struct):
    """`tool_choice` that forces one function."""

    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Struct):
    """A schema under a name, as `response_format` carries it."""

    schema: dict[str, Any] | None = None
    name: str = "answer"
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Thinking(Struct):
    """`budget_tokens` ends the thought after so many tokens."""

    type: Literal["enabled", "disabled", "adaptive"] = "enabled"
    budget_tokens: Positive | None = None


class Sampling(Struct, kw_only=True):
    """The fields of all OpenAI-shaped generation requests."""

    model: str | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Probability | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    max_tokens: Positive | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user_id: UserId | None = None
    x_usage: bool | None = None  # adds usage.x_cost and usage.x_flops


class ChatRequest(Sampling, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = (
        None
    )
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions: text, texts or token ids in; `suffix` makes it fill-in-the-middle."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Positive | None = None
    response_format: ResponseFormat | None = None


class TokenizeRequest(Struct, kw_only=True):
    """POST /v1/tokenize: a text, or the messages of a chat as the template writes them."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(Struct, kw_only=True):
    """POST /v1/detokenize."""

    tokens: list[int]
    model: str | None = None


# Fields that would change the answer if this server knew them: refused rather than ignored.
REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "web_search_options": "this server does not search",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "structured_outputs": "use response_format",
    "chat_template": "the model's own template is used",
    "use_beam_search": "only sampling is offered",
    "min_tokens": "use ignore_eos and max_tokens",
    "audio": "only text is served",
    "logits_processors": "use logit_bias",
    "bad_words": "use logit_bias",
    "allowed_token_ids": "use logit_bias",
    "prompt_logprobs": "use echo and logprobs on /v1/completions",
    "truncate_prompt_tokens": "a prompt is never cut",
}


def decode(body: bytes, kind: type[T]) -> T:
    """A request body as `kind`, or a 400 that says what is wrong and where."""
    if not body:
        raise invalid("the request body is empty; send a JSON object", code="invalid_json")
    try:
        body.decode("utf-8")
        value = msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        raise _from_validation(e) from None
    except msgspec.DecodeError as e:
        raise invalid(f"the request body is not JSON: {e}", code="invalid_json") from None
    except UnicodeError:
        raise invalid("the request body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise invalid("the request body is nested too deeply", code="invalid_json") from None
    _refuse_unsupported(body)
    return value


# Only the refused fields, so that finding them builds no Python objects for the rest of the body.
_Refused = msgspec.defstruct("_Refused", [(name, Any, None) for name in (*REFUSED, "modalities")])


def _refuse_unsupported(body: bytes) -> None:
    try:
        found = msgspec.json.decode(body, type=_Refused)
    except RecursionError:
        raise invalid("the request body is nested too deeply", code="invalid_json") from None
    for name, cure in REFUSED.items():
        if getattr(found, name):
            raise invalid(f"{name} is not supported: {cure}", name, "unsupported_parameter")
    modalities = getattr(found, "modalities", None)
    if modalities and modalities != ["text"]:
        raise invalid(
            f"modalities={modalities!r}: only ['text'] is served", "modalities", "unsupported_value"
        )


_AT = re.compile(r" - at `(?:key in )?\$(.*)`$")
_MISSING = re.compile(r"missing required field `(.+?)`")


def _from_validation(error: msgspec.ValidationError) -> ApiError:
    """msgspec's message, with its `$.a[0].b` path as the dotted `param`."""
    text = str(error)
    at = _AT.search(text)
    path = at.group(1).lstrip(".").replace("[...]", "") if at else ""
    reason = text[: at.start()] if at else text
    missing = _MISSING.search(reason)
    if missing:
        path = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return invalid(f"{path} is required", path, "missing_required_parameter")
    code = "invalid_type" if ", got `" in reason else "invalid_value"
    said = reason[0].lower() + reason[1:]
    return invalid(f"{path}: {said}" if path else said, path or None, code)
