"""From a model folder, or a script, to a model that is served."""

from __future__ import annotations

from pathlib import Path

from rorqual.engine.config import EngineConfig
from rorqual.engine.request import EngineCore
from rorqual.errors import ConfigError
from rorqual.server.bridge import Bridge
from rorqual.server.models import Served
from rorqual.server.scripted import Script, ScriptedEngine, ScriptedTemplate


def scripted(name: str, script: Path | Script, max_open: int) -> Served:
    """A model that answers from a file."""
    read = script if isinstance(script, Script) else Script.load(script)
    engine = ScriptedEngine(read)
    return Served(name, engine.tokenizer, ScriptedTemplate(thinks=read.thinks), Bridge(engine, max_open))


def load_served(name: str, path: Path, max_open: int, config: EngineConfig, dtype: str) -> Served:
    """A model folder or file behind the engine."""
    from rorqual.engine.llm import LLM

    llm = LLM(path, config, dtype)
    if llm.tokenizer is None:
        raise ConfigError(f"model={path}: has no tokenizer.json, and text cannot be served without one")
    return Served(
        name,
        llm.tokenizer,
        llm.loaded.template,
        Bridge(llm.engine, max_open),
        flops=getattr(llm, "flops", None),
    )


def load_engine(path: Path) -> EngineCore:
    """An engine alone."""
    from rorqual.engine.llm import LLM

    return LLM(path).engine
