"""A scheduler on a clock of its own: order, room, retries, and what a kill leaves behind."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from rorqual.lab.records import Ended, Trial
from rorqual.lab.scheduler import Scheduler
from rorqual.lab.settings import Settings
from rorqual.lab.store import Store

Make = Callable[..., Any]


def test_27_ideas_worst_first_cost_a_quarter_and_the_best_runs_to_the_end(make_lab: Make) -> None:
    """27 at 1 step, 9 on to 3, 3 on to 9: 27 + 18 + 18 = 63 of 243 steps."""
    lab = make_lab()
    for i in range(27):
        lab.add(27.0 - i)
        lab.look(1.0)  # each comes when the one before it has reached the first rung
    lab.finish()
    assert lab.states()[27] == "done"
    assert lab.steps() <= 0.3 * 243


def test_a_lone_idea_runs_to_the_end(make_lab: Make) -> None:
    lab = make_lab()
    lab.add(1.0)
    assert lab.finish() == 9
    assert lab.states() == {1: "done"}
    assert [s for s, *_ in lab.store.results(1)] == [0, 1, 2]


def test_no_step_is_computed_twice(make_lab: Make) -> None:
    lab = make_lab(slots=2)
    for i in range(9):
        lab.add(float(i))
    lab.finish()
    seen: set[tuple[str, int]] = set()
    for folder, begun, to in lab.backend.work:
        steps = {(folder, s) for s in range(begun, to)}
        assert not steps & seen
        seen |= steps


def test_urgent_work_makes_another_leave_and_it_comes_back(make_lab: Make) -> None:
    lab = make_lab(budgets=(100,))
    first = lab.add(1.0)
    lab.look()
    urgent = lab.add(2.0, priority="urgent")
    lab.look(10.0)  # asked
    lab.look(1.0)  # left within a step; the urgent one begins
    assert lab.states() == {first: "waiting", urgent: "running"}
    lab.finish()
    assert lab.states() == {first: "done", urgent: "done"}
    assert [(b, t) for f, b, t in lab.backend.work if "x=1.0" in f] == [(0, 11), (11, 100)]
    assert any("more urgent" in e.text for e in lab.store.events(trial=first))


def test_only_as_many_leave_as_are_needed(make_lab: Make) -> None:
    lab = make_lab(slots=3, budgets=(100,))
    for i in range(3):
        lab.add(float(i))
    lab.look()
    lab.add(9.0, priority="urgent")
    lab.look(5.0)
    assert sum(bool(a.asked) for a in lab.store.running()) == 1


def test_low_work_waits_for_normal(make_lab: Make) -> None:
    lab = make_lab(budgets=(5,))
    low, normal = lab.add(1.0, priority="low"), lab.add(2.0)
    lab.look()
    assert lab.states() == {low: "waiting", normal: "running"}


def test_slots_are_shared_by_people_not_by_ideas(make_lab: Make) -> None:
    """Ada has put in twenty before Bob's two: Bob's begin with the next slots."""
    lab = make_lab(slots=2, budgets=(10,))
    for i in range(20):
        lab.add(float(i), who="ada")
    lab.look()
    for i in range(2):
        lab.add(100.0 + i, who="bob")
    lab.look(10.0)
    running = [lab.store.trial(a.trial).who for a in lab.store.running()]
    assert sorted(running) == ["ada", "bob"]
    lab.finish()
    order = [lab.store.trial(e.trial).who for e in lab.store.events() if e.kind == "reach"]
    assert order.index("bob") < 5


def test_twice_the_weight_is_twice_the_slots(make_lab: Make) -> None:
    lab = make_lab(slots=3, budgets=(10,))
    lab.store.share("bob", 2.0)
    for i in range(30):
        lab.add(float(i), who="ada")
        lab.add(float(i), who="bob")
    lab.look()
    for _ in range(5):
        who = [lab.store.trial(a.trial).who for a in lab.store.running()]
        assert sorted(who) == ["ada", "bob", "bob"]
        lab.look(10.0)


def test_anyone_starts_at_once_beside_a_long_run(make_lab: Make) -> None:
    """One slot, and a promoted trial in it for an hour: a new idea gets its few steps, then the long run goes on."""
    lab = make_lab(budgets=(1, 3000), quantum=60.0)
    for i in range(3):
        lab.add(float(i))
    for _ in range(4):
        lab.look(1.0)
    assert lab.states()[1] == "running"
    new = lab.add(5.0, who="bob")
    lab.look(10.0)
    assert lab.states()[new] == "waiting", "the long run has had its slot for less than a minute"
    lab.look(50.0)
    lab.look(1.0)
    assert lab.states()[new] == "running"
    lab.look(1.0)
    lab.look(1.0)
    assert lab.states()[1] == "running"
    assert any("new and short" in e.text for e in lab.store.events(trial=1))


def test_making_room_never_goes_round_in_a_circle(make_lab: Make) -> None:
    """Many new ideas beside many promoted trials: whoever made room would be first again, and nobody got anywhere."""
    lab = make_lab(budgets=(10, 300), quantum=60.0)
    for i in range(27):
        lab.add(float(i))
    lab.finish(most=10 * 27 + 9 * 300 + 200)
    left = sum(e.kind == "left" for e in lab.store.events())
    assert left <= 27
    assert all(lab.store.results(n) for n in range(1, 28))


def test_a_lone_guest_leaves_for_anyone(make_lab: Make) -> None:
    lab = make_lab(budgets=(1, 3000))
    lone = lab.add(1.0)
    lab.look()
    lab.look(1.0)
    lab.look(1.0)
    new = lab.add(5.0, who="bob")
    lab.look(1.0)
    lab.look(1.0)
    assert lab.states() == {lone: "waiting", new: "running"}
    lab.look(1.0)
    assert lab.states() == {lone: "running", new: "paused"}


def test_idle_slots_take_guests_who_leave_for_work_with_a_place(make_lab: Make) -> None:
    lab = make_lab(slots=2, budgets=(1, 100))
    for i in range(3):
        lab.add(float(i))
    lab.look()
    lab.look(1.0)
    lab.look(1.0)  # all three have come; one is promoted, the other slot is idle
    running = {lab.store.trial(a.trial).id: a.bonus for a in lab.store.running()}
    assert running == {1: False, 2: True}
    new = lab.add(9.0)
    lab.look(10.0)
    lab.look(1.0)
    assert lab.states()[new] == "running"
    assert lab.states()[2] == "waiting"
    lab.look(1.0)
    assert lab.states()[2] == "running", "the slot is idle again"


def test_guests_are_not_begun_beside_nobody(make_lab: Make) -> None:
    """When all with a place are done, the lab is: the others stay paused."""
    lab = make_lab(slots=2)
    for i in range(9):
        lab.add(float(i))
    lab.finish()
    assert list(lab.states().values()).count("paused") >= 5


def test_guests_can_be_refused(make_lab: Make) -> None:
    lab = make_lab(slots=2, budgets=(1, 100), bonus=False)
    for i in range(3):
        lab.add(float(i))
    for _ in range(5):
        lab.look(1.0)
    assert len(lab.store.running()) == 1


def test_a_trial_that_always_crashes_is_given_up_and_shows_its_log(make_lab: Make) -> None:
    lab = make_lab()
    bad = lab.add(1.0)
    good = lab.add(2.0)
    lab.backend.crash = lambda job: job.settings["x"] == 1.0
    lab.finish()
    assert lab.states() == {bad: "failed", good: "done"}
    assert sum(attempt == bad or budget == 0 for attempt, budget in lab.backend.starts) <= 3
    assert len(lab.store.attempts_of(bad)) == 3
    assert "ValueError: always" in lab.store.trial(bad).message
    lab.backend.crash = lambda job: False
    lab.store.again(bad)
    lab.finish()
    assert lab.states()[bad] == "done"


def test_preempted_at_its_last_step_it_has_reached_its_rung(make_lab: Make) -> None:
    """A wish that comes with the last step: done, not to be done again."""
    lab = make_lab(budgets=(5,))
    first = lab.add(1.0)
    lab.look()
    lab.backend.now += 5.0  # the steps are over, but nobody has looked
    lab.add(2.0, priority="urgent")
    lab.look()
    lab.finish()
    assert lab.states()[first] == "done"
    assert len(lab.store.attempts_of(first)) == 1


def test_withdrawn_while_it_runs(make_lab: Make) -> None:
    lab = make_lab(budgets=(100,))
    number = lab.add(1.0)
    lab.look()
    lab.store.withdraw(number, "ada")
    lab.look(2.0)
    lab.look(1.0)
    assert lab.states() == {number: "withdrawn"}
    assert lab.store.running() == []


def test_withdrawn_at_the_end_of_a_rung_and_tried_again(make_lab: Make) -> None:
    """Its last rung is reached all the same: it is done, not sent to a rung that there is not; at an earlier one it
    waits for a place."""
    lab = make_lab(slots=2, budgets=(1, 3))
    last, first = lab.add(1.0), lab.add(2.0)
    lab.look()
    lab.backend.now += 1.0  # over, but nobody has looked
    lab.store.withdraw(first, "ada")
    lab.look()
    lab.look()  # the other goes on alone
    lab.backend.now += 5.0
    lab.store.withdraw(last, "ada")
    lab.look()
    assert lab.states() == {last: "withdrawn", first: "withdrawn"}
    for number in (last, first):
        lab.store.again(number)
    assert lab.states() == {last: "done", first: "paused"}
    lab.finish()
    assert lab.states()[last] == "done"


def test_one_that_leaves_unasked_and_does_nothing_is_given_up(make_lab: Make) -> None:
    lab = make_lab(budgets=(10,), attempts=1)
    number = lab.add(1.0)
    lab.look()
    lab.backend.now += 4.0
    begin = lab.backend.start

    def start(job: Any) -> str:
        handle: str = begin(job)
        run = lab.backend.runs[handle]
        lab.backend._end(run, run["from"], 75)
        return handle

    lab.backend.leave(next(iter(lab.backend.runs)))  # from outside, with four steps done: no failure
    lab.backend.start = start
    lab.finish(60)
    assert lab.states() == {number: "failed"}
    assert "left with code 75 at step 4" in lab.store.trial(number).message
    assert [e.kind for e in lab.store.events(trial=number)] == ["try", "left", *["retry"] * 3, "fail"]


def test_a_step_that_was_seen_is_progress(make_lab: Make) -> None:
    """Failures without progress are counted: each attempt goes a step further, so it is tried again and again."""
    lab = make_lab(budgets=(9,))
    number = lab.add(1.0)
    lab.look()
    for step in range(1, 7):
        (attempt,) = lab.store.running()
        lab.store.progress([(attempt.id, number, step, None)])
        lab.store.end(attempt, Ended(1, step), 3, 100.0)
        lab.look(60.0)
    assert lab.store.trial(number).failures == 1


def test_one_that_does_not_leave_is_killed_when_its_time_is_up(make_lab: Make, monkeypatch: Any) -> None:
    lab = make_lab(budgets=(1000,), grace=30.0)
    number = lab.add(1.0)
    lab.look()
    monkeypatch.setattr(lab.backend, "leave", lambda handle: None)
    lab.add(2.0, priority="urgent")
    for _ in range(40):
        lab.look(1.0)
    assert lab.states()[number] == "waiting"
    assert lab.store.trial(number).failures == 0


def test_a_slot_does_not_shrink_by_what_trials_hold(make_lab: Make, monkeypatch: Any) -> None:
    """A machine of 1,000 MB for two slots: 500 each, also for a scheduler that comes while 800 are held."""
    lab = make_lab(slots=2, budgets=(100,))
    held = 0.0
    monkeypatch.setattr(lab.backend, "held_mb", lambda handle: held)
    monkeypatch.setattr(
        "rorqual.lab.scheduler.available_memory", lambda: int(1000 - held * len(lab.store.running())) << 20
    )

    def begin() -> None:
        settings = Settings(slots=2, min_free_mb=0)
        lab.scheduler = Scheduler(
            lab.store, lab.backend, settings, say=lambda _: None, clock=lab.backend.clock
        )

    begin()
    lab.add(1.0)
    lab.add(2.0)
    lab.look()
    held = 400.0
    lab.look(2.0)
    begin()
    lab.look(2.0)
    assert lab.states() == {1: "running", 2: "running"}
    held = 501.0
    lab.look(2.0)
    lab.look(2.0)
    assert lab.states() == {1: "failed", 2: "failed"}
    assert "held 501 MB, a slot has 500" in lab.store.trial(1).message


def test_a_running_lab_hears_of_its_settings(make_lab: Make) -> None:
    lab = make_lab(slots=2, budgets=(100,), grace=7.0)
    for i in range(3):
        lab.add(float(i))
    lab.look()
    assert len(lab.store.running()) == 2
    assert lab.scheduler.settings.grace == 7.0  # nothing was set: what the scheduler was given holds
    Store(lab.store.folder).set_meta(settings={"slots": 3, "memory_mb": 1000, "backend": "slurm"})
    lab.look(1.0)
    assert len(lab.store.running()) == 3
    assert lab.scheduler.settings.backend == "local"


def test_two_schedulers_on_one_state_file_do_no_harm(make_lab: Make) -> None:
    """They take turns at random; the machine refuses two attempts in one folder, and nothing is computed twice."""
    lab = make_lab(slots=2)
    for i in range(18):
        lab.add(float(i))
    other = Scheduler(
        Store(lab.store.folder),
        lab.backend,
        lab.scheduler.settings,
        say=lambda _: None,
        clock=lab.backend.clock,
    )
    randomly = random.Random(1)
    for _ in range(400):
        lab.backend.advance(randomly.choice([0.0, 0.0, 1.0]))
        randomly.choice([lab.scheduler, other]).tick()
    assert lab.states()[1] == "done"
    seen = set()
    for folder, begun, to in lab.backend.work:
        steps = {(folder, s) for s in range(begun, to)}
        assert not steps & seen
        seen |= steps


class Killed(BaseException):
    """The scheduler's process is gone."""


