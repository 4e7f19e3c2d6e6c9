"""POST /v1/completions: text in, text on; `suffix` fills in the middle, `echo` repeats and scores it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.engine.request import TokenLogprob
from rorqual.server.caller import Caller
from rorqual.server.chat import FINGERPRINT, check_stream_options
from rorqual.server.events import Finish, Text
from rorqual.server.faults import invalid
from rorqual.server.models import Served
from rorqual.server.protocol import MAX_N, CompletionRequest, decode
from rorqual.server.reply import Generated, Reply, data_frame, openai_error_frame
from rorqual.server.sampling import sampling_params
from rorqual.server.structure import Structure, mask_maker, response_schema
from rorqual.server.turn import Run, Turn, check_room

_DEFAULT_MAX_TOKENS = 16  # OpenAI's, on this route
_MAX_PROMPTS = 256
# Markers of fill-in-the-middle: begin, hole, end, and whether the suffix comes before the place of the
# answer.
_FIM = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


async def completions(caller: Caller, body: bytes) -> Reply:
    """Answer one completion request, whole or as a stream."""
    request = decode(body, CompletionRequest)
    check_stream_options(request)
    model = caller.service.models.find(request.model)
    prompts = await asyncio.to_thread(prompt_ids, request, model)
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise invalid(
            f"best_of={request.best_of}: only {n} (the same as n) is offered", "best_of", "unsupported_value"
        )
    if len(prompts) * n > MAX_N * 4:
        raise invalid(f"{len(prompts)} prompts x n={n}: at most {MAX_N * 4} completions a request", "prompt")
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    for ids in prompts:
        check_room(model, ids, max_tokens, "prompt")
    params = sampling_params(
        request,
        model,
        max_tokens=max_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )
    mask = await mask_maker(model, Structure(schema=response_schema(request.response_format)))
    turn = Turn(model, prompts, params, n, mask=mask, cache_salt=caller.cache_salt(request.user_id))
    run = Run(turn, caller)
    writer = _Writer(request, run, caller)
    if request.stream:
        return Generated(run, frames=writer.frames, error_frame=openai_error_frame)
    return Generated(run, whole=writer.whole)


def prompt_ids(request: CompletionRequest, model: Served) -> list[list[int]]:
    """Token ids of each prompt; exactly one begin token before text that has none."""
    prompt = request.prompt
    if isinstance(prompt, list) and not prompt:
        raise invalid("prompt is an empty list; give a text", "prompt")
    if isinstance(prompt, str):
        prompts: Sequence[Any] = [prompt]
    elif all(isinstance(p, int) for p in prompt):
        prompts = [prompt]
    else:
        prompts = prompt
    if len(prompts) > _MAX_PROMPTS:
        raise invalid(f"prompt: {len(prompts)} prompts; at most {_MAX_PROMPTS}", "prompt")
    return [_encode(p, request.suffix, model, i) for i, p in enumerate(prompts)]


def _encode(prompt: Any, suffix: str | None, model: Served, index: int) -> list[int]:
    if isinstance(prompt, str):
        if suffix:
            prompt = _fill_in(prompt, suffix, model)
        return model.tokenizer.encode(prompt)
    if suffix:
        raise invalid("suffix needs a prompt of text, not of token ids", "suffix")
    if not isinstance(prompt, list) or not all(isinstance(i, int) for i in prompt):
        raise invalid(
            f"prompt[{index}]: must be a text or a list of token ids", f"prompt[{index}]", "invalid_type"
        )
    size = model.bridge.engine.vocab_size
    wrong = next((i for i in prompt if not 0 <= i < size), None)
    if wrong is not None:
        raise invalid(f"prompt[{index}]: token id {wrong} is not from 0 to {size - 1}", f"prompt[{index}]")
    return list(prompt)


def _fill_in(prefix: str, suffix: str, model: Served) -> str:
    for begin, hole, end in _FIM:
        if all(len(model.tokenizer.encode(marker, add_bos=False)) == 1 for marker in (begin, hole, end)):
            return f"{begin}{prefix}{hole}{suffix}{end}"
    raise invalid(f"the model {model.name!r} cannot fill in the middle", "suffix", "unsupported_value")


@dataclass
class _Text:
    """One choice being gathered."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    reason: str | None = None


