"""`rorqual compare`: how much less the DeepSeek-style recipe needs than a Llama-style baseline, on this machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from rorqual.errors import ConfigError

if TYPE_CHECKING:
    from rorqual.compare.budget import Budget
    from rorqual.compare.pool import Say
    from rorqual.compare.report import Factor, Findings
    from rorqual.compare.setting import Setting
    from rorqual.compare.study import Match, Point, Study


Several = tyro.conf.UseAppendAction[tuple[str, ...]]  # the option may be repeated


@dataclass(frozen=True)
class CompareOptions:
    """Train a tuned Llama-style baseline and the DeepSeek-style recipe on the same data, and report how much less the
    recipe needs to reach the baseline's final held-out loss. Runs are kept in --out and never computed twice."""

    budget: str = "quick"  # quick, standard, or the FLOPs of one baseline run (3e13)
    out: Path = Path("runs/compare")
    data: Path | None = None  # a folder of `rorqual data build`; built from `sources` otherwise
    sources: tuple[str, ...] = ("python",)
    without: Several = ()  # a part of the recipe to take out; `all`: each in turn
    only: Several = ()  # a part to put alone on the baseline; `all`: each in turn
    idea: Several = ()  # KEY=VALUE on top of the recipe: your own
    parts: tuple[str, ...] | None = None  # the recipe's parts, instead of its own
    controls: bool = True  # the baseline with the tables, and under Muon
    data_half: bool = False  # also: the same sources as they were found, against the pool as built
    cache: bool = False  # also: loss beside cache bytes for multi-head, grouped-query and latent attention
    width: int | None = None
    depth: int | None = None  # of the baseline; the best at equal FLOPs otherwise
    steps: int | None = None  # the baseline's, at the depth where its search begins
    seeds: int | None = None
    workers: int = 0  # runs at a time; 0: one a core


def compare(argv: Sequence[str]) -> int:
    options = tyro.cli(CompareOptions, args=list(argv), prog="rorqual compare")
    from rich.console import Console

    from rorqual.compare.pool import Pool, Stopped
    from rorqual.compare.pools import built_pool
    from rorqual.compare.report import log, summary, write
    from rorqual.compare.study import Pools, Study
    from rorqual.train.stop import exit_code

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    require_workers(options.workers)
    budget = sized(options)
    built = options.data or built_pool(options.out / "data", budget, options.sources, say)
    try:
        with Pool(options.workers or os.cpu_count() or 1, say) as pool:
            found = investigate(Study(budget, Pools(built, options.out / "runs"), pool), options, say)
    except Stopped as e:
        say(str(e))
        return exit_code(e.signal)
    found.seconds = pool.seconds
    write(found, options.out)
    log(found, budget.steps, options.out)
    print("\n".join(summary(found)))
    print(f"report: {options.out / 'report.html'}")
    return 0


def investigate(study: Study, options: CompareOptions, say: Say) -> Findings:
    """Everything that was asked for; what is found so far is written after each part."""
    from rorqual.compare.pools import found_pool
    from rorqual.compare.report import Findings, write
    from rorqual.compare.setting import RECIPE, Setting, with_overrides

    recipe = RECIPE if options.parts is None else Setting("recipe", options.parts)
    recipe = with_overrides(recipe, options.idea)
    _ = study.job(
        recipe, study.budget.steps, 0
    ).config  # an idea that cannot be is told before the long search
    say("the baseline's rates and depth")
    study, sweep = study.sweep()
    b, base = study.budget, study.baseline
    found = Findings(b, sweep)
    controls = study.controls() if options.controls else []
    say("the baselines")  # the long runs side by side, so that no worker waits for one
    full = [(base, b.seeds), *((control, b.control_seeds) for control in controls)]
    study.pool.all(study.job(setting, b.steps, seed) for setting, seeds in full for seed in range(seeds))
    say("the recipe against the baseline")
    whole = study.match(recipe, base, b.seeds)
    found.matches["architecture and training"] = whole
    write(found, options.out)
    for control in controls:
        say(f"the recipe against the {control.name}")
        found.matches[f"against the {control.name}"] = study.match(recipe, control, b.control_seeds)
        write(found, options.out)
    for part in chosen(options.without, recipe):
        say(f"the recipe without {part}")
        found.factors.append(without(study, recipe, part, whole))
        write(found, options.out)
    for part in chosen(options.only, recipe):
        say(f"the baseline with {part} alone")
        found.factors.append(only(study, base, part, whole))
        write(found, options.out)
    if options.cache:
        say("loss beside cache")
        found.caches = caches(study)
    if options.data_half:
        say("the pool as it was found")
        pool = found_pool(options.out / "data", study.pools.built, b, options.sources, say)
        found.matches["data alone"] = study.match(base, base, b.control_seeds, pool)
        found.matches["architecture, training and data"] = study.match(recipe, base, b.control_seeds, pool)
    return found


