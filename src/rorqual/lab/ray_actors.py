"""Attempts as Ray actors, one each, on whichever machine has room. The machines see the lab's folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from typing import Any

from rorqual.errors import RunError
from rorqual.lab.child import environment
from rorqual.lab.job import Job
from rorqual.train.launch import end_with_parent

NAMESPACE = "rorqual-lab"


class Runner:
    """In the actor: the attempt's process. It hears SIGTERM when the actor ends, saves and leaves."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            words,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent(signal.SIGTERM),
        )

    def poll(self) -> int | None:
        return self.process.poll()

    def send(self, number: int) -> None:
        self.process.send_signal(number)


class RayActors:
    """A handle is the actor's name. On a cluster given by its address actors are detached, and a later scheduler adopts
    them; a cluster that was begun here ends with us, and its attempts are tried again."""

    def __init__(self, address: str = "") -> None:
        try:
            import ray
        except ImportError as e:
            raise RunError("backend=ray: Ray is not installed; pip install 'rorqual[ray]'") from e
        self.ray: Any = ray
        self.detached = bool(address)
        path = os.pathsep.join(p for p in sys.path if p)
        try:
            ray.init(
                address=address or "local", namespace=NAMESPACE, log_to_driver=False, ignore_reinit_error=True,
                include_dashboard=None if address else False, runtime_env={"env_vars": {"PYTHONPATH": path}},
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as e:
            raise RunError(f"ray={address!r}: no cluster there ({e})") from e
        self._actors: dict[str, Any] = {}
        self._polls: dict[str, Any] = {}
        self._codes: dict[str, int | None] = {}

    def start(self, job: Job) -> str:
        words = [sys.executable, "-m", "rorqual.lab.child", job.folder, str(job.attempt)]
        handle = name(job.token)
        options: dict[str, Any] = {"name": handle, "num_cpus": job.threads, "max_restarts": 0}
        options |= {"memory": job.memory_mb << 20, "lifetime": "detached" if self.detached else None}
        try:
            self._actors[handle] = self.ray.remote(Runner).options(**options).remote(words, environment(job))
        except ValueError as e:
            raise RunError(f"Ray: {e}") from e
        return handle

    def find(self, token: str) -> str | None:
        return name(token) if self._actor(name(token)) is not None else None

    def alive(self, handle: str) -> bool:
        """Asks without waiting: an actor that waits for room has not ended."""
        if handle in self._codes:
            return False
        actor = self._actor(handle)
        if actor is None:
            self._codes[handle] = None
            return False
        poll = self._polls.setdefault(handle, actor.poll.remote())
        ready, _ = self.ray.wait([poll], timeout=0)
        if not ready:
            return True
        del self._polls[handle]
        try:
            code = self.ray.get(poll)
        except self.ray.exceptions.RayError:
            code = -signal.SIGKILL  # the actor or its machine is gone
        if code is None:
            return True
        self._codes[handle] = code
        self._drop(handle)
        return False

    def exit_code(self, handle: str) -> int | None:
        return self._codes.get(handle)

    def leave(self, handle: str) -> None:
        actor = self._actor(handle)
        if actor is not None:
            actor.send.remote(int(signal.SIGTERM))

    def kill(self, handle: str, token: str) -> None:
        self._drop(handle or name(token))

    def held_mb(self, handle: str) -> float | None:
        return None

    def close(self) -> None:
        self.ray.shutdown()

    def _actor(self, handle: str) -> Any:
        if handle not in self._actors:
            try:
                self._actors[handle] = self.ray.get_actor(handle)
            except ValueError:
                return None
        return self._actors[handle]

    def _drop(self, handle: str) -> None:
        actor = self._actor(handle)
        if actor is not None:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.kill(actor)
            del self._actors[handle]


def name(token: str) -> str:
    """What an attempt's actor is called."""
    return hashlib.sha256(token.encode()).hexdigest()[:24]
