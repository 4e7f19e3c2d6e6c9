"""vLLM's CPU wheel on a config with random weights: prompts of 512 and 2,048 tokens, decode of 1 and 32 requests.

Run by bench/engine.py in vLLM's own environment; prints tokens a second as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")


def main() -> None:
    """Measure and print."""
    sys.path.remove(
        str(Path(__file__).parent)
    )  # transformers would take kernels.py for a package of that name
    from vllm import LLM, SamplingParams

    llm = LLM(
        sys.argv[1],
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        max_num_seqs=32,
        enable_prefix_caching=False,
        trust_remote_code=False,
    )

    def timed(batch: int, length: int, tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        prompts = [
            {"prompt_token_ids": [(7 + i * 131 + j * 17) % 100000 for j in range(length)]}
            for i in range(batch)
        ]
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    timed(1, 16, 2)
    speeds = {f"prompt of {n:,}": n / timed(1, n, 1) for n in (512, 2048)}
    for batch, name in ((1, "decode, context 16"), (32, "decode, 32 requests at once")):
        tokens = 32 if batch > 1 else 16
        speeds[name] = batch * (tokens - 1) / (timed(batch, 16, tokens) - timed(batch, 16, 1))
    print(json.dumps(speeds))


if __name__ == "__main__":
    main()
