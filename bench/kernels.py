"""Each native kernel: its time, the share of this machine's limits that it reaches, and torch's own op beside it.

    python bench/kernels.py [--only NAME]

Sizes are DeepSeek-V2-Lite's: hidden 2048, 64 experts of 1408 with 6 chosen, 16 heads, latent 512 + 64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from record import Row, faster, smaller, write_record

from rorqual.device import Limits, measure_limits
from rorqual.kernels.gqa_attention import gqa_attention
from rorqual.kernels.mla_attention import mla_attention
from rorqual.kernels.native import native
from rorqual.kernels.paged import PagedRows, round_rows
from rorqual.kernels.quantised import Format, Packed
from rorqual.kernels.quantised_experts import quantised_experts
from rorqual.kernels.quantised_heads import quantised_heads
from rorqual.kernels.quantised_linear import quantised_linear

HIDDEN, INNER, EXPERTS, CHOSEN, HEADS, RANK, ROTARY = 2048, 1408, 64, 6, 16, 512, 64
FORMATS = [Format("int4"), Format("int4_min"), Format("int8"), Format("int4", 128), Format("int8", 128)]


def best(work: Callable[[], object], seconds: float = 0.4) -> float:
    """The fastest of several tries, in seconds: others on the machine only ever add time."""
    work()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least


def packed(format: Format, rows: int, width: int, *stack: int) -> Packed:
    """Random values; the scales are small numbers."""
    shape = format.shape(rows, width)
    data = torch.randint(0, 256, (*stack, *shape), dtype=torch.uint8)
    values = int(16 * format.groups(width) * format.group * (8 if format.kind == "int8" else 4) / 8)
    halves = torch.full(((shape[1] - values) // 2,), 0.01, dtype=torch.float16)
    data[..., values:] = halves.view(torch.uint8)
    return Packed(data, rows, width, format)


def name(format: Format) -> str:
    return f"{format.kind} in groups of {format.group}"


def linear_rows(limits: Limits) -> list[Row]:
    """One row streams the weights; hundreds are limited by arithmetic."""
    rows = []
    for format in FORMATS:
        # beyond the last-level cache: 16 matrices one after the other
        many = [packed(format, 4096, HIDDEN) for _ in range(16 if format.kind == "int8" else 32)]
        x = torch.randn(1, HIDDEN)
        seconds = best(lambda many=many, x=x: [quantised_linear(x, m) for m in many])
        rate = sum(m.data.numel() for m in many) / seconds
        rows.append(
            faster(
                f"linear, 1 row, {name(format)}",
                rate / 1e9,
                limits.bandwidth / 1e9,
                "memory read",
                unit="GB/s",
            )
        )
        for n in (8, 32, 512):
            x, m = torch.randn(n, HIDDEN), many[0]
            seconds = best(lambda m=m, x=x: quantised_linear(x, m))
            rate = 2 * n * 4096 * HIDDEN / seconds
            peak, what = limits.flops_bfloat16 / 1e9, "bfloat16 peak"
            rows.append(faster(f"linear, {n} rows, {name(format)}", rate / 1e9, peak, what, unit="GFLOP/s"))
    return rows


def expert_rows(limits: Limits) -> list[Row]:
    rows = []
    for format in FORMATS:
        layers = [
            (packed(format, 2 * INNER, HIDDEN, EXPERTS), packed(format, HIDDEN, INNER, EXPERTS))
            for _ in range(2)
        ]
        weights = 3 * INNER * HIDDEN
        for n in (1, 8, 32, 512):
            x, scale = torch.randn(n, HIDDEN), torch.rand(n, CHOSEN)
            tries = [torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(n)]) for _ in range(8)]
            at = iter(range(1 << 30))

            def work(x=x, scale=scale, tries=tries, layers=layers, at=at) -> torch.Tensor:
                i = next(at)
                return quantised_experts(x, tries[i % 8], scale, *layers[i % 2])

            seconds = best(work)
            if n == 1:
                size = CHOSEN * weights * format.bits / 8
                rate, peak, unit, what = size / seconds, limits.bandwidth, "GB/s", "memory read"
            else:
                rate, peak = 2 * n * CHOSEN * weights / seconds, limits.flops_bfloat16
                unit, what = "GFLOP/s", "bfloat16 peak"
            note = f"{seconds * 1e3:.3f} ms"
            rows.append(
                faster(
                    f"experts, {n} tokens, {name(format)}", rate / 1e9, peak / 1e9, what, unit=unit, note=note
                )
            )
    return rows


def paged(lengths: list[int], block_size: int = 32) -> tuple[PagedRows, int]:
    blocks = max(-(-n // block_size) for n in lengths)
    table = torch.randperm(len(lengths) * blocks).int().view(len(lengths), blocks)
    rows = PagedRows(table, torch.arange(len(lengths)).int(), torch.tensor(lengths).int(), block_size)
    return rows, table.numel() * block_size


def mla_rows(limits: Limits) -> list[Row]:
    out = []
    for context in (512, 2048, 8192, 16384):
        rows, slots = paged([context])
        q = torch.randn(1, HEADS, RANK + ROTARY)
        flops = 2 * HEADS * context * (2 * RANK + ROTARY)
        for dtype in (torch.bfloat16, torch.float32, torch.uint8):
            wide = torch.randn(slots, RANK + ROTARY)
            cache = round_rows(wide) if dtype == torch.uint8 else wide.to(dtype)
            seconds = best(lambda cache=cache, q=q, rows=rows: mla_attention(q, cache, rows, RANK, 0.1))
            keys = wide.to(torch.bfloat16)[:context]
            half = q[0].to(torch.bfloat16)
            torchs = best(
                lambda half=half, keys=keys: (
                    ((half @ keys.T).float() * 0.1).softmax(-1).to(keys.dtype) @ keys[:, :RANK]
                )
            )
            note = f"{flops / seconds / 1e9:.0f} GFLOP/s"
            what = f"MLA decode at {context}, {str(dtype).removeprefix('torch.')} cache"
            out.append(
                smaller(
                    what, seconds * 1e3, torchs * 1e3, "torch's products in bfloat16", unit="ms", note=note
                )
            )
    return out


def gqa_rows(limits: Limits) -> list[Row]:
    out = []
    for heads, kv_heads, width in ((9, 3, 64), (32, 8, 128)):
        for context in (512, 4096):
            rows, slots = paged([context])
            q = torch.randn(1, heads, width)
            keys, values = (torch.randn(slots, kv_heads, width).bfloat16() for _ in range(2))
            seconds = best(lambda q=q, k=keys, v=values, r=rows: gqa_attention(q, k, v, r, 0.1))
            k, v = (x[:context].transpose(0, 1)[None] for x in (keys, values))
            half = q.bfloat16().transpose(0, 1)[None]
            torchs = best(
                lambda h=half, k=k, v=v: F.scaled_dot_product_attention(h, k, v, scale=0.1, enable_gqa=True)
            )
            note = f"{2 * keys[:context].numel() * 2 / seconds / 1e9:.0f} GB/s"
            what = f"GQA decode at {context}, {heads} heads, {kv_heads} key heads of {width}"
            out.append(smaller(what, seconds * 1e3, torchs * 1e3, "torch SDPA", unit="ms", note=note))
    return out


def small_rows(limits: Limits) -> list[Row]:
    """What one call costs where the work is nothing."""
    m = packed(Format("int8"), 16, 32)
    h = packed(Format("int8"), RANK, 128, HEADS)
    x, q = torch.randn(1, 32), torch.randn(1, HEADS, 128)
    keys = torch.randn(HEADS, 128, RANK).bfloat16()
    half = q.bfloat16()
    return [
        smaller("a call", best(lambda: quantised_linear(x, m)) * 1e6, best(lambda: F.linear(x, x)) * 1e6,
                "torch linear", unit="us"),
        smaller("absorbing a query, int8", best(lambda: quantised_heads(q, h)) * 1e6,
                best(lambda: torch.einsum("bhn,hnc->bhc", half, keys)) * 1e6, "torch einsum in bfloat16", unit="us"),
    ]  # fmt: skip


PARTS = {
    "linear": linear_rows,
    "experts": expert_rows,
    "mla": mla_rows,
    "gqa": gqa_rows,
    "small": small_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, help="one part, printed and not recorded")
    options = parser.parse_args()
    library = native()
    limits = measure_limits()
    rows = []
    for part, measure in PARTS.items():
        if options.only in (None, part):
            rows += measure(limits)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        print(
            f"{row.what:60} {row.ours:9.3f} {row.unit:8} {row.peer_name:28} {row.peer or 0:9.3f} {ratio} {row.note}"
        )
    if options.only is None:
        write_record("kernels", rows, isa=library.isa if library else "none", threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