@pytest.mark.parametrize("seed", range(3))
def test_a_scheduler_killed_between_any_two_statements_loses_nothing(make_lab: Make, seed: int) -> None:
    """At random statements of the state file and starts of the back-end, everything in memory is lost. What ran goes on
    and is adopted; whatever was half done is done once."""
    lab = make_lab(slots=2)
    for i in range(9):
        lab.add(float(i))
    randomly = random.Random(seed)
    scheduler = lab.scheduler
    kills = 0
    for _ in range(3000):
        left = randomly.randint(1, 25)

        def count(*_: Any, **__: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        store = Store(lab.store.folder)
        scheduler = Scheduler(
            store, lab.backend, lab.scheduler.settings, say=lambda _: None, clock=lab.backend.clock
        )
        store.db.set_trace_callback(None)
        work = True
        real_start = lab.backend.start

        def start(job: Any, real: Any = real_start, tell: Any = count) -> str:
            tell()
            handle = real(job)
            tell()  # started, and not written down
            return str(handle)

        scheduler.backend = _Counted(lab.backend, start, count)
        scheduler.store = _CountedStore(store, count)
        try:
            while work:
                lab.backend.advance(0.5)
                work = scheduler.tick()
        except Killed:
            kills += 1
            store.db.close()
            continue
        break
    else:
        raise AssertionError("never done")
    assert kills > 5
    results = lab.store.db.execute(
        "SELECT trial, rung, COUNT(*) FROM results GROUP BY trial, rung"
    ).fetchall()
    assert all(r[2] == 1 for r in results)
    assert sum(r[1] == 0 for r in results) == 9, "every idea has its first rung"
    assert lab.states()[1] == "done"
    assert lab.steps() < 81


class _Counted:
    """A back-end whose scheduler may be killed around every start."""

    def __init__(self, backend: Any, start: Any, count: Any) -> None:
        self._backend, self.start, self._count = backend, start, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class _CountedStore:
    """A store whose caller may be killed before or after every transaction."""

    def __init__(self, store: Store, count: Any) -> None:
        self._store, self._count = store, count

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in ("claim", "started", "end", "promote", "ask", "unclaim", "progress"):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            self._count()
            result = found(*args, **kwargs)
            self._count()
            return result

        return call


def test_a_transaction_that_is_cut_off_leaves_nothing(make_lab: Make) -> None:
    lab = make_lab()
    lab.add(1.0)

    def cut_off() -> None:
        with lab.store.change() as db:
            db.execute("UPDATE trials SET state='done'")
            raise Killed

    with pytest.raises(Killed):
        cut_off()
    assert lab.states() == {1: "waiting"}


def test_an_outcome_is_booked_once(make_lab: Make) -> None:
    lab = make_lab()
    lab.add(1.0)
    lab.look()
    (attempt,) = lab.store.running()
    lab.backend.advance(1.0)
    assert lab.store.end(attempt, Ended(0, 1, 0.5, 1.0), 3, 100.0) == "paused"
    assert lab.store.end(attempt, Ended(0, 1, 0.1, 1.0), 3, 100.0) == ""
    assert lab.store.results(1) == [(0, 1, 0.5)]


def test_a_wall_clock_that_jumps_changes_nothing(make_lab: Make, monkeypatch: Any) -> None:
    lab = make_lab(slots=2)
    times = iter(random.Random(3).choices([0.0, 1e9, 5e9, -1e6], k=10_000))
    monkeypatch.setattr("rorqual.lab.store.time.time", lambda: next(times))
    for i in range(9):
        lab.add(float(i))
    lab.finish()
    assert lab.states()[1] == "done"
    assert [e.seq for e in lab.store.events()] == sorted(e.seq for e in lab.store.events())


def test_nothing_is_started_on_a_full_disk_and_all_goes_on_when_there_is_room(
    make_lab: Make, monkeypatch: Any
) -> None:
    lab = make_lab()
    lab.add(1.0)
    room = [0]
    monkeypatch.setattr(
        "rorqual.lab.scheduler.shutil.disk_usage", lambda _: type("U", (), {"free": room[0]})()
    )
    lab.scheduler.settings = type(lab.scheduler.settings)(slots=1, memory_mb=1, min_free_mb=100)
    lab.look(1.0)
    lab.look(1.0)
    assert lab.states() == {1: "waiting"}
    assert sum(e.kind == "blocked" for e in lab.store.events()) == 1
    room[0] = 10**9
    lab.finish()
    assert lab.states() == {1: "done"}


def test_a_full_disk_under_the_state_file_stops_nothing_for_good(make_lab: Make) -> None:
    """SQLite says 'database or disk is full'; the loop says so and looks again, and nothing is half written."""
    lab = make_lab()
    for i in range(3):
        lab.add(float(i))
    said: list[str] = []
    lab.scheduler.say = said.append
    pages = lab.store.db.execute("PRAGMA page_count").fetchone()[0]
    lab.store.db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        lab.store.tell("note", "x" * 4_000_000)
    lab.store.db.execute("PRAGMA max_page_count=100000")
    lab.finish()
    assert lab.states()[1] == "done"


def test_the_story_says_why(make_lab: Make) -> None:
    lab = make_lab()
    for i in range(3):
        lab.add(float(i))
    lab.finish()
    told = [e.text for e in lab.store.events(trial=1) if e.kind == "promote"]
    assert told[0] == "goes on to step 3: 1 of 3 at step 1, 1 has a place"


def test_a_trial_knows_its_own_folder(make_lab: Make) -> None:
    lab = make_lab()
    number = lab.store.add(lab.study, "ada", "../../etc/passwd", "command", {}, {}, 0)
    trial: Trial = lab.store.trial(number)
    assert lab.store.folder_of(trial).parent == lab.store.folder / "trials"
