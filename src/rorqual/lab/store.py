"""The lab's state: one SQLite file in WAL mode, every change of state a transaction, order by number and not by clock.

trials: waiting ─► running ─► paused (at a rung) ─► waiting … ─► done
            │         └─► waiting (left, or retried)      └─► failed, withdrawn
attempts: starting ─► running ─► ended; a trial has at most one that has not ended (a unique index)
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError, RunError
from rorqual.lab.records import Attempt, Ended, Event, Study, Trial
from rorqual.lab.rungs import Ladder, Standing

FILE = "lab.sqlite"
FORMAT = 1
PRIORITIES = {"low": -1, "normal": 0, "urgent": 1}
LIVE = ("waiting", "running")
ENDED = ("done", "failed", "withdrawn")

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE people (name TEXT PRIMARY KEY, weight REAL NOT NULL DEFAULT 1, used REAL NOT NULL DEFAULT 0);
CREATE TABLE studies (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, budgets TEXT NOT NULL, eta INTEGER NOT NULL, goal TEXT NOT NULL,
    metric TEXT NOT NULL
);
CREATE TABLE trials (
    id INTEGER PRIMARY KEY, study INTEGER NOT NULL REFERENCES studies, who TEXT NOT NULL, name TEXT NOT NULL,
    kind TEXT NOT NULL, spec TEXT NOT NULL, settings TEXT NOT NULL, priority INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'waiting', target INTEGER NOT NULL DEFAULT 0, place INTEGER NOT NULL DEFAULT 0,
    reached INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, value REAL, message TEXT NOT NULL DEFAULT '',
    made REAL NOT NULL
);
CREATE INDEX trials_by_state ON trials (state, study);
CREATE INDEX trials_by_study ON trials (study, reached);
CREATE TABLE results (
    trial INTEGER NOT NULL REFERENCES trials, rung INTEGER NOT NULL, step INTEGER NOT NULL, value REAL,
    attempt INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (trial, rung)
) WITHOUT ROWID;
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY, trial INTEGER NOT NULL REFERENCES trials, target INTEGER NOT NULL, bonus INTEGER NOT NULL,
    backend TEXT NOT NULL, handle TEXT, state TEXT NOT NULL DEFAULT 'starting', asked TEXT NOT NULL DEFAULT '',
    code INTEGER, seconds REAL NOT NULL DEFAULT 0, step INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX one_attempt_a_trial ON attempts (trial) WHERE state != 'ended';
CREATE INDEX attempts_by_trial ON attempts (trial);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, kind TEXT NOT NULL, trial INTEGER, text TEXT NOT NULL
);
CREATE INDEX events_by_trial ON events (trial);
"""


