"""What a lab has learnt: report.html and a text, from the state file and the trials' logs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rorqual.checkpoint.files import write_whole
from rorqual.errors import RunError
from rorqual.lab.evidence import ENOUGH, Change, Effect, Row, changes, effects
from rorqual.lab.job import curve
from rorqual.lab.records import Study
from rorqual.lab.status import duration, ladder_words, leaders, table, value_words, when
from rorqual.lab.store import Store
from rorqual.train.plot import Curve, chart
from rorqual.train.report import STYLE

CURVES = 6  # the palette's colours
STORY = ("try", "promote", "bonus", "reach", "fail", "withdraw")


def write_report(store: Store, name: str | None, path: Path) -> tuple[str, Path]:
    """Write the page and return the text beside it. Raises RunError where there is no such study."""
    studies = [s for s in store.studies() if name in (None, s.name)]
    if not studies:
        known = ", ".join(repr(s.name) for s in store.studies()) or "none yet"
        raise RunError(f"--study {name}: not in {store.folder}; there are: {known}")
    parts = [Learnt(store, s) for s in studies]
    html = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>What {escape(store.folder.name)} has learnt</title><style>{STYLE}</style>",
        f"<h1>What {escape(store.folder.name)} has learnt</h1>",
        *(part.html() for part in parts),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "\n".join(html) + "\n")
    return "\n\n".join(part.text() for part in parts), path


class Learnt:
    """One study, read once."""

    def __init__(self, store: Store, study: Study) -> None:
        self.store, self.study = store, study
        self.trials = store.trials(study=study.id)
        self.standings = {s.trial: s for s in store.standings(study.id)}
        self.best = leaders(store, study)
        self.spent = sum(t.seconds for t in self.trials)

    @property
    def ladder(self) -> Any:
        return self.study.ladder

    def rows(self, rung: int) -> list[Row]:
        """Settings and values (less is better) of all that have reached a rung."""
        return [
            (t.settings, self.ladder.key(self.standings[t.id].values[rung]))
            for t in self.trials
            if self.standings[t.id].reached > rung
        ]

    def rungs(self) -> list[int]:
        """Rungs with enough trials to say something, the last first: longer runs are better evidence."""
        return [r for r in reversed(range(self.ladder.top + 1)) if len(self.rows(r)) >= ENOUGH]

    def shares(self) -> str:
        """What was spent of what all trials to the end would have cost, in steps."""
        full = len(self.trials) * self.ladder.budgets[-1]
        done = sum(self.ladder.budgets[s.reached - 1] for s in self.standings.values() if s.reached)
        return f"{done:,} of {full:,} steps ({done / full:.0%})" if full else "nothing"

    def lead(self) -> list[str]:
        """The first lines: what won, and what it cost to know."""
        if not self.best:
            return ["No trial has reached a rung yet."]
        b = self.best[0]
        sets = ", ".join(f"{k}={v}" for k, v in b.settings.items()) or "no settings: the config as it is"
        return [
            f"Best: trial {b.id} ({b.name}) of {b.who}, {self.study.metric} {value_words(b.value)} "
            f"at step {b.step:,}; {sets}.",
            f"{len(self.trials)} ideas, {duration(self.spent)} of a slot, {self.shares()}.",
        ]

    def text(self) -> str:
        out = [f"{self.study.name} ({self.study.metric}, {ladder_words(self.ladder)})"]
        out += [f"  {line}" for line in self.lead()]
        for rung in self.rungs():
            found = effects(self.rows(rung))
            if found:
                out += ["", f"  which settings mattered, at step {self.ladder.budgets[rung]:,}"]
                out += ["  " + line for line in table(EFFECT_HEAD, [effect_row(e, self.sign) for e in found])]
        for rung in self.rungs():
            against = changes(self.rows(rung))
            if against:
                out += ["", f"  against the config as it is, at step {self.ladder.budgets[rung]:,}"]
                out += [
                    "  " + line for line in table(CHANGE_HEAD, [change_row(c, self.sign) for c in against])
                ]
        return "\n".join(out)

    @property
    def sign(self) -> int:
        return 1 if self.ladder.goal == "min" else -1

    def html(self) -> str:
        out = [f"<h2>{escape(self.study.name)}</h2><p class=lead>{escape(ladder_words(self.ladder))}</p>"]
        out += [f"<p>{escape(line)}</p>" for line in self.lead()]
        lines = [
            Curve(t.name, curve(self.store.folder_of(t), self.study.metric), dots=True)
            for t in self.best[:CURVES]
        ]
        out += ["<div class=charts>", chart(f"{self.study.metric} of the best", lines), "</div>"]
        head = ("trial", "idea", "who", "rung", self.study.metric, "cost", "what became of it")
        out += ["<h2>Ideas</h2>", _table(head, [self._idea(t.id) for t in self._all()])]
        for rung in self.rungs():
            step = f"at step {self.ladder.budgets[rung]:,}"
            found, against = effects(self.rows(rung)), changes(self.rows(rung))
            if found:
                out += [f"<h2>Which settings mattered, {step}</h2><p class=lead>{escape(HOW)}</p>"]
                out.append(_table(EFFECT_HEAD, [effect_row(e, self.sign) for e in found]))
            if against:
                out += [f"<h2>Against the config as it is, {step}</h2>"]
                out.append(_table(CHANGE_HEAD, [change_row(c, self.sign) for c in against]))
        mine = {t.id for t in self.trials}
        story = [e for e in self.store.events() if e.trial in mine and e.kind in STORY]
        names = {t.id: t.name for t in self.trials}
        out += ["<details><summary>The story</summary>"]
        rows = [(e.seq, when(e.at), f"{e.trial}: {names[e.trial or 0]}", e.text) for e in story]
        return "\n".join([*out, _table(("", "", "trial", ""), rows), "</details>"])

    def _all(self) -> list[Any]:
        first = [t.id for t in self.best]
        rest = sorted(
            (t for t in self.trials if t.id not in first),
            key=lambda t: (-t.reached, self.ladder.key(t.value), t.id),
        )
        return [*self.best, *rest]

    def _idea(self, number: int) -> tuple[Any, ...]:
        t = self.store.trial(number)
        return (
            t.id, t.name, t.who, f"{t.reached} of {self.ladder.top + 1}", value_words(t.value), duration(t.seconds),
            verdict(self.store, self.study, number),
        )  # fmt: skip


def verdict(store: Store, study: Study, number: int) -> str:
    """Why a trial was promoted or not, in a line."""
    t = store.trial(number)
    if t.state in ("failed", "withdrawn"):
        return f"{t.state}: {(t.message.splitlines() or [''])[0]}"
    if t.reached == 0:
        return "on its way to the first rung"
    rung = t.reached - 1
    rows = [s.values[rung] for s in store.standings(study.id) if s.reached > rung]
    rank = sum(study.ladder.key(v) < study.ladder.key(store.results(number)[rung][2]) for v in rows) + 1
    where = f"{rank} of {len(rows)} at step {study.ladder.budgets[rung]:,}"
    if rung == study.ladder.top:
        return f"ran to the end: {where}"
    if t.state in ("running", "waiting"):
        return f"promoted: {where}"
    if t.place > rung:
        return f"promoted: {where}"
    return f"not promoted: {where}, {len(rows) // study.ladder.eta} go on"


HOW = (
    "share: how much of the spread of the trials' ranks the setting's groups explain; chance: how often a random "
    "exchange explains as much; it mattered where that is below 5%, corrected for how many settings were looked at."
)
EFFECT_HEAD = ("setting", "share", "chance", "mattered", "groups, best first: mean (trials)")
CHANGE_HEAD = ("change", "trials", "difference", "noise of a trial", "beyond the noise")


def effect_row(e: Effect, sign: int) -> tuple[str, ...]:
    """A setting's line."""
    groups = "; ".join(f"{name}: {sign * mean:.4g} ({n})" for name, n, mean in e.groups)
    return e.key, f"{e.share:.0%}", f"{e.chance:.3f}", "yes" if e.mattered else "not shown", groups


def change_row(c: Change, sign: int) -> tuple[str, ...]:
    """An idea's line."""
    said = ", ".join(f"{k}={v}" for k, v in c.settings.items())
    spread = "no repeats" if c.noise is None else f"{c.noise:.4f}"
    verdict = "unknown" if c.noise is None else "not shown" if not c.sure else "yes"
    return said, str(c.trials), f"{sign * c.difference:+.4f}", spread, verdict


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def cells(row: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<td>{escape(str(c))}" for c in row)

    return f"<table>{cells(head)}{''.join(map(cells, rows))}</table>"
