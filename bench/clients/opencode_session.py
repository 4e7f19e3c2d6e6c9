"""opencode: one non-interactive turn through the openai-compatible provider."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key, binary = sys.argv[1:]
provider = {
    "npm": "@ai-sdk/openai-compatible",
    "name": "rorqual",
    "options": {"baseURL": f"{url}/v1", "apiKey": key},
    "models": {"scripted": {"name": "scripted", "limit": {"context": 200000, "output": 32000}}},
}
with tempfile.TemporaryDirectory() as home:
    Path(home, "opencode.json").write_text(
        json.dumps({"provider": {"rorqual": provider}, "autoupdate": False})
    )
    env = {
        **os.environ,
        "HOME": home,
        "XDG_CONFIG_HOME": home,
        "XDG_DATA_HOME": home,
        "XDG_CACHE_HOME": home,
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_CONFIG": str(Path(home, "opencode.json")),
    }
    command = [binary, "run", "-m", "rorqual/scripted", "say hello"]
    done = subprocess.run(
        command, env=env, cwd=home, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert "Hello from Rorqual!" in done.stdout, done
