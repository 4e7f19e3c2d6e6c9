"""What a person sees while a model trains: a panel that stays in place in a terminal, plain lines elsewhere."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.train.metrics import View

BARS = "▁▂▃▄▅▆▇█"


def view(title: str, steps: int) -> View:
    """A live panel in a terminal, plain lines elsewhere."""
    return Live(title, steps) if sys.stdout.isatty() else Lines()


def echo(text: str) -> None:
    """Print a line. Once nobody reads any more (`| head`) all goes nowhere: a run does not end for that."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lines:
    """A line every few seconds and at every evaluation."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self._next = every, 0.0

    def update(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() >= self._next or "heldout_bpb" in line:
            self._next = time.monotonic() + self.every
            echo(summary(line))

    def say(self, text: str) -> None:
        echo(text)

    def close(self) -> None:
        pass


class Live:
    """Progress, figures, curves and the latest sample."""

    def __init__(self, title: str, steps: int) -> None:
        from rich.console import Console
        from rich.live import Live as Panel

        self.title, self.steps = title, steps
        self._line: dict[str, Any] = {}
        self._losses: list[float] = []
        self._heldout: list[float] = []
        self._console = Console()
        self._panel = Panel(console=self._console, refresh_per_second=4)
        self._panel.start()

    def update(self, line: Mapping[str, Any]) -> None:
        self._line |= line
        self._losses.append(line["loss"])
        if "heldout_bpb" in line:
            self._heldout.append(line["heldout_bpb"])
        self._panel.update(self._render())

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        self._panel.stop()

    def _render(self) -> Any:
        from rich import box
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line, width = self._line, max(20, min(self._console.width, 110) - 34)
        table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
        table.add_column(style="dim", width=18)
        table.add_column(width=12, justify="right", style="bold")
        table.add_column(ratio=1, no_wrap=True)
        done = ProgressBar(total=self.steps, completed=line["step"], width=width)
        table.add_row("step", f"{line['step']:,}", done)
        table.add_row("loss", f"{line['loss']:.3f}", Text(sparkline(self._losses, width), style="cyan"))
        if self._heldout:
            bits = Text(sparkline(self._heldout, width), style="green")
            table.add_row("held-out bits/byte", f"{self._heldout[-1]:.3f}", bits)
        if "load_spreads" in line:
            layers = "  ".join(f"{s:.2f}" for s in line["load_spreads"])
            table.add_row(
                "expert load spread", f"{line['load_spread']:.2f}", Text(f"by layer {layers}", style="dim")
            )
        shares = f"MFU {line['mfu']:.0%}, " if "mfu" in line else ""
        shares += f"optimizer {line['optimizer_share']:.0%} of a step"
        table.add_row("tokens a second", f"{line['tokens_per_second']:,.0f}", Text(shares, style="dim"))
        skipped = f", {line['skipped']} steps skipped" if line["skipped"] else ""
        passed = Text(f"{duration(line['seconds'])} so far{skipped}", style="dim")
        table.add_row("time left", duration(line["eta_seconds"]), passed)
        parts: list[Any] = [table]
        if line.get("sample"):
            shown = Text("\n".join(line["sample"].splitlines()[:12]))
            parts.append(Panel(shown, title="a sample", border_style="dim", box=box.ROUNDED))
        return Panel(
            Group(*parts), title=self.title, border_style="blue", width=min(self._console.width, 112)
        )


class TensorBoard:
    """Hands everything to another view, and the figures to TensorBoard as well."""

    def __init__(self, run: Path, inner: View) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise ConfigError(
                "tensorboard=true: the package is not installed; pip install tensorboard"
            ) from e
        self._writer: Any = SummaryWriter(str(run / "tensorboard"))
        self._inner = inner

    def update(self, line: Mapping[str, Any]) -> None:
        self._inner.update(line)
        for key, value in line.items():
            if isinstance(value, (int, float)) and key != "step":
                self._writer.add_scalar(key, value, line["step"])
        if "sample" in line:
            self._writer.add_text("sample", line["sample"], line["step"])

    def say(self, text: str) -> None:
        self._inner.say(text)

    def close(self) -> None:
        self._inner.close()
        self._writer.close()


def summary(line: Mapping[str, Any]) -> str:
    """The figures of a line in a person's units."""
    parts = [f"step {line['step']}", f"loss {line['loss']:.3f}"]
    if "heldout_bpb" in line:
        parts.append(f"held-out {line['heldout_bpb']:.3f} bits/byte")
    parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.0%}")
    if "load_spread" in line:
        parts.append(f"expert load spread {line['load_spread']:.2f}")
        parts.append(f"balance {line['balance_alpha']:g} x {line['balance_loss']:.3f}")
    if line["skipped"]:
        parts.append(f"{line['skipped']} steps skipped")
    return ", ".join([*parts, f"{duration(line['eta_seconds'])} left"])


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line of text, means of neighbours where it is longer than `width`."""
    finite = [v for v in values if abs(v) < float("inf")]
    groups = min(width, len(finite))
    if not groups:
        return ""
    edges = [len(finite) * i // groups for i in range(groups + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    return "".join(BARS[min(int((m - low) / ((high - low) or 1) * len(BARS)), len(BARS) - 1)] for m in means)


def duration(seconds: float) -> str:
    """1h 02m, 3m 20s or 12s."""
    minutes, s = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {s:02d}s" if minutes else f"{s}s"
