"""Offline generation: many prompts through one engine, answers in the order of the prompts."""

from __future__ import annotations

import logging
import reprlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.loaded import Model, load, locate
from rorqual.device import resolve_device, resolve_dtype
from rorqual.engine import packed_folder
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.quantised import is_packed
from rorqual.engine.request import Delta, FinishReason, Request, SamplingParams, TokenLogprob
from rorqual.errors import CapacityError, RequestError, TokenizerError
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
        self._news: dict[str, deque[Delta]] = {}  # of each open request, until its caller takes them

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
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer every prompt, or the only one; `params` for all of them or one each. Raises RequestError for a prompt
        that cannot be served, before any is computed."""
        prompts = _many(prompts)
        each = (
            [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        )
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} params")
        requests = [self._request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        answers = {r.request_id: Completion(list(r.prompt_ids)) for r in requests}
        with closing(self._steps(requests)) as steps:
            for delta in chain.from_iterable(steps):
                answers[delta.request_id].take(delta)
        return list(answers.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Deltas of one answer as they come, an empty one after a step that brought no news of it, as while a long prompt
        is read. Leaving the loop early drops the request."""
        request = self._request(prompt, params or SamplingParams())
        with closing(self._steps([request])) as steps:
            for deltas in steps:
                yield from deltas or [Delta(request.request_id, prompt_tokens=len(request.prompt_ids))]

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: of a text with BOS where the tokenizer wants it, of messages through the template."""
        found = _listed(prompt)
        if isinstance(found, list) and all(isinstance(t, Integral) for t in found):
            return [int(t) for t in found]
        if not isinstance(found, str) and not (
            isinstance(found, list) and all(isinstance(m, Mapping) for m in found)
        ):
            raise RequestError(
                f"prompt={reprlib.repr(prompt)}: must be text, a list of token ids or a list of messages",
                param="prompt",
            )
        if self.tokenizer is None:
            raise TokenizerError("the model has no tokenizer.json: give token ids")
        return self.tokenizer.encode(
            readable(found if isinstance(found, str) else self.template.render(found))
        )

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        self._count += 1
        request = Request(f"llm-{self._count}", self.encode(prompt), params)
        self.engine.validate(request)
        return request

    def _steps(self, requests: Sequence[Request]) -> Generator[list[Delta]]:
        """Compute some requests: after each step, what is new of them. A step may also bring news of requests whose
        callers are elsewhere; those wait in queues. What is unfinished when the caller leaves or fails is dropped."""
        waiting, news = deque(requests), deque[Delta]()
        unfinished = {r.request_id for r in requests}
        try:
            while unfinished and (waiting or news or self.engine.has_work()):
                while waiting and self.engine.stats().waiting < self.engine.config.max_waiting:
                    request = waiting.popleft()
                    self._news[request.request_id] = news
                    self.engine.add(request)
                if not news:
                    self._step()
                deltas = [news.popleft() for _ in range(len(news))]
                unfinished -= {d.request_id for d in deltas if d.finish_reason}
                yield deltas
        finally:
            for name in unfinished:
                self.engine.abort(name)
                self._news.pop(name, None)

    def _step(self) -> None:
        """Advance every request and queue the news for those who asked."""
        for delta in self.engine.step():
            self._news[delta.request_id].append(delta)
            if delta.finish_reason:
                del self._news[delta.request_id]


def readable(text: str) -> str:
    """Text with U+FFFD for each half of a surrogate pair, as Python reads bytes of a command line that are not UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _many(prompts: Any) -> list[Any]:
    """A list of prompts, also where it is only one."""
    found = _listed(prompts)
    one = not isinstance(found, list) or (found and isinstance(found[0], Integral | Mapping))
    return [prompts] if one else found


def _listed(prompt: Any) -> Any:
    """Sequences, arrays and tensors as lists; text as it is."""
    if isinstance(prompt, np.ndarray | torch.Tensor):
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) else prompt
