"""lm-evaluation-harness against our server, with a local task: python bench/lm_eval_harness.py MODEL LM_EVAL [LIMIT]

LM_EVAL is the harness's command in an environment of its own (`pip install "lm-eval[api]"`). The task is our sums in
words, held-out problems, written out as JSON lines; nothing is downloaded. Prints the harness's result.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from rorqual.verify import tasks

TASK = """task: rorqual_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, temperature: 0}}
filter_list:
  - name: last-number
    filter: [{{function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def main(model: str, harness: str, limit: int = 20) -> None:
    """Serve, evaluate, print."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        data = folder / "sums.jsonl"
        family = tasks.create("sums", style="words", terms=2, digits=2)
        problems = [family.make(1234, i, None, "held_out") for i in range(limit)]
        data.write_text(
            "".join(json.dumps({"question": p.prompt, "answer": str(p.answer)}) + "\n" for p in problems)
        )
        (folder / "rorqual_sums.yaml").write_text(TASK.format(data=data))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        server = subprocess.Popen([sys.executable, "-m", "rorqual.cli", "serve", model, "--port", str(port)])
        try:
            served = wait(f"http://127.0.0.1:{port}/v1/models")
            args = f"model={served},base_url=http://127.0.0.1:{port}/v1/completions,tokenizer_backend=none,"
            command = [
                harness,
                "--model",
                "local-completions",
                "--tasks",
                "rorqual_sums",
                "--include_path",
                name,
            ]
            command += ["--model_args", args + "tokenized_requests=False,num_concurrent=8"]
            offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": name}
            subprocess.run(command, check=True, env={**os.environ, **offline, "PYTHONPATH": ""})
        finally:
            server.terminate()
            server.wait(30)


def wait(url: str, seconds: float = 120) -> str:
    """The id of the served model, once the server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return str(json.load(reply)["data"][0]["id"])
        except OSError:  # not up yet, or still loading
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
