"""Four processes that stay for all tests here, so that torch is imported once in each."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TASKS = HERE / "tasks.py"


class Team:
    """Processes that run a function of tasks.py together."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.count = folder, 0
        path = os.pathsep.join(p for p in sys.path if p)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(HERE / "worker.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                text=True,
            )
            for _ in range(size)
        ]

    def __call__(self, world: int, function: str, **arguments: Any) -> list[Any]:
        """What every one of `world` processes returns."""
        self.count += 1
        store = self.folder / f"store-{self.count}"
        outs = [self.folder / f"out-{self.count}-{rank}" for rank in range(world)]
        for rank, process in enumerate(self.processes[:world]):
            task = {
                "file": str(TASKS), "function": function, "arguments": arguments, "rank": rank, "world": world,
                "store": str(store), "out": str(outs[rank]),
            }  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        for rank, process in enumerate(self.processes[:world]):
            assert process.stdout is not None
            answer = process.stdout.readline().strip()
            assert answer == "done", f"process {rank}: {json.loads(answer) if answer else 'gone'}"
        return [pickle.loads(out.read_bytes()) for out in outs]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    found = Team(tmp_path_factory.mktemp("team"), 4)
    yield found
    found.close()
