"""aider: one message, streamed, no git, nothing fetched."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key = sys.argv[1:]
with tempfile.TemporaryDirectory() as home:
    env = {
        **os.environ,
        "HOME": home,
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = [
        str(Path(sys.executable).parent / "aider"),
        "--model",
        "openai/scripted",
        "--message",
        "say hello",
        "--no-git",
        "--yes-always",
        "--no-check-update",
        "--no-show-model-warnings",
        "--analytics-disable",
        "--no-auto-commits",
    ]
    done = subprocess.run(
        command, env=env, cwd=home, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert "Hello from Rorqual!" in done.stdout, done
