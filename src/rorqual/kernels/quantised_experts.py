"""The chosen experts' SwiGLU over packed weights, summed with the router's weights, in one call.

x [N, D], ids [N, K] int64, weights [N, K] float32, up [E, 2f, D] (gate first), down [E, D, f] → [N, D] float32.
`up` is packed with gate and up projection each padded to whole blocks (`pack_up`). Tokens are sorted by expert, and
each token adds its experts' results in the order of their numbers, so its neighbours change nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.native import can_take, native, type_of
from rorqual.kernels.quantised import KINDS, Format, Packed, dequantise, quantise, round_activations


def pack_up(gate: Tensor, up: Tensor, format: Format, importance: Tensor | None = None) -> Packed:
    """gate and up [E, f, D] → one packed stack, the gate's blocks of each expert before the up projection's."""
    halves = [quantise(w, format, importance) for w in (gate, up)]
    return join_up(*halves)


def join_up(gate: Packed, up: Packed) -> Packed:
    """Two packed stacks [E, f, D] → the layout of `up` above."""
    return Packed(torch.cat((gate.data, up.data), 1), 2 * gate.rows, gate.width, gate.format)


def split_up(up: Packed) -> tuple[Packed, Packed]:
    """The reverse of `join_up`."""
    gate, value = up.data.chunk(2, 1)
    return (
        Packed(gate, up.rows // 2, up.width, up.format),
        Packed(value, up.rows // 2, up.width, up.format),
    )


def quantised_experts_reference(x: Tensor, ids: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    """The definition: one expert after the other, on the tokens that chose it."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    gates, values = split_up(up)
    group = up.format.group
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        rows = round_activations(x[token], group)
        gate, value = (rows @ dequantise(w[expert]).T for w in (gates, values))
        y = round_activations(F.silu(gate) * value, group) @ dequantise(down[expert]).T
        out = out.index_add(0, token, y * weights[token, slot, None])
    return out


def quantised_experts(x: Tensor, ids: Tensor, weights: Tensor, up: Packed, down: Packed) -> Tensor:
    """Natively where the library is there and x is on the CPU."""
    library = native()
    if library is None or not can_take(x):
        return quantised_experts_reference(x, ids, weights, up, down)
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.float().contiguous()
    (n, k), f = ids.shape, up.format
    out = torch.empty(n, down.rows)
    library.experts(
        up.data.data_ptr(), down.data.data_ptr(), down.rows, down.width, KINDS.index(f.kind), f.group,
        x.data_ptr(), type_of(x), ids.data_ptr(), weights.data_ptr(), n, k, len(up.data),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
