"""The formats in which a GGUF file's matrices run: their own where the kernels know it, else what loses least.

Q8_0, Q4_0 and Q4_1 are our int8, int4 and int4_min in groups of 32, and value for value where the file's scales are its
groups' extremes, as the plain quantiser of llama.cpp sets them (one with an importance matrix may not: then within about
1%). Q4_K becomes int4_min within about 1%, Q5 and Q6 values int8. Float tensors stay wide.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

from rorqual.checkpoint.gguf import GGUF, sources
from rorqual.engine import quantize
from rorqual.kernels.quantised import Format, Kind
from rorqual.model.transformer import Transformer

log = logging.getLogger(__name__)
KINDS: dict[str, Kind] = {
    "Q8_0": "int8", "Q4_0": "int4", "Q4_1": "int4_min", "Q4_K": "int4_min", "Q5_0": "int8", "Q5_K": "int8",
    "Q6_K": "int8",
}  # fmt: skip
OWN = ("Q8_0", "Q4_0", "Q4_1")
BY_WIDTH: tuple[Kind, ...] = ("int4", "int4_min", "int8")  # what holds the ones before it


def pack(model: Transformer, path: Path) -> Transformer:
    """Pack a float32 model that was read from a GGUF file as the file has it, in place."""
    file = GGUF(path)
    chosen = formats(model, file)
    if chosen:
        quantize.quantize(model, chosen)
        others = sorted({t.tensor_type.name for t in file.tensors.values()} & set(KINDS) - set(OWN))
        if others:
            log.warning("%s: %s run as int4 or int8 in groups of 32", path.name, ", ".join(others))
    return model


def formats(model: Transformer, file: GGUF) -> dict[str, Format]:
    """The format of every module all of whose tensors are quantised, by its name."""
    types: dict[int, set[str]] = defaultdict(set)
    for target, names, _ in sources(model, file):
        types[id(target)] |= {file.tensors[n].tensor_type.name for n in names if n in file.tensors}
    tied = model.config.tie_word_embeddings
    chosen = {}
    for name in quantize.formats(model, 8):
        owner = "embed_tokens" if tied and name == "lm_head" else name
        weights = [p for n, p in model.get_submodule(owner).named_parameters() if not n.endswith("bias")]
        found = set().union(*(types[id(p)] for p in weights))
        if not found or not found <= set(KINDS):
            continue
        kind = max((KINDS[t] for t in found), key=BY_WIDTH.index)
        if kind == "int4" and len(found) > 1:
            kind = "int4_min"
        # Latent attention multiplies by this matrix from both sides, so its groups are not the file's.
        chosen[name] = Format("int8" if name.endswith("kv_b_proj") else kind)
    return chosen
