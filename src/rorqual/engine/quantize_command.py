"""`rorqual quantize MODEL --bits 4|8`: store a model at fewer bits, with its perplexity before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

if TYPE_CHECKING:
    import torch

    from rorqual.model.transformer import Transformer


@dataclass(frozen=True)
class QuantizeOptions:
    """Store a model at 4 or 8 bits a weight."""

    model: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    bits: Literal[4, 8] = 4
    group: Literal[32, 128] = 32  # neighbouring weights that share a scale
    head: Literal[4, 8] = 8  # bits of the output head; 4 decodes faster
    text: Path | None = (
        None  # what perplexity is measured on, its first half used to calibrate; Python's own source by default
    )
    calibrate: bool = True  # weigh rounding errors by the activations that meet them
    tokens: int = 2048  # of the text


def quantize(argv: Sequence[str]) -> int:
    options = tyro.cli(QuantizeOptions, args=list(argv), prog="rorqual quantize")
    from rorqual.checkpoint.files import require_place
    from rorqual.checkpoint.loaded import load, locate
    from rorqual.engine import packed_folder
    from rorqual.engine import quantize as scheme
    from rorqual.errors import ConfigError

    if options.tokens < 256:
        raise ConfigError(f"tokens={options.tokens}: must be 256 or more")
    text = read_text(options.text, options.tokens)
    require_place(options.out)
    loaded = load(options.model, "float32")
    model, config = loaded.model, loaded.config
    formats = scheme.formats(model, options.bits, options.group, options.head)
    rows = text_rows(loaded.tokenizer, text, options.tokens)
    before = None if rows is None else perplexity(model, rows[1])
    importance = scheme.calibrate(model, rows[0]) if rows is not None and options.calibrate else None
    scheme.quantize(model, formats, importance)
    after = None if rows is None else perplexity(model, rows[1])
    packed_folder.save(model, formats, options.out, locate(options.model))
    if before is None or after is None:
        print("no tokenizer: perplexity was not measured")
    else:
        print(f"perplexity {before:.3f} before, {after:.3f} after ({after / before - 1:+.2%})")
    mean = scheme.bits_a_weight(config, formats)
    print(f"{options.out}: {mean:.2f} bits a weight, {size(options.out) / 1e6:,.1f} MB")
    return 0


def read_text(path: Path | None, tokens: int) -> str:
    """As much of a text file as twice so many tokens can take; Python's own source without one."""
    import inspect

    from rorqual.errors import DataError

    if path is None:
        return inspect.getsource(inspect)
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(2 * tokens * 32)  # 32 letters: far more than a token has on average
    except OSError as e:
        raise DataError(f"text={path.resolve()}: {e.strerror}; give a text file") from e
    except UnicodeDecodeError as e:
        raise DataError(f"text={path.resolve()}: not UTF-8 ({e.reason}); give a text file") from e


def text_rows(tokenizer: object, text: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(calibration rows, evaluation rows) of 256 tokens [B, 256]; None without a tokenizer."""
    import torch

    from rorqual.errors import DataError
    from rorqual.text.tokenizer import Tokenizer

    if not isinstance(tokenizer, Tokenizer):
        return None
    ids = tokenizer.encode(text)[: 2 * tokens]
    if len(ids) < 512:
        raise DataError(f"text: {len(ids)} tokens; at least 512 are needed, give a longer one")
    rows = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def perplexity(model: Transformer, rows: torch.Tensor) -> float:
    """exp of the mean negative log-likelihood over rows [B, T]."""
    import torch

    from rorqual.model.attend import Causal

    total = 0.0
    with torch.inference_mode():
        for row in rows:
            h = model(row[None], torch.arange(len(row))[None], Causal())
            logits = model.logits(h)[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    return math.exp(total / (rows.shape[0] * (rows.shape[1] - 1)))


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))
