"""Counts of tokens of a request in three classes, and the two shapes in which clients read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rorqual.server.price import decimal_text


@dataclass(frozen=True)
class Usage:
    """`prompt` = `cached` + computed; `completion` includes `reasoning`. `cost`: nano-units of `currency`."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0
    cost: int = 0
    currency: str = "USD"
    flops: int | None = None

    @property
    def missed(self) -> int:
        """Prompt tokens that had to be computed."""
        return self.prompt - self.cached

    def openai(self, extended: bool = False) -> dict[str, Any]:
        """OpenAI's and DeepSeek's fields; `extended` adds the cost (decimal string) and floating point
        operations.
        """
        out: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": self.missed,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }
        if extended:
            out["x_cost"] = {"amount": decimal_text(self.cost), "currency": self.currency}
            out["x_flops"] = self.flops
        return out

    def responses(self) -> dict[str, Any]:
        """The Responses API's fields, which /v1/decisions shares."""
        return {
            "input_tokens": self.prompt,
            "input_tokens_details": {"cached_tokens": self.cached, "cache_write_tokens": 0},
            "output_tokens": self.completion,
            "output_tokens_details": {"reasoning_tokens": self.reasoning},
            "total_tokens": self.prompt + self.completion,
        }

    def anthropic(self) -> dict[str, Any]:
        """Anthropic counts the cached part beside the input, not within it."""
        return {
            "input_tokens": self.missed,
            "cache_read_input_tokens": self.cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.completion,
        }
