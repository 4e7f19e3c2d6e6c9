"""What all requests share: models, ledger, prices, limits, figures, and whether the server is closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rorqual.server.bridge import Bridge
from rorqual.server.faults import ApiError, overloaded
from rorqual.server.ledger import Ledger
from rorqual.server.limits import Limits
from rorqual.server.metrics import Metrics
from rorqual.server.models import Models, Served
from rorqual.server.price import PriceList
from rorqual.server.settings import Settings


@dataclass
class Service:
    """One server."""

    models: Models
    ledger: Ledger
    settings: Settings = field(default_factory=Settings)
    prices: PriceList = field(default_factory=PriceList)
    limits: Limits = field(default_factory=Limits)
    open_door: bool = False  # no keys were made: whoever reaches the port may use it
    load: Callable[[str, Path], Served] | None = (
        None  # a model folder under a name; None: no models at run time
    )
    draining: bool = False
    _retiring: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.models)

    def start(self) -> None:
        """Start every engine's thread on the running event loop."""
        for bridge in self.models.bridges():
            bridge.start()

    async def stop(self) -> None:
        """Stop every engine and close the ledger."""
        for bridge in self.models.bridges():
            await bridge.stop()
        self.ledger.close()

    def refuse_new(self) -> None:
        """From now on only what has begun is served."""
        self.draining = True

    def end_open(self) -> None:
        """End what is still running: each stream gets an error frame."""
        error = ApiError(503, "the server is shutting down", code="shutting_down")
        for bridge in self.models.bridges():
            bridge.fail_all(error)

    def retire(self, bridge: Bridge) -> None:
        """Stop an engine that no name leads to any more, once what it runs has ended."""
        task = asyncio.ensure_future(_stop_when_idle(bridge))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def check_open(self) -> None:
        """503 while draining."""
        if self.draining:
            raise overloaded("the server is shutting down", retry_after_s=5)

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served."""
        return not self.draining and all(bridge.healthy for bridge in self.models.bridges())


async def _stop_when_idle(bridge: Bridge) -> None:
    while bridge.open_requests:
        await asyncio.sleep(0.05)
    await bridge.stop()
