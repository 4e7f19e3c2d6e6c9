"""Decode and prefill of DeepSeek-V2-Lite's sizes with random weights, beside llama.cpp, vLLM's CPU wheel, transformers.

python bench/engine.py --llama llama.cpp/build/bin [--vllm-python venv/bin/python] [--layers 6|27] [--work DIR]

llama.cpp knows this model only at its full 27 layers; for another depth src/models/deepseek2.cpp needs
`hparams.n_layer() == 6` beside its 27 and 26. All peers and ours run on two threads, one after the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import random_model
from record import Row, faster, write_record

from rorqual.model.config import ModelConfig
from rorqual.model.published import published

HERE = Path(__file__).parent
TOKENS = 32
PROMPTS = (512, 2048)
CONTEXT = 8192
BATCH = 32


def ours(folder: Path, whole: bool) -> dict[str, Any]:
    """Tokens a second by name, and facts of the load."""
    contexts = (
        ("16",) if whole else ("16", str(CONTEXT))
    )  # a peer fills a long one at its own speed, for minutes
    command = [sys.executable, "-m", "rorqual.cli", "bench", str(folder), "--json", "--tokens", str(TOKENS)]
    command += ["--contexts", *contexts, "--batches", "1", str(BATCH)]
    command += ["--prompts", *(str(p) for p in (PROMPTS[:1] if whole else PROMPTS))]
    tree = _json(command)
    speeds = {f["what"].partition(" (")[0]: f["tokens_per_second"] for f in tree["figures"]}
    shares = {f["what"].partition(" (")[0]: f["share"] for f in tree["figures"]}
    return {**tree, "speeds": speeds, "shares": shares}


def llama(binaries: Path, model: Path, whole: bool) -> dict[str, float]:
    """llama-bench and llama-batched-bench: the same measurements."""
    base = [str(binaries / "llama-bench"), "-m", str(model), "-t", "2", "-o", "json", "-r", "2"]
    found = {}
    prompts = ",".join(str(p) for p in (PROMPTS[:1] if whole else PROMPTS))
    for row in _json([*base, "-p", prompts, "-n", str(TOKENS)]):
        key = f"prompt of {row['n_prompt']:,}" if row["n_prompt"] else "decode, context 16"
        found[key] = row["avg_ts"]
    for flash in () if whole else ("0", "1"):  # the better of the two
        for row in _json([*base, "-p", "0", "-n", str(TOKENS), "-d", str(CONTEXT), "-fa", flash, "-r", "1"]):
            key = f"decode, context {CONTEXT:,}"
            found[key] = max(found.get(key, 0.0), row["avg_ts"])
    batched = [str(binaries / "llama-batched-bench"), "-m", str(model), "-t", "2", "-c", "4096"]
    batched += ["-npp", "16", "-ntg", str(TOKENS), "-npl", str(BATCH), "--output-format", "jsonl"]
    lines = _run(batched).splitlines()
    found[f"decode, {BATCH} requests at once"] = next(
        json.loads(line)["speed_tg"] for line in lines if line.startswith("{")
    )
    return found


def other(python: Path, script: str, config: Path) -> dict[str, float]:
    """What another engine's script says of itself."""
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    lines = _run([str(python), str(HERE / script), str(config)], env).splitlines()
    speeds: dict[str, float] = json.loads(next(line for line in lines if line.startswith("{")))
    return speeds


def write_config(config: ModelConfig, folder: Path) -> Path:
    """config.json alone: the other engines fill in weights of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": "bfloat16"}))
    return folder


def rows_of(name: str, us: dict[str, Any], peers: dict[str, dict[str, float]], whole: bool) -> list[Row]:
    """A row for each measurement against the fastest peer that has it."""
    goals = {
        "decode, context 16": 1.5,
        f"decode, context {CONTEXT:,}": 2.5,
        f"decode, {BATCH} requests at once": 2.0,
        **{f"prompt of {p:,}": 1.5 for p in PROMPTS},
    }
    rows = []
    for what, goal in goals.items():
        if what not in us["speeds"]:
            continue
        have = {peer: speeds[what] for peer, speeds in peers.items() if what in speeds}
        best = max(have, key=lambda peer: have[peer]) if have else ""
        others = ", ".join(f"{p} {s:.1f}" for p, s in have.items() if p != best)
        rows.append(
            faster(f"{name}, {what}", us["speeds"][what], have.get(best), best, goal, "tokens/s", others)
        )
    share = us["shares"]["decode, context 16"]
    rows.append(
        Row(f"{name}, decode, share of measured memory bandwidth", share, 1.0, "bandwidth", share, 0.8)
    )
    if whole:
        seconds = us["load_seconds"]
        rows.append(Row(f"{name}, seconds to load", seconds, 20.0, "bound", 20.0 / seconds, 1.0, "s"))
    return rows


def main() -> int:
    """Make the model for each engine, measure, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", type=Path, required=True, help="the folder of llama.cpp's programs")
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rorqual-bench")
    options = parser.parse_args()
    config = dataclasses.replace(published("deepseek-v2-lite"), num_hidden_layers=options.layers)
    whole = options.layers == 27
    name = f"V2-Lite, {options.layers} layers"
    folder, file = options.work / f"lite{options.layers}", options.work / f"lite{options.layers}.gguf"
    if not folder.exists():
        random_model.write_quantised(config, folder, bits=4, head=4)
    if not file.exists():
        random_model.write_gguf(config, file)
    sizes = {"ours": _size(folder), "llama.cpp": file.stat().st_size}
    weights = _parameters(config)
    begin = time.monotonic()
    us = ours(folder, whole)
    peers = {"llama.cpp Q4_K_M": llama(options.llama, file, whole)}
    if options.vllm_python:
        peers["vLLM bf16"] = other(
            options.vllm_python, "engine_vllm.py", write_config(config, options.work / "wide")
        )
    if options.transformers:
        peers["transformers bf16"] = other(
            Path(sys.executable), "engine_transformers.py", write_config(config, options.work / "wide")
        )
    rows = rows_of(name, us, peers, whole)
    bits = {key: size * 8 / weights for key, size in sizes.items()}
    rows.append(
        Row(f"{name}, bits a weight", bits["ours"], bits["llama.cpp"], "llama.cpp Q4_K_M",
            bits["llama.cpp"] / bits["ours"], 1.0)
    )  # fmt: skip
    for row in rows:
        print(row)
    print(
        write_record(
            f"engine_lite{options.layers}",
            rows,
            seconds=time.monotonic() - begin,
            ours=us,
            peers=peers,
            bits=bits,
        )
    )
    return 0


def _parameters(config: ModelConfig) -> int:
    from rorqual.model.cost import cost

    return cost(config).parameters


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir())


def _run(command: list[str], env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _json(command: list[str]) -> Any:
    return json.loads(_run(command))


if __name__ == "__main__":
    sys.exit(main())
