"""What a trial of one's own keeps: should I stop? save; done so far; and an exit code.

    from rorqual.lab.contract import Trial

    def idea(trial: Trial) -> None:                    # rorqual lab try module:idea --set lr=0.1 --steps 90
        step, state = trial.saved or (0, fresh())
        while not trial.should_stop():
            step, state = step + 1, train(state, trial.settings["lr"])
            trial.done(step, loss=measure(state))
        trial.save(step, state)                        # anything that JSON can say; or a folder: trial.folder

A program started with --command does the same with `trial = Trial.current()` and `sys.exit(trial.exit_code)`; one in
another language reads the variables and appends the lines itself.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from rorqual.checkpoint.files import write_whole
from rorqual.errors import RunError
from rorqual.train.metrics import FILE, Log

FOLDER, BUDGET, SETTINGS, ATTEMPT = (
    "RORQUAL_LAB_FOLDER", "RORQUAL_LAB_BUDGET", "RORQUAL_LAB_SETTINGS", "RORQUAL_LAB_ATTEMPT",
)  # fmt: skip
SAVED = "saved.json"
LEFT = 75  # sysexits' EX_TEMPFAIL: saved and left; start me again
METRICS = FILE  # one JSON object a line: "step" and whatever was measured


class Trial:
    """The lab as a trial sees it. `budget` is how many steps to have done in all, earlier attempts included."""

    def __init__(self, folder: Path, budget: int, settings: dict[str, Any]) -> None:
        self.folder, self.budget, self.settings = folder, budget, settings
        self.asked = False
        self._log: Log | None = None
        found = self.saved
        self.step = 0 if found is None else found[0]

    @classmethod
    def current(cls) -> Trial:
        """The trial that this process is; SIGTERM is a wish to leave from here on. Raises RunError outside the lab."""
        if FOLDER not in os.environ:
            raise RunError(f"{FOLDER}: not set; start the program with `rorqual lab try --command …`")
        settings = json.loads(os.environ.get(SETTINGS, "{}"))
        trial = cls(Path(os.environ[FOLDER]), int(os.environ[BUDGET]), settings)
        signal.signal(signal.SIGTERM, lambda *_: trial.leave())
        return trial

    def leave(self) -> None:
        """Be asked to save and leave."""
        self.asked = True

    def should_stop(self) -> bool:
        """Whether to save and leave: the budget is used up, or the slot is wanted."""
        return self.asked or self.step >= self.budget

    @property
    def saved(self) -> tuple[int, Any] | None:
        """(step, state) of the last save; None in the beginning."""
        path = self.folder / SAVED
        if not path.is_file():
            return None
        tree = json.loads(path.read_text(encoding="utf-8"))
        return int(tree["step"]), tree["state"]

    def save(self, step: int, state: Any = None) -> None:
        """Keep what is needed to go on after `step`, whole or not at all. Raises CheckpointError where the disk
        fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / SAVED, json.dumps({"step": step, "state": state}) + "\n")

    def done(self, step: int, **measured: float) -> None:
        """Say how far it is, and what was measured there; lines of a cut-off attempt from here on are dropped."""
        if self._log is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._log = Log(self.folder, step - 1)
        self._log.write({"step": step, **measured})
        self.step = step

    @property
    def exit_code(self) -> int:
        """75 where it was asked to leave before its budget was used up, else 0: whether that is so, its log says."""
        return LEFT if self.asked and self.step < self.budget else 0
