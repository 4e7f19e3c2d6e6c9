"""An engine that answers from a file: for tests, and for people who write clients.

    {"max_model_len": 4096,
     "answers": [
       {"match": "colour", "text": "Blue."},
       {"text": "Hello there!", "first_delay_s": 0.2, "delay_s": 0.01, "tokens_per_step": 4}]}

The first answer whose `match` occurs in the prompt is given (one without `match` fits all). Tokens are bytes,
or the strings of `pieces` where an answer needs tokens of several characters. `random` draws tokens evenly
instead, under the request's token mask, bias and seed. Text after which nothing more is scripted ends with
"stop".
"""

from __future__ import annotations

import codecs
import math
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.config import from_dict, read_tree
from rorqual.engine.request import Delta, EngineStats, Request, TokenLogprob
from rorqual.errors import ConfigError, RequestError
from rorqual.server.markers import partial_end

BOS, EOS = 256, 257
_DECODER = codecs.getincrementaldecoder("utf-8")
_BLOCK = 16  # tokens of a prompt that are cached together


@dataclass(frozen=True)
class ScriptedAnswer:
    """One answer. Delays are seconds; `error_after` tokens the answer fails with `error`."""

    text: str = ""
    pieces: tuple[str, ...] = ()
    match: str = ""
    first_delay_s: float = 0.0
    delay_s: float = 0.0
    tokens_per_step: int = 1
    error: str | None = None
    error_after: int = 0
    crash: bool = False  # the step itself raises
    random: bool = False
    endless: bool = False  # the text again and again


@dataclass(frozen=True)
class Script:
    """What a scripted engine says and how large it claims to be."""

    answers: tuple[ScriptedAnswer, ...] = (ScriptedAnswer(text="Hello!"),)
    max_model_len: int = 4096
    max_running: int = 64
    thinks: bool = False

    @classmethod
    def load(cls, file: Path) -> Script:
        """Read a script from JSON or TOML."""
        script = from_dict(cls, read_tree(file))
        if not script.answers:
            raise ConfigError(f"{file}: answers is empty; give at least one")
        return script


class ByteTokenizer:
    """A token is a byte, `<bos>`, `<eos>`, or one of the pieces of a script."""

    bos_id: int | None = BOS
    eos_ids: tuple[int, ...] = (EOS,)

    def __init__(self, pieces: Sequence[str] = ()) -> None:
        self._tokens = [bytes([b]) for b in range(256)] + [b"<bos>", b"<eos>"]
        self._pieces = {piece: 258 + i for i, piece in enumerate(dict.fromkeys(pieces))}
        markers = {p: i for p, i in self._pieces.items() if p.startswith("<") and p.endswith(">")}
        self._ids = {"<bos>": BOS, "<eos>": EOS, **markers}
        self._markers = f"({'|'.join(map(re.escape, self._ids))})"
        self._tokens += [piece.encode() for piece in self._pieces]

    @property
    def vocab_size(self) -> int:
        """Bytes, specials and pieces."""
        return len(self._tokens)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Tokens that are no text."""
        return (BOS, EOS)

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """Those of them that only a template writes."""
        return self.special_ids

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """UTF-8 bytes; with `special`, `<bos>`, `<eos>` and pieces of that form are one token each. One
        `<bos>` first unless unwanted.
        """
        ids: list[int] = []
        for part in re.split(self._markers, text) if special else [text]:
            marker = self._ids.get(part) if special else None
            ids += [marker] if marker is not None else list(part.encode())
        return ids if add_bos is False or ids[:1] == [BOS] else [BOS, *ids]

    def piece_id(self, piece: str) -> int:
        """The token of a script's piece."""
        return self._pieces[piece]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of tokens; bytes that are no character become U+FFFD."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        return b"".join(self._tokens[i] for i in kept).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for."""
        return self._tokens[token_id]


