"""Offline generation: many prompts through one engine, answers in the order of the prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.loaded import Model, load, locate
from rorqual.device import resolve_device, resolve_dtype
from rorqual.engine import packed_folder
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.quantised import is_packed
from rorqual.engine.request import Delta, FinishReason, Request, SamplingParams, TokenLogprob
from rorqual.errors import CapacityError, TokenizerError
from rorqual.model.cost import cost
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or messages


@dataclass
class Completion:
    """One answer."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: int = 0
    routed_experts: torch.Tensor | None = None  # [prompt + completion - 1, MoE layers, K], where asked

    def take(self, delta: Delta) -> None:
        """Add what a delta brings."""
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += delta.logprobs
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.error = delta.finish_reason, delta.error
        self.cached_tokens = delta.cached_tokens
        self.routed_experts = delta.routed_experts


def load_any(path: str | Path, dtype: str = "auto") -> Model:
    """What `rorqual.load` reads, and folders of `rorqual quantize`; a GGUF file in its own precision, unless told a
    dtype."""
    where = locate(path)
    if where.is_dir() and packed_folder.is_quantised(hf.read_config(where)):
        wide = torch.float32 if dtype == "auto" else resolve_dtype(dtype)
        tokenizer = Tokenizer.load(where) if (where / "tokenizer.json").is_file() else None
        return Model(packed_folder.load(where, wide), tokenizer, ChatTemplate.load(where))
    if where.suffix == ".gguf" and dtype == "auto":
        from rorqual.engine.gguf_formats import pack

        try:
            loaded = load(path, "float32")
        except CapacityError as e:  # packing begins from wide values
            log.warning("%s: runs in bfloat16, not in its own precision (%s)", where.name, e)
        else:
            pack(loaded.model, where)
            return loaded
    return load(path, dtype)


class LLM:
    """A model with an engine of its own.

    >>> llm = LLM("models/smollm2")
    >>> llm.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0))[0].text
    """

    def __init__(
        self, model: str | Path | Model, config: EngineConfig | None = None, dtype: str = "auto"
    ) -> None:
        config = config or EngineConfig()
        if isinstance(model, Model):
            self.loaded = model
        else:
            device = resolve_device(config.device)
            self.loaded = load_any(model, dtype)
            # Packed products are the CPU's: elsewhere each step would widen the weights again.
            if config.device != "auto" or not is_packed(self.loaded.model):
                self.loaded.model.to(device)
        self.tokenizer = self.loaded.tokenizer
        self.engine = Engine(self.loaded.model, self.tokenizer, config)
        self._cost = cost(self.loaded.config)
        self._count = 0

    def flops(self, cached: int, prompt: int, completion: int) -> int:
        """FLOPs of a request: `prompt` tokens of which `cached` were found in the cache, then `completion` tokens."""
        fresh = prompt - cached
        total = 2.0 * self._cost.matmul * (fresh + completion)
        total += self._cost.attention_flops((cached + prompt) / 2, absorbed=False) * fresh
        absorbed = self.loaded.config.attention == "mla"
        total += self._cost.attention_flops(prompt + completion / 2, absorbed) * completion
        return round(total)

    @property
    def template(self) -> ChatTemplate:
        """The model's chat template; chatml where it has none."""
        return self.loaded.template or ChatTemplate.built_in("chatml")

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer every prompt; `params` for all of them or one each. Raises RequestError for a prompt that cannot
        be served, before any is computed."""
        each = (
            [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        )
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} params")
        answers: dict[str, Completion] = {}
        for prompt, p in zip(prompts, each, strict=True):
            request = self._request(prompt, p)
            self.engine.add(request)
            answers[request.request_id] = Completion(list(request.prompt_ids))
        while self.engine.has_work():
            for delta in self.engine.step():
                answers[delta.request_id].take(delta)
        return list(answers.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one answer as they come; leaving the loop early drops the request."""
        request = self._request(prompt, params or SamplingParams())
        self.engine.add(request)
        try:
            while self.engine.has_work():
                yield from self.engine.step()
        finally:
            self.engine.abort(request.request_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text with BOS where the tokenizer wants it, of messages through the template."""
        if not isinstance(prompt, str) and all(isinstance(t, int) for t in prompt):
            return [t for t in prompt if isinstance(t, int)]
        if self.tokenizer is None:
            raise TokenizerError("the model has no tokenizer.json: give token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        text = self.template.render([m for m in prompt if isinstance(m, Mapping)])
        return self.tokenizer.encode(text)

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        self._count += 1
        return Request(f"llm-{self._count}", self.encode(prompt), params)
