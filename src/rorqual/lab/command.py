"""`rorqual lab …`: try, space, run, status, show, top, serve, report, and what changes a trial.

argparse, not tyro: `lab status` answers in a fifth of a second, of which tyro's import would take most."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import ConfigError
from rorqual.lab.store import PRIORITIES, Store

if TYPE_CHECKING:
    from rorqual.lab.idea import Idea

DESCRIPTION = "Anyone starts an idea at once at the smallest rung; the best of each rung are given more."


def lab(argv: Sequence[str]) -> int:
    options = parser().parse_args(list(argv))
    return int(options.function(options) or 0)


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="rorqual lab", description=DESCRIPTION)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--lab", type=Path, default=Path(os.environ.get("RORQUAL_LAB", "runs/lab")), metavar="DIR",
        help="the lab's folder (default: $RORQUAL_LAB or runs/lab)",
    )  # fmt: skip

    def add(
        name: str, function: Any, text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[folder, *parents])
        command.set_defaults(function=function)
        return command

    idea = _idea()
    add("try", _try, "start an idea at once at the smallest rung", idea)
    space = add("space", _space, "open a family of trials from ranges", idea)
    space.add_argument("--vary", action="append", default=[], metavar="KEY=RANGE", required=True,
                       help="low..high, low..high:log, low..high:int, or a|b|c; may be repeated")  # fmt: skip
    space.add_argument("--trials", type=int, default=27)
    space.add_argument("--seed", type=int, default=0)
    space.add_argument("--grid", action="store_true", help="all combinations of lists instead of drawing")
    run = add("run", _run, "schedule until there is no more work")
    run.add_argument("--stay", action="store_true", help="wait for more work instead of leaving")
    status = add("status", _status, "what runs, waits and leads")
    status.add_argument("--json", action="store_true")
    show = add("show", _show, "an idea: settings, rungs, story, the log's end")
    show.add_argument("trial", type=int)
    add("top", _top, "status that keeps itself up to date; q leaves")
    serve = add("serve", _serve, "a web page of every idea")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8600)
    report = add("report", _report, "what was learnt: which settings mattered, with the evidence")
    report.add_argument("--study", help="default: every study")
    report.add_argument("--out", type=Path, help="default: report.html in the lab's folder")
    withdraw = add("withdraw", _withdraw, "take an idea out")
    withdraw.add_argument("trial", type=int, nargs="+")
    withdraw.add_argument("--who", default=None)
    again = add("again", _again, "let a failed or withdrawn idea try again from what it has saved")
    again.add_argument("trial", type=int, nargs="+")
    priority = add("priority", _priority, "change an idea's priority")
    priority.add_argument("trial", type=int)
    priority.add_argument("level", choices=list(PRIORITIES))
    share = add("share", _share, "a person's weight where slots are scarce")
    share.add_argument("who")
    share.add_argument("weight", type=float)
    change = add("set", _set, "the lab's settings: slots=2 threads=1 memory_mb=4000 backend=slurm …")
    change.add_argument("pairs", nargs="*", metavar="KEY=VALUE")
    return top


def _idea() -> argparse.ArgumentParser:
    """Options that try and space share."""
    idea = argparse.ArgumentParser(add_help=False)
    idea.add_argument(
        "config", nargs="?", metavar="CONFIG",
        help="a config file of `rorqual train`, or a Python function as module:function",
    )  # fmt: skip
    idea.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="pairs")
    idea.add_argument(
        "--data", action="append", default=[], type=Path, help="a folder of `rorqual data build`"
    )
    idea.add_argument(
        "--command", help="a program that keeps the contract; {folder}, {budget}, {resume} are put in"
    )
    idea.add_argument("--name")
    idea.add_argument("--who", help="default: the user's name")
    idea.add_argument("--priority", choices=list(PRIORITIES), default="normal")
    idea.add_argument(
        "--study", help="who competes; default: what is measured alike, by steps, measure and held-out text"
    )
    idea.add_argument("--steps", type=int, help="of the last rung; default: the config's")
    idea.add_argument("--eta", type=int, help="of each rung the best 1/eta go on; default: 3")
    idea.add_argument("--rungs", type=int, help="default: 3")
    idea.add_argument("--metric", help="key of metrics.jsonl; default: heldout_bpb of train, else loss")
    idea.add_argument("--goal", choices=("min", "max"))
    idea.add_argument("--foreground", action="store_true", help="schedule here and show what happens")
    idea.add_argument("--hold", action="store_true", help="only put it in the queue; no scheduler is started")
    return idea


def _ideas(o: argparse.Namespace, points: Sequence[Mapping[str, Any]]) -> list[Idea]:
    """The options as ideas, one for each point of a space."""
    from rorqual.config import scalar
    from rorqual.lab.idea import Idea

    fixed: dict[str, Any] = {}
    for pair in o.pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"--set {pair}: write it as KEY=VALUE, such as optim.lr=0.01")
        fixed[key.strip()] = scalar(value.strip())
    names = (
        "config",
        "command",
        "name",
        "who",
        "priority",
        "study",
        "steps",
        "eta",
        "rungs",
        "metric",
        "goal",
    )
    given = {k: getattr(o, k) for k in names if getattr(o, k) is not None}
    return [Idea(**given, data=tuple(o.data), settings={**fixed, **point}) for point in points]


def _try(o: argparse.Namespace) -> int:
    from rorqual.lab.idea import submit

    store = Store(o.lab)
    trial = submit(store, _ideas(o, [{}])[0])
    print(f"trial {trial.id} ({trial.name}): rorqual lab show {trial.id}{_where(o.lab)}")
    return _go(store, o)


def _space(o: argparse.Namespace) -> int:
    from rorqual.lab.idea import submit_all
    from rorqual.lab.space import Space

    space = Space.parse(o.vary)
    points = space.grid() if o.grid else space.draw(o.trials, o.seed)
    store = Store(o.lab)
    made = submit_all(store, _ideas(o, points))
    print(f"trials {made[0].id} to {made[-1].id}: rorqual lab top{_where(o.lab)}")
    return _go(store, o)


def _go(store: Store, o: argparse.Namespace) -> int:
    """See to it that somebody schedules what was just put in."""
    from rorqual.lab.scheduler import scheduler_pid, start_detached

    if o.hold:
        return 0
    if o.foreground:
        return _run(argparse.Namespace(lab=o.lab, stay=False))
    if scheduler_pid(store.folder) is None:
        start_detached(store.folder)
    return 0


def _run(o: argparse.Namespace) -> int:
    from rorqual.lab.backends import backend
    from rorqual.lab.scheduler import Scheduler, hold, scheduler_pid
    from rorqual.lab.settings import load_settings
    from rorqual.train.stop import Stop

    store = Store(o.lab)
    while True:
        lock = hold(store.folder)
        if lock is None:
            print(f"process {scheduler_pid(store.folder)} schedules {store.folder} already")
            return 0
        settings = load_settings(store)
        scheduler = Scheduler(store, backend(settings), settings, say=_say)
        with Stop() as stop:
            scheduler.run(o.stay, stop.asked)
        lock.close()
        if stop.asked():
            running = len(store.running())
            print(f"left; {running} trial{'s' * (running != 1)} running, which the next scheduler adopts")
            return 0
        # What came between the last look and the unlocking would wait for nobody.
        if not scheduler.tick_would_work():
            return 0


def _say(text: str) -> None:
    print(text, flush=True)


def _set(o: argparse.Namespace) -> int:
    from rorqual.config import from_dict, scalar, to_dict
    from rorqual.lab.settings import Settings

    store = Store(o.lab)
    tree = store.meta("settings") or {}
    for pair in o.pairs:
        key, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(f"{pair}: write it as KEY=VALUE")
        tree[key] = scalar(value)
    settings = from_dict(Settings, tree)
    store.set_meta(settings=tree)
    print(json.dumps(to_dict(settings), indent=1))
    return 0


def _status(o: argparse.Namespace) -> int:
    from rorqual.lab.status import as_tree, text

    store = Store.open(o.lab)
    print(json.dumps(as_tree(store), indent=1) if o.json else text(store))
    return 0


def _show(o: argparse.Namespace) -> int:
    from rorqual.lab.status import one

    print(one(Store.open(o.lab), o.trial))
    return 0


def _top(o: argparse.Namespace) -> int:
    from rorqual.lab.top import top

    return top(Store.open(o.lab))


def _serve(o: argparse.Namespace) -> int:
    from rorqual.lab.page import serve

    return serve(Store.open(o.lab).folder, o.host, o.port)


def _report(o: argparse.Namespace) -> int:
    from rorqual.lab.report import write_report

    store = Store.open(o.lab)
    text, path = write_report(store, o.study, o.out or store.folder / "report.html")
    print(f"{text}\nreport: {path}")
    return 0


def _withdraw(o: argparse.Namespace) -> int:
    from rorqual.lab.idea import me

    store = Store.open(o.lab)
    for number in o.trial:
        store.withdraw(number, o.who or me())
    return 0


def _again(o: argparse.Namespace) -> int:
    from rorqual.lab.scheduler import scheduler_pid, start_detached

    store = Store.open(o.lab)
    for number in o.trial:
        store.again(number)
    if scheduler_pid(store.folder) is None:
        start_detached(store.folder)
    return 0


def _priority(o: argparse.Namespace) -> int:
    Store.open(o.lab).set_priority(o.trial, PRIORITIES[o.level])
    return 0


def _share(o: argparse.Namespace) -> int:
    Store.open(o.lab).share(o.who, o.weight)
    return 0


def _where(folder: Path) -> str:
    return "" if "RORQUAL_LAB" in os.environ or folder == Path("runs/lab") else f" --lab {folder}"
