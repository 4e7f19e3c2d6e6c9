"""POST /v1/chat/completions: OpenAI's dialect with DeepSeek's additions, and the turn that other dialects
share.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine.request import TokenLogprob
from rorqual.server.answer import Reading
from rorqual.server.caller import Caller
from rorqual.server.events import CallArguments, CallStart, Event, Finish, Reasoning, Text
from rorqual.server.faults import invalid
from rorqual.server.models import Served
from rorqual.server.prompt import Prompt, check_messages, render, specs
from rorqual.server.protocol import MAX_TOOLS, ChatRequest, NamedTool, decode
from rorqual.server.reply import Generated, Reply, data_frame, encode, openai_error_frame
from rorqual.server.sampling import UNLIMITED, sampling_params
from rorqual.server.structure import Structure, check_tools, mask_maker, response_schema
from rorqual.server.tools import ToolSpec
from rorqual.server.turn import Run, Turn, check_room

FINGERPRINT = "rorqual"
# A thought of this many tokens is a short one: what `reasoning_effort: low` allows.
_LOW_EFFORT = 1024


async def chat(caller: Caller, body: bytes) -> Reply:
    """Answer one chat request, whole or as a stream."""
    request = decode(body, ChatRequest)
    check_messages(request.messages)
    check_stream_options(request)
    model = caller.service.models.find(request.model)
    turn = await chat_turn(request, model, caller)
    run = Run(turn, caller)
    writer = _Writer(request, run, caller)
    if request.stream:
        return Generated(run, frames=writer.frames, error_frame=openai_error_frame)
    return Generated(run, whole=writer.whole)


def check_stream_options(request: Any) -> None:
    """400 for stream_options without stream."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only for stream: true", "stream_options")


async def chat_turn(request: ChatRequest, model: Served, caller: Caller) -> Turn:
    """What to generate for a chat request: prompt, sampling, structure and how to read the output."""
    tools, prompt = await read_prompt(request, model)
    max_tokens = completion_limit(request)
    check_room(model, prompt.ids, max_tokens, "messages")
    structure = await asyncio.to_thread(_structure, request, model, tools, prompt)
    params = sampling_params(request, model, max_tokens=max_tokens, logprobs=_logprobs(request))
    form, _ = model.tool_format
    named = isinstance(request.tool_choice, NamedTool)
    reading = Reading(
        thought_opened=prompt.thought_opened if model.thinks else None,
        tools=form if tools else None,
        document=structure.schema is not None,
        one_call=named or request.parallel_tool_calls is False,
        named=named,
    )
    return Turn(
        model,
        [prompt.ids],
        params,
        request.n or 1,
        reading,
        await mask_maker(model, structure),
        caller.cache_salt(request.user_id),
    )


async def read_prompt(request: ChatRequest, model: Served) -> tuple[list[ToolSpec], Prompt]:
    """The tools on offer and the prompt, read on a thread: a long conversation takes longer than other streams should
    wait."""
    tools = _offered(request)
    return tools, await asyncio.to_thread(render, model, request.messages, tools, thinking=_thinking(request))


def completion_limit(request: ChatRequest) -> int:
    """max_tokens and max_completion_tokens mean the same; both and different is a 400."""
    first, second = request.max_tokens, request.max_completion_tokens
    if first is not None and second is not None and first != second:
        message = f"max_tokens={first} and max_completion_tokens={second} mean the same and differ; send one"
        raise invalid(message, "max_completion_tokens")
    return second or first or UNLIMITED


def _offered(request: ChatRequest) -> list[ToolSpec]:
    """The tools that the model may call: none, all, or the one that is named."""
    tools = specs(request.tools)
    if len(tools) > MAX_TOOLS:
        raise invalid(f"tools: {len(tools)} tools; at most {MAX_TOOLS}", "tools")
    check_tools(tools)
    choice = request.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise invalid("tool_choice asks for a call, but there are no tools", "tool_choice")
    if isinstance(choice, NamedTool):
        named = [t for t in tools if t.name == choice.function.name]
        if not named:
            raise invalid(
                f"tool_choice: no tool is named {choice.function.name!r}", "tool_choice.function.name"
            )
        return named
    return [] if choice == "none" else tools


