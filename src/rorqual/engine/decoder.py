"""All layers of a model over a few rows in one native call (kernels/native/decoder.h).

One by one, the modules of rorqual/model cost a third of a decoding step in dispatch. They define the result: over packed
weights the call runs the same kernels in the same order, and only its router adds its products in another one. Weights in
float32 are laid out anew for it, where they are small: `refresh` does so again once they have changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
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
from rorqual.model.layers import SwiGLU
from rorqual.model.mla import LATENT_NORM_EPS, MLA
from rorqual.model.moe import Experts, MoE, Router
from rorqual.model.rope import rotate_interleaved
from rorqual.model.transformer import Transformer

MOST_ROWS = 64  # of one call over packed weights; for more the dispatch is nothing
MOST_WIDE_ROWS = 512  # over wide ones
MOST_WIDE = 1 << 28  # bytes of float32 weights that are laid out a second time
FLOATS = len(KINDS)  # kernels.h: Kind
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
        ("table_width", c_int64), ("block_size", c_int64), ("chosen", c_void_p),
    ]  # fmt: skip


class Unfit(Exception):
    """A part of the model that the call does not know."""


class Decoder:
    """Addresses of a model's weights and of its cache's rows. Whoever moves the weights (`Module.to`) makes it useless:
    `moved` says so, and as the old ones are kept as long as it lives, no address ever dangles."""

    def __init__(self, model: Transformer, cache: PagedCache, library: Native) -> None:
        """Raises Unfit, saying why."""
        config = model.config
        if library.layer_bytes() != ctypes.sizeof(_Layer) or library.step_bytes() != ctypes.sizeof(_Step):
            raise AssertionError("the structures of decoder.py are not those of kernels.h")
        if any(
            (
                model.x0_mix is not None,
                len(model.value_embeddings),
                model.looks_back,
                model.induction is not None,
            )
        ):
            raise Unfit("x0, value embeddings, induction, tables or smear between layers")
        if cache.dtype not in (torch.float32, torch.bfloat16):
            raise Unfit("a cache at 8 bits")
        self.model, self.hidden, self._library = model, config.hidden_size, library
        self.wide: list[
            tuple[Callable[[], Tensor], Tensor]
        ] = []  # where weights come from, and where they went
        self.experts = (sum(isinstance(b.mlp, MoE) for b in model.layers), config.num_experts_per_tok)
        self._layers = (_Layer * len(model.layers))()
        self.most_rows = MOST_ROWS
        for i, block in enumerate(model.layers):
            assert isinstance(block, Block)
            self._fill(self._layers[i], block, cache, i)
        if self.wide:
            self.most_rows = MOST_WIDE_ROWS
        bases = (x if x._base is None else x._base for x in (source() for source, _ in self.wide))
        self._watched = list({id(x): x for x in bases if not x.is_inference()}.values())
        self._version = self._versions()
        self._kept = [t.detach() for t in (*model.parameters(), *model.buffers())]
        self._first = next(model.parameters()).data_ptr()

    @property
    def moved(self) -> bool:
        """Whether the model's weights lie elsewhere by now: whatever moves one moves all."""
        return next(self.model.parameters()).data_ptr() != self._first

    def refresh(self) -> None:
        """Take over float32 weights that have changed. A change of the parameters is seen at the next run, one through
        their `.data` has to be told."""
        for source, to in self.wide:
            to.copy_(_side_by_side(source()))
        self._version = self._versions()

    def _versions(self) -> int:
        return sum(x._version for x in self._watched)

    def run(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        rows: PagedRows,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """x [N, D] float32, cos and sin [N, R/2], cache rows to write [N], what each row sees (itself too) → hidden
        states [N, D] before the final norm; x itself, changed in place. `chosen` [layers of experts, N, K] int64 takes up
        who computed each row."""
        assert x.is_contiguous()
        assert x.dtype == torch.float32
        if self._versions() != self._version:
            self.refresh()
        step = _Step(
            len(x), cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), rows.request.data_ptr(),
            rows.length.data_ptr(), rows.table.data_ptr(), rows.table.shape[1], rows.block_size,
            None if chosen is None else chosen.data_ptr(),
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

    def _fill(self, to: Any, block: Block, cache: PagedCache, i: int) -> None:
        attn, mlp = block.self_attn, block.mlp
        to.in_norm, to.post_norm = (
            _wide(block.input_layernorm.weight),
            _wide(block.post_attention_layernorm.weight),
        )
        to.eps, to.latent_eps, to.scale = block.input_layernorm.eps, LATENT_NORM_EPS, attn.scale
        to.heads, to.out = attn.num_heads, self._matrix(attn.o_proj)
        if attn.q_norm is not None and attn.k_norm is not None:
            to.q_norm, to.k_norm = _wide(attn.q_norm.weight), _wide(attn.k_norm.weight)
        if isinstance(attn, MLA):
            self._fill_mla(to, attn)
            to.keys = _rows(cache.latent[i])
        else:
            to.kv_heads, to.rotary = attn.num_key_value_heads, attn.head_dim
            to.q, to.kv, to.v = (
                self._matrix(attn.q_proj),
                self._matrix(attn.k_proj),
                self._matrix(attn.v_proj),
            )
            to.keys, to.values = _rows(cache.keys[i]), _rows(cache.values[i])
        if isinstance(mlp, MoE):
            self._fill_moe(to, mlp)
        else:
            to.mlp = self._pair(mlp)

    def _fill_mla(self, to: Any, attn: MLA) -> None:
        if attn.kv_lora_rank + attn.qk_rope_head_dim > WIDEST:
            raise Unfit("latents wider than any model's")
        to.nope, to.rotary, to.rank = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.kv_lora_rank
        to.interleaved = attn.rotate is rotate_interleaved
        if attn.q_lora_rank is None:
            to.q = self._matrix(attn.q_proj)
        else:
            to.q_low, to.q = self._matrix(attn.q_a_proj), self._matrix(attn.q_b_proj)
            to.q_low_norm = _wide(attn.q_a_layernorm.weight)
        to.kv, to.kv_norm = self._matrix(attn.kv_a_proj_with_mqa), _wide(attn.kv_a_layernorm.weight)
        a = attn.absorbed
        if isinstance(a, QuantAbsorbed):
            to.absorbed_keys.w = _weights(a.keys, a.rank, a.key_dim, a.format)
            to.absorbed_values.w = _weights(a.values, a.value_dim, a.rank, a.format)
        elif a is None and type(attn.kv_b_proj) is nn.Linear:
            keys = attn.qk_nope_head_dim
            to.absorbed_keys.w = self._floats(lambda: attn.kv_b_weight()[:, :keys].mT)
            to.absorbed_values.w = self._floats(lambda: attn.kv_b_weight()[:, keys:])
        else:
            raise Unfit("weights of kv_b_proj of an unknown kind")

    def _fill_moe(self, to: Any, moe: MoE) -> None:
        experts, router, c = moe.experts, moe.router, moe.router.config
        if isinstance(experts, QuantExperts):
            to.mlp.up = _weights(experts.up, 2 * experts.inner, experts.hidden, experts.format)
            to.mlp.down = _weights(experts.down, experts.hidden, experts.inner, experts.format)
        elif type(experts) is Experts:
            gate_up, down = experts.gate_up_proj, experts.down_proj
            to.mlp.up = self._floats(*(lambda half=half: gate_up.chunk(2, 1)[half] for half in range(2)))
            to.mlp.down = self._floats(lambda: down)
        else:
            raise Unfit("experts of an unknown kind")
        if moe.shared_experts is not None:
            to.shared = self._pair(moe.shared_experts)
        to.router = _router(router)
        grouped = router.e_score_correction_bias is not None or c.topk_method == "group_limited_greedy"
        to.router.groups, to.router.kept_groups = (c.n_group, c.topk_group) if grouped else (1, 1)

    def _pair(self, mlp: nn.Module) -> _Pair:
        if isinstance(mlp, QuantSwiGLU):
            up = _weights(mlp.up, 2 * mlp.inner, mlp.hidden, mlp.format)
            return _Pair(up, _weights(mlp.down, mlp.hidden, mlp.inner, mlp.format))
        if type(mlp) is not SwiGLU:
            raise Unfit("a feed-forward of an unknown kind")
        parts = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if any(type(p) is not nn.Linear or p.bias is not None for p in parts):
            raise Unfit("a feed-forward with biases, or of an unknown kind")
        gate, up_, down = (p.weight for p in parts)
        return _Pair(self._floats(lambda: gate, lambda: up_), self._floats(lambda: down))

    def _matrix(self, linear: nn.Module) -> _Packed:
        if isinstance(linear, QuantLinear):
            w = _weights(linear.packed, linear.out_features, linear.in_features, linear.format)
            return _Packed(w, None if linear.bias is None else _wide(linear.bias))
        if type(linear) is not nn.Linear:
            raise Unfit("a projection of an unknown kind")
        bias = None if linear.bias is None else _wide(linear.bias)
        return _Packed(self._floats(lambda: linear.weight), bias)

    def _floats(self, *sources: Callable[[], Tensor]) -> _Weights:
        """Float32 matrices [*E, rows, width] one after the other, each laid out for the call."""
        first = sources[0]()
        size = 4 * first.numel() * len(sources)
        if any(x().dtype != torch.float32 for x in sources):
            raise Unfit("weights that are neither packed nor float32")
        if size + sum(to.numel() * 4 for _, to in self.wide) > MOST_WIDE:
            raise Unfit("more float32 weights than are laid out twice")
        blocks = torch.cat([_side_by_side(x()) for x in sources], -3)
        at = 0
        for source in sources:
            count = blocks.shape[-3] // len(sources)
            self.wide.append((source, blocks.narrow(-3, at, count)))
            at += count
        return _Weights(blocks.data_ptr(), first.shape[-2] * len(sources), first.shape[-1], FLOATS, 1)


@torch.no_grad()
def _side_by_side(w: Tensor) -> Tensor:
    """[*E, rows, width] → [*E, blocks, width, 16]: 16 rows of a block beside each other, zeros behind the last."""
    padded = nn.functional.pad(w, (0, 0, 0, -w.shape[-2] % 16))
    return padded.unflatten(-2, (-1, 16)).transpose(-1, -2).contiguous()


def decoder(model: Transformer, cache: PagedCache) -> Decoder | None:
    """The call for this model and cache, or None where its modules compute one by one."""
    library = native()
    if library is None or cache.device.type != "cpu":
        return None
    try:
        return Decoder(model, cache, library)
    except Unfit:
        return None


def _router(router: Router) -> _Router:
    c, bias = router.config, router.e_score_correction_bias
    normalised = c.norm_topk_prob and c.num_experts_per_tok > 1
    return _Router(
        _wide(router.weight), None if bias is None else _wide(bias), c.n_routed_experts, c.num_experts_per_tok, 1, 1,
        c.scoring_func == "softmax", normalised, not normalised or c.scale_after_norm, c.routed_scaling_factor,
    )  # fmt: skip


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