class ScriptedTemplate:
    """`<|role|>` before each turn, `<eos>` after it; tools are described in the system message."""

    def __init__(self, *, thinks: bool) -> None:
        self.source = "reasoning_content" + ("<think></think>" if thinks else "")
        self._thinks = thinks

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
    ) -> str:
        """The conversation as text; a thinking model's prompt opens the thought unless told not to."""
        out = "<bos>"
        for message in messages:
            thought = message.get("reasoning_content")
            out += (
                f"<|{message['role']}|>"
                + (f"<think>{thought}</think>" if thought else "")
                + message["content"]
            )
            out += "" if message.get("prefix") else "<eos>\n"
        if add_generation_prompt:
            out += "<|assistant|>" + ("<think>\n" if self._thinks and thinking is not False else "")
        return out


@dataclass
class _Running:
    request: Request
    answer: ScriptedAnswer
    script: list[int]
    cached: int
    random: random.Random
    ready_at: float
    at: int = 0  # place in the script
    made: list[int] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    sent: int = 0  # characters given out
    begun: bool = False

    def scripted(self, at: int) -> int:
        """The script's token at a place; EOS after its end."""
        if at < len(self.script):
            return self.script[at]
        return self.script[at % len(self.script)] if self.answer.endless and self.script else EOS


