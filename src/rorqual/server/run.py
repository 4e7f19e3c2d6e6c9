"""A service on a port: the socket, the signals, and a graceful end.

The first SIGTERM or SIGINT stops new requests, lets what has begun finish for a while, then ends it with an
error frame; the exit code is 0. The second exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from rorqual.errors import ConfigError
from rorqual.server.app import build_app
from rorqual.server.guard import REQUEST_ID
from rorqual.server.service import Service

log = logging.getLogger(__name__)
# How long a thread may keep the interpreter from another, seconds: the event loop waits for the engine's
# thread no longer than this. Python's own 5 ms would be the larger part of the time to the first token of a
# small model.
_SWITCH_INTERVAL_S = 0.0005
_GRACE_S = 5.0  # after the error frames went out, for clients to take them


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port={port}: must be 0 (a free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as e:
        sock.close()
        raise ConfigError(f"host={host} port={port}: {e.strerror or e}; choose another with --port") from e
    sock.listen(2048)
    return sock


def serve_forever(service: Service, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until a signal; returns when everything has ended."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    config = uvicorn.Config(
        build_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,
        h11_max_incomplete_event_size=64 * 1024,
    )
    _Server(config, service, on_ready).run(sockets=[sock])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours instead of uvicorn's, which would end with the signal's exit code."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say that the server is up once it is."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    def _on_signal(self) -> None:
        if self._service.draining:
            log.warning("second signal: exiting at once")
            logging.shutdown()
            os._exit(1)
        log.info("draining: no new requests; waiting up to %g s", self._service.settings.drain_s)
        self._service.refuse_new()
        self._drain = asyncio.ensure_future(self._end_after_a_while())
        self.should_exit = True

    async def _end_after_a_while(self) -> None:
        await asyncio.sleep(self._service.settings.drain_s)
        self._service.end_open()
        await asyncio.sleep(_GRACE_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class WithRequestId(logging.Filter):
    """Gives every record the id of the request that it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = REQUEST_ID.get()
        return True


def log_to_stderr(level: str) -> None:
    """One line a record, with the request's id."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(WithRequestId())
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