@dataclass
class Store:
    """The state file of a lab folder. Each method is one transaction; several processes may use it at once."""

    folder: Path
    db: sqlite3.Connection = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        path = self.folder / FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.db = sqlite3.connect(path, timeout=30, isolation_level=None)
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=FULL")
            if not self.db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                self._create()
        except sqlite3.DatabaseError as e:
            raise RunError(f"{path}: cannot be used as a lab's state ({e})") from e
        found = self.meta("format")
        if found != FORMAT:
            raise RunError(f"{path}: has format {found}, this is {FORMAT}; use another --lab folder")

    @classmethod
    def open(cls, folder: Path) -> Store:
        """A lab that is there. Raises RunError where none is."""
        if not (folder / FILE).is_file():
            raise RunError(
                f"{folder.resolve()}: no lab here; `rorqual lab try` makes one, --lab names another folder"
            )
        return cls(folder)

    def _create(self) -> None:
        with self.change():
            if self.db.execute("SELECT 1 FROM sqlite_master WHERE name='meta'").fetchone():
                return  # somebody else was first
            for statement in SCHEMA.split(";"):
                self.db.execute(statement)
            self.db.execute("INSERT INTO meta VALUES ('format', ?)", (json.dumps(FORMAT),))

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """A transaction that writes: all of it or nothing."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield self.db
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def version(self) -> int:
        """Changes when another connection has written."""
        return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    def meta(self, key: str) -> Any:
        row = self.db.execute("SELECT value FROM meta WHERE key=?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, **values: Any) -> None:
        with self.change() as db:
            for key, value in values.items():
                db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    # Studies and people

    def study(self, name: str, ladder: Ladder, metric: str) -> Study:
        """The study of this name, made if it is new. Raises ConfigError where it has another ladder or measure."""
        with self.change() as db:
            db.execute(
                "INSERT OR IGNORE INTO studies (name, budgets, eta, goal, metric) VALUES (?, ?, ?, ?, ?)",
                (name, json.dumps(ladder.budgets), ladder.eta, ladder.goal, metric),
            )
        found = next(s for s in self.studies() if s.name == name)
        if found.ladder != ladder or found.metric != metric:
            raise ConfigError(
                f"--study {name}: has rungs {list(found.ladder.budgets)}, eta {found.ladder.eta} and {found.ladder.goal} "
                f"{found.metric}, not {list(ladder.budgets)}, {ladder.eta}, {ladder.goal} {metric}; name another study"
            )
        return found

    def studies(self) -> list[Study]:
        rows = self.db.execute("SELECT * FROM studies ORDER BY id")
        return [
            Study(
                r["id"], r["name"], Ladder(tuple(json.loads(r["budgets"])), r["eta"], r["goal"]), r["metric"]
            )
            for r in rows
        ]

    def people(self) -> dict[str, tuple[float, float]]:
        """Each person's (weight, slot seconds used); what was used counts less the more has been used since."""
        return {r["name"]: (r["weight"], r["used"]) for r in self.db.execute("SELECT * FROM people")}

    def share(self, who: str, weight: float) -> None:
        """Give a person a weight: twice the weight, twice the slots where there are not enough."""
        if not 0 < weight < 1e6:
            raise ConfigError(f"weight={weight}: must be above 0")
        with self.change() as db:
            db.execute(
                "INSERT INTO people (name, weight) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET weight=excluded.weight",
                (who, weight),
            )

    # Trials

    def add(
        self,
        study: Study,
        who: str,
        name: str,
        kind: str,
        spec: dict[str, Any],
        settings: dict[str, Any],
        priority: int,
    ) -> int:
        """A new idea, waiting for the smallest rung."""
        with self.change() as db:
            db.execute("INSERT OR IGNORE INTO people (name) VALUES (?)", (who,))
            cursor = db.execute(
                "INSERT INTO trials (study, who, name, kind, spec, settings, priority, made) VALUES (?,?,?,?,?,?,?,?)",
                (study.id, who, name, kind, json.dumps(spec), json.dumps(settings), priority, time.time()),
            )
            trial = int(cursor.lastrowid or 0)
            level = next(k for k, v in PRIORITIES.items() if v == priority)
            said = f"{who} tries {name}" + ("" if level == "normal" else f" ({level})")
            self._tell(db, "try", trial, said)
        return trial

    def trials(self, *states: str, study: int | None = None) -> list[Trial]:
        """Trials in their order, of some states or all."""
        where, values = [], list[Any](states)
        if states:
            where.append(f"state IN ({','.join('?' * len(states))})")
        if study is not None:
            where.append("study=?")
            values.append(study)
        sql = "SELECT * FROM trials" + (" WHERE " + " AND ".join(where) if where else "") + " ORDER BY id"
        return [_trial(r) for r in self.db.execute(sql, values)]

    def trial(self, number: int) -> Trial:
        """Raises RunError where there is none of the number."""
        row = None
        if abs(number) < 2**63:  # what SQLite can hold
            row = self.db.execute("SELECT * FROM trials WHERE id=?", (number,)).fetchone()
        if row is None:
            raise RunError(f"trial {number}: not in {self.folder}; `rorqual lab status` lists them")
        return _trial(row)

    def folder_of(self, trial: Trial) -> Path:
        """Where a trial's files lie."""
        safe = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in trial.name)[:48]
        return self.folder / "trials" / f"{trial.id:05d}-{safe}"

    def results(self, trial: int) -> list[tuple[int, int, float | None]]:
        """(rung, step, value) of what a trial has reached."""
        rows = self.db.execute("SELECT rung, step, value FROM results WHERE trial=? ORDER BY rung", (trial,))
        return [(r[0], r[1], r[2]) for r in rows]

    def standings(self, study: int) -> list[Standing]:
        """Where everyone of a study stands who has reached a rung or is on the way to one."""
        values: dict[int, list[float | None]] = {}
        for trial, value in self.db.execute(
            "SELECT r.trial, r.value FROM results r JOIN trials t ON t.id=r.trial WHERE t.study=? "
            "ORDER BY r.trial, r.rung",
            (study,),
        ):
            values.setdefault(trial, []).append(value)
        rows = self.db.execute("SELECT id, place, state FROM trials WHERE study=? ORDER BY id", (study,))
        return [
            Standing(
                r["id"], tuple(values.get(r["id"], ())), r["place"], r["state"] in ("failed", "withdrawn")
            )
            for r in rows
        ]

    def promote(self, trial: int, rung: int, place: bool, text: str) -> bool:
        """Send a paused trial on to `rung`, or give a place to one that is on its way there without. False where it has
        changed meanwhile."""
        with self.change() as db:
            if place:
                changed = db.execute(
                    "UPDATE trials SET place=?, target=MAX(target, ?), "
                    "state=CASE WHEN state='paused' AND reached<=? THEN 'waiting' ELSE state END "
                    "WHERE id=? AND place<? AND state IN ('paused','waiting','running','done')",
                    (rung, rung, rung, trial, rung),
                ).rowcount
                # An attempt under way without a place has one now.
                db.execute(
                    "UPDATE attempts SET bonus=0 WHERE trial=? AND state!='ended' AND target<=?",
                    (trial, rung),
                )
            else:
                changed = db.execute(
                    "UPDATE trials SET target=?, state='waiting' WHERE id=? AND state='paused' AND reached=?",
                    (rung, trial, rung),
                ).rowcount
            if changed:
                self._tell(db, "promote" if place else "bonus", trial, text)
        return bool(changed)

    def withdraw(self, number: int, who: str) -> None:
        """Take an idea out; a running attempt is asked to leave. Raises RunError where it has ended."""
        self.trial(number)
        with self.change() as db:
            changed = db.execute(
                "UPDATE trials SET state='withdrawn', message=? WHERE id=? AND state IN ('waiting','running','paused')",
                (f"withdrawn by {who}", number),
            ).rowcount
            if changed:
                db.execute(
                    "UPDATE attempts SET asked='withdrawn' WHERE trial=? AND state!='ended'", (number,)
                )
                self._tell(db, "withdraw", number, f"withdrawn by {who}")
        if not changed:
            raise RunError(f"trial {number}: is {self.trial(number).state}; nothing to withdraw")

    def set_priority(self, number: int, priority: int) -> None:
        self.trial(number)
        with self.change() as db:
            db.execute("UPDATE trials SET priority=? WHERE id=?", (priority, number))

    def again(self, number: int) -> None:
        """Let a failed or withdrawn trial try again from what it has saved. Raises RunError where it is neither."""
        with self.change() as db:
            trial = self.trial(number)
            top = next(s for s in self.studies() if s.id == trial.study).ladder.top
            # A withdrawn one may have reached its rung all the same, even the last.
            state = "done" if trial.reached > top else "paused" if trial.reached > trial.place else "waiting"
            changed = db.execute(
                "UPDATE trials SET state=?, target=?, failures=0, message='' "
                "WHERE id=? AND state IN ('failed','withdrawn') AND NOT EXISTS "
                "(SELECT 1 FROM attempts a WHERE a.trial=trials.id AND a.state!='ended')",
                (state, trial.reached - (state != "waiting"), number),
            ).rowcount
            if changed:
                self._tell(db, "again", number, "tried again")
        if not changed:
            raise RunError(
                f"trial {number}: is {self.trial(number).state}; only a failed or withdrawn one is tried again"
            )

    # Attempts

    def claim(self, trial: Trial, backend: str) -> Attempt | None:
        """Take a waiting trial for a start; None where somebody else was faster."""
        with self.change() as db:
            taken = db.execute(
                "UPDATE trials SET state='running', attempts=attempts+1 WHERE id=? AND state='waiting' AND target=?",
                (trial.id, trial.target),
            ).rowcount
            if not taken:
                return None
            cursor = db.execute(
                "INSERT INTO attempts (trial, target, bonus, backend) VALUES (?, ?, ?, ?)",
                (trial.id, trial.target, trial.bonus, backend),
            )
            number = int(cursor.lastrowid or 0)
        return Attempt(
            number, trial.id, trial.target, trial.bonus, backend, None, "starting", "", None, 0.0, 0
        )

    def started(self, attempt: int, handle: str) -> None:
        with self.change() as db:
            db.execute(
                "UPDATE attempts SET handle=?, state='running' WHERE id=? AND state='starting'",
                (handle, attempt),
            )

    def ask(self, attempt: Attempt, why: str) -> None:
        """Note that an attempt is to save and leave."""
        with self.change() as db:
            changed = db.execute(
                "UPDATE attempts SET asked=? WHERE id=? AND asked='' AND state!='ended'", (why, attempt.id)
            ).rowcount
            if changed:
                self._tell(db, "leave", attempt.trial, why)

    def progress(self, seen: Sequence[tuple[int, int, int, float | None]]) -> None:
        """Steps and latest values of running trials: (attempt, trial, step, value)."""
        with self.change() as db:
            for attempt, trial, step, value in seen:
                db.execute("UPDATE attempts SET step=? WHERE id=?", (step, attempt))
                db.execute(
                    "UPDATE trials SET step=MAX(step, ?), value=COALESCE(?, value) WHERE id=?",
                    (step, value, trial),
                )

    def end(self, attempt: Attempt, ended: Ended, cap: int, half_life: float) -> str:
        """Book how an attempt ended, once: a rung reached, left, retried or failed. Returns what the trial became;
        '' where it was booked before."""
        with self.change() as db:
            first = db.execute(
                "UPDATE attempts SET state='ended', code=?, seconds=?, step=? WHERE id=? AND state!='ended'",
                (ended.code, ended.seconds, ended.step, attempt.id),
            ).rowcount
            if not first:
                return ""
            trial = _trial(db.execute("SELECT * FROM trials WHERE id=?", (attempt.trial,)).fetchone())
            study = next(s for s in self.studies() if s.id == trial.study)
            self._charge(db, trial, ended.seconds, half_life)
            asked = db.execute("SELECT asked FROM attempts WHERE id=?", (attempt.id,)).fetchone()[0]
            budget = study.ladder.budgets[attempt.target]
            if ended.code == 0 and ended.step >= budget and trial.reached == attempt.target:
                return self._reached(db, trial, study, attempt, ended)
            if trial.state == "withdrawn":
                return "withdrawn"
            before = db.execute(
                "SELECT COALESCE(MAX(step), 0) FROM attempts WHERE trial=? AND id<?", (trial.id, attempt.id)
            ).fetchone()[0]
            further = ended.step > before
            left = ended.code == 75 and (asked or further)  # by us or, with something done, from outside
            if left or (asked and ended.code is None) or ended.excuse:
                db.execute("UPDATE trials SET state='waiting' WHERE id=?", (trial.id,))
                why = ended.excuse or asked or "asked from outside"
                self._tell(db, "left", trial.id, f"left at step {ended.step:,}: {why}")
                return "waiting"
            return self._failed(db, trial, ended, budget, cap, further)

    def _reached(
        self, db: sqlite3.Connection, trial: Trial, study: Study, attempt: Attempt, ended: Ended
    ) -> str:
        rung, top = attempt.target, attempt.target == study.ladder.top
        spent = trial.seconds + ended.seconds
        db.execute(
            "INSERT INTO results VALUES (?, ?, ?, ?, ?, ?)",
            (trial.id, rung, ended.step, ended.value, attempt.id, spent),
        )
        state = trial.state if trial.state == "withdrawn" else "done" if top else "paused"
        db.execute(
            "UPDATE trials SET state=?, reached=?, step=?, value=?, failures=0, message='' WHERE id=?",
            (state, rung + 1, ended.step, ended.value, trial.id),
        )
        said = "no value" if ended.value is None else f"{study.metric} {ended.value:.5g}"
        self._tell(
            db,
            "reach",
            trial.id,
            f"reached rung {rung + 1} of {study.ladder.top + 1} (step {ended.step:,}): {said}",
        )
        return state

    def _failed(
        self, db: sqlite3.Connection, trial: Trial, ended: Ended, budget: int, cap: int, further: bool
    ) -> str:
        failures = 1 if further else trial.failures + 1
        if ended.code == 0:
            why = f"ended at step {ended.step:,} of {budget:,} without being asked to"
        elif ended.code is None:
            why = "its process vanished without a word"
        else:
            why = f"left with code {ended.code}" if ended.code > 0 else f"killed by signal {-ended.code}"
        give_up = not ended.retry or failures >= cap
        message = f"{why} at step {ended.step:,}\n{ended.tail}".strip()
        db.execute(
            "UPDATE trials SET state=?, failures=?, step=MAX(step, ?), message=? WHERE id=?",
            ("failed" if give_up else "waiting", failures, ended.step, message, trial.id),
        )
        last = ended.tail.strip().splitlines()[-1:]
        then = "given up" if give_up else f"tried again ({failures} of {cap})"
        self._tell(db, "fail" if give_up else "retry", trial.id, "; ".join([": ".join([why, *last]), then]))
        return "failed" if give_up else "waiting"

    def unclaim(self, attempt: Attempt, why: str) -> None:
        """An attempt that never started: the trial waits again, and nothing counts against it."""
        with self.change() as db:
            first = db.execute(
                "UPDATE attempts SET state='ended' WHERE id=? AND state!='ended'", (attempt.id,)
            ).rowcount
            if first:
                db.execute(
                    "UPDATE trials SET state='waiting' WHERE id=? AND state='running'", (attempt.trial,)
                )
                self._tell(db, "unstarted", attempt.trial, why)

    def _charge(self, db: sqlite3.Connection, trial: Trial, seconds: float, half_life: float) -> None:
        """Book slot seconds; each person's past use fades with what all have used since, not with the clock."""
        db.execute("UPDATE trials SET seconds=seconds+? WHERE id=?", (seconds, trial.id))
        db.execute("UPDATE people SET used=used*?", (0.5 ** (seconds / half_life),))
        db.execute("UPDATE people SET used=used+? WHERE name=?", (seconds, trial.who))

    def running(self) -> list[Attempt]:
        """Attempts that have not ended, in their order."""
        rows = self.db.execute("SELECT * FROM attempts WHERE state!='ended' ORDER BY id")
        return [_attempt(r) for r in rows]

    def attempts_of(self, trial: int) -> list[Attempt]:
        return [
            _attempt(r) for r in self.db.execute("SELECT * FROM attempts WHERE trial=? ORDER BY id", (trial,))
        ]

    # The story

    def tell(self, kind: str, text: str, trial: int | None = None) -> None:
        with self.change() as db:
            self._tell(db, kind, trial, text)

    @staticmethod
    def _tell(db: sqlite3.Connection, kind: str, trial: int | None, text: str) -> None:
        db.execute(
            "INSERT INTO events (at, kind, trial, text) VALUES (?, ?, ?, ?)", (time.time(), kind, trial, text)
        )

    def events(self, after: int = 0, trial: int | None = None, last: int | None = None) -> list[Event]:
        """The story in its order: from a number on, of one trial, or the last few lines."""
        where, values = "seq>?", [after]
        if trial is not None:
            where, values = where + " AND trial=?", [after, trial]
        limit = "" if last is None else f" LIMIT {int(last)}"
        rows = self.db.execute(
            f"SELECT * FROM events WHERE {where} ORDER BY seq DESC{limit}", values
        ).fetchall()
        return [Event(*r) for r in reversed(rows)]


def _trial(row: sqlite3.Row) -> Trial:
    tree = dict(row)
    return Trial(**{**tree, "spec": json.loads(tree["spec"]), "settings": json.loads(tree["settings"])})


def _attempt(row: sqlite3.Row) -> Attempt:
    tree = dict(row)
    return Attempt(**{**tree, "bonus": bool(tree["bonus"])})
