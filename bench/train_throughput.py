"""Training throughput beside Hugging Face Llama, litgpt and Hugging Face DeepseekV3 on one shape.

Six layers, 384 wide, 6 heads, SwiGLU 1024, vocabulary 4096, rows of 512 tokens: 10.6M weights that multiply, apart from
the embedding and the head; with experts, 24 of 256 of which a token takes 3, and a shared one: as many active. A step is
forward, backward, clipping and AdamW for everybody. Every contestant runs in a process of its own, in turns, and its
best turn counts.

    python bench/train_throughput.py --litgpt VENV/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import Row, faster, smaller, write_record

VOCAB, LENGTH = 4096, 512
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
}
EXPERTS = {
    "moe_intermediate_size": 256,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 192,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
}
MUON_TOKENS = 16384  # of a step for Muon: its work is per step, and a run of this size takes such steps

Step = Callable[[], float]  # one step; seconds of it spent in the optimizer


def ours(options: argparse.Namespace) -> Step:
    """Our model, loss, clipping and optimizer, as the trainer calls them."""
    from rorqual.train.allocator import keep_freed_memory
    from rorqual.train.batch import Lesson
    from rorqual.train.config import Optim, TrainConfig
    from rorqual.train.objective import autocast, objective
    from rorqual.train.optim import Optimizer, clip_
    from rorqual.train.run import begin_model
    from rorqual.train.shape import Shape

    keep_freed_memory()
    shape = Shape(depth=6, family="llama") if options.worker == "rorqual" else Shape(depth=6, experts=24)
    model = begin_model(TrainConfig(shape=shape), shape.model(VOCAB, LENGTH)).train()
    optim = Optim(options.optimizer, lr=1e-3, embedding_lr=1e-3, head_lr=1e-3, vector_lr=1e-3)
    products = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    optimizer = Optimizer(model.named_parameters(), optim, products)
    params = list(model.parameters())
    forward = torch.compile(model) if options.compile else model
    batch = options.rows * LENGTH
    times = options.step_tokens // batch if options.optimizer == "muon" else 1
    ids = torch.randint(0, VOCAB, (options.rows, LENGTH + 1))
    positions = torch.arange(LENGTH).expand(options.rows, -1)
    lesson = Lesson(ids, positions, None, torch.ones(options.rows, LENGTH))

    def step() -> float:
        for _ in range(times):
            with autocast(torch.device("cpu"), options.dtype):
                loss, _ = objective(model, lesson, batch * times, 1 / times, forward=forward)
            loss.total.backward()
        begin = clock(options)
        clip_(params, 1.0)
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)
        return clock(options) - begin

    step.tokens = batch * times  # type: ignore[attr-defined]
    return step


def peer(options: argparse.Namespace) -> Step:
    """A peer's model in a plain loop with torch's fused AdamW."""
    model = {"hf-llama": hf_llama, "hf-deepseek": hf_deepseek, "litgpt": litgpt}[options.worker]().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    ids = torch.randint(0, VOCAB, (options.rows, LENGTH + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    call: Any = torch.compile(model) if options.compile else model

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
            if options.worker == "litgpt":
                logits = call(inputs)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            else:
                loss = call(input_ids=inputs, labels=inputs).loss
        loss.backward()
        begin = clock(options)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return clock(options) - begin

    step.tokens = options.rows * LENGTH  # type: ignore[attr-defined]
    return step


def hf_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def hf_deepseek() -> torch.nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    return DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, **EXPERTS))


def litgpt() -> torch.nn.Module:
    from litgpt.config import Config
    from litgpt.model import GPT

    return GPT(
        Config(
            block_size=LENGTH,
            vocab_size=VOCAB,
            padded_vocab_size=VOCAB,
            n_layer=6,
            n_head=6,
            n_embd=384,
            n_query_groups=6,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=1024,
        )
    )


def clock(options: argparse.Namespace) -> float:
    """Wall time, or the processor time of this process where other work shares the machine."""
    return time.process_time() / options.threads if options.cpu_time else time.perf_counter()


def work(options: argparse.Namespace) -> dict[str, float]:
    """In a contestant's process: tokens a second of the best step, and the optimizer's share of it."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    step = (ours if options.worker.startswith("rorqual") else peer)(options)
    for _ in range(3 if options.compile else 1):
        step()
    best: tuple[float, float] | None = None
    for _ in range(options.steps):
        begin = clock(options)
        optimizer = step()
        took = clock(options) - begin
        if best is None or took < best[0]:
            best = took, optimizer
    assert best is not None
    return {"tokens_per_second": step.tokens / best[0], "share": best[1] / best[0]}  # type: ignore[attr-defined]


