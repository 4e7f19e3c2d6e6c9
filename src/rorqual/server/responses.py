"""POST /v1/responses: typed events with sequence numbers, ended by response.completed, and no [DONE]."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from rorqual.server.caller import Caller
from rorqual.server.chat import chat_turn, logprob_entry
from rorqual.server.events import CallArguments, CallEnd, CallStart, Event, Finish, Reasoning, Text
from rorqual.server.faults import ApiError
from rorqual.server.prompt import check_messages
from rorqual.server.protocol import decode
from rorqual.server.reply import Generated, Reply, event_frame
from rorqual.server.responses_input import ResponsesRequest, to_chat
from rorqual.server.turn import Run

Named = tuple[str, dict[str, Any]]  # an event's name and its fields


async def responses(caller: Caller, body: bytes) -> Reply:
    """Answer one Responses request, whole or as a stream."""
    request = decode(body, ResponsesRequest)
    chat, kinds = to_chat(request)
    check_messages(chat.messages, "input")
    model = caller.service.models.find(request.model)
    run = Run(await chat_turn(chat, model, caller), caller)
    writer = _Writer(request, run, caller, kinds)
    if request.stream:
        return Generated(run, frames=writer.frames, error_frame=writer.error_frame)
    return Generated(run, whole=writer.whole)


@dataclass
class _Item:
    """An item of the output while it grows."""

    index: int
    fields: dict[str, Any]
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)


class _Writer:
    def __init__(self, request: ResponsesRequest, run: Run, caller: Caller, kinds: dict[str, str]) -> None:
        self._request = request
        self._run = run
        self._kinds = kinds
        self._id = f"resp_{caller.id}"
        self._created = int(time.time())
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._sequence = 0

    async def whole(self) -> dict[str, Any]:
        """The `response` object."""
        last: dict[str, Any] = {}
        async for _, fields in self._events():
            last = fields.get("response", last)
        return last

    async def frames(self) -> AsyncIterator[bytes]:
        """Every event as a frame."""
        async for name, fields in self._events():
            yield self._frame(name, fields)

    def error_frame(self, error: ApiError) -> bytes:
        """response.failed, which ends the stream."""
        cause = {"code": "server_error", "message": error.message}
        return self._frame("response.failed", {"response": self._response("failed", error=cause)})

    def _frame(self, name: str, fields: dict[str, Any]) -> bytes:
        frame = event_frame(name, {"type": name, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return frame

    async def _events(self) -> AsyncIterator[Named]:
        yield "response.created", {"response": self._response("in_progress")}
        yield "response.in_progress", {"response": self._response("in_progress")}
        async for _, event in self._run.events():
            for named in self._event(event):
                yield named

    def _event(self, event: Event) -> Iterator[Named]:
        if isinstance(event, Reasoning):
            yield from self._need("reasoning")
            yield from self._grow("response.reasoning_text.delta", event.text, content_index=0)
        elif isinstance(event, Text):
            yield from self._need("message")
            assert self._open is not None
            entries = [logprob_entry(self._run.turn.model, lp) for lp in event.logprobs]
            self._open.logprobs += entries
            yield from self._grow("response.output_text.delta", event.text, content_index=0, logprobs=entries)
        elif isinstance(event, CallStart):
            yield from self._close("completed")
            yield from self._begin_call(event)
        elif isinstance(event, CallArguments):
            assert self._open is not None
            if self._open.fields["type"] == "custom_tool_call":
                self._open.text += event.text
            else:
                yield from self._grow("response.function_call_arguments.delta", event.text)
        elif isinstance(event, CallEnd):
            yield from self._close("completed")
        else:
            yield from self._finish(event)

    def _finish(self, event: Finish) -> Iterator[Named]:
        cut = event.reason == "length"
        if not self._items:
            yield from self._need("message")
        yield from self._close("incomplete" if cut else "completed")
        status = "incomplete" if cut else "completed"
        yield f"response.{status}", {"response": self._response(status)}

    def _need(self, kind: str) -> Iterator[Named]:
        """An open item of this kind: the one that is, or a new one."""
        if self._open is not None and self._open.fields["type"] == kind:
            return
        yield from self._close("completed")
        if kind == "reasoning":
            item = self._add({"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []})
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = self._add({"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield "response.output_item.added", {"output_index": item.index, "item": _copy(item, "in_progress")}
        yield "response.content_part.added", {**self._place(content_index=0), "part": part}

    def _begin_call(self, event: CallStart) -> Iterator[Named]:
        fields = {"id": _new_id("fc"), "call_id": event.id, "name": event.name}
        if self._kinds.get(event.name) == "custom":
            item = self._add({**fields, "type": "custom_tool_call", "input": ""})
        else:
            item = self._add({**fields, "type": "function_call", "arguments": ""})
        yield "response.output_item.added", {"output_index": item.index, "item": _copy(item, "in_progress")}

    def _grow(self, name: str, text: str, **fields: Any) -> Iterator[Named]:
        assert self._open is not None
        self._open.text += text
        if text:
            yield name, {**self._place(**fields), "delta": text}

    def _close(self, status: str) -> Iterator[Named]:
        """End the open item."""
        item = self._open
        if item is None:
            return
        kind = item.fields["type"]
        part: dict[str, Any]
        if kind == "reasoning":
            part = {"type": "reasoning_text", "text": item.text}
            item.fields["content"] = [part]
            yield "response.reasoning_text.done", {**self._place(content_index=0), "text": item.text}
            yield "response.content_part.done", {**self._place(content_index=0), "part": part}
        elif kind == "message":
            part = {"type": "output_text", "text": item.text, "annotations": [], "logprobs": item.logprobs}
            item.fields["content"] = [part]
            done = {**self._place(content_index=0), "text": item.text, "logprobs": item.logprobs}
            yield "response.output_text.done", done
            yield "response.content_part.done", {**self._place(content_index=0), "part": part}
        elif kind == "custom_tool_call":
            item.fields["input"] = _free_form(item.text)
            yield "response.custom_tool_call_input.delta", {**self._place(), "delta": item.fields["input"]}
            yield "response.custom_tool_call_input.done", {**self._place(), "input": item.fields["input"]}
        else:
            item.fields["arguments"] = item.text
            done = {**self._place(), "name": item.fields["name"], "arguments": item.text}
            yield "response.function_call_arguments.done", done
        item.fields["status"] = status
        self._open = None
        yield "response.output_item.done", {"output_index": item.index, "item": item.fields}

    def _add(self, fields: dict[str, Any]) -> _Item:
        item = _Item(len(self._items), fields)
        self._items.append(item)
        self._open = item
        return item

    def _place(self, **fields: Any) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.fields["id"], "output_index": self._open.index, **fields}

    def _response(self, status: str, error: dict[str, Any] | None = None) -> dict[str, Any]:
        request = self._request
        ended = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": request.model,
            "output": [item.fields for item in self._items if "status" in item.fields] if ended else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {
                "format": request.text.format if request.text and request.text.format else {"type": "text"}
            },
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": self._run.usage.responses() if ended and error is None else None,
            "metadata": request.metadata or {},
        }


def _copy(item: _Item, status: str) -> dict[str, Any]:
    return {**item.fields, "status": status}


def _free_form(arguments: str) -> str:
    """The text of a free-form tool, out of the function call that carried it."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return str(value.get("input", "")) if isinstance(value, dict) else arguments


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
