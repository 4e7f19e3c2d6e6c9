"""How fast a run goes: tokens a second, share of the machine's peak, the optimizer's share, what is left."""

from __future__ import annotations

import time
from typing import Any

from rorqual.train.config import TrainConfig

SMOOTH = 0.9  # of the last steps' times: about ten steps count


class Speed:
    """A stopwatch of steps, from `begin` to `end`; evaluations and checkpoints between them count for `seconds` alone."""

    def __init__(
        self,
        config: TrainConfig,
        flops_per_step: float = 0.0,
        peak_flops: float | None = None,
        processes: int = 1,
    ) -> None:
        self.config, self.flops_per_step, self.peak_flops = config, flops_per_step, peak_flops
        self.processes = processes  # whose work a step is; this one's time on the processor stands for each
        self.before = 0.0  # seconds of a run that was resumed
        self._start = self._mark = time.perf_counter()
        self._cpu = time.process_time()
        self._step = self._optimizer = 0.0
        self.stepping = self.processor = (
            0.0  # seconds in steps alone: of the clock, and of the processor's cores
        )

    @property
    def seconds(self) -> float:
        """Of the whole run so far."""
        return self.before + time.perf_counter() - self._start

    def begin(self) -> None:
        """A step begins."""
        self._mark, self._cpu = time.perf_counter(), time.process_time()

    def optimizer(self, seconds: float) -> None:
        """The update's part of the step under way."""
        self._optimizer = _smooth(self._optimizer, seconds)

    def end(self) -> None:
        """The step has ended."""
        took = time.perf_counter() - self._mark
        self._step = _smooth(self._step, took)
        self.stepping += took
        self.processor += (time.process_time() - self._cpu) * self.processes

    def figures(self, step: int) -> dict[str, Any]:
        """tokens_per_second, optimizer_share, eta_seconds, seconds, and mfu where the peak is known."""
        c, each = self.config, max(self._step, 1e-9)
        figures = {
            "tokens_per_second": c.tokens_per_step / each,
            "optimizer_share": self._optimizer / each,
            "eta_seconds": each * (c.steps - step),
            "seconds": self.seconds,
            "stepping_seconds": self.stepping,
            "processor_seconds": self.processor,
        }
        if self.peak_flops:
            figures["mfu"] = self.flops_per_step / each / self.peak_flops
        return figures


def _smooth(old: float, new: float) -> float:
    return SMOOTH * old + (1 - SMOOTH) * new if old else new
