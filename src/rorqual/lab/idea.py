"""From an idea to a trial: checked before it is put in, so that a slip costs no slot.

store = Store(Path("runs/lab"))
submit(store, Idea(config="recipe.toml", data=(Path("data/python"),), settings={"optim.lr": 0.02}))
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.config import from_dict, put, read_tree, to_dict
from rorqual.data.shards import fingerprint, read_meta
from rorqual.errors import ConfigError
from rorqual.lab.records import Study, Trial
from rorqual.lab.rungs import Ladder
from rorqual.lab.store import PRIORITIES, Store
from rorqual.train.config import TrainConfig

OURS = ("out", "stop_at", "save_every", "keep")  # keys of a run that the lab decides


@dataclass(frozen=True)
class Idea:
    """What somebody wants to try: a config of `rorqual train`, a Python function, or a command."""

    config: str | None = (
        None  # a file of `rorqual train` (none: its defaults), or a function as module:function
    )
    command: str | None = (
        None  # a program that keeps the contract; {folder}, {budget}, {resume} and settings are put in
    )
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted keys
    data: tuple[Path, ...] = ()  # folders of `rorqual data build`
    name: str | None = None  # the settings, by default
    who: str | None = None  # the user, by default
    priority: str = "normal"
    study: str | None = None  # by default, by steps, measure and held-out text: what is measured alike
    steps: int | None = None  # of the last rung; the config's, by default
    eta: int = 3
    rungs: int = 3
    metric: str | None = None  # key of metrics.jsonl; heldout_bpb of train, else loss
    goal: str = "min"


def submit(store: Store, idea: Idea) -> Trial:
    """Put an idea in. Raises ConfigError for what cannot be, DataError for a set that is none."""
    return submit_all(store, [idea])[0]


def submit_all(store: Store, ideas: Sequence[Idea]) -> list[Trial]:
    """Put ideas in: all of them, or, where one of them cannot be, a ConfigError and none."""
    works = [_work(idea) for idea in ideas]
    studies = [_study(store, idea, *work) for idea, work in zip(ideas, works, strict=True)]
    found = []
    for idea, (kind, spec, _), study in zip(ideas, works, studies, strict=True):
        called, priority = idea.name or _called(idea), PRIORITIES[idea.priority]
        number = store.add(study, idea.who or me(), called, kind, spec, dict(idea.settings), priority)
        found.append(store.trial(number))
    return found


def _study(store: Store, idea: Idea, kind: str, spec: Mapping[str, Any], ladder: Ladder) -> Study:
    """Whom an idea competes with: by default all that are measured alike."""
    metric = idea.metric or ("heldout_bpb" if kind == "train" else "loss")
    name = f"{metric} at {ladder.budgets[-1]} steps, {len(ladder.budgets)} rungs of {ladder.eta}"
    if kind == "train" and idea.study is None:
        name += f", {_held_out(spec['config'])}"
    return store.study(idea.study or name, ladder, metric)


def _held_out(config: Mapping[str, Any]) -> str:
    """The text that a run of `rorqual train` is measured on, by the checksums of its shards."""
    sets = [fingerprint(read_meta(Path(folder)), "heldout") for folder in config["data"]]
    return f"{config['eval_rows']} rows of {hashlib.sha256(' '.join(sets).encode()).hexdigest()[:8]}"


def me() -> str:
    """The person at the keyboard."""
    try:
        return os.environ.get("RORQUAL_LAB_USER") or getpass.getuser()
    except (KeyError, OSError):
        return "somebody"


def _work(idea: Idea) -> tuple[str, dict[str, Any], Ladder]:
    """(kind, what the child needs, rungs)."""
    if idea.config is not None and idea.command is not None:
        raise ConfigError("--command: leave CONFIG out, or --command")
    if idea.priority not in PRIORITIES:
        raise ConfigError(f"--priority {idea.priority}: must be one of {', '.join(PRIORITIES)}")
    function = idea.config is not None and ":" in idea.config and not Path(idea.config).exists()
    if idea.command is None and not function:
        return "train", *_train(idea)
    if idea.data:
        raise ConfigError("--data: is for a config of `rorqual train`; give it to your program by --set")
    if idea.steps is None:
        raise ConfigError("--steps: say how many steps the last rung has")
    ladder = Ladder.below(idea.steps, idea.eta, idea.rungs, idea.goal)
    if idea.command is not None:
        try:
            words = shlex.split(idea.command)
        except ValueError as e:
            raise ConfigError(f"--command {idea.command}: {e}; close every quote") from e
        if not words:
            raise ConfigError(f"--command {idea.command!r}: empty; name a program")
        return "command", {"command": idea.command, "folder": str(Path.cwd())}, ladder
    return "function", {"function": _function(idea.config or ""), "folder": str(Path.cwd())}, ladder


def _train(idea: Idea) -> tuple[dict[str, Any], Ladder]:
    """The whole config of the last rung, its paths made absolute, and the rungs below it."""
    tree = read_tree(Path(idea.config)) if idea.config is not None else {}
    for key, value in idea.settings.items():
        if key in OURS:
            raise ConfigError(f"--set {key}: the lab decides it; leave it out")
        put(tree, key, value)
    if idea.data:
        tree["data"] = [str(d) for d in idea.data]
    if idea.steps is not None:
        tree["steps"] = idea.steps
    config = from_dict(TrainConfig, tree)
    if not config.data:
        raise ConfigError("--data: name at least one folder made by `rorqual data build`")
    for folder in config.data:
        if not (folder / "meta.json").is_file():
            raise ConfigError(f"--data {folder}: not a folder of `rorqual data build` (no meta.json)")
    ladder = Ladder.below(config.steps, idea.eta, idea.rungs, idea.goal)
    whole = to_dict(config)
    whole["data"] = [str(d.resolve()) for d in config.data]
    if config.init_from is not None:
        whole["init_from"] = str(config.init_from.resolve())
    # Every rung ends with an evaluation: each budget is a multiple of the first.
    if config.eval_every < 1 or ladder.budgets[0] % config.eval_every:
        whole["eval_every"] = ladder.budgets[0]
    if "sample_every" not in tree:
        whole["sample_every"] = 0
    return {"config": whole}, ladder


def _function(text: str) -> str:
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for part in module.split(".")) or not name.isidentifier():
        raise ConfigError(f"{text}: write a function as module:function, or name a config file that is there")
    return text


def _called(idea: Idea) -> str:
    if idea.settings:
        return ",".join(f"{k.rpartition('.')[2]}={_short(v)}" for k, v in idea.settings.items())
    if idea.command is not None:
        return Path(shlex.split(idea.command)[0]).name
    if idea.config is None:
        return "train"
    return idea.config if ":" in idea.config else Path(idea.config).stem


def _short(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
