"""What HTTP costs beside the engine alone: tokens a second at 32 streams, and the time to the first token.

    python bench/api_overhead.py MODEL [--streams 32 --tokens 64 --repeats 5]

The same prompts and limits run through the engine in this process and through a server in another, in turns, so
that both see the same machine. Goals: at least 97% of the engine's tokens a second; first token within 5 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from api_matrix import free_port, make_key, running
from record import Row, write_record

from rorqual.engine.llm import LLM
from rorqual.engine.request import Request, SamplingParams


@dataclass(frozen=True)
class Options:
    """What is run."""

    model: tyro.conf.Positional[Path]
    """Model folder."""
    streams: int = 32
    """Requests at one time."""
    tokens: int = 64
    """Tokens of each."""
    repeats: int = 5
    """Rounds; the median counts."""
    lite: int = 0
    """So many layers of DeepSeek-V2-Lite's sizes with random weights at 4 bits, and MODEL's tokenizer, instead."""


def prompt(round_number: int, stream: int) -> str:
    """Another text each time, so that nothing is cached."""
    return f"{round_number} {stream}: tell me about the sea and what lives in it."


def engine_round(llm: LLM, prompts: Sequence[str], tokens: int) -> tuple[float, float]:
    """Tokens a second of all, and seconds to the first token of a lone request before them."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    llm.engine.add(Request("first", llm.encode([{"role": "user", "content": prompts[0]}]), params))
    while not any(delta.token_ids for delta in llm.engine.step()):
        pass
    first = time.perf_counter() - began
    llm.engine.abort("first")
    began = time.perf_counter()
    for i, text in enumerate(prompts[1:]):
        llm.engine.add(Request(str(i), llm.encode([{"role": "user", "content": text}]), params))
    count = 0
    while llm.engine.has_work():
        count += sum(len(delta.token_ids) for delta in llm.engine.step())
    return count / (time.perf_counter() - began), first


class Stream(asyncio.Protocol):
    """A request and the bytes of its answer, and nothing else: a client that parses each event would take more of this
    machine's cores than the server does, and they are the engine's."""

    def __init__(self, host: str, key: str, payload: bytes) -> None:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(payload)}\r\nconnection: close\r\n\r\n"
        )
        self.request = head.encode() + payload
        self.answer = bytearray()
        self.began = time.perf_counter()
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[float] = loop.create_future()
        self.done: asyncio.Future[bytes] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.began = time.perf_counter()
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if not self.first.done() and self.answer.count(b'"content":"') > self.answer.count(b'"content":""'):
            self.first.set_result(time.perf_counter() - self.began)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.first.done():
            self.first.set_exception(RuntimeError(f"no token came: {bytes(self.answer[-500:])!r}"))
        if not self.done.done():
            self.done.set_result(bytes(self.answer))


async def server_round(url: str, key: str, prompts: Sequence[str], tokens: int) -> tuple[float, float]:
    """The same through HTTP, streamed."""
    host, _, port = url.removeprefix("http://").partition(":")

    async def begin(text: str) -> Stream:
        payload = json.dumps(body(text, tokens)).encode()
        loop = asyncio.get_running_loop()
        _, stream = await loop.create_connection(lambda: Stream(host, key, payload), host, int(port))
        return stream

    alone = await begin(prompts[0])
    first = await alone.first
    alone.transport.close()
    await asyncio.sleep(0.2)  # its slot is free again
    began = time.perf_counter()
    streams = await asyncio.gather(*(begin(text) for text in prompts[1:]))
    answers = await asyncio.gather(*(s.done for s in streams))
    seconds = time.perf_counter() - began
    for answer in answers:
        assert b"data: [DONE]" in answer, answer[-500:]
    return len(answers) * tokens / seconds, first


def body(text: str, tokens: int) -> dict[str, object]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def lite(folder: Path, layers: int, tokenizer_from: Path) -> Path:
    """A model of the size that this project is for: its steps take longer than those of 135M weights."""
    import random_model

    from rorqual.checkpoint.hf import TOKENIZER_FILES
    from rorqual.model.published import published
    from rorqual.text.tokenizer import Tokenizer

    vocabulary = Tokenizer.load(tokenizer_from).vocab_size
    config = dataclasses.replace(
        published("deepseek-v2-lite"),
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        bos_token_id=1,
        eos_token_id=2,
    )
    random_model.write_quantised(config, folder, bits=4, head=4)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    return folder


def main() -> None:
    """Measure in turns and write bench/records/api_overhead*.json."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as made:
        if options.lite:
            model = lite(Path(made) / "lite", options.lite, options.model)
            options = dataclasses.replace(options, model=model)
        measure(options)


def measure(options: Options) -> None:
    engine: list[tuple[float, float]] = []
    server: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        ledger, port = Path(scratch, "ledger.db"), free_port()
        key, url = make_key(ledger), f"http://127.0.0.1:{port}"
        serve = [
            sys.executable,
            "-m",
            "rorqual.cli",
            "serve",
            str(options.model),
            "--name",
            "m",
            "--port",
            str(port),
        ]
        stack.enter_context(running([*serve, "--ledger", str(ledger)], url, Path(scratch, "log.txt")))
        llm = LLM(options.model)
        for number in range(options.repeats + 1):
            prompts = [prompt(number, i) for i in range(options.streams + 1)]
            mine = engine_round(llm, prompts, options.tokens)
            through = asyncio.run(server_round(url, key, prompts, options.tokens))
            if number:  # the first round warms both up
                engine.append(mine)
                server.append(through)
            print(
                f"engine {mine[0]:.1f} tokens/s, first {mine[1] * 1e3:.1f} ms; "
                f"server {through[0]:.1f} tokens/s, first {through[1] * 1e3:.1f} ms",
                flush=True,
            )
    speed = statistics.median(s[0] for s in server), statistics.median(e[0] for e in engine)
    first = statistics.median(s[1] - e[1] for s, e in zip(server, engine, strict=True))
    share = speed[0] / speed[1]
    model = f"V2-Lite's sizes, {options.lite} layers" if options.lite else "SmolLM2"
    name = f"{model}: tokens/s through HTTP, {options.streams} streams"
    rows = [
        Row(name, speed[0], speed[1], "our engine alone", share, 0.97, "tokens/s"),
        Row(
            f"{model}: time to first token added by HTTP",
            first * 1e3,
            5.0,
            "bound",
            5.0 / max(first * 1e3, 1e-3),
            1.0,
            "ms",
        ),
    ]
    print(write_record("api_overhead_lite" if options.lite else "api_overhead", rows))


if __name__ == "__main__":
    main()
