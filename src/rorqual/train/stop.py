"""SIGTERM and Ctrl-C as a wish that the loop looks at, so that it can save before it leaves."""

from __future__ import annotations

import signal
from types import TracebackType
from typing import Any


class Stop:
    """While entered, collects the first signal; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> Stop:
        try:
            for s in (signal.SIGTERM, signal.SIGINT):
                self._before[s] = signal.signal(s, self._take)
        except ValueError:  # not in the main thread: whoever runs us there stops us otherwise
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _take(self, number: int, _: Any) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def exit_code(stopped: signal.Signals | None) -> int:
    """0 done, 130 after Ctrl-C, 75 where a scheduler asked to make room (sysexits' EX_TEMPFAIL)."""
    return 0 if stopped is None else 130 if stopped == signal.SIGINT else 75
