"""FP8 block-scaled weights, as DeepSeek-V3 is published: value = float8 * scale of its 128 x 128 block.

`X.weight` is e4m3 beside `X.weight_scale_inv` in float32, which multiplies despite its name
(deepseek-ai/DeepSeek-V3, README_WEIGHTS). Blocks at the edges may be ragged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint.tensors import TensorFile
from rorqual.errors import CheckpointError

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "_scale_inv"
PACKED = "rorqual"  # the quant_method of `rorqual quantize`, whose folders the engine alone reads


@dataclass(frozen=True)
class Scheme:
    """Block of rows and columns that share one scale."""

    block: tuple[int, int]


def scheme(config: Mapping[str, Any] | None) -> Scheme | None:
    """Read quantization_config; None where there is none. Raises CheckpointError for a scheme we cannot
    read."""
    if not config:
        return None
    method = config.get("quant_method")
    if method == PACKED:
        raise CheckpointError(
            f"quantization_config quant_method={PACKED!r}: packed for the engine; use rorqual.LLM, chat or serve"
        )
    if method != "fp8":
        raise CheckpointError(
            f"quantization_config quant_method={method!r}: only fp8 in blocks is read; dequantise first"
        )
    block = config.get("weight_block_size")
    if not (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(isinstance(b, int) and b > 0 for b in block)
    ):
        raise CheckpointError(
            f"quantization_config weight_block_size={block!r}: must be two sizes such as [128, 128]"
        )
    return Scheme((block[0], block[1]))


def check(wanted: Iterable[str], where: Mapping[str, TensorFile], found: Scheme | None, folder: Path) -> None:
    """Every float8 tensor needs a scale of the right shape, and the config a scheme."""
    for name in wanted:
        entry = where[name].entries[name]
        if entry.dtype not in DTYPES:
            continue
        if found is None:
            raise CheckpointError(
                f"{folder}: tensor {name} is float8 but config.json has no quantization_config"
            )
        if name + SCALE not in where:
            raise CheckpointError(
                f"{folder}: tensor {name} is float8 without {name + SCALE}; its values are unknown"
            )
        rows, columns = entry.shape
        need = (-(-rows // found.block[0]), -(-columns // found.block[1]))
        there = where[name + SCALE].entries[name + SCALE].shape
        if there != need:
            raise CheckpointError(
                f"{folder}: {name + SCALE} is {list(there)}, but {list(entry.shape)} in blocks of {list(found.block)} "
                f"needs {list(need)}"
            )


def dequantize(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """weight [out, in] float8, scale [ceil(out/b0), ceil(in/b1)] → float32 [out, in]."""
    rows, columns = weight.shape
    wide = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * wide


def quantize(weight: Tensor, block: tuple[int, int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The reverse, for tests and exports: scales first (rounded up to a power of two where asked), then the
    values, so that both sides use the same scale (huggingface/transformers#46763)."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = tiles.abs().amax((1, 3)).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    if power_of_two:
        scale = scale.log2().ceil().exp2()
    wide = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (weight.float() / wide).to(torch.float8_e4m3fn), scale
