"""metrics.jsonl is the truth of a run: one line a logged step. The live view and the report read the same figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rorqual.errors import ConfigError

FILE = "metrics.jsonl"


class View(Protocol):
    """Something that shows a run to a person."""

    def update(self, line: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Log:
    """Appends lines; on a resumed run first drops those after the checkpoint, which will be computed again."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / FILE
        kept = [line for line in read(run) if line["step"] <= step]
        work = self.path.with_suffix(".partial")
        work.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        work.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, a half-written last one left out."""
    path = run / FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class Lines:
    """A plain line now and then, where nobody watches a terminal."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self._next = every, 0.0

    def update(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() >= self._next or "heldout_bpb" in line:
            self._next = time.monotonic() + self.every
            print(summary(line), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Live:
    """A panel that stays in place, with progress, figures and the latest sample."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.live import Live as Panel

        self.steps = steps
        self.console = Console()
        self._line: dict[str, Any] = {}
        self._heldout: list[tuple[int, float]] = []
        self._sample = ""
        self._panel = Panel(console=self.console, refresh_per_second=4, transient=False)
        self._panel.start()

    def update(self, line: Mapping[str, Any]) -> None:
        self._line |= line
        if "heldout_bpb" in line:
            self._heldout.append((line["step"], line["heldout_bpb"]))
        if line.get("sample"):
            self._sample = line["sample"]
        self._panel.update(self._render())

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def close(self) -> None:
        self._panel.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        line = self._line
        parts: list[Any] = [ProgressBar(total=self.steps, completed=line["step"]), Text(summary(line))]
        if self._heldout:
            shown = "  ".join(f"{step}: {value:.3f}" for step, value in self._heldout[-6:])
            parts.append(Text(f"held-out bits per byte  {shown}"))
        if self._sample:
            parts.append(Panel(Text(self._sample[:600]), title="sample", border_style="dim"))
        return Panel(Group(*parts), title=f"training, step {line['step']} of {self.steps}")


def view(steps: int) -> View:
    """A live panel in a terminal, plain lines elsewhere."""
    return Live(steps) if sys.stdout.isatty() else Lines()


def summary(line: Mapping[str, Any]) -> str:
    """The figures of a line in a person's units."""
    parts = [f"step {line['step']}"]
    if "loss" in line:
        parts.append(f"loss {line['loss']:.3f}")
    if "heldout_bpb" in line:
        parts.append(f"held-out {line['heldout_bpb']:.3f} bits/byte")
    if "tokens_per_second" in line:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line.get("mfu") is not None:
        parts.append(f"MFU {line['mfu']:.0%}")
    if line.get("load_spread") is not None:
        parts.append(f"expert load spread {line['load_spread']:.2f}")
    if line.get("skipped"):
        parts.append(f"{line['skipped']} steps skipped")
    if "eta_seconds" in line:
        parts.append(f"ETA {duration(line['eta_seconds'])}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 12s."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {s:02d}s" if minutes else f"{s}s"


class TensorBoard:
    """The same figures for TensorBoard, where it is installed."""

    def __init__(self, run: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ConfigError(
                "tensorboard=true: the package is not installed; pip install tensorboard"
            ) from e
        self._writer: Any = SummaryWriter(str(run / "tensorboard"))

    def write(self, line: Mapping[str, Any]) -> None:
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()