@dataclass
class _Writer:
    """Writes a run's events in the completions dialect."""

    request: CompletionRequest
    run: Run
    caller: Caller

    def __post_init__(self) -> None:
        self.id = f"cmpl-{self.caller.id}"
        self.created = int(time.time())
        self._offset = [0] * len(self.run.answers)
        self._special = frozenset(self.run.turn.model.tokenizer.special_ids)

    async def whole(self) -> dict[str, Any]:
        """The `text_completion` object."""
        choices = [_Text() for _ in self.run.answers]
        async for index, event in self.run.events():
            if isinstance(event, Text):
                choices[index].text.append(event.text)
                choices[index].logprobs += event.logprobs
            elif isinstance(event, Finish):
                choices[index].reason = event.reason
        out = []
        for i, choice in enumerate(choices):
            echo = self._echo(i)
            logprobs = [*self._echo_logprobs(i), *choice.logprobs]
            out.append(self._choice(i, echo + "".join(choice.text), logprobs, choice.reason))
        return {**self._head(), "choices": out, "usage": self.run.usage.openai(bool(self.request.x_usage))}

    async def frames(self) -> AsyncIterator[bytes]:
        """Chunks, the usage chunk where asked for, `[DONE]`."""
        options = self.request.stream_options
        echoed: set[int] = set()
        async for index, event in self.run.events():
            if index not in echoed:
                echoed.add(index)
                if self.request.echo:
                    yield self._chunk(index, self._echo(index), self._echo_logprobs(index), None)
            if isinstance(event, Text):
                yield self._chunk(index, event.text, list(event.logprobs), None)
            elif isinstance(event, Finish):
                yield self._chunk(index, "", [], event.reason)
        if options is not None and options.include_usage:
            usage = self.run.usage.openai(bool(self.request.x_usage))
            yield data_frame({**self._head(), "choices": [], "usage": usage})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob | None], reason: str | None
    ) -> bytes:
        return data_frame(
            {**self._head(), "choices": [self._choice(index, text, logprobs, reason)], "usage": None}
        )

    def _choice(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob | None], reason: str | None
    ) -> dict[str, Any]:
        asked = self.request.logprobs is not None
        block = self._logprob_block(index, logprobs) if asked else None
        return {"index": index, "text": text, "logprobs": block, "finish_reason": reason}

    def _logprob_block(self, index: int, logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """The older shape: four lists. The first token of an echoed prompt has no log-probability."""
        model = self.run.turn.model
        prompt = self._prompt(index)
        tokens: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for lp in logprobs:
            token_id = prompt[0] if lp is None else lp.token_id
            tokens.append(_token_text(model, token_id))
            offsets.append(self._advance(index, token_id))
            tops.append(
                None if lp is None else {_token_text(model, i): v for i, v in lp.top if v > -math.inf}
            )
        values = [None if lp is None else lp.logprob for lp in logprobs]
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _advance(self, index: int, token_id: int) -> int:
        """Where in the text a token begins; one that ends a character where that does. The next begins after it, but for
        a special token, which the text shows only where the prompt spells it."""
        at = self._offset[index]
        data = self.run.turn.model.tokenizer.token_bytes(token_id)
        if token_id in self._special and not (self._said(index) or "").startswith(data.decode(), at):
            return at
        starts = [byte & 0xC0 != 0x80 for byte in data]  # of characters: UTF-8 marks the bytes that go on
        self._offset[index] += sum(starts)
        return at if not data or starts[0] else at - 1

    def _prompt(self, index: int) -> list[int]:
        return self.run.turn.prompts[index // self.run.turn.n]

    def _echo(self, index: int) -> str:
        if not self.request.echo:
            return ""
        said = self._said(index)
        if said is not None:
            return said
        return self.run.turn.model.tokenizer.decode(self._prompt(index), skip_special=True)

    def _said(self, index: int) -> str | None:
        """The prompt as text, where it was given as one."""
        prompt = self.request.prompt
        item = prompt if isinstance(prompt, str) else prompt[index // self.run.turn.n]
        return item if isinstance(item, str) else None

    def _echo_logprobs(self, index: int) -> list[TokenLogprob | None]:
        return self.run.prompt_logprobs.get(index, []) if self.request.echo else []

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.request.model,
            "system_fingerprint": FINGERPRINT,
        }


def _token_text(model: Served, token_id: int) -> str:
    return model.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
