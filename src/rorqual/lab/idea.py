"""From the words of a command line to a trial: checked before it is put in, so that a slip costs no slot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rorqual.config import from_dict, put, read_tree, scalar, to_dict
from rorqual.errors import ConfigError
from rorqual.lab.rungs import Ladder
from rorqual.lab.store import PRIORITIES, Store, Study, Trial
from rorqual.train.config import TrainConfig

OURS = ("out", "stop_at", "save_every", "keep")  # keys of a run that the lab decides


def submit(store: Store, o: argparse.Namespace, point: Mapping[str, Any]) -> Trial:
    """Put an idea in. Raises ConfigError for what cannot be."""
    settings = _pairs(o.pairs) | dict(point)
    if (o.config is None) == (o.command is None) and o.command is not None:
        raise ConfigError("--command: leave CONFIG out, or --command")
    if o.command is not None:
        kind, spec = "command", {"command": o.command, "folder": str(Path.cwd())}
    elif o.config is not None and ":" in o.config and not Path(o.config).exists():
        kind, spec = "function", {"function": _function(o.config), "folder": str(Path.cwd())}
    else:
        kind, spec = "train", {}
    if kind != "train" and o.data:
        raise ConfigError("--data: is for a config of `rorqual train`; give it to your program by --set")
    if kind == "train":
        spec, ladder = _train(o, settings)
    else:
        if o.steps is None:
            raise ConfigError("--steps: say how many steps the last rung has")
        ladder = Ladder.below(o.steps, o.eta, o.rungs, o.goal)
    metric = o.metric or ("heldout_bpb" if kind == "train" else "loss")
    name = o.study or f"{metric} at {ladder.budgets[-1]} steps, {len(ladder.budgets)} rungs of {ladder.eta}"
    study = store.study(name, ladder, metric)
    return put_in(store, study, kind, spec, settings, o.who, o.name, o.priority, _plain(o))


def put_in(
    store: Store, study: Study, kind: str, spec: dict[str, Any], settings: dict[str, Any], who: str | None = None,
    name: str | None = None, priority: str = "normal", plain: str = "idea",
) -> Trial:  # fmt: skip
    """A checked idea into the state file."""
    from rorqual.lab.command import who as me

    said = ",".join(f"{k.rpartition('.')[2]}={_short(v)}" for k, v in settings.items())
    return store.trial(
        store.add(study, who or me(), name or said or plain, kind, spec, settings, PRIORITIES[priority])
    )


def _train(o: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Ladder]:
    """The whole config of the last rung, its paths made absolute, and the rungs below it."""
    tree = read_tree(Path(o.config)) if o.config is not None else {}
    for key, value in settings.items():
        if key in OURS:
            raise ConfigError(f"--set {key}: the lab decides it; leave it out")
        put(tree, key, value)
    if o.data:
        tree["data"] = [str(d) for d in o.data]
    if o.steps is not None:
        tree["steps"] = o.steps
    config = from_dict(TrainConfig, tree)
    if not config.data:
        raise ConfigError("--data: name at least one folder made by `rorqual data build`")
    for folder in config.data:
        if not (folder / "meta.json").is_file():
            raise ConfigError(f"--data {folder}: not a folder of `rorqual data build` (no meta.json)")
    ladder = Ladder.below(config.steps, o.eta, o.rungs, o.goal)
    tree = to_dict(config)
    tree["data"] = [str(d.resolve()) for d in config.data]
    if config.init_from is not None:
        tree["init_from"] = str(config.init_from.resolve())
    # Every rung ends with an evaluation; each budget divides the next.
    if config.eval_every < 1 or ladder.budgets[0] % config.eval_every:
        tree["eval_every"] = ladder.budgets[0]
    if "sample_every" not in settings:
        tree["sample_every"] = 0
    return {"config": tree}, ladder


def _pairs(pairs: list[str]) -> dict[str, Any]:
    found = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {pair}: write it as KEY=VALUE, such as optim.lr=0.01")
        found[key.strip()] = scalar(value.strip())
    return found


def _function(text: str) -> str:
    module, _, name = text.partition(":")
    if not module.replace(".", "").isidentifier() or not name.isidentifier():
        raise ConfigError(f"{text}: write a function as module:function, or name a config file that is there")
    return text


def _plain(o: argparse.Namespace) -> str:
    if o.command:
        return Path(o.command.split()[0]).name
    return Path(o.config).stem if o.config and ":" not in o.config else o.config or "train"


def _short(value: Any) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    )
