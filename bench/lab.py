"""The lab against its goals: 27 trials in 20 orders beside Ray Tune's ASHA, slots busy, `lab status` after 10,000 trials,
how soon an idea computes and urgent work begins.

    python bench/lab.py DATA [--ray PYTHON_WITH_RAY]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import Row, faster, smaller, write_record

from rorqual.lab.rungs import Ladder, Standing, best_left, due
from rorqual.lab.store import Store

LADDER = Ladder((3, 9, 27), 3)
TRIALS, ORDERS = 27, 20

# The peer's own rule, with its own classes: a bracket is asked at each rung, as its scheduler does.
PEER = """
import json, sys
from ray.tune.schedulers.async_hyperband import _Bracket
from ray.tune.schedulers import TrialScheduler
class T:
    def __init__(self, i): self.trial_id = str(i)
curves, orders = json.load(sys.stdin)
out = []
for order in orders:
    bracket = _Bracket(min_t=3, max_t=27, reduction_factor=3, s=0)
    spent, ended = 0, []
    for i in order:
        done = 3
        for r in (3, 9, 27):
            done = r
            if r == 27: ended.append(i); break
            if bracket.on_result(T(i), r, -curves[i][str(r)]) == TrialScheduler.STOP: break
        spent += done
    out.append([spent, ended])
print(json.dumps(out))
"""


def curves(seed: int) -> list[dict[int, float]]:
    """27 learning curves that cross: a loss floor, a speed and noise that shrinks with the steps."""
    randomly = random.Random(seed)
    found = []
    for i in range(TRIALS):
        floor, speed = 2.0 + 0.05 * i, randomly.uniform(0.8, 1.2)
        found.append(
            {b: floor + speed * 3 / b + randomly.gauss(0, 0.03) * (3 / b) ** 0.5 for b in LADDER.budgets}
        )
    return found


def arrivals(values: list[dict[int, float]]) -> list[list[int]]:
    """20 orders: worst first, best first, and 18 drawn."""
    by = sorted(range(TRIALS), key=lambda i: -values[i][27])
    orders = [by, by[::-1]]
    for seed in range(ORDERS - 2):
        orders.append(random.Random(seed).sample(range(TRIALS), TRIALS))
    return orders


def climb(values: list[dict[int, float]], order: list[int]) -> tuple[int, list[int]]:
    """(steps, who ran to the end) of our rule: each trial comes when the one before it has reached the first rung, every
    place is given as soon as there is one, and the best that is left goes on at the end."""
    there: dict[int, Standing] = {}

    def run(i: int, rung: int, place: int) -> None:
        before = there[i].values if i in there else ()
        there[i] = Standing(i, (*before, values[i][LADDER.budgets[rung]]), place)

    def settle() -> None:
        while found := due(LADDER, list(there.values())):
            p = found[0]
            if there[p.trial].reached > p.rung:
                there[p.trial] = Standing(p.trial, there[p.trial].values, p.rung)
            else:
                run(p.trial, p.rung, p.rung)

    for i in order:
        run(i, 0, 0)
        settle()
    while left := best_left(LADDER, list(there.values())):
        run(left.trial, left.rung, there[left.trial].place)
        settle()
    spent = sum(LADDER.budgets[s.reached - 1] for s in there.values())
    return spent, [s.trial for s in there.values() if s.reached == 3]


def orders_rows(ray: str | None) -> list[Row]:
    values = curves(0)
    best = min(range(TRIALS), key=lambda i: values[i][27])
    orders = arrivals(values)
    ours = [climb(values, order) for order in orders]
    full = TRIALS * LADDER.budgets[-1]
    peers = None
    if ray:
        done = subprocess.run(
            [ray, "-c", PEER], input=json.dumps([values, orders]), capture_output=True, text=True, check=True
        )
        peers = json.loads(done.stdout)

    def found(results: list[tuple[int, list[int]]]) -> float:
        return sum(best in ended for _, ended in results) / ORDERS

    def cost(results: list[tuple[int, list[int]]]) -> float:
        return max(spent for spent, _ in results) / full

    rows = [
        faster("lab, 27 trials in 20 orders: the true best ran to the end", found(ours), 0.9, "bound", 1.0),
        smaller(
            "lab, 27 trials in 20 orders: share of the full cost, dearest order",
            cost(ours),
            0.3,
            "bound",
            1.0,
        ),
    ]
    if peers:
        rows += [
            faster("lab, the true best ran to the end, beside the peer's rule", found(ours), found(peers),
                   "Ray Tune ASHA"),
            smaller("lab, share of the full cost, dearest order, beside the peer's rule", cost(ours), cost(peers),
                    "Ray Tune ASHA"),
            smaller("lab, share of the full cost, worst first", ours[0][0] / full, peers[0][0] / full, "Ray Tune ASHA"),
        ]  # fmt: skip
    return rows


def lab(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rorqual.cli", "lab", words[0], "--lab", str(folder), *words[1:]],
        capture_output=True, text=True, check=True,
    )  # fmt: skip


def status_row(folder: Path) -> Row:
    """`lab status` as a command, interpreter and all, with 10,000 finished trials."""
    store = Store(folder / "many")
    study = store.study("many", LADDER, "loss")
    with store.change() as db:
        for i in range(10_000):
            reached = 3 if i % 9 == 0 else 1
            db.execute(
                "INSERT INTO trials (study, who, name, kind, spec, settings, priority, state, reached, place, step, "
                "value, seconds, made) VALUES (?, ?, ?, 'train', '{}', ?, 0, ?, ?, ?, 27, ?, 60, 0)",
                (study.id, f"p{i % 7}", f"lr={i}", json.dumps({"optim.lr": i}), "done" if reached == 3 else "paused",
                 reached, reached - 1, 2 + i / 1e4),
            )  # fmt: skip
            for rung in range(reached):
                db.execute("INSERT INTO results VALUES (?, ?, 27, ?, ?, 1)", (i + 1, rung, 2 + i / 1e4, i))
            db.execute(
                "INSERT INTO events (at, kind, trial, text) VALUES (0, 'reach', ?, 'reached')", (i + 1,)
            )
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        lab(folder / "many", "status")
        times.append(time.perf_counter() - begin)
    return smaller("lab, `status` with 10,000 trials", sorted(times)[4], 0.2, "bound", 1.0, "s")


TOY = """
import time
def slow(trial):
    step = (trial.saved or (0, None))[0]
    while not trial.should_stop():
        time.sleep(0.1)
        step += 1
        trial.done(step, loss=trial.settings["x"] + 1 / step)
    trial.save(step)
