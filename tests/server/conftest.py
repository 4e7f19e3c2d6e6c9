"""A server on a loopback port, on its own thread, over a scripted engine: what the tests of this folder talk
to.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import uvicorn

from rorqual.server.app import build_app
from rorqual.server.ledger import Ledger
from rorqual.server.loading import scripted
from rorqual.server.models import Models
from rorqual.server.price import PriceList
from rorqual.server.run import listen
from rorqual.server.scripted import Script, ScriptedAnswer
from rorqual.server.service import Service
from rorqual.server.settings import Settings


@dataclass
class Live:
    """A running server and a client for it."""

    service: Service
    port: int
    client: httpx.Client
    key: str | None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        """One chat request with a single user message, unless `messages` is given."""
        body = {"model": "scripted", "messages": [{"role": "user", "content": content}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def frames(self, path: str, body: dict[str, Any]) -> list[bytes]:
        """A stream's frames as they came, keep-alive comments included."""
        with self.client.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            return [f for f in b"".join(response.iter_bytes()).split(b"\n\n") if f]

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which `data` was sent."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        sock.sendall(data)
        return sock

    def post_bytes(self, path: str, body: bytes) -> bytes:
        """A POST request as bytes, for `raw`."""
        auth = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{auth}Content-Type: application/json\r\n"
        return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def loop_call(self, function: Callable[[], object]) -> None:
        """Call a function on the server's event loop."""
        done = threading.Event()
        loop = self.service.models.all()[0].bridge._loop
        assert loop is not None
        loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(5)

    def stats(self) -> tuple[int, int]:
        """Running and waiting completions, as the engine says now."""
        stats = self.service.models.all()[0].bridge.engine.stats()
        return stats.running, stats.waiting


Start = Callable[..., Live]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts servers: `start(*answers, script={…}, settings={…}, prices={…}, keys=[{…}])`."""
    stops: list[Callable[[], None]] = []

    def run(
        *answers: ScriptedAnswer,
        script: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        prices: dict[str, Any] | None = None,
        key: dict[str, Any] | None = None,
        **service_fields: Any,
    ) -> Live:
        fields = {"answers": answers or (ScriptedAnswer(text="Hello!"),), **(script or {})}
        limits = Settings(**(settings or {}))
        served = scripted("scripted", Script(**fields), limits.max_open)
        ledger = Ledger(":memory:")
        text = ledger.make_key("test", **key) if key is not None else None
        listed = PriceList.parse(prices) if prices is not None else PriceList()
        models = Models([served], {"alias": "scripted"})
        service = Service(models, ledger, limits, listed, open_door=key is None, **service_fields)
        sock = listen("127.0.0.1", 0)
        config = uvicorn.Config(
            build_app(service), log_config=None, ws="none", lifespan="on", access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            thread.join(0.005)
        port = sock.getsockname()[1]
        headers = {"authorization": f"Bearer {text}"} if text else {}
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=20, headers=headers, trust_env=False
        )

        def stop() -> None:
            client.close()
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()

        stops.append(stop)
        return Live(service, port, client, text)

    yield run
    for stop in stops:
        stop()
