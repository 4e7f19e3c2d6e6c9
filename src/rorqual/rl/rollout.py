"""Rollouts by our own engine, on the very weights that are trained, in the same process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import FinishReason, Request, SamplingParams
from rorqual.errors import NumericsError
from rorqual.model.transformer import Transformer
from rorqual.rl.config import Sampling
from rorqual.text.tokenizer import Tokenizer


@dataclass
class Rollout:
    """A prompt's completion with the log-probability of each of its tokens under what it was drawn from."""

    prompt_ids: list[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    text: str = ""
    trained: list[float] | None = None  # log-probabilities under the trainer before the step's first update
    reference: list[float] | None = None  # and under the weights that the run began with
    experts: Tensor | None = None  # [prompt + completion - 1, MoE layers, K]: who computed each token

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


class Sampler:
    """An engine over the model that is trained. `refresh` after every change of the weights."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: Sampling,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.sampling, self.tokenizer, self.autocast = sampling, tokenizer, autocast
        context = sampling.max_prompt + sampling.max_tokens
        config = EngineConfig(
            max_model_len=context,
            block_size=sampling.block_size,
            cache_tokens=sampling.at_once * (context + sampling.block_size),
            max_num_seqs=sampling.at_once,
            max_num_batched_tokens=max(2048, sampling.at_once),
            max_waiting=1_000_000,
            cache_completions=False,
        )
        self.engine = Engine(model, None, config)
        self.stops = tuple(sorted({*tokenizer.eos_ids, *self.engine.eos_ids}))
        self._replays = sampling.replay and bool(expert_layers(model))
        self._count = 0

    def refresh(self) -> None:
        """Forget what was computed with other weights."""
        self.engine.reset_cache()

    def draw(
        self,
        prompts: Sequence[Sequence[int]],
        count: int,
        seeds: Sequence[int],
        temperature: float | None = None,
    ) -> list[list[Rollout]]:
        """`count` rollouts of every prompt, drawn from `seeds` [prompts]; temperature 0 is greedy.

        The first of each group computes the prompt, the others find it in the cache.
        """
        heat = self.sampling.temperature if temperature is None else temperature
        found: list[list[Rollout]] = [[Rollout(list(p)) for _ in range(count)] for p in prompts]
        open_: dict[str, Rollout] = {}
        self.engine.model.eval()
        with self.autocast():
            for k in range(count):
                for prompt, seed, group in zip(prompts, seeds, found, strict=True):
                    self._add(prompt, (seed * 4099 + k) % (1 << 62), heat, group[k], open_)
                if k == 0 and count > 1:
                    self._step(open_)
            while self.engine.has_work():
                self._step(open_)
        for rollout in (r for group in found for r in group):
            rollout.text = self.tokenizer.decode(rollout.ids, skip_special=True)
        return found

    def _add(
        self, prompt: Sequence[int], seed: int, heat: float, rollout: Rollout, open_: dict[str, Rollout]
    ) -> None:
        self._count += 1
        name = str(self._count)
        open_[name] = rollout
        params = SamplingParams(
            max_tokens=self.sampling.max_tokens,
            temperature=heat,
            seed=seed,
            logprobs=0,
            stop_token_ids=self.stops,
            return_routed_experts=self._replays,
        )
        self.engine.add(Request(name, prompt, params))

    def _step(self, open_: dict[str, Rollout]) -> None:
        for delta in self.engine.step():
            if delta.error is not None:
                raise NumericsError(f"a rollout ended with an error: {delta.error}")
            rollout = open_[delta.request_id]
            rollout.ids += delta.token_ids
            rollout.logprobs += [t.logprob for t in delta.logprobs]
            rollout.finish_reason = delta.finish_reason
            rollout.experts = delta.routed_experts


def expert_layers(model: Transformer) -> list[int]:
    """The layers that have experts, in order; MTP modules take no part in sampling."""
    return sorted(layer for layer, _ in model.routers() if layer < model.config.num_hidden_layers)


def as_replay(experts: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """experts [*L, MoE layers, K] → what `Routing.replay` takes, [N, K] for each layer."""
    return {layer: experts[..., i, :].flatten(0, -2) for i, layer in enumerate(layers)}
