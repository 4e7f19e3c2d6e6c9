"""What a person sees while a model is reinforced: reward, live groups and held-out accuracy, never the loss."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rorqual.train.metrics import View
from rorqual.train.view import duration, echo, sparkline


def view(title: str) -> View:
    """A live panel in a terminal, plain lines elsewhere."""
    return Live(title) if sys.stdout.isatty() else Lines()


class Lines:
    """A line every few seconds and at every evaluation, with a rollout below the latter."""

    def __init__(self, every: float = 5.0) -> None:
        self.every, self._next = every, 0.0

    def update(self, line: Mapping[str, Any]) -> None:
        if time.monotonic() >= self._next or "accuracy" in line:
            self._next = time.monotonic() + self.every
            echo(summary(line))
            for sample in line.get("samples", ())[:1]:
                echo(f"    {one_line(sample)}")

    def say(self, text: str) -> None:
        echo(text)

    def close(self) -> None:
        pass


class Live:
    """Figures, their curves, and rollouts with their verdicts."""

    ROWS = (
        ("accuracy", "held-out accuracy", "{:.1%}"),
        ("reward", "reward of rollouts", "{:.3f}"),
        ("live", "groups that teach", "{:.0%}"),
        ("length", "tokens a rollout", "{:.1f}"),
        ("entropy", "entropy, nats", "{:.3f}"),
        ("mismatch", "sampler against trainer", "{:.1e}"),
    )

    def __init__(self, title: str) -> None:
        from rich.console import Console
        from rich.live import Live as Panel

        self.title = title
        self._line: dict[str, Any] = {}
        self._curves: dict[str, list[float]] = {key: [] for key, _, _ in self.ROWS}
        self._console = Console()
        self._panel = Panel(console=self._console, refresh_per_second=4)
        self._panel.start()

    def update(self, line: Mapping[str, Any]) -> None:
        self._line |= line
        for key, values in self._curves.items():
            if key in line:
                values.append(line[key])
        self._panel.update(self._render())

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def close(self) -> None:
        self._panel.stop()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        line, width = self._line, max(20, min(self._console.width, 110) - 40)
        skipped = f", {line['skipped']} updates skipped" if line.get("skipped") else ""
        table = Table(box=None, show_header=False, padding=(0, 1), expand=True)
        table.add_column(style="dim", width=24)
        table.add_column(width=12, justify="right", style="bold")
        table.add_column(ratio=1, no_wrap=True)
        table.add_row(
            "step",
            f"{line['step']:,}",
            Text(f"{line['phase']}, {duration(line['seconds'])}{skipped}", style="dim"),
        )
        for key, name, form in self.ROWS:
            if self._curves[key]:
                table.add_row(
                    name, form.format(line[key]), Text(sparkline(self._curves[key], width), style="cyan")
                )
        if "accuracy_low" in line:
            table.add_row("95% interval", f"{line['accuracy_low']:.1%}", f"to {line['accuracy_high']:.1%}")
        shown = line.get("rollout_samples") or line.get("samples") or ()
        parts: list[Any] = [table]
        for sample in shown[:4]:
            right = sample["verdict"] == "right"
            parts.append(Text(one_line(sample, width + 30), style="green" if right else "red"))
        return Panel(
            Group(*parts), title=self.title, border_style="blue", width=min(self._console.width, 112)
        )


def summary(line: Mapping[str, Any]) -> str:
    """The figures of a line in a person's units."""
    parts = [f"step {line['step']} ({line['phase']})"]
    if "reward" in line:
        parts.append(f"reward {line['reward']:.3f}")
        parts.append(f"{line['live']:.0%} of groups teach")
        parts.append(f"{line['length']:.1f} tokens")
        parts.append(f"entropy {line['entropy']:.2f}")
        parts.append(f"mismatch {line['mismatch']:.0e}")
        parts.append(f"{line['rollouts_per_second']:,.0f} rollouts/s")
    if line.get("skipped"):
        parts.append(f"{line['skipped']} updates skipped")
    if line.get("grader_failed"):
        parts.append(f"grader failed on {line['grader_failed']:.1%}")
    if "accuracy" in line:
        parts.append(
            f"held-out {line['accuracy']:.1%} ({line['accuracy_low']:.1%} to {line['accuracy_high']:.1%})"
        )
    if "pass_k" in line:
        parts.append(f"pass@1 {line['pass_1']:.1%}, pass@{line['k']} {line['pass_k']:.1%}")
    return ", ".join([*parts, duration(line["seconds"])])


def one_line(sample: Mapping[str, Any], width: int = 110) -> str:
    """A rollout with its verdict, cut to a line."""
    text = f"{sample['prompt']} → {sample['completion']}".replace("\n", "⏎")
    return f"[{sample['verdict']}] {text if len(text) <= width else text[: width - 1] + '…'}"
