"""`rorqual bench MODEL`: decode and prefill speed of a model here, and how near the machine's limits they come."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from rorqual.engine.engine import Engine


@dataclass(frozen=True)
class BenchOptions:
    """Measure decode and prefill speed on random prompts."""

    model: tyro.conf.Positional[Path]
    batches: tuple[int, ...] = (1, 8, 32)  # requests at once, at a short context
    contexts: tuple[int, ...] = (16, 2048, 8192)  # of one request
    prompts: tuple[int, ...] = (512, 2048)  # lengths of prompts to read
    tokens: int = 32  # generated in each measurement
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    json: bool = False


@dataclass(frozen=True)
class Figure:
    """One measurement. `share`: of the memory bandwidth while decoding one request, of the matmul peak while reading."""

    what: str
    tokens_per_second: float
    share: float | None = None


def bench(argv: Sequence[str]) -> int:
    options = tyro.cli(BenchOptions, args=list(argv), prog="rorqual bench")
    import psutil

    from rorqual.device import format_bytes, measure_limits
    from rorqual.engine.config import EngineConfig
    from rorqual.engine.llm import LLM

    begin = time.perf_counter()
    need = max((*options.contexts, *options.prompts)) + options.tokens + 1
    tokens = max(need + 64, max(options.batches) * (64 + options.tokens))
    llm = LLM(
        options.model, EngineConfig(cache_tokens=tokens, max_num_seqs=max(options.batches)), options.dtype
    )
    loaded = time.perf_counter() - begin
    limits = measure_limits()
    figures = measure(llm.engine, options, limits.bandwidth, limits.flops_bfloat16)
    memory = psutil.Process().memory_info().rss
    if options.json:
        facts = {"load_seconds": loaded, "memory_bytes": memory, "limits": asdict(limits)}
        print(json.dumps({**facts, "figures": [asdict(f) for f in figures]}, indent=1))
        return 0
    print(
        f"{options.model}: loaded in {loaded:.1f} s, {format_bytes(memory)} of memory; the machine reads "
        f"{limits.bandwidth / 1e9:.1f} GB/s and multiplies {limits.flops_bfloat16 / 1e9:,.0f} GFLOP/s in bfloat16"
    )
    for f in figures:
        share = "" if f.share is None else f"   {f.share:.0%} of the limit"
        print(f"  {f.what:<34}{f.tokens_per_second:>10,.1f} tokens/s{share}")
    return 0


def measure(engine: Engine, options: BenchOptions, bandwidth: float, peak: float) -> list[Figure]:
    """Every figure, one after the other, on an engine that does nothing else."""
    from rorqual.engine.cache import token_bytes
    from rorqual.model.cost import cost

    bill = cost(engine.model.config)
    weights = active_bytes(engine)
    figures = []
    first_token(
        engine, min(256, engine.max_model_len - 2)
    )  # weights that are mapped from a file come into memory
    decode(engine, 1, 16, options.tokens)  # and threads, scratch and branches into their places
    for context in (c for c in options.contexts if c + options.tokens < engine.max_model_len):
        speed = decode(engine, 1, context, options.tokens)
        read = weights + context * token_bytes(engine.model.config, engine.cache.dtype)
        figures.append(Figure(f"decode, context {context:,}", speed, speed * read / bandwidth))
    for batch in options.batches:
        if batch > 1:
            figures.append(
                Figure(f"decode, {batch} requests at once", decode(engine, batch, 16, options.tokens))
            )
    for length in (n for n in options.prompts if n < engine.max_model_len):
        seconds = first_token(engine, length)
        work = 2 * bill.matmul * length + bill.attention_flops(length / 2, absorbed=False) * length
        figures.append(
            Figure(
                f"prompt of {length:,} ({seconds * 1e3:,.0f} ms to first)",
                length / seconds,
                work / seconds / peak,
            )
        )
    return figures


def active_bytes(engine: Engine) -> int:
    """Bytes of weights that one token reads: all but the embedding and the experts that it does not choose."""
    config = engine.model.config
    total = 0
    tensors = [*engine.model.named_parameters(), *engine.model.named_buffers()]
    for name, t in tensors:
        if name.startswith("embed_tokens.") and not config.tie_word_embeddings:
            continue
        size = t.numel() * t.element_size()
        routed = ".experts." in name and "shared" not in name
        total += size * config.num_experts_per_tok // config.n_routed_experts if routed else size
    return total


def decode(engine: Engine, batch: int, context: int, tokens: int) -> float:
    """Tokens a second of all requests together once every prompt is read."""
    _add(engine, batch, context, tokens + 1)
    while any(len(s.tokens) == s.prompt_len for s in engine._sequences.values()):
        engine.step()
    begin, made = time.perf_counter(), 0
    while engine.has_work():
        made += sum(len(d.token_ids) for d in engine.step())
    return made / (time.perf_counter() - begin)


def first_token(engine: Engine, length: int) -> float:
    """Seconds from a new prompt to its first token."""
    begin = time.perf_counter()
    _add(engine, 1, length, 1)
    while engine.has_work():
        engine.step()
    return time.perf_counter() - begin


def _add(engine: Engine, batch: int, context: int, tokens: int) -> None:
    """Requests with prompts that share no beginning with any before."""
    import random

    from rorqual.engine.request import Request, SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    for i in range(batch):
        prompt = [random.randrange(engine.vocab_size) for _ in range(context)]
        engine.add(Request(f"bench-{time.perf_counter_ns()}-{i}", prompt, params))