"""


def urgent_row(folder: Path) -> Row:
    """Both slots full of steps of 0.1 s; from the submission of an urgent idea to its first step's beginning."""
    (folder / "toys.py").write_text(TOY, encoding="utf-8")
    os.chdir(folder)
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    lab(folder / "urgent", "set", "slots=2", "memory_mb=1000", "idle=1")
    for x in (1, 2):
        lab(folder / "urgent", "try", "toys:slow", "--steps", "900", "--rungs", "1", "--set", f"x={x}")
    store = Store(folder / "urgent")
    wait(lambda: all(t.step > 0 for t in store.trials()) and len(store.trials("running")) == 2)
    from rorqual.lab.idea import Idea, submit

    begin = time.perf_counter()
    trial = submit(
        store, Idea("toys:slow", settings={"x": 0}, steps=9, rungs=1, priority="urgent", study="urgent")
    )
    log = store.folder_of(trial) / "log.txt"
    wait(lambda: log.is_file() and "--- attempt" in log.read_text(encoding="utf-8"))
    took = time.perf_counter() - begin
    for t in store.trials("waiting", "running"):
        store.withdraw(t.id, "bench")
    return smaller("lab, urgent work begins (both slots full, steps of 0.1 s)", took, 1.1, "bound", 1.0, "s")


def busy_row(folder: Path) -> Row:
    """Slot seconds of 12 trials over the wall time of two slots, while anything waited."""
    os.chdir(folder)
    lab(folder / "busy", "set", "slots=2", "memory_mb=1000", "idle=1")
    for x in range(12):
        lab(folder / "busy", "try", "toys:slow", "--steps", "60", "--rungs", "1", "--set", f"x={x}", "--hold")
    store = Store(folder / "busy")
    lab(folder / "busy", "try", "toys:slow", "--steps", "60", "--rungs", "1", "--set", "x=12")
    counts, begin = [], time.perf_counter()
    wait(lambda: len(store.running()) == 2)
    while store.trials("waiting") and time.perf_counter() - begin < 120:
        counts.append(sum(a.state == "running" for a in store.running()))
        time.sleep(0.02)
    return faster("lab, slots busy while there is work (2 slots, trials of 6 s)", sum(counts) / len(counts) / 2, 0.95,
                  "bound", 1.0)  # fmt: skip


def start_row(folder: Path, data: Path) -> Row:
    """From `lab try` to the log line of the first training step, less the time to import torch."""
    config = folder / "tiny.toml"
    config.write_text(
        'steps = 9\nbatch_size = 2\nseq_len = 64\neval_rows = 4\ndevice = "cpu"\n[shape]\ndepth = 2\nwidth = 64\n'
    )
    imports = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        imports.append(time.perf_counter() - begin)
    times = []
    for i in range(3):
        begin = time.perf_counter()
        lab(folder / f"start{i}", "try", str(config), "--data", str(data))
        store = Store(folder / f"start{i}")
        log = store.folder_of(store.trial(1)) / "run" / "metrics.jsonl"
        wait(lambda log=log: log.is_file() and log.stat().st_size > 0)
        times.append(time.perf_counter() - begin)
        wait(lambda store=store: not store.trials("waiting", "running"))
    took = sorted(times)[1] - sorted(imports)[1]
    return smaller(
        "lab, from `lab try` to the first step, beyond importing torch", took, 2.0, "bound", 1.0, "s"
    )


def wait(ready: object, seconds: float = 90.0) -> None:
    assert callable(ready)
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            raise SystemExit("waited in vain")
        time.sleep(0.01)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--ray", help="a Python that has ray[tune]")
    options = parser.parse_args()
    data = options.data.resolve()
    rows = orders_rows(options.ray)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        rows += [status_row(folder), urgent_row(folder), busy_row(folder), start_row(folder, data)]
        os.chdir("/")
    for row in rows:
        print(row)
    write_record("lab", rows, orders=ORDERS, budgets=list(LADDER.budgets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
