"""The engine: requests in, deltas out, one model step at a time. One thread owns it."""

from __future__ import annotations

import secrets
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.device import format_bytes, require_memory, resolve_device
from rorqual.engine.adapters import Adapter
from rorqual.engine.blocks import BlockPool, Hash, root_hash
from rorqual.engine.cache import PagedCache, token_bytes
from rorqual.engine.config import EngineConfig
from rorqual.engine.disk_cache import DiskCache, digest
from rorqual.engine.quantised import is_packed
from rorqual.engine.request import Delta, EngineStats, FinishReason, Request, TokenLogprob
from rorqual.engine.runner import Runner
from rorqual.engine.sampler import Drawable, sample, sample_rows, top_logprobs
from rorqual.engine.scheduler import Scheduler, Work
from rorqual.engine.sequence import Sequence
from rorqual.engine.stop import StopChecker
from rorqual.errors import CapacityError, ConfigError, RequestError
from rorqual.kernels.survey import survey
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer

# uint8: rows of signed bytes and half scales
CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}


class Engine:
    """Continuous batching over a paged cache with prefix reuse; see `EngineCore` for the contract."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, config: EngineConfig | None = None
    ) -> None:
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.vocab_size = model.config.vocab_size
        self.eos_ids = frozenset(tokenizer.eos_ids if tokenizer is not None else ()) | set(
            model.config.eos_ids
        )
        # Quantised models keep float32 activations; their cache would gain nothing from it but size.
        dtype = torch.bfloat16 if is_packed(model) else next(model.parameters()).dtype
        if self.config.cache_dtype != "auto":
            dtype = CACHE_DTYPES[self.config.cache_dtype]
        if self.config.mtp and not model.config.num_nextn_predict_layers:
            raise ConfigError(
                "speculate_by='mtp': this model has no multi-token prediction modules; use 'ngram', or train with "
                "shape.mtp=1"
            )
        blocks = self._count_blocks(dtype)
        size = self.config.block_size
        self.max_model_len = self._choose_length(blocks * size)
        device = next(model.parameters()).device
        if self.config.device != "auto" and resolve_device(self.config.device).type != device.type:
            raise ConfigError(
                f"device={self.config.device!r}: the model's weights are on {device}; move them there"
            )
        if device.type == "cpu":  # CUDA refuses by itself
            require_memory(
                blocks * size * token_bytes(model.config, dtype, self.config.mtp),
                f"a cache of {blocks * size} tokens",
                "give the engine a smaller cache_memory or cache_tokens",
            )
        self.pool = BlockPool(blocks)
        self.cache = PagedCache(model.config, blocks * size, dtype, device, self.config.mtp)
        self.scheduler = Scheduler(self.pool, self.config, self._disk_cache())
        self.runner = Runner(model, self.cache, size, self.config.batch_invariant)
        self.weights_version = 0
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._adapters: dict[str, Adapter] = {}

    def _disk_cache(self) -> DiskCache | None:
        c = self.config
        if c.disk_cache is None:
            return None
        chunk = c.chunk if c.batch_invariant else 0  # rows depend on it in their last bits
        owner = digest(
            self.model.state_dict().items(), self.model.config, self.cache.dtype, c.block_size, chunk, c.mtp
        )
        return DiskCache(c.disk_cache, c.disk_cache_bytes, self.cache, c.block_size, owner)

    def _count_blocks(self, dtype: torch.dtype) -> int:
        size = self.config.block_size
        if self.config.cache_tokens is not None:
            return -(-self.config.cache_tokens // size)
        row = token_bytes(self.model.config, dtype, self.config.mtp)
        blocks = int(self.config.cache_memory // (row * size))
        if blocks < 1:
            raise CapacityError(
                f"cache_memory={format_bytes(self.config.cache_memory)}: one block of {size} tokens needs "
                f"{format_bytes(row * size)}; give more"
            )
        longest = self.config.max_model_len or self.model.config.max_position_embeddings
        most = self.config.max_num_seqs * -(-longest // size)  # more could never be held at once
        return min(blocks, most)

    def _choose_length(self, tokens: int) -> int:
        model = self.model.config.max_position_embeddings
        asked = self.config.max_model_len
        if asked is None:
            return min(model, tokens)
        if asked > model:
            raise ConfigError(f"max_model_len={asked}: the model was made for {model} positions")
        if asked > tokens:
            raise CapacityError(
                f"max_model_len={asked}: the cache holds {tokens} tokens; ask for {tokens} or give it more"
            )
        return asked

    def validate(self, request: Request) -> None:
        """Raise RequestError where a request cannot be served, however empty the queue is; changes nothing."""
        prompt, params = request.prompt_ids, request.params
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is in use", param="request_id")
        if request.model is not None and request.model not in self._adapters:
            raise RequestError(
                f"model {request.model!r}: no adapter of this name", param="model", code="model_not_found"
            )
        if not prompt:
            raise RequestError("prompt: must have at least one token", param="prompt", code="empty_prompt")
        for field, ids in (("prompt", prompt), ("logit_bias", params.logit_bias)):
            wrong = next((t for t in ids if not 0 <= t < self.vocab_size), None)
            if wrong is not None:
                raise RequestError(
                    f"{field}: token id {wrong}: must be 0 to {self.vocab_size - 1}", param=field
                )
        room = self.max_model_len - len(prompt)
        if room < (1 if params.max_tokens else 0):
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and the context is {self.max_model_len}"
                + ("; one place must be free for an answer" if room == 0 else ""),
                param="prompt",
                code="context_length_exceeded",
            )
        if params.max_tokens == 0 and params.prompt_logprobs is None:
            raise RequestError(
                "max_tokens=0: scores a prompt, so prompt_logprobs must be asked for", param="max_tokens"
            )
        if params.return_routed_experts and not self.runner.moe_layers:
            raise RequestError(
                "return_routed_experts=True: this model has no experts", param="return_routed_experts"
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError before any compute where it cannot be served."""
        self.validate(request)
        params = request.params
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise RequestError(
                f"{self.config.max_waiting} requests are waiting; try again", code="queue_full"
            )
        if params.return_routed_experts and self.cache.experts is None:
            self.runner.record_experts()
            self.reset_cache()  # of what is in it nobody knows the experts
        self._arrivals += 1
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            max_tokens=min(params.max_tokens, self.max_model_len - len(request.prompt_ids)),
            stop=StopChecker(self.tokenizer, params.stop),
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            hashes=[],
            adapter=None if request.model is None else self._adapters[request.model],
        )
        sequence.hashes = [self._root(sequence)]
        self._sequences[sequence.id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """Drop a request and free its blocks; unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    def has_work(self) -> bool:
        return bool(self._sequences)

    def step(self) -> list[Delta]:
        """Advance every scheduled request; returns the news of those that have any."""
        deltas = [self._finish(s, "abort") for s in list(self._sequences.values()) if s.expired]
        works = self.scheduler.schedule()
        if not works:
            return deltas
        h = self.runner.run(works)
        ends = list(accumulate(w.count for w in works))
        ready = [(w, end) for w, end in zip(works, ends, strict=True) if w.last]
        rows = [row for w, end in ready for row in range(end - 1 - w.guesses, end)]
        logits = self.runner.logits(h if len(rows) == len(h) else h[rows]) if ready else None
        for work, end in zip(works, ends, strict=True):
            if work.sequence.request.params.prompt_logprobs is not None:
                self._score_prompt(work, h[end - work.count : end])
            if not work.last:
                self.scheduler.computed(work)
        if logits is not None:
            deltas += self._draw_all([w for w, _ in ready], logits)
        if self.config.mtp:
            self._guess(works, h)
        return deltas

    def _guess(self, works: list[Work], h: Tensor) -> None:
        """The module's guesses for all that go on; h [N, D] of all works."""
        parts = h.split([w.count for w in works])
        going = [(w, part) for w, part in zip(works, parts, strict=True) if w.sequence.id in self._sequences]
        if going:
            self.runner.guess([w for w, _ in going], torch.cat([part for _, part in going]))

    def _draw_all(self, works: list[Work], logits: Tensor) -> list[Delta]:
        """The next tokens of all; where nothing is guessed, rows that ask for plain sampling are drawn together."""
        counts = [w.guesses + 1 for w in works]  # before any draw adds to a sequence
        drawn: list[tuple[int, TokenLogprob | None] | None] = [None] * len(works)
        best, finite = survey(logits)
        if len(logits) == len(works) > 1 and all(finite):
            sequences = [w.sequence for w in works]
            drawn = sample_rows(
                logits,
                [s.request.params for s in sequences],
                [s.generated for s in sequences],
                [s.seed for s in sequences],
                best,
            )
        deltas, at = [], 0
        for work, count, first in zip(works, counts, drawn, strict=True):
            if first is not None:
                self.scheduler.computed(work)  # first: a token that ends the request gives its blocks back
                delta = self._take(work.sequence, *first)
            else:
                delta = self._draw(
                    work, [Drawable(logits[i], best[i], finite[i]) for i in range(at, at + count)]
                )
            deltas.append(delta)
            at += count
        return deltas

    def stats(self) -> EngineStats:
        s = self.scheduler
        return EngineStats(
            running=len(s.running),
            waiting=len(s.waiting),
            blocks_total=self.pool.total,
            blocks_used=self.pool.used,
            preemptions=s.preemptions,
            prefix_hit_tokens=s.hit_tokens,
            prefix_query_tokens=s.query_tokens,
        )

    def update_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy new weights over the old ones, in place. Every cached block of the old ones is forgotten, and
        requests under way are computed again from their tokens.

        Raises ConfigError where a name or shape is not the model's; nothing is changed then.
        """
        own: dict[str, Any] = self.model.state_dict(keep_vars=True)
        for name, value in weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ConfigError(f"update_weights: {name} {list(value.shape)} is not a tensor of this model")
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
        running = {s.adapter for s in self._sequences.values() if s.adapter is not None}
        for adapter in running | set(self._adapters.values()):
            adapter.refresh()
        self.reset_cache()

    def reset_cache(self) -> None:
        """Forget every cached block, as after a change of the weights."""
        self.weights_version += 1
        if self.runner.decoder is not None:
            self.runner.decoder.refresh()
        self.scheduler.store = None  # what is on disk is the first weights'
        for sequence in list(self.scheduler.running):
            self.scheduler._preempt(sequence)
        self.pool.forget_all()
        for sequence in self._sequences.values():
            sequence.hashes = [self._root(sequence)]

    def _root(self, sequence: Sequence) -> Hash:
        """What a sequence's first block is named after: whoever shares a block shares weights and salt."""
        weights = "" if sequence.adapter is None else sequence.adapter.digest
        return root_hash(f"{self.weights_version}/{weights}/{sequence.request.cache_salt}")

    def load_adapter(self, name: str, folder: Path) -> None:
        """Serve a LoRA adapter: requests name it as their model. Raises RequestError for a name in use, ConfigError and
        CheckpointError where the adapter cannot be used with this model."""
        if name in self._adapters:
            raise RequestError(f"adapter {name!r} is loaded already; unload it first", param="model")
        self._adapters[name] = Adapter(self.model, folder)

    def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; those under way are finished with it."""
        if name not in self._adapters:
            raise RequestError(f"adapter {name!r}: none of this name is loaded", param="model")
        del self._adapters[name]

    def check(self) -> None:
        """Assert that blocks are all accounted for; for tests, when idle."""
        self.pool.check()
        held = sum(len(s.blocks) for s in self._sequences.values())
        assert held >= self.pool.used
        if not self._sequences:
            assert self.pool.used == 0

    def _draw(self, work: Work, rows: list[Drawable]) -> Delta:
        """Draw the next token, and further ones as long as the guesses [G] before them were right; rows: G + 1."""
        guesses = work.sequence.draft[: work.guesses]
        delta = self._advance(work, rows[0], len(guesses))
        right = 0
        while right < len(guesses) and not delta.finish_reason and delta.token_ids[-1] == guesses[right]:
            right += 1
            delta.extend(self._advance(work, rows[right], len(guesses) - right))
        return delta

    def _advance(self, work: Work, row: Drawable, unchecked: int) -> Delta:
        """Draw one token and say what is new; the last `unchecked` tokens of the work are guesses that come later."""
        sequence = work.sequence
        if not row.finite:
            return self._finish(
                sequence, "error", error="the model gave non-finite logits: its weights or dtype overflow"
            )
        self.scheduler.computed(work, wrong=unchecked)
        request = sequence.request
        return self._take(
            sequence, *sample(row, request.params, request.prompt_ids, sequence.completion, sequence.seed)
        )

    def _take(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> Delta:
        """Go on with a token that was drawn, and say what is new."""
        if sequence.max_tokens == 0:
            return self._finish(sequence, "length")
        params = sequence.request.params
        sequence.tokens.append(token)
        if params.mask is not None:
            params.mask.accept(token)
        delta = self._delta(sequence)
        delta.token_ids = [token]
        if logprob is not None:
            delta.logprobs = [logprob]
        ended = (token in self.eos_ids and not params.ignore_eos) or token in params.stop_token_ids
        if not ended:
            delta.text = sequence.stop.push(token)
        reason: FinishReason | None = None
        if ended or sequence.stop.matched is not None or (params.mask is not None and params.mask.finished):
            reason = "stop"
        elif sequence.generated >= sequence.max_tokens:
            reason = "length"
        if reason is not None:
            delta.text += sequence.stop.flush()
            if sequence.stop.matched is not None:
                reason = "stop"
            if params.return_routed_experts:
                delta.routed_experts = self.runner.experts(sequence.blocks, len(sequence.tokens) - 1)
            self._close(sequence, delta, reason)
        return delta

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> Delta:
        delta = self._delta(sequence)
        delta.error = error
        delta.text = sequence.stop.flush()
        self._close(sequence, delta, reason)
        return delta

    def _close(self, sequence: Sequence, delta: Delta, reason: FinishReason) -> None:
        delta.finish_reason, delta.stop_text = reason, sequence.stop.matched
        self.abort(sequence.id)

    def _delta(self, sequence: Sequence) -> Delta:
        delta = Delta(
            sequence.id, prompt_tokens=sequence.prompt_len, cached_tokens=sequence.cached_tokens or 0
        )
        if not sequence.started:
            delta.prompt_logprobs = sequence.prompt_logprobs
            sequence.started = True
        return delta

    def _score_prompt(self, work: Work, h: Tensor) -> None:
        """Log-probabilities of the prompt's tokens whose predecessors are in this chunk."""
        sequence, prompt = work.sequence, work.sequence.request.prompt_ids
        count = sequence.request.params.prompt_logprobs
        assert count is not None
        if sequence.prompt_logprobs is None or work.start == 0:
            sequence.prompt_logprobs = [None]
        scores: list[TokenLogprob | None] = sequence.prompt_logprobs
        wanted = [p for p in range(work.start, work.start + work.count) if p + 1 < len(prompt)]
        if not wanted:
            return
        logprobs = self.runner.logits(h[: len(wanted)]).log_softmax(-1)
        scores += [top_logprobs(logprobs[i], prompt[p + 1], count) for i, p in enumerate(wanted)]
