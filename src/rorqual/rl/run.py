"""A reinforcement run from its config: folder, model, tasks, loop, report."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.loaded import check_vocabulary
from rorqual.device import require_memory
from rorqual.errors import ConfigError, RunError
from rorqual.model.cost import cost
from rorqual.model.transformer import Transformer
from rorqual.rl.config import RLConfig
from rorqual.rl.loop import BEST, REFERENCE, Loop
from rorqual.rl.problems import Mix, family
from rorqual.rl.report import write_report
from rorqual.rl.tokens import write_characters
from rorqual.rl.view import view
from rorqual.text.tokenizer import Tokenizer
from rorqual.train import checkpoint, folders, metrics
from rorqual.train.allocator import keep_freed_memory
from rorqual.train.lock import Lock
from rorqual.train.metrics import View
from rorqual.train.run import HEAD_SCALE, RUN, settle
from rorqual.train.stop import Stop
from rorqual.train.trainer import Result
from rorqual.verify.interval import wilson

# What may change when a run is resumed: it does not touch the weights.
FREE = frozenset({"out", "save_every", "keep", "eval_every", "pass_k", "enough", "stop_at"})


def reinforce(config: RLConfig, resume: bool = False, show: View | None = None) -> Result:
    """Run a config to its end, its goal or a signal. Raises before any work for what cannot work: an unknown family, a
    folder in use or already used, a model that is not there, a resume with nothing to resume."""
    tasks = [family(t) for t in config.tasks]
    mix = Mix(config.tasks, tasks, config.seed, config.eval_problems)
    check_goal(config, mix)
    keep_freed_memory()
    with Lock(config.out):
        there = folders.steps(config.out)
        if there and not resume:
            raise RunError(
                f"{config.out.resolve()}: holds a run of {there[-1]} steps; add --resume to go on, or take another folder"
            )
        show = show or view(config.out.name)
        try:
            for label, posed in mix.held_out.items():
                if len(posed) < config.eval_problems:
                    show.say(f"{label}: {len(posed)} different held-out problems, all there are")
            found = checkpoint.latest(config.out, show.say)
            if resume and found is None:
                raise RunError(f"{config.out.resolve()}: nothing to resume; it has no whole checkpoint")
            if found is None and (config.out / RUN).is_file():
                _forget(config.out)
            settle(config, resume, FREE)
            folder = _tokenizer_folder(config)
            tokenizer = Tokenizer.load(folder)
            torch.manual_seed(config.seed)
            model = begin(config, tokenizer)
            loop = Loop(config, model, tokenizer, mix, folder)
            if found is not None:
                loop.resume(found)
                show.say(f"going on from step {loop.step}")
            with Stop() as stop:  # until the report is written: a signal that comes late costs neither
                result = loop.run(show, stop)
                write_report(config, cost(model.config))
        finally:
            show.close()
    return result


def _forget(out: Path) -> None:
    """What a run that ended before its first checkpoint left: another one must not measure its divergence from there."""
    for name in (REFERENCE, BEST):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / metrics.FILE).unlink(missing_ok=True)


def check_goal(config: RLConfig, mix: Mix) -> None:
    """That the held-out problems are enough to show what `enough` asks for. Raises ConfigError."""
    count = sum(map(len, mix.held_out.values()))
    most = wilson(count, count)[0]
    if config.enough is not None and config.enough >= most:
        raise ConfigError(
            f"enough={config.enough}: the interval of {count} right answers to {count} held-out problems begins at "
            f"{most:.3f}; set less, or raise eval_problems or the family's sizes"
        )


def begin(config: RLConfig, tokenizer: Tokenizer) -> Transformer:
    """The weights that a run begins with: a folder's, or new ones from the seed."""
    if config.model is None:
        eos = tokenizer.eos_ids[0]
        shape = config.shape.model(tokenizer.vocab_size, config.context, tokenizer.bos_id, eos)
        model = Transformer(shape).init_weights(config.seed, config.shape.zero_output)
        if not shape.tie_word_embeddings:
            with torch.no_grad():
                model.lm_head.weight.mul_(HEAD_SCALE)
        return model
    shape = hf.load_config(config.model)
    if config.context > shape.max_position_embeddings:
        raise ConfigError(
            f"sampling: max_prompt + max_tokens={config.context}, the model has {shape.max_position_embeddings} positions"
        )
    needed = cost(shape).parameters * (
        24 if config.loss.beta else 20
    )  # weights, gradients, two moments, a spare
    require_memory(needed, f"reinforcing {config.model}", "take a smaller model")
    return hf.load_model(config.model, torch.float32)


def _tokenizer_folder(config: RLConfig) -> Path:
    """A new model's tokenizer is made of characters; another model brings its own."""
    if config.model is None:
        folder = config.out / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            write_characters(folder)
        return folder
    check_vocabulary(Tokenizer.load(config.model), hf.load_config(config.model).vocab_size, config.model)
    return config.model
