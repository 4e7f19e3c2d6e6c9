"""Our own load test and guidellm's on the same server: time to first token, between tokens, and tokens a second.

    python bench/api_load.py MODEL --guidellm VENV/bin/guidellm [--streams 8 --requests 64 --tokens 64]

Both keep `streams` requests in flight over the same prompts, in turns (ours, guidellm's, ours), so that neither has
the better machine. Once with a scripted engine that paces its tokens, where only the two programs' measuring differs, and
once with the model, whose two cores are also theirs. Goal: they agree within 5%.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from api_matrix import free_port, make_key, running
from record import Row, write_record


@dataclass(frozen=True)
class Options:
    """What is run."""

    model: tyro.conf.Positional[Path]
    """Model folder."""
    guidellm: Path
    """The program of guidellm's environment."""
    streams: int = 8
    """Requests in flight."""
    requests: int = 64
    """Requests in all."""
    tokens: int = 64
    """Tokens of each answer."""


@dataclass(frozen=True)
class Figures:
    """Medians over requests, in milliseconds, and tokens a second of all requests together."""

    first: float
    between: float
    speed: float


def prompts(options: Options, turn: int) -> list[str]:
    """Other texts in each turn, so that no turn finds another's cache."""
    return [f"{turn} {i}: tell me about the sea and what lives in it." for i in range(options.requests)]


async def own(url: str, key: str, options: Options, turn: int) -> Figures:
    """Our load test: workers that take the next prompt as soon as their answer has ended."""
    waiting = prompts(options, turn)
    firsts: list[float] = []
    betweens: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    settings: dict[str, Any] = {
        "base_url": url, "headers": {"authorization": f"Bearer {key}"}, "timeout": 600, "limits": limits,
    }  # fmt: skip

    async def worker(client: httpx.AsyncClient) -> None:
        while waiting:
            body = {
                "model": "m", "messages": [{"role": "user", "content": waiting.pop(0)}], "stream": True,
                "max_completion_tokens": options.tokens, "ignore_eos": True,
            }  # fmt: skip
            began, first, last = time.perf_counter(), 0.0, 0.0
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if '"content":"' in line and '"content":""' not in line:
                        last = time.perf_counter()
                        first = first or last
            firsts.append(first - began)
            betweens.append((last - first) / (options.tokens - 1))

    async with httpx.AsyncClient(trust_env=False, **settings) as client:
        began = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(options.streams)))
        took = time.perf_counter() - began
    speed = options.requests * options.tokens / took
    return Figures(statistics.median(firsts) * 1e3, statistics.median(betweens) * 1e3, speed)


def theirs(url: str, key: str, options: Options, turn: int, scratch: Path) -> Figures:
    """guidellm's report of the same load."""
    data, out = scratch / f"prompts-{turn}.jsonl", scratch / f"report-{turn}.json"
    lines = (json.dumps({"prompt": p, "output_tokens_count": options.tokens}) for p in prompts(options, turn))
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        str(options.guidellm), "run", "--disable-console",
        "--backend", f"kind=openai_http,target={url},model=m,api_key={key},request_format=/v1/chat/completions",
        "--profile", f"kind=concurrent,streams={options.streams}",
        "--constraint", f"kind=max_requests,count={options.requests}",
        "--tokenizer", f"kind=huggingface_auto,model={options.model}",
        "--data", f"kind=json_file,path={data}",
        "--output", f"kind=json,path={out}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not out.is_file():
        raise SystemExit(f"guidellm ended with {done.returncode}: {done.stderr[-2000:]}")
    metrics: dict[str, Any] = json.loads(out.read_text())["benchmarks"][0]["metrics"]
    good = {name: metrics[name]["successful"] for name in metrics if "successful" in (metrics[name] or {})}
    return Figures(
        good["time_to_first_token_ms"]["median"],
        good["inter_token_latency_ms"]["median"],
        good["output_tokens_per_second"]["mean"],
    )


PACED = {
    "max_model_len": 4096,
    "answers": [
        {"text": "the sea is wide and deep ", "endless": True, "first_delay_s": 0.25, "delay_s": 0.03}
    ],
}


def compare(options: Options, paced: bool) -> list[Row]:
    """Both programs on one server, in turns."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        scratch = Path(folder)
        ledger, port = scratch / "ledger.db", free_port()
        key, url = make_key(ledger), f"http://127.0.0.1:{port}"
        (scratch / "paced.json").write_text(json.dumps(PACED), encoding="utf-8")
        what_ = ["--scripted", str(scratch / "paced.json")] if paced else [str(options.model)]
        command = [sys.executable, "-m", "rorqual.cli", "serve", *what_, "--name", "m"]
        serve = [*command, "--port", str(port), "--ledger", str(ledger)]
        stack.enter_context(running(serve, url, scratch / "log.txt"))
        asyncio.run(own(url, key, options, 0))  # warm
        turns = []
        for turn in range(1, 6):
            mine = turn % 2 == 1
            found = (
                asyncio.run(own(url, key, options, turn))
                if mine
                else theirs(url, key, options, turn, scratch)
            )
            print("ours" if mine else "guidellm", found, flush=True)
            turns.append(found)
    rows, engine = [], "paced engine" if paced else "real engine"
    for what, unit in (("first", "ms"), ("between", "ms"), ("speed", "tokens/s")):
        name = {"first": "time to first token", "between": "time between tokens", "speed": "tokens/s"}[what]
        mine, other = (statistics.mean(getattr(t, what) for t in turns[k::2]) for k in (0, 1))
        agree = min(mine, other) / max(mine, other)
        rows.append(
            Row(f"load test, {name} at {options.streams} streams, {engine}, ours beside guidellm's", mine, other,
                "guidellm", agree, 0.95, unit)
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure and write bench/records/api_load.json."""
    options = tyro.cli(Options)
    rows = compare(options, True)
    print(write_record("api_load", rows))
    print(write_record("api_load", rows + compare(options, False)))  # minutes more, and may be cut off


if __name__ == "__main__":
    main()
