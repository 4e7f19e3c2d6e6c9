"""All layers of a packed model over a few rows in one native call (kernels/native/decoder.h).

One by one, the modules of rorqual/model cost a third of a decoding step in dispatch. They define the result: the call
runs the same kernels in the same order, and its router adds its products in another one.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from rorqual.engine.cache import PagedCache
from rorqual.engine.quantised import QuantAbsorbed, QuantExperts, QuantLinear, QuantSwiGLU
from rorqual.kernels.native import TYPES, Native, native
from rorqual.kernels.paged import PagedRows
from rorqual.kernels.quantised import KINDS, Format
from rorqual.model.block import Block
from rorqual.model.gqa import GQA
from rorqual.model.mla import LATENT_NORM_EPS, MLA
from rorqual.model.moe import MoE, Router
from rorqual.model.rope import rotate_interleaved
from rorqual.model.transformer import Transformer

MOST_ROWS = 64  # of one call; for more the dispatch is nothing
WIDEST = 4096  # values of a cached latent and its rotary key


class _Weights(ctypes.Structure):
    _fields_ = [("data", c_void_p), *((n, c_int64) for n in ("rows", "width", "kind", "group"))]


class _Packed(ctypes.Structure):
    _fields_ = [("w", _Weights), ("bias", c_void_p)]


class _Pair(ctypes.Structure):
    _fields_ = [("up", _Weights), ("down", _Weights)]


class _Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int64), ("stride", c_int64)]


class _Router(ctypes.Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("weight", "bias")),
        *((n, c_int64) for n in ("experts", "chosen", "groups", "kept_groups", "softmax", "normalised", "scaled")),
        ("scale", c_double),
    ]  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = [
        *((n, c_void_p) for n in ("in_norm", "post_norm")),
        *((n, c_double) for n in ("eps", "latent_eps", "scale")),
        *((n, c_int64) for n in ("heads", "kv_heads", "nope", "rotary", "rank", "interleaved")),
        *((n, c_void_p) for n in ("q_low_norm", "kv_norm", "q_norm", "k_norm")),
        *((n, _Packed) for n in ("q_low", "q", "kv", "v", "out", "absorbed_keys", "absorbed_values")),
        ("keys", _Rows), ("values", _Rows), ("router", _Router), ("mlp", _Pair), ("shared", _Pair),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        ("n", c_int64),
        *((n, c_void_p) for n in ("cosine", "sine", "slots", "request", "length", "table")),
        ("table_width", c_int64), ("block_size", c_int64),
    ]  # fmt: skip


class Unfit(Exception):
    """A part of the model that the call does not know."""


class Decoder:
    """Addresses of a model's weights and of its cache's rows, which must stay where they are."""

    def __init__(self, model: Transformer, cache: PagedCache, library: Native) -> None:
        """Raises Unfit, saying why."""
        config = model.config
        if library.layer_bytes() != ctypes.sizeof(_Layer) or library.step_bytes() != ctypes.sizeof(_Step):
            raise AssertionError("the structures of decoder.py are not those of kernels.h")
        if any((model.x0_mix is not None, len(model.value_embeddings), model.looks_back)):
            raise Unfit("x0, value embeddings, tables or smear between layers")
        if cache.dtype not in (torch.float32, torch.bfloat16) or cache.experts is not None:
            raise Unfit("a cache at 8 bits, or with the experts recorded")
        self.model, self.hidden, self._library = model, config.hidden_size, library
        self._layers = (_Layer * len(model.layers))()
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block)
            _fill(self._layers[i], block, cache, i)

    def run(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, rows: PagedRows) -> Tensor:
        """x [N, D] float32, cos and sin [N, R/2], cache rows to write [N], what each row sees (itself too) → hidden
        states [N, D] before the final norm; x itself, changed in place."""
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        step = _Step(
            len(x), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), rows.request.data_ptr(),
            rows.length.data_ptr(), rows.table.data_ptr(), rows.table.shape[1], rows.block_size,
        )  # fmt: skip
        self._library.layers(
            self._layers,
            len(self._layers),
            ctypes.byref(step),
            self.hidden,
            x.data_ptr(),
            torch.get_num_threads(),
        )
        return x


def decoder(model: Transformer, cache: PagedCache) -> Decoder | None:
    """The call for this model and cache, or None where its modules compute one by one."""
    library = native()
    if library is None or cache.device.type != "cpu":
        return None
    try:
        return Decoder(model, cache, library)
    except Unfit:
        return None


def _fill(to: Any, block: Block, cache: PagedCache, i: int) -> None:
    attn, mlp = block.self_attn, block.mlp
    to.in_norm, to.post_norm = (
        _wide(block.input_layernorm.weight),
        _wide(block.post_attention_layernorm.weight),
    )
    to.eps, to.latent_eps, to.scale = block.input_layernorm.eps, LATENT_NORM_EPS, attn.scale
    to.heads, to.out = attn.num_heads, _matrix(attn.o_proj)
    if isinstance(attn, MLA):
        _fill_mla(to, attn)
        to.keys = _rows(cache.latent[i])
    else:
        _fill_gqa(to, attn)
        to.keys, to.values = _rows(cache.keys[i]), _rows(cache.values[i])
    if isinstance(mlp, MoE):
        _fill_moe(to, mlp)
    else:
        to.mlp = _pair(mlp)


def _fill_mla(to: Any, attn: MLA) -> None:
    if attn.q_norm is not None or not isinstance(attn.absorbed, QuantAbsorbed):
        raise Unfit("norms of queries and keys beside latents, or weights of kv_b_proj that are not packed")
    if attn.kv_lora_rank + attn.qk_rope_head_dim > WIDEST:
        raise Unfit("latents wider than any model's")
    to.nope, to.rotary, to.rank = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.kv_lora_rank
    to.interleaved = attn.rotate is rotate_interleaved
    if attn.q_lora_rank is None:
        to.q = _matrix(attn.q_proj)
    else:
        to.q_low, to.q = _matrix(attn.q_a_proj), _matrix(attn.q_b_proj)
        to.q_low_norm = _wide(attn.q_a_layernorm.weight)
    to.kv, to.kv_norm = _matrix(attn.kv_a_proj_with_mqa), _wide(attn.kv_a_layernorm.weight)
    a = attn.absorbed
    to.absorbed_keys.w = _weights(a.keys, a.rank, a.key_dim, a.format)
    to.absorbed_values.w = _weights(a.values, a.value_dim, a.rank, a.format)


def _fill_gqa(to: Any, attn: GQA) -> None:
    to.kv_heads, to.rotary = attn.num_key_value_heads, attn.head_dim
    to.q, to.kv, to.v = _matrix(attn.q_proj), _matrix(attn.k_proj), _matrix(attn.v_proj)
    if attn.q_norm is not None and attn.k_norm is not None:
        to.q_norm, to.k_norm = _wide(attn.q_norm.weight), _wide(attn.k_norm.weight)


def _fill_moe(to: Any, moe: MoE) -> None:
    experts, router, c = moe.experts, moe.router, moe.router.config
    if not isinstance(experts, QuantExperts):
        raise Unfit("experts that are not packed")
    to.mlp.up = _weights(experts.up, 2 * experts.inner, experts.hidden, experts.format)
    to.mlp.down = _weights(experts.down, experts.hidden, experts.inner, experts.format)
    if moe.shared_experts is not None:
        to.shared = _pair(moe.shared_experts)
    to.router = _router(router)
    grouped = router.e_score_correction_bias is not None or c.topk_method == "group_limited_greedy"
    to.router.groups, to.router.kept_groups = (c.n_group, c.topk_group) if grouped else (1, 1)


def _router(router: Router) -> _Router:
    c, bias = router.config, router.e_score_correction_bias
    normalised = c.norm_topk_prob and c.num_experts_per_tok > 1
    return _Router(
        _wide(router.weight), None if bias is None else _wide(bias), c.n_routed_experts, c.num_experts_per_tok, 1, 1,
        c.scoring_func == "softmax", normalised, not normalised or c.scale_after_norm, c.routed_scaling_factor,
    )  # fmt: skip


def _pair(mlp: nn.Module) -> _Pair:
    if not isinstance(mlp, QuantSwiGLU):
        raise Unfit("a feed-forward that is not packed")
    return _Pair(
        _weights(mlp.up, 2 * mlp.inner, mlp.hidden, mlp.format),
        _weights(mlp.down, mlp.hidden, mlp.inner, mlp.format),
    )


def _matrix(linear: nn.Module) -> _Packed:
    if not isinstance(linear, QuantLinear):
        raise Unfit("a projection that is not packed")
    bias = None if linear.bias is None else _wide(linear.bias)
    return _Packed(_weights(linear.packed, linear.out_features, linear.in_features, linear.format), bias)


def _weights(data: Tensor, rows: int, width: int, format: Format) -> _Weights:
    if not data.is_contiguous():
        raise Unfit("a packed matrix that is not in one piece")
    return _Weights(data.data_ptr(), rows, width, KINDS.index(format.kind), format.group)


def _rows(rows: Tensor) -> _Rows:
    return _Rows(rows.data_ptr(), TYPES[rows.dtype], rows.stride(0) * rows.element_size())


def _wide(x: Tensor) -> int:
    """The address of a float32 tensor."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise Unfit("norms or a router below float32")
    return x.data_ptr()
