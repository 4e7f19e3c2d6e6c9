"""A model with its tokenizer, from whatever a path holds: the small Python API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.checkpoint import gguf, hf
from rorqual.device import resolve_dtype
from rorqual.errors import CheckpointError, RequestError, TokenizerError
from rorqual.model.attend import Cached, Causal, KVCache
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rorqual.model.transformer import Transformer


class Model:
    """A loaded model. `tokenizer` and `template` are None where the folder has none: ids still work."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None, template: ChatTemplate | None
    ) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.config = model.config

    def logits(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """ids [B, T] integers → [B, T, V] float32."""
        ids = self._checked(ids)
        with torch.inference_mode():
            positions = torch.arange(ids.shape[1]).expand_as(ids)
            return self.model.logits(self.model(ids, positions, Causal())).float()

    def generate(
        self,
        ids: Tensor | Sequence[Sequence[int]],
        max_new_tokens: int = 16,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Tensor:
        """ids [B, T] → [B, T + max_new_tokens]: a plain loop over a contiguous cache, greedy at temperature 0.

        Stops early where every row has met an end token. The engine (`rorqual.LLM`) is the fast way.
        """
        ids = self._checked(ids)
        if temperature < 0:
            raise RequestError(f"temperature={temperature}: must be 0 (greedy) or more", param="temperature")
        generator = torch.Generator()
        _ = generator.seed() if seed is None else generator.manual_seed(seed)
        cache, out, new = KVCache(), ids, ids
        ended = torch.zeros(ids.shape[0], dtype=torch.bool)
        ends = torch.tensor(self.config.eos_ids, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                positions = torch.arange(cache.length, cache.length + new.shape[1]).expand_as(new)
                h = self.model(new, positions, Cached(cache))
                new = _sample(self.model.logits(h[:, -1]).float(), temperature, generator)[:, None]
                out = torch.cat((out, new), 1)
                ended |= torch.isin(new[:, 0], ends)
                if ended.all():
                    break
        return out

    def _checked(self, ids: Tensor | Sequence[Sequence[int]]) -> Tensor:
        ids = torch.as_tensor(ids)
        if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
            raise RequestError(
                f"ids of shape {list(ids.shape)}: must be [B, T] integers with T at least 1", param="ids"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(f"id {wrong}: must be 0 to {self.config.vocab_size - 1}", param="ids")
        return ids.long()


def _sample(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if not logits.isfinite().all():
        raise RequestError(
            "non-finite logits: the weights or the dtype overflow; load as float32 or bfloat16"
        )
    if temperature < 1e-5:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]


def load(path: str | Path, dtype: str = "auto", check_finite: bool = True) -> Model:
    """Load a Hugging Face folder, a GGUF file, or a folder with one GGUF file.

    `dtype`: float32, bfloat16, float16 or auto (as stored; bfloat16 for quantised files). Raises CheckpointError,
    ConfigError, TokenizerError or CapacityError, each naming what is wrong and the cure.
    """
    where = locate(path)
    torch_dtype = None if dtype == "auto" else resolve_dtype(dtype)
    if where.suffix == ".gguf":
        file = gguf.GGUF(where)
        model = gguf.load_model(where, torch_dtype, file)
        files = gguf.tokenizer_files(file)
        tokenizer: Tokenizer | None
        template: ChatTemplate | None
        tokenizer, template = from_files(files)
    else:
        model = hf.load_model(where, torch_dtype, check_finite)
        tokenizer = Tokenizer.load(where) if (where / "tokenizer.json").is_file() else None
        template = ChatTemplate.load(where)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model.config.vocab_size, where)
    return Model(model, tokenizer, template)


def locate(path: str | Path) -> Path:
    """The model folder or GGUF file that a path means. Raises CheckpointError saying what is there instead."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{path.resolve()}: no such path; expected a folder with config.json and *.safetensors, or a .gguf file"
        )
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise CheckpointError(f"{path.resolve()}: a file; give the folder that it is in, or a .gguf file")
    if (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{path.resolve()}: {len(found)} GGUF files; name one of {', '.join(p.name for p in found)}"
        )
    what = "empty" if not any(path.iterdir()) else "no config.json and no .gguf file"
    raise CheckpointError(
        f"{path.resolve()}: {what}; a model folder has config.json, *.safetensors (or one .gguf) and tokenizer.json"
    )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: Path) -> None:
    """A tokenizer may be smaller than the (padded) embedding, never larger."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{where.resolve()}: tokenizer.json has {tokenizer.vocab_size} tokens, config.json vocab_size={vocab_size} "
            "embeddings; take both from one model"
        )


def from_files(files: dict[str, str]) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and template from the texts of their files."""
    import json

    config = json.loads(files["tokenizer_config.json"])
    tokenizer = Tokenizer.from_json(files["tokenizer.json"], config)
    tokens = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str)}
    source = files.get("chat_template.jinja")
    return tokenizer, None if source is None else ChatTemplate(source, tokens)
