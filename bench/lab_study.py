"""A real study in the lab: 27 ideas about the recipe (routing, optimizer, MLA ranks, data order) at a small size, rungs
at 108, 324 and 972 steps. One command; killed, the same command goes on.

    rorqual data build python --out data/python
    python bench/lab_study.py data/python --lab runs/lab-study
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import RECORDS, Row, write_record

from rorqual.config import put
from rorqual.lab.evidence import changes, noise
from rorqual.lab.idea import Idea, submit
from rorqual.lab.local import Local
from rorqual.lab.report import Learnt, write_report
from rorqual.lab.scheduler import Scheduler, hold
from rorqual.lab.settings import load_settings
from rorqual.lab.store import Store
from rorqual.train.stop import Stop

STUDY = "the recipe at 0.7 M parameters"
BASE: dict[str, Any] = {
    "steps": 972, "batch_size": 16, "seq_len": 128, "dtype": "float32", "device": "cpu", "eval_every": 54,
    "eval_rows": 64, "shape.depth": 3, "shape.width": 96, "shape.heads": 4, "shape.experts": 8,
    "shape.experts_per_token": 2,
}  # fmt: skip
IDEAS: dict[str, dict[str, Any]] = {
    # The config as it is, and twice again: another seed is another order of the data and other first weights.
    "as it is": {},
    "another order": {"seed": 1},
    "a third order": {"seed": 2},
    # Routing
    "16 experts": {"shape.experts": 16},
    "4 experts": {"shape.experts": 4},
    "dense": {"shape.experts": 0, "shape.experts_per_token": 3},
    "1 expert a token": {"shape.experts_per_token": 1},
    "3 of 16 experts": {"shape.experts": 16, "shape.experts_per_token": 3},
    "V2's balance loss": {"shape.balance": "loss"},
    "slow selection biases": {"optim.bias_speed": 0.001},
    "fast selection biases": {"optim.bias_speed": 0.05},
    # Optimizer
    "half the rate": {"optim.lr": 0.004},
    "twice the rate": {"optim.lr": 0.016},
    "four times the rate": {"optim.lr": 0.032},
    "AdamW": {"optim.name": "adamw"},
    "plain Muon rows": {"optim.even_rows": False},
    "no weight decay": {"optim.weight_decay": 0.0},
    "cosine": {"schedule.name": "cosine"},
    "long cool-down": {"schedule.cooldown": 0.8},
    # MLA ranks (48 as it is) and attention
    "rank 16": {"shape.kv_lora_rank": 16},
    "rank 32": {"shape.kv_lora_rank": 32},
    "rank 96": {"shape.kv_lora_rank": 96},
    "grouped-query": {"shape.attention": "gqa"},
    "norms of queries and keys": {"shape.qk_norm": True},
    # Data order
    "short rows": {"seq_len": 64, "batch_size": 32},
    "long rows": {"seq_len": 256, "batch_size": 8},
    "no document masks": {"document_masks": False},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--lab", type=Path, default=Path("runs/lab-study"))
    options = parser.parse_args()
    store = Store(options.lab)
    there = {t.name for t in store.trials()}
    store.set_meta(settings={"slots": 1, "threads": 1, "bonus": False})
    for name, settings in IDEAS.items():
        if name not in there:
            submit(store, idea(name, settings, options.data, store.folder))
    lock = hold(store.folder)
    if lock is None:
        print("another process schedules this study")
        return 2
    with Stop() as stop:
        Scheduler(store, Local(), load_settings(store), say=lambda text: print(text, flush=True)).run(
            stop=stop.asked
        )
    if stop.asked():
        return 75
    text, page = write_report(store, STUDY, store.folder / "report.html")
    print(text)
    shutil.copyfile(page, RECORDS / "lab_study.html")
    record(store)
    return 0


def idea(name: str, settings: dict[str, Any], data: Path, folder: Path) -> Idea:
    """An idea over the base; what the report shows as its settings is only what it changes."""
    config = folder / "base.json"
    tree: dict[str, Any] = {}
    for key, value in BASE.items():
        put(tree, key, value)
    config.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return Idea(config=str(config), data=(data,), settings=settings, name=name, who="bench", study=STUDY)


def record(store: Store) -> None:
    """bench/records/lab_study.json: what won, what it cost, what was beyond the noise."""
    study = next(s for s in store.studies() if s.name == STUDY)
    learnt = Learnt(store, study)
    best, full = learnt.best[0], len(learnt.trials) * study.ladder.budgets[-1]
    spent = sum(study.ladder.budgets[s.reached - 1] for s in learnt.standings.values() if s.reached)
    rows = [
        Row(f"study, steps of {len(learnt.trials)} ideas", spent, full, "all to the end", full / spent, 1 / 0.3, "steps"),
        Row("study, slot minutes", learnt.spent / 60, unit="min"),
        Row(f"study, best of {len(learnt.trials)}: {best.name}", best.value or 0.0, unit="held-out bits/byte"),
    ]  # fmt: skip
    first = learnt.rows(0)
    base = [v for s, v in first if not set(s) - {"seed"}]
    for change in changes(first):
        if change.sure:
            said = ", ".join(f"{k}={v}" for k, v in change.settings.items())
            mean = sum(base) / len(base)
            rows.append(
                Row(f"study, at step {study.ladder.budgets[0]}: {said}, beyond the noise", mean + change.difference, mean,
                    "as it is", None, None, "held-out bits/byte")
            )  # fmt: skip
    tried = [
        {"name": t.name, "settings": t.settings, "seconds": t.seconds, "results": store.results(t.id)}
        for t in learnt.trials
    ]
    write_record("lab_study", rows, ladder=list(study.ladder.budgets), noise=noise([base]), ideas=tried)


if __name__ == "__main__":
    sys.exit(main())
