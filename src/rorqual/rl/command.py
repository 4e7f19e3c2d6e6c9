"""`rorqual rl`: a recipe or a file, dotted overrides on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rorqual.config import load_config, read_tree, scalar
from rorqual.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rorqual.rl.config import RLConfig

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class RLOptions:
    """Make a model better at problems that a program can check.

    Overrides are dotted: `rorqual rl --recipe sums steps=100 sampling.group=8`.
    """

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    recipe: str | None = None  # sums, …: one that comes with the package
    config: Path | None = None  # a TOML or JSON file of the same keys
    model: Path | None = None  # a model folder to begin with
    out: Path | None = None  # the run folder
    resume: bool = False  # go on from the last checkpoint, with the run's own config
    show: bool = False  # print the config and leave

    def all_overrides(self) -> list[str]:
        """Flags as overrides, before those written out."""
        flags = {"model": self.model, "out": self.out}
        return [f"{k}={json.dumps(str(v))}" for k, v in flags.items() if v is not None] + list(self.overrides)


def rl(argv: Sequence[str]) -> int:
    from rorqual.train.command import OVERRIDE

    overrides = [a for a in argv if OVERRIDE.match(a)]
    rest = [a for a in argv if not OVERRIDE.match(a)]
    options = tyro.cli(RLOptions, args=[*rest, *overrides], prog="rorqual rl")
    config = rl_config(options)
    if options.show:
        from rorqual.config import to_dict

        print(json.dumps(to_dict(config), indent=1))
        return 0
    from rorqual.rl.run import reinforce
    from rorqual.train.stop import exit_code
    from rorqual.train.view import echo

    result = reinforce(config, options.resume)
    echo(f"report: {config.out / 'report.html'}")
    if result.stopped is not None:
        echo(f"stopped at step {result.step:,}; go on with rorqual rl --resume --out {config.out}")
    else:
        echo(f"the model: {result.folder}")
    return exit_code(result.stopped)


def rl_config(options: RLOptions) -> RLConfig:
    """The config of a run: a recipe, a file or, when it is resumed, the run's own, with overrides on top."""
    from rorqual.rl.config import RLConfig

    overrides = options.all_overrides()
    if options.recipe is not None and options.config is not None:
        raise ConfigError("--recipe, --config: give one of them")
    file = options.config
    if options.recipe is not None:
        file = RECIPES / f"{options.recipe}.toml"
        if not file.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
            raise ConfigError(f"--recipe {options.recipe}: not known; there are {known}")
    if not options.resume:
        return load_config(RLConfig, file, overrides)
    own = _out(file, overrides) / "run.json"
    if not own.is_file():
        raise RunError(
            f"--resume: nothing to resume in {own.parent.resolve()} (no run.json); name the run's folder with --out"
        )
    if file is None:
        overrides = ["stop_at=null", *overrides]  # there it has stopped: the run's own is over
    return load_config(RLConfig, file or own, overrides)


def _out(file: Path | None, overrides: Sequence[str]) -> Path:
    """The run folder that a file and overrides name."""
    from rorqual.rl.config import RLConfig

    tree = read_tree(file) if file is not None else {}
    named = [scalar(o.removeprefix("out=")) for o in overrides if o.startswith("out=")]
    return Path(named[-1] if named else tree.get("out", RLConfig.__dataclass_fields__["out"].default))
