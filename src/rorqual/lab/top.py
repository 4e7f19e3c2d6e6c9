"""`rorqual lab top`: the status page, anew every second, until Ctrl-C."""

from __future__ import annotations

import sys
import time

from rorqual.lab.job import curve
from rorqual.lab.status import leaders, text
from rorqual.lab.store import Store

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40


def top(store: Store, every: float = 1.0) -> int:
    """Show until stopped; once, where nobody looks at a terminal."""
    if not sys.stdout.isatty():
        print(screen(store))
        return 0
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        try:
            while True:
                live.update(Text(screen(store)), refresh=True)
                time.sleep(every)
        except KeyboardInterrupt:
            return 0


def screen(store: Store) -> str:
    """Status, the curves of what runs beside the best, and the last lines of the story."""
    out = [text(store)]
    for study in store.studies():
        running = store.trials("running", study=study.id)
        best = leaders(store, study, 1)
        if not running:
            continue
        out += ["", f"curves of {study.metric}, on one scale"]
        shown = [("best", best[0])] if best else []
        shown += [("", t) for t in running]
        points = [[v for _, v in curve(store.folder_of(t), study.metric)] for _, t in shown]
        every = [v for p in points for v in p]
        if every:
            low, high = min(every), max(every)
            for (mark, t), values in zip(shown, points, strict=True):
                out.append(f"  {t.id:>5} {spark(values, low, high):<{WIDTH}} {t.name} {mark}")
    out += ["", "story", *(f"  {e.seq:>6} {e.trial or '':>5} {e.text}" for e in store.events(last=10))]
    return "\n".join(out)


def spark(values: list[float], low: float, high: float) -> str:
    """A curve in a line of blocks."""
    step = -(-len(values) // WIDTH) if values else 1
    scale = (len(BARS) - 1) / ((high - low) or 1)
    return "".join(BARS[int((v - low) * scale)] for v in values[::step])
