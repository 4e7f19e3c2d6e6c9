"""A long run of random traffic: memory and descriptors stay flat, no block leaks, no usage is wrong.

    python bench/api_soak.py MODEL [--minutes 20 --clients 24]

Clients ask whole and streamed, with and without grammar; some leave in the middle, some before the first token,
some read slowly. At the end the ledger must equal the usages that were answered, those of leavers aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from api_matrix import free_port, make_key
from record import Row, write_record

from rorqual.server.ledger import Ledger


@dataclass(frozen=True)
class Options:
    """How long and how many."""

    model: tyro.conf.Positional[Path]
    """Model folder."""
    minutes: float = 20.0
    """Length of the run."""
    clients: int = 24
    """At one time."""
    idle: int = 0
    """Further streams that never read."""


@dataclass
class Tally:
    """What the clients saw."""

    outcomes: Counter[str] = field(default_factory=Counter)
    prompt: int = 0
    completion: int = 0
    wrong: int = 0

    def usage(self, usage: dict[str, int], limit: int) -> None:
        self.prompt += usage["prompt_tokens"]
        self.completion += usage["completion_tokens"]
        whole = usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
        cache = usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
        self.wrong += not (whole and cache and usage["completion_tokens"] <= limit)


async def client(http: httpx.AsyncClient, rng: random.Random, tally: Tally, until: float) -> None:
    """One client's life."""
    while time.monotonic() < until:
        limit = rng.choice([1, 8, 24, 64])
        body: dict[str, object] = {"model": "m", "max_tokens": limit, "seed": rng.randrange(1000)}
        body["messages"] = [
            {"role": "user", "content": "sea " * rng.choice([1, 5, 40, 150]) + str(rng.randrange(5))}
        ]
        if rng.random() < 0.2:
            body["response_format"] = {"type": "json_object"}
        kind = rng.choice(["whole", "stream", "slow", "leave", "leave early"])
        try:
            await asyncio.wait_for(ask(http, kind, body, limit, tally, rng), 300)
            tally.outcomes[kind] += 1
        except (httpx.HTTPError, TimeoutError, asyncio.TimeoutError) as e:
            tally.outcomes[f"failed: {type(e).__name__}"] += 1


async def ask(
    http: httpx.AsyncClient, kind: str, body: dict[str, object], limit: int, tally: Tally, rng: random.Random
) -> None:
    if kind == "leave early":
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(
                http.post("/v1/chat/completions", json={**body, "user": "leaver"}), rng.random() * 0.05
            )
        return
    if kind == "whole":
        answer = await http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        tally.usage(answer.json()["usage"], limit)
        return
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    last = ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if kind == "leave" and rng.random() < 0.2:
                return
            if kind == "slow":
                await asyncio.sleep(0.02)
            if line.startswith("data: {"):
                last = line
    tally.usage(json.loads(last[6:])["usage"], limit)


def metrics(url: str, key: str) -> str:
    return httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {key}"}, trust_env=False).text


def figure(text: str, name: str) -> float:
    return sum(
        float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)", text, re.MULTILINE)
    )


async def traffic(
    options: Options, url: str, key: str, process: psutil.Process
) -> tuple[Tally, list[tuple[float, int]]]:
    """Run every client; sample memory (MB) and descriptors."""
    tally, samples = Tally(), []
    until = time.monotonic() + options.minutes * 60
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    http = httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits, trust_env=False)
    async with http, contextlib.AsyncExitStack() as stack:
        for _ in range(options.idle):
            said = [{"role": "user", "content": "idle"}]
            body = {"model": "m", "max_tokens": 4, "stream": True, "messages": said}
            await stack.enter_async_context(http.stream("POST", "/v1/chat/completions", json=body))
        work = asyncio.gather(*(client(http, random.Random(i), tally, until) for i in range(options.clients)))
        while not work.done():
            samples.append((process.memory_info().rss / 1e6, process.num_fds()))
            await asyncio.wait({work}, timeout=max(1.0, options.minutes * 60 / 100))
        await work
    return tally, samples


def main() -> None:
    """Soak a server and write bench/records/api_soak.json."""
    options = tyro.cli(Options)
    with tempfile.TemporaryDirectory() as scratch:
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
            # Small enough to be touched as a whole while the server warms up: pages of a cache count when they are used.
            "--engine.cache-tokens",
            "16384",
        ]
        log = Path(scratch, "log.txt")
        with log.open("wb") as out:
            server = subprocess.Popen([*serve, "--ledger", str(ledger)], stdout=out, stderr=out)
        while "serves" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        tally, samples = asyncio.run(traffic(options, url, key, psutil.Process(server.pid)))
        end = time.monotonic() + 30
        while figure(metrics(url, key), "vllm:num_requests_running") and time.monotonic() < end:
            time.sleep(0.2)
        text = metrics(url, key)
        server.terminate()
        code = server.wait(60)
        book = Ledger(ledger)
        charged = book._db.execute(
            "SELECT sum(hit + miss), sum(output) FROM charges WHERE outcome != 'abort'"
        ).fetchone()
        book.close()
        faults = log.read_text().count("Traceback")
    report(options, tally, samples, text, charged, code, faults)


def report(
    options: Options,
    tally: Tally,
    samples: list[tuple[float, int]],
    text: str,
    charged: tuple[int, int],
    code: int,
    faults: int,
) -> None:
    """Print what was seen and write the record."""
    warm = samples[len(samples) // 4 :] or samples
    growth = warm[-1][0] - warm[0][0]
    descriptors = warm[-1][1] - warm[0][1]
    blocks = figure(text, "vllm:kv_cache_usage_perc")
    failed = sum(n for name, n in tally.outcomes.items() if name.startswith("failed"))
    print(
        dict(tally.outcomes),
        f"memory {samples[0][0]:.0f} -> {samples[-1][0]:.0f} MB, descriptors {descriptors:+d}",
    )
    print("answered", tally.prompt, tally.completion, "charged", charged, "exit", code, "tracebacks", faults)
    lost = max(0, tally.completion - charged[1], tally.prompt - charged[0])
    name = f"soak of {options.minutes:g} min, {options.clients} clients"
    rows = [
        Row(f"{name}: wrong usages", tally.wrong, 0, "bound", float(tally.wrong == 0), 1.0),
        Row(f"{name}: requests failed", failed, 0, "bound", float(failed == 0), 1.0),
        Row(f"{name}: cache blocks held at the end", blocks, 0, "bound", float(blocks == 0), 1.0),
        Row(f"{name}: descriptors gained, at most 8", descriptors, None, "", float(descriptors <= 8), 1.0),
        Row(
            f"{name}: memory gained after warm-up, at most 50",
            growth,
            None,
            "",
            float(growth <= 50),
            1.0,
            "MB",
        ),
        Row(f"{name}: answered tokens not charged", lost, 0, "bound", float(lost == 0), 1.0),
        Row(f"{name}: tracebacks in the log", faults, 0, "bound", float(faults == 0 and code == 0), 1.0),
    ]
    print(write_record("api_soak", rows, outcomes=dict(tally.outcomes)))


if __name__ == "__main__":
    main()
