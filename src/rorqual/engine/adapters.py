"""LoRA adapters that an engine serves under their names, beside its own weights."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from rorqual.checkpoint.lora import LoraLinear, linears, load_adapter
from rorqual.engine.disk_cache import digest
from rorqual.engine.quantised import is_packed
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer


class Adapter:
    """A second model that shares every tensor with the first but the projections that the adapter changes: those are
    copies with the adapter's product added. So each form of attention and every kernel computes what it computes for a
    merged model, to the bit; the price is the memory of the changed projections.
    """

    def __init__(self, base: Transformer, folder: Path) -> None:
        """Raises ConfigError for a quantised model, CheckpointError where the adapter does not fit."""
        if is_packed(base):
            raise ConfigError(
                f"adapter {folder}: this model is quantised, and adapters are added to wide weights; serve the model "
                "as it was before `rorqual quantize` (a GGUF file with --dtype bfloat16), or merge the adapter and "
                "quantise that"
            )
        shared = {id(t): t for t in chain(base.parameters(), base.buffers())}
        self.model: Transformer = copy.deepcopy(base, shared)
        trained = [p for p in base.parameters() if p.requires_grad]
        load_adapter(self.model, folder)
        for p in trained:  # which loading froze: they are the base's own
            p.requires_grad_(True)
        self._pairs: list[tuple[LoraLinear, nn.Linear]] = []
        # What blocks that it computed are named after: the same adapter, loaded again, finds them.
        tensors = [(n, p) for n, p in self.model.named_parameters() if ".lora_" in n]
        self.digest = digest(
            tensors, [m.scaling for m in self.model.modules() if isinstance(m, LoraLinear)]
        ).hex()
        for parent, name, layer in list(linears(self.model)):
            if isinstance(layer, LoraLinear):
                merged = layer.merged()
                setattr(parent, name, merged)
                self._pairs.append((layer, merged))

    @torch.no_grad()
    def refresh(self) -> None:
        """Add the products anew, after the base's weights have changed in place."""
        for layer, merged in self._pairs:
            merged.weight.copy_(layer.merged().weight)
