"""How far sampler and trainer are apart at learning rate zero: the same weights, in float32 and bfloat16, with and
without replay of the experts that sampling chose.

The divergence is the mean over sampled tokens of k3 = r - 1 - log r with r = p_trainer / p_sampler. The model is of the
DeepSeek kind with 16 experts of which a token takes 3, its weights random and wide, so that routing is close to call.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from record import Row, write_record

from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer
from rorqual.rl.config import Sampling
from rorqual.rl.losses import k3
from rorqual.rl.rollout import Sampler, expert_layers
from rorqual.rl.rows import Batch
from rorqual.rl.tokens import write_characters
from rorqual.rl.update import score
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.objective import autocast
from rorqual.train.shape import Shape

GOALS = {"float32": 1e-6, "bfloat16": 1e-3}


def measure(dtype: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Divergence and largest difference with and without replay, and how often the two choose other experts."""
    context = (
        (lambda: autocast(torch.device("cpu"), dtype)) if dtype == "bfloat16" else contextlib.nullcontext
    )
    shape = Shape(depth=6, width=128, heads=4, experts=16, experts_per_token=3, zero_output=False)
    config = shape.model(tokenizer.vocab_size, 128, tokenizer.bos_id, tokenizer.eos_ids[0])
    model = Transformer(config).init_weights(11)
    sampling = Sampling(group=16, max_tokens=64, max_prompt=16)
    sampler = Sampler(model, tokenizer, sampling, context)
    prompts = [tokenizer.encode(f"{i * 7 % 90 + 10}+{i * 13 % 90 + 10}=") for i in range(16)]
    flat = [r for g in sampler.draw(prompts, 16, list(range(16))) for r in g]
    batch = Batch.of(flat, [0.0] * len(flat))
    counts = batch.mask.bool()
    found: dict[str, Any] = {"tokens": int(counts.sum())}
    with torch.no_grad():
        for replay in (True, False):
            new = score(model, batch, 1.0, context, replay).logprobs[counts].double()
            old = batch.sampled[counts].double()
            name = "replay" if replay else "free"
            found[name] = float(k3(old, new).mean())
            found[f"{name}_most"] = float((new - old).abs().max())
        routing = Routing()
        with context():
            model(batch.ids, batch.positions, batch.attend(), routing)
    assert batch.experts is not None
    there = batch.branch >= 0
    other = []
    for i, layer in enumerate(expert_layers(model)):
        ours = routing.chosen[layer].view(*there.shape, -1).sort(-1).values
        theirs = batch.experts[:, :, i].sort(-1).values
        other.append((ours != theirs).any(-1)[there])
    found["routers"] = float(torch.stack(other).float().mean())
    found["positions"] = float(torch.stack(other).any(0).float().mean())
    return found


def main() -> None:
    import tempfile
    from pathlib import Path

    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        write_characters(Path(work))
        tokenizer = Tokenizer.load(Path(work))
    for dtype, bound in GOALS.items():
        f = measure(dtype, tokenizer)
        print(dtype, f)
        note = f"largest difference of a log-probability {f['replay_most']:.1e}; {f['tokens']:,} tokens"
        rows.append(
            Row(
                f"divergence, {dtype}, replay",
                f["replay"],
                bound,
                "bound",
                bound / max(f["replay"], 1e-15),
                1.0,
                "k3",
                note,
            )
        )
        note = (
            f"largest difference {f['free_most']:.1e}; {f['routers']:.2%} of choices and {f['positions']:.2%} of tokens "
            "went to other experts"
        )
        rows.append(Row(f"divergence, {dtype}, no replay", f["free"], None, "", None, None, "k3", note))
    print(write_record("rl_mismatch", rows))


if __name__ == "__main__":
    main()
