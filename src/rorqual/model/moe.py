"""DeepSeekMoE: fine-grained routed experts beside shared ones (arXiv 2401.06066), with V2's and V3's routers.

All routing is float32 whatever the model's dtype: in bfloat16 the selection biases of a trained model
collapse onto a few values (sgl-project/sglang#37133).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.kernels.experts import experts, fits
from rorqual.kernels.grouped import grouped_linear
from rorqual.model.config import ModelConfig
from rorqual.model.layers import SwiGLU, apply_keeping_float32


class Routing:
    """A record of one forward pass, filled by the MoE layers; recomputing a layer writes the same values
    again.

    `replay` {layer: expert ids [N, K]} forces the choice (the weights are still computed, and
    differentiable), so that an update scores the very experts that sampling used. Not a dataclass: FSDP2 hands
    modules copies of those.
    """

    def __init__(self, replay: dict[int, Tensor] | None = None) -> None:
        self.replay = replay
        self.chosen: dict[int, Tensor] = {}  # layer → [N, K]
        self.load: dict[int, Tensor] = {}  # layer → tokens per expert [E]
        self.losses: dict[int, Tensor] = {}  # layer → balance loss, coefficient included

    @property
    def balance_loss(self) -> Tensor:
        """The sum over layers; 0 where no layer has one."""
        return torch.stack(list(self.losses.values())).sum() if self.losses else torch.zeros(())


class Router(nn.Module):
    """Scores, choice and weights of experts for each token."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Moves and casts as always, but for the selection bias, which stays in float32."""
        return apply_keeping_float32(self, super()._apply, fn, "e_score_correction_bias")

    def forward(self, x: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, D] → expert ids [N, K], weights [N, K] float32, scores of all experts [N, E] float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.softmax(-1) if self.config.scoring_func == "softmax" else logits.sigmoid()
            ids = self.choose(scores.detach()) if forced is None else forced
            return ids, self.weigh(scores.gather(1, ids)), scores

    def choose(self, scores: Tensor) -> Tensor:
        """The K experts of each token [N, K], by biased scores within the best groups."""
        c = self.config
        if self.e_score_correction_bias is not None:
            choice = scores + self.e_score_correction_bias
            in_group = choice.unflatten(1, (c.n_group, -1))
            if c.topk_group < c.n_group:
                choice = _keep_groups(choice, in_group.topk(2, -1).values.sum(-1), c.topk_group)
        elif c.topk_method == "group_limited_greedy" and c.topk_group < c.n_group:
            choice = _keep_groups(scores, scores.unflatten(1, (c.n_group, -1)).amax(-1), c.topk_group)
        else:
            choice = scores
        return choice.topk(c.num_experts_per_tok, -1, sorted=False).indices

    def weigh(self, picked: Tensor) -> Tensor:
        """Scores of the chosen experts [N, K] → their weights: V3 normalises and scales, V2's own code does
        either."""
        c = self.config
        if c.norm_topk_prob and c.num_experts_per_tok > 1:
            picked = picked / (picked.sum(-1, keepdim=True) + 1e-20)
            return picked * c.routed_scaling_factor if c.scale_after_norm else picked
        return picked * c.routed_scaling_factor


def _keep_groups(choice: Tensor, group_score: Tensor, keep: int) -> Tensor:
    """Bar the experts of all but the `keep` best groups. -inf, not 0: biased scores may be negative
    (huggingface/transformers#45440)."""
    kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(
        1, group_score.topk(keep, -1).indices, True
    )
    return choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // kept.shape[1], 1), float("-inf"))


class Experts(nn.Module):
    """All routed experts of a layer, fused: gate_up_proj [E, 2f, D] (gate first), down_proj [E, D, f]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """x [N, D], ids and weights [N, K], load [E] → sum over the chosen experts [N, D].

        Rows are sorted by expert and each token sums its K results in its own order, so neighbours change
        nothing.
        """
        if torch.is_grad_enabled() and fits(x, self.gate_up_proj):
            return experts(x, self.gate_up_proj, self.down_proj, ids, weights, load)
        n, k = ids.shape
        order = ids.flatten().argsort(stable=True)
        ends = load.cumsum(0, dtype=torch.int32)
        gate, up = grouped_linear(x[order // k], self.gate_up_proj, ends).chunk(2, -1)
        y = grouped_linear(F.silu(gate) * up, self.down_proj, ends)
        y = y[order.argsort()].view(n, k, -1)
        return torch.einsum("nkd,nk->nd", y.float(), weights).to(x.dtype)

    def forward_reference(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The definition: each expert by itself, on the tokens that chose it."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in range(self.gate_up_proj.shape[0]):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            gate, up = (x[token] @ self.gate_up_proj[expert].T).chunk(2, -1)
            y = (F.silu(gate) * up) @ self.down_proj[expert].T
            out = out.index_add(0, token, y.float() * weights[token, slot, None])
        return out.to(x.dtype)


class MoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.aux_loss_alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, width) if width else None
        # Where other processes take other rows of the batch: how many do, and the sum over them, in place.
        self.data_size = 1
        self.sum_counts: Callable[[Tensor], Tensor] = lambda counts: counts

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x [*L, D] → [*L, D]. For the sequence-wise loss the last leading dimension is the sequence."""
        flat = x.flatten(0, -2)
        forced = (
            routing.replay.get(self.layer) if routing is not None and routing.replay is not None else None
        )
        ids, weights, scores = self.router(flat, forced)
        load = torch.bincount(ids.flatten(), minlength=scores.shape[1])
        if routing is not None:
            routing.chosen[self.layer] = ids
            routing.load[self.layer] = load
            if self.aux_loss_alpha and self.training:
                if x.dim() == 3 and self.seq_aux:
                    loss = balance_loss(scores, ids, x.shape[0])
                else:
                    loss = balance_loss(scores, ids, load=self.sum_counts(load.float()) / self.data_size)
                routing.losses[self.layer] = self.aux_loss_alpha * loss
        out = self.experts(flat, ids, weights, load).view_as(x)
        return out if self.shared_experts is None else out + self.shared_experts(x)


def balance_loss(scores: Tensor, ids: Tensor, rows: int = 1, load: Tensor | None = None) -> Tensor:
    """Expert-level balance loss over `rows` equal parts of the N tokens, without its coefficient.

    sum_i f_i P_i with f_i = E / (K T) * count_i and P_i the mean share of expert i's score: 1 where all is
    even (DeepSeek-V2, section 2.2.3; per sequence as in DeepSeek-V3, section 2.1.2). scores [N, E], ids [N,
    K] → scalar. `load` [E]: counts of a larger batch that these tokens are an even part of, as many as theirs.
    """
    n, experts = scores.shape
    share = (scores / scores.sum(-1, keepdim=True)).view(rows, n // rows, experts).mean(1)
    index = ids.reshape(rows, -1)
    if load is None:
        count = torch.zeros(rows, experts, device=scores.device).scatter_add_(
            1, index, torch.ones_like(index, dtype=torch.float32)
        )
    else:
        count = load[None]
    return (count * experts / index.shape[1] * share).sum(1).mean()


def update_selection_bias(bias: Tensor, load: Tensor, speed: float) -> None:
    """Loss-free balancing: raise the bias of underloaded experts, lower that of overloaded ones, in place.

    One call per optimizer step with the counts of the whole batch; the step's mean is taken out so that the
    sum stays 0 (arXiv 2408.15664; pytorch/torchtitan#1506).
    """
    step = speed * (load.float().mean() - load.float()).sign()
    bias += step - step.mean()
