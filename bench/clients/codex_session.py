"""OpenAI's codex: one non-interactive turn over the Responses API."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key, binary = sys.argv[1:]
CONFIG = f"""
model = "scripted"
model_provider = "rorqual"
[model_providers.rorqual]
name = "rorqual"
base_url = "{url}/v1"
env_key = "RORQUAL_KEY"
wire_api = "responses"
"""
with tempfile.TemporaryDirectory() as home:
    Path(home, "config.toml").write_text(CONFIG)
    env = {**os.environ, "CODEX_HOME": home, "RORQUAL_KEY": key}
    command = [binary, "exec", "--skip-git-repo-check", "--sandbox", "read-only", "say hello"]
    done = subprocess.run(
        command, env=env, cwd=home, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert "Hello from Rorqual!" in done.stdout, done