def _thinking(request: ChatRequest) -> bool | None:
    """None leaves it to the template."""
    if request.thinking is not None:
        return request.thinking.type != "disabled"
    if request.reasoning_effort is not None:
        return request.reasoning_effort != "none"
    choice = (request.chat_template_kwargs or {}).get("enable_thinking")
    choice = (request.chat_template_kwargs or {}).get("thinking", choice)
    return choice if isinstance(choice, bool) else None


def _structure(request: ChatRequest, model: Served, tools: Sequence[ToolSpec], prompt: Prompt) -> Structure:
    schema = response_schema(request.response_format)
    choice = request.tool_choice
    must_call = isinstance(choice, NamedTool) or (choice == "required" and bool(tools))
    if schema is not None and must_call:
        raise invalid("response_format and a forced tool call exclude each other", "response_format")
    budget = request.thinking.budget_tokens if request.thinking is not None else None
    if budget is None and request.reasoning_effort in ("minimal", "low"):
        budget = _LOW_EFFORT
    return Structure(
        schema=schema,
        tools=tuple(tools),
        form=model.tool_format[0],
        many_calls=request.parallel_tool_calls is not False and not isinstance(choice, NamedTool),
        must_call=must_call,
        budget=budget,
        thinks=prompt.thought_opened or (model.thinks and _will_think(request, model, tools, prompt)),
        opened=prompt.thought_opened,
    )


def _will_think(request: ChatRequest, model: Served, tools: Sequence[ToolSpec], prompt: Prompt) -> bool:
    """Whether a model whose prompt did not open the thought will open one: when told to; and, when not told
    anything, if its template writes something else to keep it from thinking."""
    thinking = _thinking(request)
    if thinking is not None:
        return thinking
    return render(model, request.messages, tools, thinking=False).text != prompt.text


def _logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


