"""A lab in words: who leads, what runs, what waits, and the story of one idea."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rorqual.lab.job import tail
from rorqual.lab.records import Study, Trial
from rorqual.lab.rungs import Ladder
from rorqual.lab.store import PRIORITIES, Store

SHOWN = 12  # lines of each part
LEVELS = {v: k for k, v in PRIORITIES.items()}


def as_tree(store: Store) -> dict[str, Any]:
    """Counts, running, waiting and the best of each study, as plain values."""
    counts = dict(store.db.execute("SELECT state, COUNT(*) FROM trials GROUP BY state").fetchall())
    spent = store.db.execute("SELECT COALESCE(SUM(seconds), 0) FROM trials").fetchone()[0]
    return {
        "lab": str(store.folder),
        "scheduler": _scheduler(store),
        "counts": counts,
        "slot_seconds": spent,
        "running": [brief(store, t) for t in store.trials("running")],
        "waiting": [brief(store, t) for t in store.trials("waiting")[:SHOWN]],
        "studies": [_study_tree(store, s) for s in store.studies()],
        "people": _people(store),
    }


def brief(store: Store, t: Trial) -> dict[str, Any]:
    """A trial in a line."""
    return {
        "trial": t.id, "name": t.name, "who": t.who, "state": t.state, "priority": LEVELS[t.priority], "study": t.study,
        "reached": t.reached, "target": t.target, "place": t.place, "bonus": t.bonus, "step": t.step, "value": t.value,
        "seconds": round(t.seconds, 1), "attempts": t.attempts, "settings": t.settings,
    }  # fmt: skip


def leaders(store: Store, study: Study, count: int = SHOWN) -> list[Trial]:
    """The best of a study: by the highest rung reached, then by the value there."""
    sign = "" if study.ladder.goal == "min" else "-"
    rows = store.db.execute(
        "SELECT id FROM trials WHERE study=? AND reached>0 AND value IS NOT NULL "
        f"ORDER BY reached DESC, {sign}value, id LIMIT ?",
        (study.id, count),
    )
    return [store.trial(r[0]) for r in rows]


def text(store: Store) -> str:
    """The page that `rorqual lab status` prints."""
    tree = as_tree(store)
    counts = ", ".join(f"{n:,} {state}" for state, n in sorted(tree["counts"].items())) or "no trials yet"
    out = [
        f"{tree['lab']}: {counts}; {duration(tree['slot_seconds'])} of slots used; scheduler: {tree['scheduler']}"
    ]
    for study in store.studies():
        top = leaders(store, study)
        if not top:
            continue
        out += ["", f"{study.name} ({study.metric}, {ladder_words(study.ladder)})"]
        out += table(
            ("trial", "rung", study.metric, "step", "cost", "state", "who", "idea"),
            [
                (
                    t.id, f"{t.reached}/{study.ladder.top + 1}", value_words(t.value), f"{t.step:,}", duration(t.seconds),
                    t.state, t.who, t.name,
                )
                for t in top
            ],
        )  # fmt: skip
    for title in ("running", "waiting", "failed"):
        trials = store.trials(title)
        if trials:
            out += ["", f"{title} ({len(trials):,})"]
            out += table(
                ("trial", "to rung", "step", "priority", "who", "idea", ""),
                [_line(t) for t in trials[:SHOWN]],
            )
    if len(tree["people"]) > 1:
        rows = [(p["who"], f"{p['weight']:g}", p["trials"], duration(p["seconds"])) for p in tree["people"]]
        out += ["", "people", *table(("who", "weight", "trials", "cost"), rows)]
    return "\n".join(out)


def one(store: Store, number: int) -> str:
    """The page that `rorqual lab show N` prints."""
    t = store.trial(number)
    study = next(s for s in store.studies() if s.id == t.study)
    out = [
        f"trial {t.id}: {t.name}",
        f"  {t.who}, {LEVELS[t.priority]} priority, {t.state}, study {study.name!r}",
    ]
    out.append(f"  {store.folder_of(t)}")
    out.append(f"  cost {duration(t.seconds)} of a slot in {t.attempts} attempts, step {t.step:,}")
    out += [f"  {k} = {v}" for k, v in t.settings.items()]
    for rung, step, value in store.results(number):
        row = store.db.execute(
            "SELECT COUNT(*), SUM(r.value < ?), SUM(r.value > ?) FROM results r JOIN trials t ON t.id=r.trial "
            "WHERE t.study=? AND r.rung=?",
            (value, value, t.study, rung),
        ).fetchone()
        better = (row[1] if study.ladder.goal == "min" else row[2]) or 0
        out.append(
            f"  rung {rung + 1} (step {step:,}): {study.metric} {value_words(value)}, {better + 1} of {row[0]}"
        )
    out += ["", "story"]
    out += [f"  {e.seq:>6}  {when(e.at)}  {e.text}" for e in store.events(trial=number)]
    if t.message:
        out += ["", *(f"  {line}" for line in t.message.splitlines())]
    elif end := tail(store.folder_of(t)):
        out += ["", "the log's end", *(f"  {line}" for line in end.splitlines())]
    return "\n".join(out)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns of text; numbers are given as text that is already formed."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return ["  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def duration(seconds: float) -> str:
    """48 s, 3.5 min, 2.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def value_words(value: float | None) -> str:
    return "none" if value is None else f"{value:.5g}"


def when(at: float) -> str:
    """Wall time, for people; order is by number."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def ladder_words(ladder: Ladder) -> str:
    steps = ", ".join(f"{b:,}" for b in ladder.budgets)
    return f"rungs at {steps} steps, of each the best 1/{ladder.eta} go on"


def _line(t: Trial) -> tuple[Any, ...]:
    note = t.message.splitlines()[0] if t.message else "guest in an idle slot" if t.bonus else ""
    return t.id, t.target + 1, f"{t.step:,}", LEVELS[t.priority], t.who, t.name, note


def _study_tree(store: Store, s: Study) -> dict[str, Any]:
    rows = store.db.execute("SELECT reached, COUNT(*) FROM trials WHERE study=? GROUP BY reached", (s.id,))
    counts = dict(map(tuple, rows))
    reached = [sum(n for r, n in counts.items() if r > rung) for rung in range(s.ladder.top + 1)]
    return {
        "study": s.id, "name": s.name, "metric": s.metric, "goal": s.ladder.goal, "eta": s.ladder.eta,
        "budgets": list(s.ladder.budgets), "reached": reached,
        "best": [brief(store, t) for t in leaders(store, s)],
    }  # fmt: skip


def _people(store: Store) -> list[dict[str, Any]]:
    rows = store.db.execute(
        "SELECT p.name, p.weight, COUNT(t.id), COALESCE(SUM(t.seconds), 0) FROM people p "
        "LEFT JOIN trials t ON t.who=p.name GROUP BY p.name ORDER BY p.name"
    )
    return [{"who": r[0], "weight": r[1], "trials": r[2], "seconds": r[3]} for r in rows]


def _scheduler(store: Store) -> str:
    from rorqual.lab.scheduler import scheduler_pid

    found = scheduler_pid(store.folder)
    return "none (`rorqual lab run` starts one)" if found is None else f"process {found}"
