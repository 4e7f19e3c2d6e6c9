"""The scheduler: looks at what ended, gives places, fills slots, makes room. Killed at any moment, the next one goes on
from the state file; attempts are adopted, and two schedulers at once are no worse than one."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from rorqual.device import available_memory
from rorqual.errors import RorqualError
from rorqual.lab.choose import Busy, Wish, make_room, order
from rorqual.lab.job import Backend, Job, Outcome, seen, tail
from rorqual.lab.records import Attempt, Ended, Study, Trial
from rorqual.lab.rungs import Promotion, Standing, best_left, bonus, due
from rorqual.lab.settings import Settings, load_settings
from rorqual.lab.store import Store

POLL = 0.05  # seconds between looks: an urgent trial waits no longer for its slot
BACKLOG = 3  # promoted trials that wait, from which on they go before new ideas
LOOK = 1.0  # seconds between readings of progress and memory
VANISHED = 4  # times the cap for attempts that vanish or leave unasked: it may have come from outside
LOCK, LOG = "scheduler.lock", "scheduler.log"
Say = Callable[[str], None]


@dataclass
class Watch:
    """What this scheduler knows of an attempt: when it began to watch it, and when it asked it to leave."""

    since: float
    asked: float | None = None
    killed: str = ""
    repeated: float = 0.0


@dataclass
class Scheduler:
    """One loop over one lab. `tick` is everything; it keeps nothing that the state file does not have, but patience."""

    store: Store
    backend: Backend
    settings: Settings
    say: Say = print
    clock: Callable[[], float] = time.monotonic
    watches: dict[int, Watch] = field(default_factory=dict)
    looked: float = 0.0
    again_at: dict[int, float] = field(default_factory=dict)  # trial: not before
    blocked: str = ""  # why nothing is started, once said
    standings: dict[int, list[Standing]] = field(default_factory=dict)
    _version: int = -1
    _kept: Any = None  # settings as the state file has them
    machine_mb: int = field(init=False)  # for all slots: read once, since what trials hold is free no more

    def __post_init__(self) -> None:
        handles = [a.handle for a in self.store.running() if a.handle and self.backend.alive(a.handle)]
        held = [self.backend.held_mb(handle) for handle in handles]
        self._kept = self.store.meta("settings")
        self.machine_mb = available_memory() // 2**20 + int(sum(mb for mb in held if mb))

    # One look

    def tick(self) -> bool:
        """Look once. Whether anything runs or could."""
        self._version, changed = self.store.version(), self.store.version() != self._version
        if changed:
            self.standings.clear()
            self._reload()
        running = self.store.running()
        self._begin_watching(running)
        if self._collect(running):
            running = self.store.running()
            self.standings.clear()
        self._patience(running)
        self._progress(running)
        return self._fill(running)

    def _reload(self) -> None:
        """Take over what `lab set` has changed, but for the back-end, which the next scheduler begins."""
        kept = self.store.meta("settings")
        if kept == self._kept:
            return
        self._kept, old = kept, self.settings
        self.settings = replace(load_settings(self.store), backend=old.backend, slurm=old.slurm, ray=old.ray)
        self.store.tell("set", f"settings are now {kept}")

    def _begin_watching(self, running: list[Attempt]) -> None:
        now = self.clock()
        known = {a.id for a in running}
        for attempt in running:
            self.watches.setdefault(attempt.id, Watch(now))
        for gone in set(self.watches) - known:
            del self.watches[gone]

    # What ended

    def _collect(self, running: list[Attempt]) -> bool:
        """Book attempts that have ended."""
        found = False
        for attempt in running:
            if attempt.state == "starting":
                found |= self._adopt(attempt)
            elif not self.backend.alive(attempt.handle or ""):
                self._end(attempt)
                found = True
        return found

    def _adopt(self, attempt: Attempt) -> bool:
        """An attempt that was claimed but whose handle was not written down: its scheduler was killed in between, or is
        another one that is just doing it."""
        if self.clock() - self.watches[attempt.id].since < 1.0:
            return False
        trial = self.store.trial(attempt.trial)
        handle = self.backend.find(self._token(attempt))
        if handle is not None:
            self.store.started(attempt.id, handle)
            self.store.tell("adopt", f"attempt {attempt.id} found running and adopted", trial.id)
        elif Outcome.read(self.store.folder_of(trial), attempt.id) is not None:
            self._end(attempt)
        else:
            self.store.unclaim(attempt, f"attempt {attempt.id} was never started; waits again")
        return True

    def _end(self, attempt: Attempt) -> None:
        trial = self.store.trial(attempt.trial)
        study = self._study(trial.study)
        folder = self.store.folder_of(trial)
        outcome = Outcome.read(folder, attempt.id)
        budget = study.ladder.budgets[attempt.target]
        watch = self.watches[attempt.id]
        # Whatever of it is left must not write beside the next attempt.
        self.backend.kill(attempt.handle or "", self._token(attempt))
        if outcome is not None:
            ended = Ended(
                outcome.code,
                outcome.step,
                outcome.value,
                outcome.seconds,
                outcome.tail,
                retry=outcome.code != 2,
            )
        else:
            step, _ = seen(folder, study.metric, budget)
            code = self.backend.exit_code(attempt.handle or "")
            code = None if code in (0, -9, -15) else code
            seconds = self.clock() - watch.since
            said = watch.killed or tail(folder)
            ended = Ended(code, step, None, seconds, said, retry=not watch.killed)
        cap = self.settings.attempts * (VANISHED if ended.code in (None, 75) else 1)
        if ended.code not in (0, 75, None) and self._no_space():
            ended = Ended(**{**vars(ended), "excuse": self._no_space()})
        became = self.store.end(attempt, ended, cap, self.settings.half_life)
        (told,) = self.store.events(trial=trial.id, last=1)
        if became == "waiting" and told.kind == "retry" and ended.code is not None:
            failures = self.store.trial(trial.id).failures
            self.again_at[trial.id] = self.clock() + min(30.0, 0.5 * 4.0**failures)
        self.say(f"trial {trial.id} ({trial.name}): {told.text}")

    def _patience(self, running: list[Attempt]) -> None:
        """Those who were asked to leave are reminded, and killed when their time is up."""
        now = self.clock()
        for attempt in running:
            watch = self.watches[attempt.id]
            if not attempt.asked or attempt.handle is None:
                continue
            if watch.asked is None:
                watch.asked = now
            if now - watch.asked > self.settings.grace:
                self.backend.kill(attempt.handle, self._token(attempt))
            elif now - watch.repeated >= 1.0:
                watch.repeated = now
                self.backend.leave(attempt.handle)

    def _progress(self, running: list[Attempt]) -> None:
        """Once in a while: how far everyone is, and who holds more memory than a slot has."""
        if self.clock() - self.looked < LOOK:
            return
        self.looked = self.clock()
        found = []
        for attempt in running:
            trial = self.store.trial(attempt.trial)
            step, value = seen(self.store.folder_of(trial), self._study(trial.study).metric)
            if step != attempt.step:
                found.append((attempt.id, trial.id, step, value))
            held = self.backend.held_mb(attempt.handle) if attempt.handle else None
            limit = self.settings.slot_memory_mb(self.machine_mb)
            if held is not None and held > limit:
                watch = self.watches[attempt.id]
                watch.killed = f"held {held:,.0f} MB, a slot has {limit:,}; make it smaller, or set memory_mb"
                self.backend.kill(attempt.handle or "", self._token(attempt))
        if found:
            self.store.progress(found)

    # Who is next

    def _fill(self, running: list[Attempt]) -> bool:
        """Give slots to whoever is next; make room where somebody outranks what runs. Whether there is work."""
        if self._no_space():
            if not self.blocked:
                self.blocked = self._no_space()
                self.store.tell("blocked", self.blocked)
                self.say(self.blocked)
            return bool(running)
        self.blocked = ""
        busy = self._busy(running)
        waiting = {t.id: t for t in self.store.trials("waiting")}
        wishes, promotions = self._wishes(waiting, busy)
        free = self.settings.slot_count - len(running)
        if not wishes:
            return bool(running) or self._resting(waiting)
        shares = self._shares(busy)
        backlog = sum(w.target > 0 and not w.bonus for w in wishes)
        first = backlog >= BACKLOG
        leaving = sum(b.leaving for b in busy)
        while wishes:
            wish = order(wishes, busy, shares, first)[0]
            wishes.remove(wish)
            if wish.bonus and not wish.alone and all(b.bonus for b in busy):
                continue  # a slot beside nobody is not idle: the lab is done
            if free > 0:
                started = self._start(wish, waiting, promotions)
                if started is None:
                    continue
                busy.append(started)
                free -= 1
                # Every promotion changes who is next.
                return True
            if wish.bonus:
                continue
            if leaving > 0:
                leaving -= 1  # this one gets the slot that is being left
                continue
            # A promoted trial that left would wait with the others: it must not then be first again.
            found = make_room(wish, busy, shares, backlog + 1 >= BACKLOG, self.settings.quantum)
            if found is None:
                break
            victim, why = found
            attempt = next(a for a in running if a.id == victim.attempt)
            self.store.ask(attempt, why)
            self.backend.leave(attempt.handle or "")
            self.watches[attempt.id].asked = self.watches[attempt.id].repeated = self.clock()
            busy = [b if b.attempt != victim.attempt else _leaving(b) for b in busy]
        return bool(running) or bool(wishes) or self._resting(waiting)

    def _resting(self, waiting: dict[int, Trial]) -> bool:
        """Whether somebody waits only because it failed a moment ago."""
        return any(self.again_at.get(t, 0.0) > self.clock() for t in waiting)

    def _wishes(
        self, waiting: dict[int, Trial], busy: list[Busy]
    ) -> tuple[list[Wish], dict[int, tuple[Study, Promotion]]]:
        """Trials that wait, and promotions that are due, by trial."""
        now = self.clock()
        wishes = [
            Wish(t.id, t.who, t.priority, t.target, t.bonus)
            for t in waiting.values()
            if self.again_at.get(t.id, 0.0) <= now
        ]
        promotions: dict[int, tuple[Study, Promotion]] = {}
        idle = self.settings.slot_count > len(busy)
        for study in self.store.studies():
            standings = self._standings(study.id)
            found = due(study.ladder, standings)
            active = any(t.study == study.id and not t.bonus for t in waiting.values())
            active = active or any(self.store.trial(b.trial).study == study.id and not b.bonus for b in busy)
            if not found and not active:
                left = best_left(study.ladder, standings)
                found = [] if left is None else [left]
            elif not found and idle and self.settings.bonus:
                found = bonus(study.ladder, standings)[:1]
            for p in found:
                trial = self.store.trial(p.trial)
                guest = p.why != "place"
                if not guest and (trial.state != "paused" or trial.reached > p.rung):
                    self._promote(study, p)  # it is there or on its way: only the place changes
                    self.standings.pop(study.id, None)
                    if any(w.trial == trial.id for w in wishes):
                        wishes = [w for w in wishes if w.trial != trial.id]
                        wishes.append(Wish(trial.id, trial.who, trial.priority, trial.target))
                    continue
                wishes = [w for w in wishes if w.trial != trial.id]
                wish = Wish(trial.id, trial.who, trial.priority, p.rung, guest, p.why == "best")
                if trial.state == "paused":
                    promotions[trial.id] = study, p
                    wishes.append(wish)
                elif trial.state == "waiting":
                    wishes.append(wish)  # a guest who had to leave
        return wishes, promotions

    def _promote(self, study: Study, p: Promotion) -> bool:
        return self.store.promote(p.trial, p.rung, p.why == "place", because(study, p))

    def _start(
        self, wish: Wish, waiting: dict[int, Trial], promotions: dict[int, tuple[Study, Promotion]]
    ) -> Busy | None:
        """Claim, write the job, start. None where somebody else was faster or it could not be started."""
        if wish.trial in promotions:
            study, promotion = promotions.pop(wish.trial)
            self.standings.pop(study.id, None)
            if not self._promote(study, promotion):
                return None
        trial = self.store.trial(wish.trial)
        attempt = self.store.claim(trial, self.settings.backend)
        if attempt is None:
            return None
        self.watches[attempt.id] = Watch(self.clock())
        study = self._study(trial.study)
        folder = self.store.folder_of(trial)
        job = Job(
            self._token(attempt), attempt.id, str(folder), study.ladder.budgets[trial.target], study.ladder.budgets,
            study.metric, trial.kind, trial.spec, trial.settings, trial.name, self.settings.threads,
            self.settings.slot_memory_mb(self.machine_mb),
        )  # fmt: skip
        try:
            job.write()
            handle = self.backend.start(job)
        except (RorqualError, OSError) as e:
            self.again_at[trial.id] = self.clock() + 5.0
            self.store.unclaim(attempt, f"not started: {e}")
            return None
        self.store.started(attempt.id, handle)
        return Busy(attempt.id, trial.id, trial.who, trial.priority, trial.target, trial.bonus, False, 0.0)

    def _busy(self, running: list[Attempt]) -> list[Busy]:
        found = []
        for a in running:
            t = self.store.trial(a.trial)
            seconds = self.clock() - self.watches[a.id].since
            found.append(Busy(a.id, t.id, t.who, t.priority, a.target, a.bonus, bool(a.asked), seconds))
        return found

    def _shares(self, busy: list[Busy]) -> dict[str, tuple[float, float]]:
        """Weights and use, what runs now included."""
        shares = self.store.people()
        for b in busy:
            weight, used = shares.get(b.who, (1.0, 0.0))
            shares[b.who] = weight, used + b.seconds
        return shares

    def _standings(self, study: int) -> list[Standing]:
        if study not in self.standings:
            self.standings[study] = self.store.standings(study)
        return self.standings[study]

    def _study(self, number: int) -> Study:
        return next(s for s in self.store.studies() if s.id == number)

    def _token(self, attempt: Attempt) -> str:
        return f"{self.store.folder}:{attempt.id}"

    def _no_space(self) -> str:
        free = shutil.disk_usage(self.store.folder).free // 2**20
        if free >= self.settings.min_free_mb:
            return ""
        least = self.settings.min_free_mb
        return f"disk: {free:,} MB free in {self.store.folder}, less than min_free_mb={least}; nothing is started"

    # The loop

    def tick_would_work(self) -> bool:
        """Whether there is something to start that a scheduler should not leave behind."""
        if self.store.running():
            return True
        wishes, _ = self._wishes({t.id: t for t in self.store.trials("waiting")}, [])
        return not self._no_space() and any(not w.bonus or w.alone for w in wishes)

    def run(self, stay: bool = False, stop: Callable[[], bool] = lambda: False) -> None:
        """Tick until there has been no work for `idle` seconds, or until told to stop; trials that run go on."""
        last = self.clock()
        while not stop():
            try:
                work = self.tick()
            except sqlite3.OperationalError as e:  # a full disk, or a lock held for half a minute
                self.say(f"state file: {e}; looking again")
                time.sleep(1.0)
                continue
            now = self.clock()
            if work:
                last = now
            elif not stay and now - last >= self.settings.idle:
                return
            time.sleep(POLL)
        self.backend.close()


def because(study: Study, p: Promotion) -> str:
    """Why somebody goes on, for the story."""
    ladder = study.ladder
    where = f"{p.rank} of {p.of} at step {ladder.budgets[p.rung - 1]:,}"
    to = f"goes on to step {ladder.budgets[p.rung]:,}"
    if p.why == "place":
        return f"{to}: {where}, {p.places} {'has' if p.places == 1 else 'have'} a place"
    if p.why == "best":
        return f"{to} as a guest: {where}, and nothing else is to do"
    return f"{to} as a guest: {where}, a slot is idle"


def _leaving(b: Busy) -> Busy:
    return Busy(b.attempt, b.trial, b.who, b.priority, b.target, b.bonus, True, b.seconds)


# Which process is the scheduler


def hold(folder: Path) -> TextIO | None:
    """The lock of a lab's scheduler; None where another process of this machine has it."""
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def scheduler_pid(folder: Path) -> int | None:
    """Who schedules a lab now; None: nobody on this machine."""
    file = hold(folder)
    if file is not None:
        file.truncate(0)
        file.close()
        return None
    text = (folder / LOCK).read_text(encoding="utf-8").strip()
    return int(text) if text.isdigit() else 0


def start_detached(folder: Path) -> None:
    """A scheduler that outlives the command that needs it, and leaves when there is no more work."""
    with (folder / LOG).open("a") as log:
        subprocess.Popen(
            [sys.executable, "-m", "rorqual.cli", "lab", "run", "--lab", str(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