@dataclass
class _Writer:
    """Writes a run's events in the chat dialect."""

    request: ChatRequest
    run: Run
    caller: Caller

    def __post_init__(self) -> None:
        self.id = f"chatcmpl-{self.caller.id}"
        self.created = int(time.time())
        self.model = self.request.model
        self.reasoning_alias = self.caller.service.settings.reasoning_alias
        # What every chunk of text begins and ends with: a stream of 32 is as many chunks each step of the engine.
        head = encode(self._head("chat.completion.chunk"))
        self._before = b"data: " + head[:-1] + b',"choices":[{"index":'
        self._after = b'},"logprobs":null,"finish_reason":null}],"usage":null}\n\n'

    # Whole

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion` object."""
        choices = [_Choice(self.run.turn.model) for _ in self.run.answers]
        async for index, event in self.run.events():
            choices[index].take(event)
        asked = bool(self.request.logprobs)
        return {
            **self._head("chat.completion"),
            "choices": [c.openai(i, asked, self.reasoning_alias) for i, c in enumerate(choices)],
            "usage": self.run.usage.openai(bool(self.request.x_usage)),
        }

    # Stream

    async def frames(self) -> AsyncIterator[bytes]:
        """Chunks, the usage chunk where asked for, `[DONE]`."""
        options = self.request.stream_options
        for index in range(len(self.run.answers)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        continuous = options is not None and bool(options.continuous_usage_stats)
        async for index, event in self.run.events():
            frame = self._event(index, event, continuous)
            if frame is not None:
                yield frame
        if options is not None and options.include_usage:
            usage = self.run.usage.openai(bool(self.request.x_usage))
            yield data_frame({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _event(self, index: int, event: Event, continuous: bool) -> bytes | None:
        usage = self._usage_so_far() if continuous else None
        if isinstance(event, Finish):
            return self._chunk(index, {}, finish=event.reason, usage=usage)
        if isinstance(event, Text):
            if usage is None and not self.request.logprobs:
                start = b'%b%d,"delta":{"content":' % (self._before, index)
                return start + encode(event.text) + self._after
            return self._chunk(
                index, {"content": event.text}, logprobs=self._logprobs("content", event), usage=usage
            )
        if isinstance(event, Reasoning):
            delta = {"reasoning_content": event.text}
            if self.reasoning_alias:
                delta["reasoning"] = event.text
            return self._chunk(index, delta, logprobs=self._logprobs("reasoning_content", event), usage=usage)
        if isinstance(event, CallStart):
            call = {
                "index": event.index,
                "id": event.id,
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            return self._chunk(index, {"tool_calls": [call]}, usage=usage)
        if isinstance(event, CallArguments):
            call = {"index": event.index, "function": {"arguments": event.text}}
            return self._chunk(index, {"tool_calls": [call]}, usage=usage)
        return None

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        finish: str | None = None,
        logprobs: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return data_frame({**self._head("chat.completion.chunk"), "choices": [choice], "usage": usage})

    def _logprobs(self, section: str, event: Text | Reasoning) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {section: [logprob_entry(self.run.turn.model, lp) for lp in event.logprobs]}

    def _usage_so_far(self) -> dict[str, Any]:
        return self.run.used().openai()

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


class _Choice:
    """One choice's events gathered into a message."""

    def __init__(self, model: Served) -> None:
        self._model = model
        self._text: list[str] = []
        self._thought: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._ended: set[int] = set()
        self._logprobs: dict[str, list[dict[str, Any]]] = {"content": [], "reasoning_content": []}
        self._reason: str | None = None

    def take(self, event: Event) -> None:
        """The next event."""
        if isinstance(event, Text):
            self._text.append(event.text)
            self._logprobs["content"] += [logprob_entry(self._model, lp) for lp in event.logprobs]
        elif isinstance(event, Reasoning):
            self._thought.append(event.text)
            self._logprobs["reasoning_content"] += [logprob_entry(self._model, lp) for lp in event.logprobs]
        elif isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            self._calls.append({"id": event.id, "type": "function", "function": function})
        elif isinstance(event, CallArguments):
            self._calls[event.index]["function"]["arguments"] += event.text
        elif isinstance(event, Finish):
            self._reason = event.reason
        else:
            self._ended.add(event.index)

    def openai(self, index: int, asked: bool, reasoning_alias: bool) -> dict[str, Any]:
        """The choice as the wire has it. Calls that never became valid JSON are left out, except one cut by
        length.
        """
        whole = [c for i, c in enumerate(self._calls) if i in self._ended or self._reason == "length"]
        text, thought = "".join(self._text), "".join(self._thought)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not whole else None}
        if thought:
            message["reasoning_content"] = thought
            if reasoning_alias:
                message["reasoning"] = thought
        if whole:
            message["tool_calls"] = whole
        logprobs = None
        if asked:
            logprobs = {"content": self._logprobs["content"]}
            if self._logprobs["reasoning_content"]:
                logprobs["reasoning_content"] = self._logprobs["reasoning_content"]
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._reason}


def logprob_entry(model: Served, logprob: TokenLogprob) -> dict[str, Any]:
    """A token as `logprobs.content[]` has it: its bytes rebuild the text, the best come first, and what could not have
    been drawn (minus infinity, which JSON does not know) is left out."""

    def entry(token_id: int, value: float) -> dict[str, Any]:
        piece = model.tokenizer.token_bytes(token_id)
        return {"token": piece.decode("utf-8", "replace"), "logprob": value, "bytes": list(piece)}

    top = [entry(*t) for t in sorted(logprob.top, key=lambda t: -t[1]) if t[1] > -math.inf]
    return {**entry(logprob.token_id, logprob.logprob), "top_logprobs": top}
