"""The models that a server answers with: names, aliases, tokenizer, template, and the engine behind each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from rorqual.errors import ConfigError
from rorqual.server.bridge import Bridge
from rorqual.server.faults import ApiError, model_not_found
from rorqual.server.reasoning import thinks
from rorqual.server.tools import ToolFormat, format_of
from rorqual.server.vocabulary import Vocabulary


class ServedTokenizer(Protocol):
    """What the server asks of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    @property
    def special_ids(self) -> Iterable[int]: ...
    @property
    def marker_ids(self) -> Iterable[int]: ...
    def encode(self, text: str, add_bos: bool | None = ..., special: bool = ...) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = ...) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class ServedTemplate(Protocol):
    """What the server asks of a chat template."""

    @property
    def source(self) -> str: ...
    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        add_generation_prompt: bool = ...,
        thinking: bool | None = ...,
    ) -> str: ...


@dataclass
class Served:
    """One name that requests may ask for. An adapter shares its base model's everything but the name."""

    name: str
    tokenizer: ServedTokenizer
    template: ServedTemplate | None
    bridge: Bridge
    adapter: str | None = None
    base: str | None = None  # the model that an adapter changes
    flops: Callable[[int, int, int], int] | None = None  # cached, prompt and completion tokens of a request
    created: int = field(default_factory=lambda: int(time.time()))
    _vocabulary: list[Vocabulary] = field(default_factory=list)  # shared with adapters; built at first need

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together."""
        return self.bridge.engine.max_model_len

    @property
    def thinks(self) -> bool:
        """Whether the model writes a thought before its answer."""
        return self.template is not None and thinks(self.template.source)

    @property
    def tool_format(self) -> tuple[ToolFormat, bool]:
        """The form of tool calls, and whether the template itself writes tools."""
        return format_of(self.template.source if self.template is not None else "")

    @cached_property
    def special_texts(self) -> list[str]:
        """How the tokens are spelt that only the template may write."""
        return [self.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in self.tokenizer.marker_ids]

    async def vocabulary(self) -> Vocabulary:
        """The tokens as grammars need them."""
        if not self._vocabulary:
            built = await asyncio.to_thread(self._build_vocabulary)
            self._vocabulary[:] = [built]
        return self._vocabulary[0]

    def _build_vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.bridge.engine.vocab_size, list(self.tokenizer.special_ids))

    def adapted(self, name: str) -> Served:
        """The same engine with an adapter of that name."""
        return replace(self, name=name, adapter=name, base=self.base or self.name, created=int(time.time()))


class Models:
    """Names to models. A model that is taken away finishes what it has begun."""

    def __init__(self, models: Iterable[Served], aliases: Mapping[str, str] | None = None) -> None:
        self._models: dict[str, Served] = {}
        for model in models:
            if model.name in self._models:
                raise ConfigError(
                    f"two models have the name {model.name!r}; give one another with --name or --also"
                )
            self._models[model.name] = model
        self.aliases = dict(aliases or {})
        for alias, name in self.aliases.items():
            if name not in self._models:
                raise ConfigError(
                    f"alias {alias}={name}: no such model; there are: {', '.join(self._models)}"
                )
            if alias in self._models:
                raise ConfigError(f"alias {alias}={name}: a model has that name already")

    def find(self, name: str | None) -> Served:
        """The model of a request, or 404."""
        model = self._models.get(self.aliases.get(name or "", name or ""))
        if model is None:
            raise model_not_found(name, self.names())
        return model

    def names(self) -> list[str]:
        """Every name that may be asked for."""
        return [*self._models, *self.aliases]

    def all(self) -> list[Served]:
        """Models and adapters, in the order in which they came."""
        return list(self._models.values())

    def bridges(self) -> list[Bridge]:
        """One for each engine."""
        return list({id(m.bridge): m.bridge for m in self._models.values()}.values())

    def add(self, model: Served) -> None:
        """From now on `model` answers under its name."""
        if model.name in self._models or model.name in self.aliases:
            raise ApiError(409, f"{model.name!r} is served already", code="model_exists", param="model")
        self._models[model.name] = model

    def remove(self, name: str) -> Served:
        """New requests for `name` are 404 from now on. The last model stays."""
        model = self.find(name)
        if len(self._models) == 1:
            raise ApiError(
                409, f"{name!r} is the only model; load another first", code="last_model", param="model"
            )
        del self._models[model.name]
        self.aliases = {alias: target for alias, target in self.aliases.items() if target != model.name}
        return model
