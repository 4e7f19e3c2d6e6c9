"""Rollouts and updates a second beside TRL's GRPOTrainer: same model, prompts, batch, precision and loss, on the CPU.

    python bench/rl_speed.py --peer-python PYTHON_WITH_TRL

A Llama-style model of random weights answers with up to 128 tokens, of lengths as they fall (an end token has a chance
of about one in a hundred), or with up to 9. A step is generation, verdicts and one update over the whole batch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Load:
    """Groups of rollouts and the longest completion."""

    name: str
    prompts: int
    group: int
    max_tokens: int
    steps: int
    goal: float


LOADS = (
    Load("batch 64, up to 128 tokens", 8, 8, 128, 6, 2.0),
    Load("batch 512, up to 9 tokens", 32, 16, 9, 6, 1.1),
)
TURNS = 3  # of ours and the peer one after the other: neighbours on the machine come and go


def prompts(load: Load, step: int) -> list[str]:
    """Sums of two numbers, others at every step."""
    first = step * load.prompts
    return [f"{(first + i) * 37 % 90 + 10}+{(first + i) * 53 % 90 + 10}=" for i in range(load.prompts)]


def reward(text: str) -> float:
    """A verdict that is right about half of the time."""
    return float(sum(map(ord, text)) % 2)


def ours(folder: Path, load: Load) -> dict[str, float]:
    """Seconds of a step, and tokens of a rollout, of our loop's own parts."""
    import torch

    from rorqual.checkpoint import hf
    from rorqual.rl.config import RLConfig, Sampling
    from rorqual.rl.losses import advantages
    from rorqual.rl.rollout import Sampler
    from rorqual.rl.update import Updater
    from rorqual.text.tokenizer import Tokenizer
    from rorqual.train.allocator import keep_freed_memory
    from rorqual.train.config import Optim
    from rorqual.train.optim import Optimizer

    keep_freed_memory()
    sampling = Sampling(prompts=load.prompts, group=load.group, max_tokens=load.max_tokens, max_prompt=16)
    config = RLConfig(out=folder, model=folder, sampling=sampling, keep_truncated=True, micro_tokens=16384)
    model, tokenizer = hf.load_model(folder, torch.float32), Tokenizer.load(folder)
    sampler = Sampler(model, tokenizer, sampling, contextlib.nullcontext)
    rate = config.lr
    optimizer = Optimizer(model.named_parameters(), Optim.even("adamw", rate, weight_decay=0.0))
    updater = Updater(config, model, optimizer, contextlib.nullcontext)
    times, tokens = [], 0
    for step in range(load.steps + 1):
        begin = time.perf_counter()
        sampler.refresh()
        seeds = [step * 1000 + i for i in range(load.prompts)]
        groups = sampler.draw([tokenizer.encode(p) for p in prompts(load, step)], load.group, seeds)
        rewards = torch.tensor([[reward(r.text) for r in g] for g in groups])
        flat = [r for g in groups for r in g]
        updater.step(flat, advantages(rewards).flatten().tolist(), 1.0, first=True)
        times.append(time.perf_counter() - begin)
        tokens += sum(len(r.ids) for r in flat)
    return {"seconds": median(times[1:]), "tokens": tokens / (load.prompts * load.group * (load.steps + 1))}


def peer(folder: Path, load: Load) -> dict[str, float]:
    """The same of TRL; runs where trl is installed."""
    sys.path.remove(
        str(Path(__file__).parent)
    )  # transformers would take kernels.py for a package of that name
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    lengths: list[int] = []

    def judge(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return [reward(c) for c in completions]

    rows = [{"prompt": p} for step in range(load.steps + 1) for p in prompts(load, step)]
    size = load.prompts * load.group
    with tempfile.TemporaryDirectory() as out:
        arguments = GRPOConfig(
            output_dir=out, per_device_train_batch_size=size, num_generations=load.group,
            max_completion_length=load.max_tokens, max_steps=load.steps + 1, use_cpu=True, bf16=False, beta=0.0,
            scale_rewards="none", loss_type="dapo", report_to=[], save_strategy="no", logging_steps=1000,
            learning_rate=1e-4, temperature=1.0, shuffle_dataset=False, gradient_checkpointing=False,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            reward_funcs=judge,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        )
        trainer.train()
    times = [b - a for a, b in itertools.pairwise(marks)]
    return {"seconds": median(times[1:]), "tokens": sum(lengths) / max(len(lengths), 1)}


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def make_model(folder: Path) -> None:
    """1.2 million parameters of random weights, with a tokenizer of characters."""
    from rorqual.checkpoint import hf
    from rorqual.model.transformer import Transformer
    from rorqual.rl.tokens import write_characters
    from rorqual.text.tokenizer import Tokenizer
    from rorqual.train.shape import Shape

    tokens = folder.with_name("tokenizer")
    write_characters(tokens)
    tokenizer = Tokenizer.load(tokens)
    shape = Shape(family="llama", depth=4, width=160, heads=5)
    config = shape.model(tokenizer.vocab_size, 256, tokenizer.bos_id, tokenizer.eos_ids[0])
    hf.save_model(Transformer(config).init_weights(0), folder, tokenizer_from=tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--run", choices=["ours", "peer"])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--load", type=int, default=0)
    options = parser.parse_args()
    if options.run is not None:
        found = (ours if options.run == "ours" else peer)(options.folder, LOADS[options.load])
        print("RESULT " + json.dumps(found))
        return
    from record import faster, write_record

    rows = []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        make_model(folder)
        for number, load in enumerate(LOADS):
            results: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
            for _ in range(TURNS):
                for who, python in (("ours", sys.executable), ("peer", str(options.peer_python))):
                    command = [
                        python, __file__, "--run", who, "--folder", str(folder), "--load", str(number)
                    ]  # fmt: skip
                    done = subprocess.run(command, capture_output=True, text=True)
                    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
                    if line is None:
                        raise SystemExit(done.stderr[-3000:])
                    results[who].append(json.loads(line.removeprefix("RESULT ")))
                    print(load.name, who, results[who][-1], flush=True)
            size = load.prompts * load.group
            a, b = (
                {key: median([turn[key] for turn in results[who]]) for key in ("seconds", "tokens")}
                for who in ("ours", "peer")
            )
            note = f"tokens a rollout {a['tokens']:.1f} against {b['tokens']:.1f}; a step with its update"
            rows.append(
                faster(
                    f"rollouts learnt from, {load.name}", size / a["seconds"], size / b["seconds"],
                    "TRL GRPOTrainer", load.goal, "rollouts/s", note,
                )
            )  # fmt: skip
    print(write_record("rl_speed", rows))


if __name__ == "__main__":
    main()
