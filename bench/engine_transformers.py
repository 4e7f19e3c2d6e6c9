"""transformers on a config with random weights: a prompt of 512 tokens, and decode of one request; JSON as printed.

Run by bench/engine.py.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Measure and print."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(sys.argv[1])
    torch.set_default_dtype(torch.bfloat16)
    torch.nn.init.normal_ = lambda t, *a, **k: t  # random weights: whatever memory holds would be as good
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.01)
    ids = torch.arange(512)[None] % config.vocab_size
    speeds = {}
    with torch.inference_mode():
        model(ids[:, :16])
        begin = time.perf_counter()
        model(ids, logits_to_keep=1)
        speeds["prompt of 512"] = 512 / (time.perf_counter() - begin)
        cache = model(ids[:, :16], use_cache=True).past_key_values
        begin = time.perf_counter()
        for _ in range(8):
            cache = model(ids[:, :1], past_key_values=cache, use_cache=True).past_key_values
        speeds["decode, context 16"] = 8 / (time.perf_counter() - begin)
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
