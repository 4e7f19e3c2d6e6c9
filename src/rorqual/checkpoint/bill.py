"""The page that `rorqual cost` prints: a model's cost beside the same shape with other kinds of attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rorqual.checkpoint import gguf, hf
from rorqual.checkpoint.loaded import locate
from rorqual.config import read_tree
from rorqual.device import format_bytes
from rorqual.model.config import ModelConfig
from rorqual.model.cost import CACHE_BITS, cost
from rorqual.model.published import PUBLISHED, published

GROUPED_HEADS = 8  # key-value heads of the grouped-query form to compare with, as in Llama 3 and DeepSeek 67B


def read_any_config(model: str) -> ModelConfig:
    """The config of a published name, a config.json, a model folder or a GGUF file."""
    if model in PUBLISHED and not Path(model).exists():
        return published(model)
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return ModelConfig.from_hf(read_tree(path))
    where = locate(path)
    return gguf.config(gguf.GGUF(where)) if where.suffix == ".gguf" else hf.load_config(where)


def bill(config: ModelConfig, context: int, users: int) -> dict[str, Any]:
    """Every figure of the page as plain values."""
    c = cost(config)
    heads = config.num_attention_heads
    grouped = min(GROUPED_HEADS, heads)
    return {
        "parameters": c.parameters,
        "active_parameters": c.active,
        "table_parameters": c.tables,
        "mtp_parameters": c.mtp,
        "train_flops_per_token": c.train_flops(context),
        "decode_flops_per_token": c.decode_flops(context),
        "context": context,
        "users": users,
        "cache_elements_per_token": c.cache_elements,
        "cache_bytes_per_token": {bits: c.cache_bytes(bits) for bits in CACHE_BITS},
        "multi_head_cache_bytes": {bits: c.cache_elements_with(heads) * bits / 8 for bits in CACHE_BITS},
        "grouped_query_heads": grouped,
        "grouped_query_cache_bytes": {bits: c.cache_elements_with(grouped) * bits / 8 for bits in CACHE_BITS},
        "serve_bytes": {bits: c.serve_bytes(users, context, weight_bits=bits) for bits in (16, 8, 4)},
    }


def print_bill(name: str, facts: dict[str, Any]) -> None:
    """Print the page."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"[bold]{name}[/]: {_count(facts['parameters'])} parameters, {_count(facts['active_parameters'])} active",
        soft_wrap=True,
    )
    for key, what in (("table_parameters", "in memory tables"), ("mtp_parameters", "in MTP modules")):
        if facts[key]:
            console.print(f"  {_count(facts[key])} {what}")
    console.print(
        f"  per token at {facts['context']:,} of context: {facts['train_flops_per_token'] / 1e9:,.2f} GFLOPs to train, "
        f"{facts['decode_flops_per_token'] / 1e9:,.2f} GFLOPs to generate",
        soft_wrap=True,
    )
    table = Table("cache of a token", *(f"{bits} bits" for bits in CACHE_BITS), "against multi-head")
    ours, full = facts["cache_bytes_per_token"], facts["multi_head_cache_bytes"]
    rows = {
        f"this model ({facts['cache_elements_per_token']:,} elements)": ours,
        f"same shape, {facts['grouped_query_heads']} key-value heads": facts["grouped_query_cache_bytes"],
        "same shape, multi-head": full,
    }
    for what, sizes in rows.items():
        table.add_row(what, *(f"{sizes[b]:,.0f} B" for b in CACHE_BITS), f"{sizes[16] / full[16]:.1%}")
    console.print(table)
    serve = ", ".join(f"{format_bytes(size)} at {bits} bits" for bits, size in facts["serve_bytes"].items())
    console.print(
        f"  to serve {facts['users']} at {facts['context']:,} tokens (cache in bfloat16): {serve} a weight",
        soft_wrap=True,
    )


def _count(n: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.2f}{unit}"
    return str(n)