class ScriptedEngine:
    """`EngineCore` over a `Script`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.tokenizer = ByteTokenizer([p for a in script.answers for p in a.pieces])
        self.max_model_len = script.max_model_len
        self.vocab_size = self.tokenizer.vocab_size
        self._waiting: list[Request] = []
        self._running: dict[str, _Running] = {}
        self._blocks: set[tuple[str, tuple[int, ...]]] = set()
        self._hit = self._queried = 0

    # EngineCore

    def add(self, request: Request) -> None:
        """Queue a request."""
        room = self.max_model_len - len(request.prompt_ids)
        if not request.prompt_ids:
            raise RequestError("prompt: has no tokens", param="prompt")
        if room < 0 or (room == 0 and request.params.max_tokens > 0):
            size = len(request.prompt_ids)
            message = f"a prompt of {size} tokens leaves no room in a context of {self.max_model_len}"
            raise RequestError(message, param="prompt", code="context_length_exceeded")
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        """Forget a request."""
        self._running.pop(request_id, None)
        self._waiting = [r for r in self._waiting if r.request_id != request_id]

    def has_work(self) -> bool:
        """Whether anything is queued or running."""
        return bool(self._waiting or self._running)

    def stats(self) -> EngineStats:
        """Blocks stand for running requests."""
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks_total=self.script.max_running,
            blocks_used=len(self._running),
            prefix_hit_tokens=self._hit,
            prefix_query_tokens=self._queried,
        )

    def step(self) -> list[Delta]:
        """Every running request whose delay is over says its next tokens."""
        while self._waiting and len(self._running) < self.script.max_running:
            running = self._begin(self._waiting.pop(0))
            self._running[running.request.request_id] = running
        now = time.monotonic()
        ready = [r for r in self._running.values() if r.ready_at <= now]
        if not ready and self._running:
            time.sleep(max(0.0, min(0.005, min(r.ready_at for r in self._running.values()) - now)))
        deltas = []
        for running in ready:
            running.ready_at = now + running.answer.delay_s
            delta = self._advance(running)
            if delta.finish_reason is not None:
                del self._running[running.request.request_id]
            deltas.append(delta)
        return deltas

    def _begin(self, request: Request) -> _Running:
        prompt = self.tokenizer.decode(request.prompt_ids)
        answer = next((a for a in self.script.answers if a.match in prompt), ScriptedAnswer())
        script = [self.tokenizer.piece_id(p) for p in answer.pieces] or list(answer.text.encode())
        cached = self._remember(request)
        seed = request.params.seed
        ready_at = time.monotonic() + answer.first_delay_s
        return _Running(request, answer, script, cached, random.Random(seed), ready_at)

    def _remember(self, request: Request) -> int:
        """Whole blocks at the start of the prompt that were seen under the same salt; at least one token is
        left to compute.
        """
        ids = tuple(request.prompt_ids)
        cached = 0
        for end in range(_BLOCK, len(ids) + 1, _BLOCK):
            block = (request.cache_salt, ids[:end])
            if block in self._blocks and cached == end - _BLOCK and end < len(ids):
                cached = end
            self._blocks.add(block)
        self._hit += cached
        self._queried += len(ids)
        return cached

    def _advance(self, running: _Running) -> Delta:
        params = running.request.params
        delta = Delta(
            running.request.request_id,
            prompt_tokens=len(running.request.prompt_ids),
            cached_tokens=running.cached,
        )
        if not running.begun and params.prompt_logprobs is not None:
            delta.prompt_logprobs = self._prompt_logprobs(running.request)
        running.begun = True
        if params.max_tokens == 0:
            delta.finish_reason = "length"
        for _ in range(running.answer.tokens_per_step):
            if delta.finish_reason is None:
                self._one_token(running, delta)
        self._release(running, delta)
        return delta

    def _one_token(self, running: _Running, delta: Delta) -> None:
        answer, params = running.answer, running.request.params
        if answer.error is not None and len(running.made) >= answer.error_after:
            if answer.crash:
                self._running.clear()
                raise RuntimeError(answer.error)
            delta.finish_reason, delta.error = "error", answer.error
            return
        token_id = self._draw(running)
        running.made.append(token_id)
        delta.token_ids.append(token_id)
        if params.logprobs is not None:
            delta.logprobs.append(self._logprob(token_id, params.logprobs))
        if token_id == EOS and not params.ignore_eos:
            delta.finish_reason = "stop"
            return
        running.raw += self.tokenizer.token_bytes(token_id)
        if params.mask is not None:
            params.mask.accept(token_id)
        room = self.max_model_len - len(running.request.prompt_ids) - len(running.made)
        if (params.mask is not None and params.mask.finished) or token_id in params.stop_token_ids:
            delta.finish_reason = "stop"
        elif len(running.made) >= params.max_tokens or room <= 0:
            delta.finish_reason = "length"

    def _draw(self, running: _Running) -> int:
        """The next token of the script that is allowed; what a mask or bias forbids is passed over."""
        params = running.request.params
        if params.mask is None and not params.logit_bias and not running.answer.random:
            running.at += 1
            return running.scripted(running.at - 1)
        bits = params.mask.allowed() if params.mask is not None else None
        allowed = [i for i in range(self.vocab_size) if bits is None or bits[i >> 3] >> (i & 7) & 1]
        allowed = [i for i in allowed if params.logit_bias.get(i, 0.0) > -100]
        forced = [i for i in allowed if params.logit_bias.get(i, 0.0) >= 100]
        if running.answer.random:
            return running.random.choice(forced or [i for i in allowed if i != BOS])
        if forced:
            return forced[0]
        for at in range(running.at, running.at + len(running.script) + 1):
            if running.scripted(at) in allowed:
                running.at = at + 1
                return running.scripted(at)
        return allowed[0]

    def _logprob(self, token_id: int, count: int) -> TokenLogprob:
        """A made-up distribution: the token has half the mass, its successors half of what is left each."""
        top = tuple(((token_id + k) % self.vocab_size, (k + 1) * math.log(0.5)) for k in range(count))
        return TokenLogprob(token_id, math.log(0.5), top)

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob | None]:
        count = request.params.prompt_logprobs or 0
        return [None, *(self._logprob(i, count) for i in request.prompt_ids[1:])]

    def _release(self, running: _Running, delta: Delta) -> None:
        """Give out whole characters that no stop string can still claim."""
        text = _DECODER("replace").decode(bytes(running.raw), delta.finish_reason is not None)
        stops = running.request.params.stop
        cuts = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if cuts:
            at, delta.stop_text = min(cuts)
            text, delta.finish_reason = text[:at], "stop"
        elif delta.finish_reason is None:
            held = max((partial_end(text, stop) for stop in stops), default=0)
            text = text[: len(text) - held]
        if len(text) > running.sent:
            delta.text, running.sent = text[running.sent :], len(text)
