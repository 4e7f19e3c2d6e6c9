"""Tokens a second at the most users that fit a fixed memory: DeepSeek-V2-Lite's sizes at six layers, beside dense
multi-head models of equal active and of equal total parameters, all with random weights at 4 bits in our engine.

Every user's context stands in the cache before the clock starts, as random values: speed does not depend on them.

python bench/engine_serving.py [--memory 4e9] [--contexts 2048 4096]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import random_model
from record import Row, faster, write_record

from rorqual.model.config import ModelConfig
from rorqual.model.published import published

GOAL = 5.76  # DeepSeek-V2 over DeepSeek 67B (arXiv 2405.04434, section 3.2.3)
TOKENS = 8
MOST_USERS = 256
LITE = dataclasses.replace(published("deepseek-v2-lite"), num_hidden_layers=6)


def dense(hidden: int, layers: int, intermediate: int) -> ModelConfig:
    """A Llama-style model whose every head has keys and values of its own."""
    return ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=LITE.vocab_size, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=intermediate, num_attention_heads=hidden // 128, num_key_value_heads=hidden // 128,
        head_dim=128, max_position_embeddings=16384,
    )  # fmt: skip


MODELS = {
    "ours": LITE,
    "dense, equal total parameters": dense(3072, 24, 8192),
    "dense, equal active parameters": dense(2048, 10, 5504),
}


def child(folder: Path, memory: float, context: int) -> None:
    """Measure one model in a process of its own; prints a line of JSON."""
    import torch

    from rorqual.engine.blocks import block_hash
    from rorqual.engine.config import EngineConfig
    from rorqual.engine.llm import LLM
    from rorqual.engine.request import Request, SamplingParams
    from rorqual.model.cost import cost

    torch.set_num_threads(2)
    weights = sum(p.stat().st_size for p in folder.iterdir())
    loaded = LLM(folder, EngineConfig(cache_tokens=64)).loaded
    a_token = cost(loaded.config).cache_bytes()
    users = min(int((memory - weights) / (a_token * (context + TOKENS + 16))), MOST_USERS)
    if users < 1:
        print(json.dumps({"users": 0, "speed": 0.0, "weights": weights, "a_token": a_token}))
        return
    size = 16
    limits = EngineConfig(
        cache_tokens=users * (context + TOKENS + 2 * size), max_num_seqs=users, block_size=size,
        max_num_batched_tokens=max(512, users),
    )  # fmt: skip
    engine = LLM(loaded, limits).engine
    generator = torch.Generator().manual_seed(0)
    for rows in (*engine.cache.latent, *engine.cache.keys, *engine.cache.values):
        rows.normal_(generator=generator)
    pool = engine.scheduler.pool
    params = SamplingParams(max_tokens=TOKENS + 1, temperature=0, ignore_eos=True)
    for user in range(users):
        prompt = torch.randint(0, engine.vocab_size, (context,), generator=generator).tolist()
        engine.add(Request(f"user-{user}", prompt, params))
        name, held = engine._sequences[f"user-{user}"].hashes[0], []
        for at in range(0, context - size, size):
            name = block_hash(name, prompt[at : at + size])
            block = pool.allocate()
            assert block is not None
            pool.publish(block, name)
            held.append(block)
        for block in held:
            pool.release(block)
    while any(len(s.tokens) == s.prompt_len for s in engine._sequences.values()):
        engine.step()
    hits = engine.stats().prefix_hit_tokens
    assert hits == users * ((context - 1) // size * size), "the contexts are computed, not found"
    begin, made = time.perf_counter(), 0
    while engine.has_work():
        made += sum(len(d.token_ids) for d in engine.step())
    speed = made / (time.perf_counter() - begin)
    print(json.dumps({"users": users, "speed": speed, "weights": weights, "a_token": a_token}))


def main() -> int:
    """Each model at each context, then the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--memory", type=float, default=4e9, help="bytes for weights and cache")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rorqual-bench")
    parser.add_argument("--child", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.memory, options.contexts[0])
        return 0
    rows: list[Row] = []
    found = {}
    for context in options.contexts:
        figures = {}
        for i, (name, config) in enumerate(MODELS.items()):
            folder = options.work / f"serving{i}"
            if not folder.exists():
                random_model.write_quantised(config, folder, bits=4, head=4)
            command = [sys.executable, __file__, "--child", str(folder), "--contexts", str(context)]
            done = subprocess.run(
                [*command, "--memory", str(options.memory)], check=True, stdout=subprocess.PIPE, text=True
            )
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(context, name, figures[name], flush=True)
        us = figures.pop("ours")
        for name, peer in figures.items():
            goal = GOAL if "total" in name else None
            note = f"{us['users']} users beside {peer['users']}"
            what = f"serving, {options.memory / 1e9:g} GB, contexts of {context:,}"
            rows.append(faster(what, us["speed"], peer["speed"], name, goal, "tokens/s", note))
        found[str(context)] = {"ours": us, **figures}
    print(write_record("engine_serving", rows, found=found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
