"""Rorqual: language models of the DeepSeek-V2 kind, trained, reinforced and served on the hardware people have.

m = rorqual.load("models/smollm2", dtype="float32")
m.logits([[1, 2, 3]])            # [B, T, V] float32
m.generate([[1, 2, 3]], max_new_tokens=8, temperature=0)
m.tokenizer.encode("hello")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rorqual.checkpoint.loaded import load
    from rorqual.engine.llm import LLM

__all__ = ["LLM", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` and `LLM` import torch when they are first asked for, not when the package is imported."""
    if name == "load":
        from rorqual.checkpoint.loaded import load

        return load
    if name == "LLM":
        from rorqual.engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'rorqual' has no attribute {name!r}")
