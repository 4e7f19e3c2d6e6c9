"""`rorqual generate` and `rorqual chat`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from rorqual.engine.llm import LLM
    from rorqual.engine.request import SamplingParams


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_tokens: int = 256
    temperature: float = 0.7  # 0: always the likeliest token
    top_p: float = 0.95
    top_k: int = 0  # 0: off
    seed: int | None = None  # none: another answer each time

    def params(self, stop: tuple[str, ...] = ()) -> SamplingParams:
        from rorqual.engine.request import SamplingParams

        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=stop,
        )


@dataclass(frozen=True)
class GenerateOptions:
    """Continue a prompt."""

    model: tyro.conf.Positional[Path]
    prompt: tyro.conf.Positional[str]
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


@dataclass(frozen=True)
class ChatOptions:
    """Talk with a model. Ctrl-C stops an answer, /clear forgets, /exit or Ctrl-D leaves."""

    model: tyro.conf.Positional[Path]
    system: str | None = None  # what the model is told before the first turn
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = Sampling()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def generate(argv: Sequence[str]) -> int:
    options = tyro.cli(GenerateOptions, args=list(argv), prog="rorqual generate")
    params = options.sampling.params()
    from rorqual.engine.llm import LLM, readable

    llm, prompt = LLM(options.model, dtype=options.dtype), readable(options.prompt)
    sys.stdout.write(prompt)
    for delta in llm.stream(prompt, params):
        _raise_error(delta)
        sys.stdout.write(delta.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def chat(argv: Sequence[str]) -> int:
    options = tyro.cli(ChatOptions, args=list(argv), prog="rorqual chat")
    params = options.sampling.params()
    from rorqual.engine.llm import LLM

    llm = LLM(options.model, dtype=options.dtype)
    print(
        f"{options.model}: {llm.engine.max_model_len:,} tokens of context; /help for the commands",
        file=sys.stderr,
    )
    start: list[dict[str, Any]] = (
        [] if options.system is None else [{"role": "system", "content": options.system}]
    )
    messages = list(start)
    for line in _lines():
        if line in ("/exit", "/quit"):
            break
        if line == "/help":
            print("/clear forgets the conversation, /exit leaves, Ctrl-C stops an answer", file=sys.stderr)
        elif line == "/clear":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(llm, messages, params)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Iterator[str]:
    """What a person types, or the lines of a pipe, until the end."""
    prompt = "> " if sys.stdin.isatty() else ""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text is no reason to end
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)", file=sys.stderr)


def _answer(llm: LLM, messages: list[dict[str, Any]], params: SamplingParams) -> str | None:
    """Print an answer as it comes and return it; Ctrl-C ends it and keeps what was said. None: it cannot be answered."""
    from rorqual.errors import RequestError

    text, count, begin = "", 0, time.monotonic()
    with _interrupts() as stopped:
        try:
            for delta in llm.stream(messages, params):
                _raise_error(delta)
                text, count = text + delta.text, count + len(delta.token_ids)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
                if stopped:
                    break
        except RequestError as e:
            print(f"error: {e}; /clear forgets the conversation", file=sys.stderr)
            print(flush=True)  # a line of a pipe has a line of its own
            return None
    seconds = max(time.monotonic() - begin, 1e-9)
    print(flush=True)
    print(
        f"[{count} tokens, {count / seconds:.1f} a second{', stopped' if stopped else ''}]", file=sys.stderr
    )
    return text


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """Collect Ctrl-C instead of dying of it; the list is empty until one comes."""
    seen: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _raise_error(delta: Any) -> None:
    from rorqual.errors import NumericsError

    if delta.finish_reason == "error":
        raise NumericsError(delta.error or "generation failed")
