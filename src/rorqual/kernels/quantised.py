"""How weights are stored at 4 and 8 bits: formats, the packed layout, and both ways between it and floats.

A group of `group` neighbouring inputs of one output row shares a half-precision scale:
    int8      w = scale * q,        q -127 … 127,  8.5 bits a weight in groups of 32
    int4      w = scale * (q - 8),  q 0 … 15,      4.5 bits
    int4_min  w = scale * q + min,  q 0 … 15,      5 bits
Half precision ends at 6e-8: a group whose largest weight is below 1e-5 at 8 bits becomes zeros.
Packed, 16 output rows make a block, so that lane j of every 64-byte vector belongs to row j and no sum crosses
lanes: first the values of all groups (int8 with 128 added: four neighbouring inputs of each row a vector; 4 bits:
eight, the first four in the low nibbles), then the scales [groups, 16], then for int4_min the mins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int4", "int4_min", "int8"]
KINDS: tuple[Kind, ...] = ("int4", "int4_min", "int8")  # kernels.h: Kind
GROUPS = (32, 128)
LANES = 16
CHUNK = 1 << 22  # weights searched at a time


@dataclass(frozen=True)
class Format:
    """How each weight of a matrix is stored."""

    kind: Kind
    group: int = 32

    @property
    def bits(self) -> float:
        """Bits a weight takes, scales included."""
        return (8 if self.kind == "int8" else 4) + 16 * (2 if self.kind == "int4_min" else 1) / self.group

    def block_bytes(self, width: int) -> int:
        """Bytes of 16 rows of `width` inputs."""
        return int(LANES * self.groups(width) * self.group * self.bits / 8)

    def groups(self, width: int) -> int:
        return -(-width // self.group)

    def shape(self, rows: int, width: int) -> tuple[int, int]:
        """The packed shape of a matrix [rows, width]: blocks, bytes of a block."""
        return -(-rows // LANES), self.block_bytes(width)


@dataclass(frozen=True)
class Rounded:
    """A matrix as whole numbers: values [rows, width] uint8, scales and mins [rows, groups] half.

    `width` here is padded to whole groups. `mins` is None for the symmetric kinds.
    """

    values: Tensor
    scales: Tensor
    mins: Tensor | None


@dataclass(frozen=True)
class Packed:
    """One matrix [rows, width], or several [E] of the same shape: data [*E, blocks, block_bytes] uint8."""

    data: Tensor
    rows: int
    width: int
    format: Format

    def __getitem__(self, index: int) -> Packed:
        return Packed(self.data[index], self.rows, self.width, self.format)


def quantise(weight: Tensor, format: Format, importance: Tensor | None = None) -> Packed:
    """weight [*E, rows, width] → the packed matrices with the least squared error found.

    `importance` [width], the mean square of each input where it is known, weighs the error.
    """
    *stack, rows, width = weight.shape
    if stack:
        data = torch.stack([quantise(w, format, importance).data for w in weight])
        return Packed(data, rows, width, format)
    step = max(LANES, CHUNK // max(width, 1) // LANES * LANES)
    pieces = [
        pack(round_matrix(weight[r : r + step], format, importance), format) for r in range(0, rows, step)
    ]
    return Packed(torch.cat(pieces), rows, width, format)


def round_matrix(weight: Tensor, format: Format, importance: Tensor | None = None) -> Rounded:
    """weight [rows, width] → whole numbers, each group's scale searched for the least weighted squared error.

    Scales are rounded to half precision before weights are divided by them (huggingface/transformers#46763).
    """
    rows, width = weight.shape
    padded = format.groups(width) * format.group
    w = torch.nn.functional.pad(weight.float(), (0, padded - width)).view(rows, -1, format.group)
    cost = torch.ones(padded) if importance is None else _cost(importance, padded)
    search = {"int8": _int8, "int4": _int4, "int4_min": _int4_min}[format.kind]
    values, scales, mins = search(w, cost.view(1, -1, format.group))
    return Rounded(
        values.to(torch.uint8).view(rows, padded),
        scales.squeeze(-1).half(),
        None if mins is None else mins.squeeze(-1).half(),
    )


def _cost(importance: Tensor, padded: int) -> Tensor:
    """Inputs that were never active still count a little, lest their weights become arbitrary."""
    known = importance.float()
    return torch.nn.functional.pad(known + 1e-3 * known.mean() + 1e-30, (0, padded - len(known)))


Found = tuple[Tensor, Tensor, Tensor | None]


def _int8(w: Tensor, cost: Tensor) -> Found:
    scale = _half(w.abs().amax(-1, keepdim=True) / 127)
    return (w / _safe(scale)).round().clamp(-127, 127) + 128, scale, None


def _int4(w: Tensor, cost: Tensor) -> Found:
    """Both signs of scale are tried: the one extra step below zero goes to the largest value's side."""
    signed = w.gather(-1, w.abs().argmax(-1, keepdim=True))

    def attempt(factor: float) -> Found:
        scale = _half(-signed / (8 * factor))
        for _ in range(2):
            q = (w / _safe(scale)).round().clamp(-8, 7)
            # the best scale for these values, then the best values for that scale
            scale = _half((cost * w * q).sum(-1, keepdim=True) / _safe((cost * q * q).sum(-1, keepdim=True)))
        return (w / _safe(scale)).round().clamp(-8, 7) + 8, scale, None

    return _best(w, cost, attempt, lambda q, s, m: s * (q - 8), [0.75 + 0.05 * i for i in range(10)])


def _int4_min(w: Tensor, cost: Tensor) -> Found:
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)

    def attempt(factor: float) -> Found:
        middle, reach = (low + high) / 2, (high - low) / 2 * factor
        scale, least = _half(2 * reach / 15), _half(middle - reach)
        for _ in range(2):
            q = ((w - least) / _safe(scale)).round().clamp(0, 15)
            scale, least = _line(q, w, cost, scale, least)
        return ((w - least) / _safe(scale)).round().clamp(0, 15), scale, least

    def value(q: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
        assert least is not None
        return scale * q + least

    return _best(w, cost, attempt, value, [0.7 + 0.05 * i for i in range(8)])


def _line(q: Tensor, w: Tensor, cost: Tensor, scale: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted least-squares line w = scale * q + min; the one given where all q are equal."""
    n = cost.sum(-1, keepdim=True)
    q_mean, w_mean = (cost * q).sum(-1, keepdim=True) / n, (cost * w).sum(-1, keepdim=True) / n
    spread = (cost * (q - q_mean).square()).sum(-1, keepdim=True)
    slope = (cost * (q - q_mean) * (w - w_mean)).sum(-1, keepdim=True) / _safe(spread)
    usable = (spread > 0) & (slope > 0)
    scale = torch.where(usable, _half(slope), scale)
    return scale, torch.where(usable, _half(w_mean - scale * q_mean), least)


def _best(
    w: Tensor,
    cost: Tensor,
    attempt: Callable[[float], Found],
    value: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    factors: list[float],
) -> Found:
    """Each group's best of several attempts."""
    best: Found | None = None
    best_error = torch.full_like(w[..., :1], float("inf"))
    enough = 1e-9 * (w.square() * cost).sum(-1, keepdim=True)
    for factor in sorted(factors, key=lambda f: abs(f - 1)):
        if bool((best_error <= enough).all()):  # such as weights that lie on a grid of this kind already
            break
        found = attempt(factor)
        error = ((value(*found) - w).square() * cost).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = found if best is None else _choose(better, found, best)
    assert best is not None
    return best


def _choose(better: Tensor, new: Found, old: Found) -> Found:
    mins = None if new[2] is None or old[2] is None else torch.where(better, new[2], old[2])
    return torch.where(better, new[0], old[0]), torch.where(better, new[1], old[1]), mins


def _half(x: Tensor) -> Tensor:
    """As it will be stored."""
    return x.clamp(-65504, 65504).half().float()


def _safe(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)


def pack(rounded: Rounded, format: Format) -> Tensor:
    """→ [blocks, block_bytes] uint8; rows beyond the last are zero."""
    rows, padded = rounded.values.shape
    more = -rows % LANES
    values = torch.nn.functional.pad(rounded.values, (0, 0, 0, more), value=_zero(format))
    v = values.view(-1, LANES, padded // 8, 2, 4).permute(
        0, 2, 3, 1, 4
    )  # block, eight inputs, half, row, input
    body = v if format.kind == "int8" else v[:, :, 0] | v[:, :, 1] << 4
    parts = [body.flatten(1)]
    for part in (rounded.scales, rounded.mins):
        if part is not None:
            p = torch.nn.functional.pad(part, (0, 0, 0, more)).view(-1, LANES, part.shape[1])
            parts.append(p.transpose(1, 2).contiguous().view(torch.uint8).flatten(1))
    return torch.cat(parts, 1)


def _zero(format: Format) -> int:
    return {"int8": 128, "int4": 8, "int4_min": 0}[format.kind]


def unpack(packed: Packed) -> Rounded:
    """One matrix back as whole numbers: the reverse of `pack`, without the padding rows."""
    f, data = packed.format, packed.data
    groups = f.groups(packed.width)
    padded = groups * f.group
    body, rest = data.split(
        [LANES * padded * (8 if f.kind == "int8" else 4) // 8, data.shape[1] - _body(f, padded)], 1
    )
    if f.kind == "int8":
        v = body.reshape(-1, padded // 8, 2, LANES, 4)
    else:
        b = body.reshape(-1, padded // 8, LANES, 4)
        v = torch.stack((b & 15, b >> 4), 2)
    values = v.permute(0, 3, 1, 2, 4).reshape(-1, padded)[: packed.rows]
    halves = rest.contiguous().view(torch.float16).view(len(data), -1, groups, LANES).transpose(2, 3)
    scales = halves[:, 0].reshape(-1, groups)[: packed.rows]
    mins = halves[:, 1].reshape(-1, groups)[: packed.rows] if f.kind == "int4_min" else None
    return Rounded(values, scales, mins)


def _body(format: Format, padded: int) -> int:
    return LANES * padded * (8 if format.kind == "int8" else 4) // 8


def restore(rounded: Rounded, format: Format) -> Tensor:
    """Whole numbers → the weights they stand for [rows, padded width] float32."""
    q = rounded.values.float().unflatten(1, (-1, format.group))
    scales = rounded.scales.float().unsqueeze(-1)
    if rounded.mins is not None:
        return (q * scales + rounded.mins.float().unsqueeze(-1)).flatten(1)
    return ((q - _zero(format)) * scales).flatten(1)


def dequantise(packed: Packed) -> Tensor:
    """The weights [*E, rows, width] float32 that packed matrices stand for."""
    if packed.data.dim() == 3:
        return torch.stack([dequantise(packed[i]) for i in range(len(packed.data))])
    return restore(unpack(packed), packed.format)[:, : packed.width]


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [*L, width] as the products see it: each group of a row rounded to 8 bits, its largest value to 127."""
    width = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -width % group)).unflatten(-1, (-1, group))
    peak = groups.abs().amax(-1, keepdim=True)
    most = torch.full_like(peak, 127.0)  # a tensor: torch divides a number by multiplying with the reciprocal
    q = (groups * torch.where(peak > 0, most / peak, 0.0)).round()
    return (q * (peak / most)).flatten(-2)[..., :width]
