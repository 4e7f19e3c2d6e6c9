"""What a token costs on this machine: seconds measured on its own engine, times the price of a second."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Decimal

from rorqual.engine.request import EngineCore, Request, SamplingParams
from rorqual.errors import ConfigError

_SECONDS_A_YEAR = 365.25 * 86400


@dataclass(frozen=True)
class Machine:
    """What a second of the machine costs: its power, and its purchase spread over its life. `busy` is the share of
    that life in which it works: idle time is paid by the tokens too."""

    watts: float = 65.0
    price_of_kwh: float = 0.30
    price_of_hardware: float = 600.0
    years: float = 4.0
    busy: float = 0.5

    def __post_init__(self) -> None:
        for name in ("watts", "price_of_kwh", "price_of_hardware"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if self.years <= 0 or not 0 < self.busy <= 1:
            raise ConfigError(
                f"years={self.years} busy={self.busy}: years must be above 0, busy above 0 and at most 1"
            )

    @property
    def price_of_second(self) -> float:
        """In the currency of the two prices."""
        power = self.watts / 1000 * self.price_of_kwh / 3600
        return power + self.price_of_hardware / (self.years * _SECONDS_A_YEAR * self.busy)


@dataclass(frozen=True)
class Seconds:
    """Seconds of the whole machine for one token of each class."""

    hit: float
    miss: float
    output: float


def measure(engine: EngineCore, *, batch: int, prompt_tokens: int, completion_tokens: int) -> Seconds:
    """Time a batch of prompts computed, the same prompts found in the cache, and their completions.

    The prompts are random token ids. What a hit costs is all that remains to be done for a prompt that is cached.
    """
    if prompt_tokens + completion_tokens > engine.max_model_len:
        raise ConfigError(
            f"prompt_tokens={prompt_tokens} completion_tokens={completion_tokens}: the context is"
            f" {engine.max_model_len} tokens, both together"
        )
    rng = random.Random(0)
    prompts = [[rng.randrange(engine.vocab_size) for _ in range(prompt_tokens)] for _ in range(batch)]
    _time(engine, prompts[:1], 2)  # the first run pays for what is done once
    prompts = [[(i + 1) % engine.vocab_size for i in prompt] for prompt in prompts]
    cold = _time(engine, prompts, 1)
    warm = _time(engine, prompts, 1)
    whole = _time(engine, prompts, completion_tokens)
    tokens = batch * prompt_tokens
    output = max(whole - warm, 0.0) / (batch * (completion_tokens - 1))
    return Seconds(hit=warm / tokens, miss=cold / tokens, output=output)


def price_list(seconds: Seconds, machine: Machine, model: str, currency: str) -> str:
    """A price list that covers the costs, as the text of a TOML file."""
    lines = [f'currency = "{currency}"', "[[price]]", f'model = "{model}"']
    for name in ("hit", "miss", "output"):
        lines.append(f'{name} = "{per_million(getattr(seconds, name), machine)}"')
    return "\n".join(lines) + "\n"


def per_million(seconds: float, machine: Machine) -> str:
    """The cost of a million tokens that take so long each, rounded up to six decimals."""
    cost = Decimal(seconds * 1e6 * machine.price_of_second)
    return str(cost.quantize(Decimal("0.000001"), rounding=ROUND_UP))


def _time(engine: EngineCore, prompts: Sequence[list[int]], tokens: int) -> float:
    """Seconds until every prompt has its `tokens`."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add(Request(f"price-{began}-{i}", prompt, params))
    while engine.has_work():
        engine.step()
    return time.perf_counter() - began
