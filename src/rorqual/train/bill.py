"""What a run costs, said before it begins, with the price of each option."""

from __future__ import annotations

import dataclasses
from typing import Any

from rorqual.device import format_bytes
from rorqual.model.cost import Cost, cost
from rorqual.train.config import TrainConfig
from rorqual.train.memory import training_bytes

# Each option of ours and the value that turns it off.
OPTIONS: dict[str, Any] = {
    "qk_norm": False,
    "logit_softcap": None,
    "value_embeddings": False,
    "ngram_table_size": 0,
    "triple_table_size": 0,
    "induction": 0,
    "x0_residual": False,
    "smear": False,
    "num_nextn_predict_layers": 0,
}


def bill_lines(config: TrainConfig, bill: Cost) -> list[str]:
    """A few lines for a person."""
    flops = bill.train_flops(config.seq_len, config.softmax_share)
    lines = [
        f"{bill.config.architecture}: {bill.parameters / 1e6:.1f}M parameters, {bill.active / 1e6:.1f}M active a token, "
        f"cache {bill.cache_bytes():,.0f} bytes a token",
        f"{config.steps:,} steps of {config.tokens_per_step:,} tokens: {flops / 1e6:.1f} MFLOP a token, "
        f"{flops * config.tokens_per_step * config.steps:.2e} FLOP in all; about "
        f"{format_bytes(training_bytes(config, bill.config, config.batch_size))} of memory",
    ]
    return lines + [f"  {line}" for line in option_lines(config, bill)]


def option_lines(config: TrainConfig, bill: Cost) -> list[str]:
    """What each option that is on adds to parameters and FLOPs."""
    lines = []
    for name, off in OPTIONS.items():
        value = getattr(bill.config, name)
        if value == off:
            continue
        without = cost(dataclasses.replace(bill.config, **{name: off}))
        more = bill.parameters + bill.mtp - without.parameters - without.mtp
        flops = _flops(config, bill) / _flops(config, without) - 1
        lines.append(f"{name}={value}: {more / 1e6:+.2f}M parameters, {flops:+.1%} FLOPs")
    return lines


def _flops(config: TrainConfig, bill: Cost) -> float:
    """FLOPs a token, each MTP module counted as a layer and the head once more."""
    c = bill.config
    modules = c.num_nextn_predict_layers * 6 * c.vocab_size * c.hidden_size + 6 * bill.mtp
    return bill.train_flops(config.seq_len, config.softmax_share) + modules