def chosen(names: Sequence[str], recipe: Setting) -> Sequence[str]:
    """The parts that an option names; `all` is every part of the recipe."""
    return recipe.parts if "all" in names else names


def without(study: Study, recipe: Setting, part: str, whole: Match) -> Factor:
    """The recipe less a part, at the steps where the recipe passes (or its most): how many times the FLOPs it needs,
    seed by seed."""
    from rorqual.compare.report import Factor
    from rorqual.compare.study import equivalent_steps

    at = whole.passing or whole.runs[0]
    point = study.point(recipe.without(part), at.steps, study.budget.control_seeds)
    dearer = point.flops / at.flops  # a step
    worth = [dearer * at.steps / equivalent_steps(loss, at.steps, whole.runs) for loss in point.losses]
    return Factor(part, "without", worth, point)


def only(study: Study, base: Setting, part: str, whole: Match) -> Factor:
    """The baseline with one part, on its full schedule at half the steps: how many times the FLOPs it is worth."""
    from rorqual.compare.report import Factor
    from rorqual.compare.study import equivalent_steps

    b = study.budget
    steps = b.steps // 2
    half = study.point(base, steps, b.control_seeds)
    point = study.point(base.plus(f"baseline with {part}", (part,)), steps, b.control_seeds)
    cheaper = half.flops / point.flops  # a step
    worth = [cheaper * equivalent_steps(loss, steps, [half, whole.baseline]) / steps for loss in point.losses]
    return Factor(part, "only", worth, point)


