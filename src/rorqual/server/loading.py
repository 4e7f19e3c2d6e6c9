"""From a model folder, or a script, to a model that is served."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from rorqual.engine.config import EngineConfig
from rorqual.engine.request import EngineCore
from rorqual.errors import ConfigError
from rorqual.server.bridge import Bridge
from rorqual.server.models import Served
from rorqual.server.scripted import Script, ScriptedEngine, ScriptedTemplate

T = TypeVar("T")


def scripted(name: str, script: Path | Script, max_open: int) -> Served:
    """A model that answers from a file."""
    read = script if isinstance(script, Script) else Script.load(script)
    engine = ScriptedEngine(read)
    return Served(name, engine.tokenizer, ScriptedTemplate(thinks=read.thinks), Bridge(engine, max_open))


def load_served(
    name: str,
    path: Path,
    max_open: int,
    config: EngineConfig,
    dtype: str,
    gather: tuple[int, float] = (0, 0.0),
) -> Served:
    """A model folder or file behind the engine."""
    from rorqual.engine.llm import LLM

    llm = apart(lambda: LLM(path, config, dtype))
    if llm.tokenizer is None:
        raise ConfigError(f"model={path}: has no tokenizer.json, and text cannot be served without one")
    return Served(
        name,
        llm.tokenizer,
        llm.loaded.template,
        Bridge(llm.engine, max_open, compute(), *gather),
        flops=getattr(llm, "flops", None),
    )


@functools.cache
def compute() -> Executor:
    """The thread on which every model's steps are done, in turns: see `apart` for what a second one would cost."""
    return ThreadPoolExecutor(1, "compute")


def apart(work: Callable[[], T]) -> T:
    """Do `work` on a thread that ends with it.

    A thread that computes with torch gets OpenMP workers of its own and keeps them. With the loader's beside the
    engine's there are more workers than cores, and OpenMP then lets all of them sleep between two operations instead of
    waiting: a step of SmolLM2 took 38 ms in place of 30 on two cores.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as e:
            done.set_exception(e)

    thread = threading.Thread(target=run, name="loader", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def load_engine(path: Path) -> EngineCore:
    """An engine alone."""
    from rorqual.engine.llm import LLM

    return LLM(path).engine
