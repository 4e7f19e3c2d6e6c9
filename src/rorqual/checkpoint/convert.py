"""From what we read to what others load: a Hugging Face folder in the dtype asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from rorqual.checkpoint import gguf, hf
from rorqual.checkpoint.files import require_place
from rorqual.checkpoint.loaded import locate
from rorqual.device import resolve_dtype
from rorqual.errors import CheckpointError
from rorqual.model.config import ModelConfig


def convert(source: Path, out: Path, dtype: str = "auto", drop_mtp: bool = False) -> ModelConfig:
    """Read a folder or GGUF file and write `out`, whole or not at all. Returns the config written.

    Raises CheckpointError for what cannot be read or exported (our extensions) and where `out` exists.
    """
    require_place(out)
    where = locate(source)
    wanted = None if dtype == "auto" else resolve_dtype(dtype)
    if where.suffix == ".gguf":
        file = gguf.GGUF(where)
        model = gguf.load_model(where, wanted, file)
        hf.save_model(model, out, texts=gguf.tokenizer_files(file))
        return model.config
    config = hf.load_config(where)
    if config.extensions:
        raise CheckpointError(
            f"{where.resolve()}: {', '.join(config.extensions)}: no other program knows these options, so the model "
            "cannot be exported; train without them"
        )
    model = hf.load_model(where, wanted)
    if drop_mtp:
        model.config = dataclasses.replace(model.config, num_nextn_predict_layers=0)
        model.mtp = nn.ModuleList()
    hf.save_model(model, out, tokenizer_from=where)
    return model.config
