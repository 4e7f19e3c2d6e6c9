"""Longer context: the same weights with their positions stretched by YaRN."""

from __future__ import annotations

import dataclasses

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig, RopeConfig


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """The config stretched to `context` positions by YaRN (arXiv 2309.00071; DeepSeek-V2, section 3.1.4).

    A model that is stretched already is stretched further from its original context.
    """
    if context <= config.max_position_embeddings:
        raise ConfigError(
            f"extend_context={context}: the model has {config.max_position_embeddings} positions already"
        )
    if config.rope.rope_type not in ("default", "yarn"):
        raise ConfigError(
            f"extend_context={context}: rope_type={config.rope.rope_type!r} cannot be stretched; default and yarn can"
        )
    original = config.rope.original_max_position_embeddings or config.max_position_embeddings
    mla = config.attention == "mla"
    rope = RopeConfig(
        rope_theta=config.rope.rope_theta,
        rope_type="yarn",
        factor=context / original,
        original_max_position_embeddings=original,
        # equal mscales: the temperature is in the softmax's scale alone, as DeepSeek has it
        mscale=1.0 if mla else None,
        mscale_all_dim=1.0 if mla else None,
    )
    return dataclasses.replace(config, rope=rope, max_position_embeddings=context)
