"""What a model costs: parameters, FLOPs per token, cache bytes per token, memory to serve.

Parameters are counted on the model itself, built without storage, so they cannot drift from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

CACHE_BITS = (16, 8, 6)  # DeepSeek counts its 93.3% saving with elements of 6 bits


@dataclass(frozen=True)
class Cost:
    """Counts of one model.

    `active`: the parameters that one token passes through. Of the embedding and the memory tables a token
    reads one row, so they are not in it; the head is. `matmul`: those of them that multiply, 2 FLOPs each a
    token. `tables`: the memory tables. `mtp`: the MTP modules, counted apart as in the papers.
    """

    config: ModelConfig
    parameters: int
    active: int
    matmul: int
    tables: int
    mtp: int

    def attention_flops(self, context: float, absorbed: bool) -> float:
        """Score and value products of one new token over `context` tokens, all layers."""
        c = self.config
        assert not absorbed or c.kv_lora_rank is not None
        widths = (
            (c.kv_lora_rank or 0) * 2 + c.qk_rope_head_dim if absorbed else c.qk_head_dim + c.value_head_dim
        )
        return 2 * c.num_hidden_layers * c.num_attention_heads * widths * context

    def train_flops(self, length: int, softmax_share: float = 1.0) -> float:
        """FLOPs per trained token in rows of `length`: forward and backward (three times the forward pass),
        causal attention seeing half the row on average, the head over a share of the vocabulary."""
        spared = (1 - softmax_share) * self.config.vocab_size * self.config.hidden_size
        return 3 * (2 * (self.matmul - spared) + self.attention_flops(length / 2, absorbed=False))

    def decode_flops(self, context: int) -> float:
        """FLOPs per generated token with `context` tokens in the cache, MLA in its absorbed form."""
        return 2 * self.matmul + self.attention_flops(context, absorbed=self.config.attention == "mla")

    @property
    def cache_elements(self) -> int:
        """Cached numbers per token, all layers."""
        c = self.config
        if c.kv_lora_rank is not None:
            return c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
        return c.num_hidden_layers * c.num_key_value_heads * 2 * c.head_dim

    def cache_elements_with(self, num_key_value_heads: int) -> int:
        """What the same shape would cache with this many key and value heads of their own."""
        c = self.config
        return c.num_hidden_layers * num_key_value_heads * (c.qk_head_dim + c.value_head_dim)

    def cache_bytes(self, bits: int = 16) -> float:
        """Cache bytes per token at this many bits an element."""
        return self.cache_elements * bits / 8

    def weight_bytes(self, bits: int = 16) -> float:
        """Bytes of the weights, MTP modules included."""
        return (self.parameters + self.mtp) * bits / 8

    def serve_bytes(self, users: int, context: int, weight_bits: int = 16, cache_bits: int = 16) -> float:
        """Memory to serve `users` at once with `context` tokens each."""
        return self.weight_bytes(weight_bits) + users * context * self.cache_bytes(cache_bits)


def cost(config: ModelConfig) -> Cost:
    """Count the parameters of a config without allocating them."""
    with torch.device("meta"):
        model = Transformer(config)
    mtp = sum(p.numel() for p in model.mtp.parameters())
    tables = sum(t.weight.numel() for t in (model.ngram, model.triples, model.induction) if t is not None)
    tables += sum(p.numel() for n, p in model.value_embeddings.named_parameters() if ".gate." not in n)
    total = idle = vectors = 0
    for name, p in model.named_parameters():  # a tied head is listed once, as the embedding
        if name.startswith("mtp."):
            continue
        total += p.numel()
        if ".experts." in name:
            idle += (
                p.numel() * (config.n_routed_experts - config.num_experts_per_tok) // config.n_routed_experts
            )
        if p.dim() == 1 or name in ("x0_mix", "induction.scale"):
            vectors += p.numel()  # norms, biases and scales: in no matrix product
    embedding = 0 if config.tie_word_embeddings else model.embed_tokens.weight.numel()
    active = total - idle - tables - embedding
    return Cost(config, total, active, active - vectors, tables, mtp)