CONTESTANTS: dict[str, tuple[str, ...]] = {
    "dense bf16": ("rorqual", "--dtype", "bfloat16"),
    "dense fp32": ("rorqual", "--dtype", "float32"),
    "dense bf16 compiled": ("rorqual", "--dtype", "bfloat16", "--compile"),
    "dense muon": ("rorqual", "--dtype", "bfloat16", "--optimizer", "muon"),
    "moe bf16": ("rorqual-moe", "--dtype", "bfloat16"),
    "moe fp32": ("rorqual-moe", "--dtype", "float32"),
    "moe muon": ("rorqual-moe", "--dtype", "bfloat16", "--optimizer", "muon"),
    "moe muon, larger step": (
        "rorqual-moe",
        "--dtype",
        "bfloat16",
        "--optimizer",
        "muon",
        "--step-tokens",
        str(2 * MUON_TOKENS),
    ),
    "HF Llama bf16": ("hf-llama", "--dtype", "bfloat16"),
    "HF Llama fp32": ("hf-llama", "--dtype", "float32"),
    "HF Llama bf16 compiled": ("hf-llama", "--dtype", "bfloat16", "--compile"),
    "litgpt bf16": ("litgpt", "--dtype", "bfloat16"),
    "litgpt fp32": ("litgpt", "--dtype", "float32"),
    "litgpt bf16 compiled": ("litgpt", "--dtype", "bfloat16", "--compile"),
    "HF DeepseekV3 bf16": ("hf-deepseek", "--dtype", "bfloat16"),
    "HF DeepseekV3 fp32": ("hf-deepseek", "--dtype", "float32"),
}


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every contestant in its own process, in turns; the best turn of each."""
    found: dict[str, dict[str, float]] = {}
    for turn in range(options.rounds):
        for name, (worker, *arguments) in CONTESTANTS.items():
            if (worker == "litgpt" and options.litgpt is None) or (options.quick and "compiled" in name):
                continue
            if ("compiled" in name or "larger" in name) and turn:
                continue  # minutes each; the best of several steps stands
            python = options.litgpt if worker == "litgpt" else Path(sys.executable)
            command = [
                str(python), __file__, "--worker", worker, *arguments, "--rows", str(options.rows),
                "--steps", str(options.steps), "--threads", str(options.threads),
                *(["--cpu-time"] if options.cpu_time else []),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            result = json.loads(done.stdout.splitlines()[-1])
            if name not in found or result["tokens_per_second"] > found[name]["tokens_per_second"]:
                found[name] = result
            print(
                f"{name}: {result['tokens_per_second']:,.0f} tokens/s, optimizer {result['share']:.1%}",
                flush=True,
            )
    return found


def rows_of(found: dict[str, dict[str, float]], peak: dict[str, float], tokens: int) -> list[Row]:
    """The record's rows."""
    speed = {name: r["tokens_per_second"] for name, r in found.items()}

    def best(*names: str) -> tuple[float | None, str]:
        there = [n for n in names if n in speed]
        return max(((speed[n], n) for n in there), default=(None, ""))

    unit = "tokens/s"
    eager, compiled = (
        best("HF Llama bf16", "litgpt bf16"),
        best("HF Llama bf16 compiled", "litgpt bf16 compiled"),
    )
    rows = [
        faster("training, dense 10M, bf16", speed["dense bf16"], *eager, 1.3, unit),
        faster("training, dense 10M, bf16, against the fastest compiled", speed["dense bf16"], *compiled, 1.0, unit),
        faster("training, dense 10M, fp32", speed["dense fp32"], *best("HF Llama fp32", "litgpt fp32"), None, unit),
        faster("training, experts, bf16", speed["moe bf16"], *best("HF DeepseekV3 bf16"), 1.5, unit),
        faster("training, experts, fp32", speed["moe fp32"], *best("HF DeepseekV3 fp32"), None, unit),
        faster(
            "training, experts against our dense model of equal active FLOPs",
            speed["moe bf16"], speed["dense bf16"], "our dense model", 0.75, unit,
        ),
    ]  # fmt: skip
    if "dense bf16 compiled" in speed:
        rows.append(
            faster(
                "training, dense 10M, bf16, ours compiled",
                speed["dense bf16 compiled"],
                *compiled,
                None,
                unit,
            )
        )
    for name, words in (("dense bf16", "AdamW, dense"), ("moe bf16", "AdamW, experts")):
        note = f"{tokens:,} tokens a step"
        rows.append(
            smaller(
                f"optimizer's share of a step, {words}", found[name]["share"], 0.1, "bound", 1.0, note=note
            )
        )
    for name, words, step in (
        ("dense muon", "Muon, dense", MUON_TOKENS),
        ("moe muon", "Muon, experts", MUON_TOKENS),
        ("moe muon, larger step", "Muon, experts", 2 * MUON_TOKENS),
    ):
        note = f"{step:,} tokens a step"
        rows.append(
            smaller(
                f"optimizer's share of a step, {words}", found[name]["share"], 0.1, "bound", 1.0, note=note
            )
        )
    for name, dtype in (("dense bf16", "bfloat16"), ("dense fp32", "float32"), ("moe bf16", "bfloat16")):
        reached = flops_per_token(name.startswith("moe")) * speed[name]
        rows.append(faster(f"share of the measured matmul peak, {name}", reached / peak[dtype], None, ""))
    return rows


def flops_per_token(moe: bool) -> float:
    """Forward and backward, head and causal attention included."""
    from rorqual.model.cost import cost
    from rorqual.train.shape import Shape

    shape = Shape(depth=6, experts=24) if moe else Shape(depth=6, family="llama")
    return cost(shape.model(VOCAB, LENGTH)).train_flops(LENGTH)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litgpt", type=Path, help="the Python of an environment that has litgpt")
    parser.add_argument("--rows", type=int, default=8, help="rows of 512 tokens of a step")
    parser.add_argument("--steps", type=int, default=8, help="steps timed in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count processor time: the machine is shared")
    parser.add_argument(
        "--quick", action="store_true", help="leave out what is compiled, and write no record"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--optimizer", default="adamw", help=argparse.SUPPRESS)
    parser.add_argument("--step-tokens", type=int, default=MUON_TOKENS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return 0
    from rorqual.device import measure_limits

    torch.set_num_threads(options.threads)
    limits = measure_limits(1.0)
    peak = {"bfloat16": limits.flops_bfloat16, "float32": limits.flops_float32}
    rows = rows_of(measure(options), peak, options.rows * LENGTH)
    for row in rows:
        ratio = "" if row.ratio is None else f"  {row.ratio:.2f}x (goal {row.goal}) of {row.peer_name}"
        print(f"{row.what}: {row.ours:,.3g}{ratio}")
    if not options.quick:
        print(write_record("train_throughput", rows, peak_flops=peak, threads=options.threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
