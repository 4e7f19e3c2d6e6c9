"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's dialect."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from rorqual.server.caller import Caller
from rorqual.server.chat import chat_turn, read_prompt
from rorqual.server.events import CallArguments, CallStart, Event, Finish, Reasoning, Text
from rorqual.server.faults import ApiError
from rorqual.server.messages_input import CountRequest, MessagesRequest, to_chat
from rorqual.server.prompt import check_messages
from rorqual.server.protocol import decode
from rorqual.server.reply import Generated, Json, Reply, event_frame
from rorqual.server.turn import Run
from rorqual.server.usage import Usage


async def messages(caller: Caller, body: bytes) -> Reply:
    """Answer one Messages request, whole or as a stream."""
    request = decode(body, MessagesRequest)
    chat = to_chat(request)
    check_messages(chat.messages)
    model = caller.service.models.find(request.model)
    run = Run(await chat_turn(chat, model, caller), caller)
    writer = _Writer(request, run, caller)
    if request.stream:
        return Generated(run, frames=writer.frames, error_frame=writer.error_frame)
    return Generated(run, whole=writer.whole)


async def count_tokens(caller: Caller, body: bytes) -> Reply:
    """Tokens of the prompt that the same message would have, without generating."""
    request = decode(body, CountRequest)
    chat = to_chat(request)
    check_messages(chat.messages)
    model = caller.service.models.find(request.model)
    _, prompt = await read_prompt(chat, model)
    return Json({"input_tokens": len(prompt.ids)})


class _Writer:
    def __init__(self, request: MessagesRequest, run: Run, caller: Caller) -> None:
        self._request = request
        self._run = run
        self._caller = caller
        self._blocks: list[dict[str, Any]] = []
        self._arguments: dict[int, str] = {}
        self._open: int | None = None

    async def whole(self) -> dict[str, Any]:
        """The `message` object."""
        stop: dict[str, Any] = {}
        async for _, event in self._run.events():
            for _ in self._event(event):
                pass
            if isinstance(event, Finish):
                stop = self._stop(event)
        return {**self._head(), "content": self._content(), **stop, "usage": self._run.usage.anthropic()}

    async def frames(self) -> AsyncIterator[bytes]:
        """message_start, blocks, message_delta, message_stop."""
        expected = Usage(prompt=len(self._run.turn.prompts[0]))
        head = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None}
        yield _frame("message_start", message={**head, "usage": expected.anthropic()})
        async for _, event in self._run.events():
            for frame in self._event(event):
                yield frame
            if isinstance(event, Finish):
                yield _frame("message_delta", delta=self._stop(event), usage=self._run.usage.anthropic())
                yield _frame("message_stop")

    def error_frame(self, error: ApiError) -> bytes:
        """`event: error`."""
        return event_frame("error", error.anthropic(self._caller.request_id))

    def _event(self, event: Event) -> Iterator[bytes]:
        if isinstance(event, Reasoning):
            yield from self._need("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            yield from self._grow("thinking", event.text, {"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, Text):
            yield from self._need("text", {"type": "text", "text": ""})
            yield from self._grow("text", event.text, {"type": "text_delta", "text": event.text})
        elif isinstance(event, CallStart):
            yield from self._close()
            block = {
                "type": "tool_use",
                "id": event.id.replace("call_", "toolu_", 1),
                "name": event.name,
                "input": {},
            }
            yield from self._begin(block)
            self._arguments[len(self._blocks) - 1] = ""
        elif isinstance(event, CallArguments):
            at = len(self._blocks) - 1
            self._arguments[at] += event.text
            delta = {"type": "input_json_delta", "partial_json": event.text}
            yield _frame("content_block_delta", index=at, delta=delta)
        else:
            yield from self._close()

    def _need(self, kind: str, block: dict[str, Any]) -> Iterator[bytes]:
        if self._open is None or self._blocks[self._open]["type"] != kind:
            yield from self._close()
            yield from self._begin(block)

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        self._blocks.append(dict(block))
        self._open = len(self._blocks) - 1
        yield _frame("content_block_start", index=self._open, content_block=block)

    def _grow(self, name: str, text: str, delta: dict[str, Any]) -> Iterator[bytes]:
        assert self._open is not None
        self._blocks[self._open][name] += text
        yield _frame("content_block_delta", index=self._open, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._blocks[self._open]["type"] == "thinking":
            delta = {"type": "signature_delta", "signature": ""}
            yield _frame("content_block_delta", index=self._open, delta=delta)
        yield _frame("content_block_stop", index=self._open)
        self._open = None

    def _content(self) -> list[dict[str, Any]]:
        """Blocks with their inputs parsed; a call that never became valid JSON is left out."""
        out = []
        for i, block in enumerate(self._blocks):
            if i in self._arguments:
                try:
                    out.append({**block, "input": json.loads(self._arguments[i])})
                except ValueError:
                    continue
            else:
                out.append(block)
        return out

    def _stop(self, finish: Finish) -> dict[str, Any]:
        called = any(block["type"] == "tool_use" for block in self._content())
        reason = "tool_use" if called else "end_turn"
        if finish.reason == "length":
            reason = "max_tokens"
        elif finish.stop_text is not None:
            reason = "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": finish.stop_text}

    def _head(self) -> dict[str, Any]:
        return {
            "id": f"msg_{self._caller.id}",
            "type": "message",
            "role": "assistant",
            "model": self._request.model,
        }


def _frame(name: str, **fields: Any) -> bytes:
    return event_frame(name, {"type": name, **fields})
