"""Work over processes, in order, with few tasks under way at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextlib.contextmanager
def pool(workers: int) -> Iterator[Run]:
    """A function that maps in order over processes with few tasks under way; in this process where one suffices."""
    count = workers or len(os.sched_getaffinity(0))
    if count == 1:
        yield lambda function, tasks: map(function, tasks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("spawn")  # a forked child would inherit locks of other threads
    with ProcessPoolExecutor(
        count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        yield lambda function, tasks: _ordered(pool, function, tasks, ahead=2 * count)


def _ordered(
    pool: ProcessPoolExecutor, function: Callable[[T], R], tasks: Iterable[T], ahead: int
) -> Iterator[R]:
    waiting: list[Future[R]] = []
    for task in tasks:
        waiting.append(pool.submit(function, task))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _end_with(parent: int) -> None:
    """In a worker: end when the process that started it does, however it ends; siblings hold the queue's other end,
    so nobody else would say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