def caches(study: Study) -> list[Point]:
    """The recipe's dense core with keys and values of every head, of one head, and latents of three ranks."""
    from rorqual.compare.setting import Setting

    b = study.budget
    core = ("muon", "wsd", "zero-output", "qk-norm")
    head = b.width // b.heads
    settings = [
        Setting("multi-head", core),
        Setting("one key-value head", core).at(shape__kv_heads=1),
        *(
            Setting(f"latent attention, rank {rank}", (*core, "mla")).at(shape__kv_lora_rank=rank)
            for rank in (head // 2, head, 2 * head)
        ),
    ]
    return [study.point(s, b.steps // 3, b.control_seeds) for s in settings]


def require_workers(workers: int) -> None:
    if workers < 0:
        raise ConfigError(f"--workers {workers}: must be 1 or more, or 0 for one a core")


def vocabulary(data: Path | None) -> int:
    """Of the pool that is trained on: equal FLOPs at another depth depend on the size of the head."""
    from rorqual.compare.budget import Budget
    from rorqual.data.shards import read_meta

    return Budget.vocab_size if data is None else int(read_meta(data)["vocab_size"])


def sized(options: CompareOptions) -> Budget:
    """The budget with the sizes that were asked for. Raises ConfigError for what cannot be."""
    from rorqual.compare.budget import Budget, budget

    changed = {
        k: getattr(options, k)
        for k in ("width", "depth", "steps", "seeds")
        if getattr(options, k) is not None
    }
    if "seeds" in changed:
        changed["control_seeds"] = min(options.seeds or 1, 3)
    if "depth" in changed:
        changed["search_depth"] = False
    changed["vocab_size"] = vocabulary(options.data)
    before = {k: v for k, v in changed.items() if k in ("width", "depth", "vocab_size")}
    base = dataclasses.replace(Budget(), **before)
    chosen = budget(options.budget, base)
    return dataclasses.replace(chosen, **changed)


@dataclass(frozen=True)
class ScalingOptions:
    """The recipe against the baseline at growing widths, the baseline's rates and depth swept at each: where it passes,
    and loss against compute of both by fits that must predict the largest rung, which is held back from them."""

    out: Path = Path("runs/scaling")
    data: Path | None = None
    sources: tuple[str, ...] = ("python",)
    rungs: int = 4
    width: int = 32  # of the smallest rung
    ratio: float = 1.41  # of one rung's width to the one below
    steps: int = 500  # of the smallest rung; more with the square of the width
    fraction: float = 4.0  # the recipe's runs for the fit have 1/fraction of the baseline's steps
    seeds: int = 2
    rounds: int = 0  # of the search for the baseline's rates and depth; 0: until one changes nothing
    workers: int = 0


def scaling(argv: Sequence[str]) -> int:
    options = tyro.cli(ScalingOptions, args=list(argv), prog="rorqual scaling")
    if options.rungs < 3:
        raise ConfigError(f"--rungs {options.rungs}: must be 3 or more: two for the line and one to judge it")
    if options.rounds < 0:
        raise ConfigError(
            f"--rounds {options.rounds}: must be 1 or more, or 0 for as many as change something"
        )
    if options.ratio <= 1:
        raise ConfigError(f"--ratio {options.ratio}: must be above 1")
    from rich.console import Console

    from rorqual.compare.budget import Budget
    from rorqual.compare.pool import Pool, Stopped
    from rorqual.compare.pools import built_pool
    from rorqual.compare.scaling import Ladder, ladder, summary, write
    from rorqual.compare.setting import RECIPE
    from rorqual.compare.study import Pools, Study
    from rorqual.train.stop import exit_code

    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, highlight=False)

    require_workers(options.workers)
    bottom = Budget(
        "ladder", width=options.width, steps=options.steps, seeds=options.seeds, control_seeds=1,
        vocab_size=vocabulary(options.data),
    )  # fmt: skip
    built = options.data or built_pool(options.out / "data", bottom, options.sources, say)
    matches, fitted = [], []
    found: Budget | None = None  # the rung below at its best rates and depth
    try:
        with Pool(options.workers or os.cpu_count() or 1, say) as pool:
            rungs = ladder(bottom, options.rungs, options.ratio)
            for rung in rungs:
                say(f"width {rung.width}: the baseline's rates and depth")
                # Rates have more than one valley: the search begins at the better of the budget's and the rung below's.
                begun = [rung, rung.like(found)] if found else [rung]
                studies = [Study(b, Pools(built, options.out / "runs"), pool) for b in begun]
                study, _ = min(studies, key=lambda s: s.beginning().loss).sweep(options.rounds)
                found = study.budget
                say(f"width {rung.width}: the recipe against the baseline")
                matches.append(study.match(RECIPE, study.baseline, options.seeds))
                fitted.append(study.point(RECIPE, found.steps_at(options.fraction), options.seeds))
    except Stopped as e:
        say(str(e))
        return exit_code(e.signal)
    ladders = [Ladder("baseline", tuple(m.baseline for m in matches)), Ladder(RECIPE.name, tuple(fitted))]
    write(ladders, matches, options.out)
    print("\n".join(summary(ladders, matches)))
    print(f"report: {options.out / 'scaling.html'}")
    return 0
