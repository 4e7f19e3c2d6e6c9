"""The transformer: DeepSeek-style (MLA and experts) and Llama-style (grouped-query, dense) are settings of
this file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rorqual.model.attend import Attend
from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import RMSNorm, apply_keeping_float32
from rorqual.model.memory import Induction, NgramTable, ValueEmbedding, has_value_embedding
from rorqual.model.moe import MoE, Router, Routing
from rorqual.model.mtp import MTP
from rorqual.model.rope import attention_factor, inv_freq


class Transformer(nn.Module):
    """Embedding, layers, norm and head, with optional MTP modules and memory tables. Weights are
    uninitialised until `init_weights` or a checkpoint fills them."""

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # An empty weight given: drawing one on the meta device would import the compiler, seconds in every load.
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        first_mtp = config.num_hidden_layers
        self.mtp = nn.ModuleList(MTP(config, first_mtp + i) for i in range(config.num_nextn_predict_layers))
        self.value_embeddings = nn.ModuleDict(
            {
                str(i): ValueEmbedding(config)
                for i in range(config.num_hidden_layers)
                if has_value_embedding(config, i)
            }
        )
        pairs, triples = config.ngram_table_size, config.triple_table_size
        self.ngram = NgramTable(config, pairs) if pairs else None
        self.triples = NgramTable(config, triples) if triples else None
        self.induction = Induction(config) if config.induction else None
        self.x0_mix = nn.Parameter(torch.empty(config.num_hidden_layers, 2)) if config.x0_residual else None
        self.smear_gate = nn.Linear(config.hidden_size, 1, bias=True) if config.smear else None
        nowhere = (
            empty.device.type == "meta"
        )  # there even arange would import the compiler; loading fills it in
        freq = torch.empty(config.rotary_dim // 2) if nowhere else self._inv_freq()
        self.register_buffer("inv_freq", freq, persistent=False)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        routing: Routing | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """ids, positions: integers [*L] → hidden states [*L, D] after the final norm.

        `recompute` drops each layer's activations and computes them again in the backward pass.
        """
        # Asked once: a cached context remembers the last tokens when it answers.
        before = attend.previous_ids(ids, self.looks_back) if self.looks_back else ()
        x = self.embed(ids, before[0] if before else None)
        cos, sin = self.rope(positions)
        x0 = x
        rows = [
            (t.scale, t(ids, *before[:n])) for n, t in ((1, self.ngram), (2, self.triples)) if t is not None
        ]
        if self.induction is not None:
            rows.append(self.induction(attend.followers(ids, self.induction.longest)))
        for i, layer in enumerate(self.layers):
            if self.x0_mix is not None:
                x = self.x0_mix[i, 0] * x + self.x0_mix[i, 1] * x0
            for scale, row in rows:
                x = x + (scale[i] * row).to(x.dtype)
            table = str(i)
            value = self.value_embeddings[table](ids, x) if table in self.value_embeddings else None
            if recompute:
                x = checkpoint(layer, x, cos, sin, attend, routing, value, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend, routing, value)
        out: Tensor = self.norm(x)
        return out

    @property
    def looks_back(self) -> int:
        """How many tokens before each one the embeddings and tables read."""
        return 2 if self.triples is not None else int(self.ngram is not None or self.smear_gate is not None)

    def embed(self, ids: Tensor, previous: Tensor | None = None) -> Tensor:
        """ids [*L] → embeddings [*L, D], smeared with their predecessors' where the config says so."""
        x: Tensor = self.embed_tokens(ids)
        if self.smear_gate is not None and previous is not None:
            x = x + torch.sigmoid(self.smear_gate(x)) * (self.embed_tokens(previous) - x)
        return x

    def predict_further(
        self,
        module: int,
        h: Tensor,
        next_ids: Tensor,
        positions: Tensor,
        attend: Attend,
        routing: Routing | None = None,
    ) -> Tensor:
        """MTP module number `module` over h [*L, D] of positions i and the tokens at i + 1 (+ module) [*L]
        → hidden states [*L, D] whose logits predict one token further."""
        cos, sin = self.rope(positions)
        out: Tensor = self.mtp[module](h, self.embed_tokens(next_ids), cos, sin, attend, routing)
        return out

    def logits(self, h: Tensor) -> Tensor:
        """h [*L, D] → [*L, V] in h's dtype, softcap applied."""
        logits: Tensor = self.lm_head(h)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [*L] → cos and sin [*L, R/2] in float32."""
        angles = positions.unsqueeze(-1).float() * self.inv_freq
        factor = attention_factor(self.config.rope)
        return angles.cos() * factor, angles.sin() * factor

    def routers(self) -> Iterable[tuple[int, Router]]:
        """(layer index, router) of every mixture of experts, MTP modules included."""
        for module in self.modules():
            if isinstance(module, MoE):
                yield module.layer, module.router

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Moves and casts as always, but for the rope frequencies, which stay in float32."""
        return apply_keeping_float32(self, super()._apply, fn, "inv_freq")

    def init_weights(self, seed: int, zero_output: bool = False) -> Transformer:
        """Fill every parameter: normal with `initializer_range` (the head and matrices), norms 1, biases 0.

        `zero_output` starts attention and feed-forward outputs at 0, so that each layer begins as the
        identity.
        """
        generator = torch.Generator(device=self.embed_tokens.weight.device).manual_seed(seed)
        outputs = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "norm" in name:
                    p.fill_(1.0)
                elif (
                    name.endswith("bias")
                    or ".gate.weight" in name
                    or (zero_output and name.endswith(outputs))
                ):
                    p.zero_()
                else:
                    p.normal_(0.0, self.config.initializer_range, generator=generator)
            if self.x0_mix is not None:
                self.x0_mix.copy_(torch.tensor([1.0, 0.0]).expand_as(self.x0_mix))
            for table in (self.ngram, self.triples):
                if table is not None:
                    table.scale.fill_(0.1)
            if self.induction is not None:
                self.induction.scale.fill_(1.0)
            if self.smear_gate is not None:
                self.smear_gate.bias.fill_(-4.0)  # nearly closed: a token starts as itself
            for _, router in self.routers():
                if router.e_score_correction_bias is not None:
                    router.e_score_correction_bias.zero_()
            self.inv_freq.copy_(self._inv_freq())
        return self

    def _inv_freq(self) -> Tensor:
        return inv_freq(self.config.rope, self.config.rotary_dim)
