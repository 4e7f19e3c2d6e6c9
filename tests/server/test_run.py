"""The server as a process: signals, exit codes, and who may reach it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import rorqual
from rorqual.errors import ConfigError
from rorqual.server.command import ServeOptions, build_service
from rorqual.server.ledger import Ledger
from rorqual.server.run import is_loopback, listen

SCRIPT = {
    "answers": [
        {"match": "long", "text": "ab", "endless": True, "delay_s": 0.01},
        {"match": "short", "text": "x" * 30, "delay_s": 0.01},
        {"text": "Hello!"},
    ]
}


class Process:
    """`rorqual serve --scripted` on a free port."""

    def __init__(self, folder: Path, *options: str) -> None:
        script = folder / "script.json"
        script.write_text(json.dumps(SCRIPT))
        env = {**os.environ, "PYTHONPATH": str(Path(rorqual.__file__).parents[1])}
        command = [sys.executable, "-m", "rorqual.cli", "serve", "--scripted", str(script), "--port", "0"]
        command += ["--ledger", str(folder / "ledger.db"), *options]
        self.log = (folder / "log.txt").open("wb")
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, env=env)
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline().decode()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        assert found, line + (folder / "log.txt").read_text()
        self.port = int(found.group(1))
        self.url = f"http://127.0.0.1:{self.port}"

    def stream(self, content: str) -> socket.socket:
        """A stream that has begun."""
        body = json.dumps(
            {
                "model": "scripted",
                "stream": True,
                "max_tokens": 2000,
                "messages": [{"role": "user", "content": content}],
            }
        )
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=15)
        sock.sendall((head + body).encode())
        assert sock.recv(65536)
        return sock

    def close(self) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        self.log.close()


@pytest.fixture
def serve(tmp_path):
    running: list[Process] = []

    def start(*options: str) -> Process:
        running.append(Process(tmp_path, *options))
        return running[-1]

    yield start
    for process in running:
        process.close()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with sock:
        while part := sock.recv(65536):
            data += part
    return data


def test_row_26_a_signal_lets_streams_finish(serve):
    """In-flight finishes whole, new ones are refused or not accepted, exit code 0, the port free."""
    process = serve()
    sock = process.stream("short")
    process.popen.send_signal(signal.SIGTERM)
    data = read_all(sock)
    assert b"data: [DONE]" in data
    assert process.popen.wait(10) == 0
    listen("127.0.0.1", process.port).close()


def test_row_26_what_does_not_finish_gets_an_error_frame(serve):
    """llama-server falls silent there; ours says so and closes."""
    process = serve("--drain-s", "0.2")
    sock = process.stream("long")
    process.popen.send_signal(signal.SIGINT)
    data = read_all(sock)
    assert b'"code":"shutting_down"' in data
    assert b"[DONE]" not in data
    assert process.popen.wait(10) == 0


def test_row_27_the_second_signal_exits_at_once(serve):
    process = serve("--drain-s", "60")
    sock = process.stream("long")
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.popen.send_signal(signal.SIGTERM)
    assert process.popen.wait(5) != 0
    sock.close()


def test_row_62_kill_9_loses_no_usage_that_a_client_read(serve, tmp_path):
    """The ledger after SIGKILL holds every usage that was answered."""
    process = serve()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
    with httpx.Client(base_url=process.url, trust_env=False) as client:
        usages = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(20)]
        process.popen.send_signal(signal.SIGKILL)
    process.popen.wait()
    ledger = Ledger(tmp_path / "ledger.db")
    row = next(ledger.sums())
    ledger.close()
    assert row.requests == 20
    assert row.hit == sum(u["prompt_cache_hit_tokens"] for u in usages)
    assert row.hit + row.miss == sum(u["prompt_tokens"] for u in usages)
    assert row.output == sum(u["completion_tokens"] for u in usages)


def test_without_keys_only_this_machine_is_served(tmp_path):
    """Another address needs a key made first; the message says how."""
    script = tmp_path / "s.json"
    script.write_text(json.dumps(SCRIPT))
    options = ServeOptions(scripted=script, host="0.0.0.0", ledger=tmp_path / "l.db")
    with pytest.raises(ConfigError, match="rorqual keys make"):
        build_service(options)
    ledger = Ledger(tmp_path / "l.db")
    ledger.make_key("ann")
    ledger.close()
    service = build_service(options)
    assert not service.open_door
    service.ledger.close()


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.com", False),
    ],
)
def test_loopback(host, local):
    assert is_loopback(host) is local


def test_a_port_in_use_is_one_line(tmp_path):
    taken = listen("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])
    taken.close()
