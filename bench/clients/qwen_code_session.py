"""qwen-code: one non-interactive turn with its 28 KB of tools."""

import os
import subprocess
import sys
import tempfile

url, key, binary = sys.argv[1:]
with tempfile.TemporaryDirectory() as home:
    env = {
        **os.environ,
        "HOME": home,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "OPENAI_MODEL": "scripted",
    }
    command = [binary, "--auth-type", "openai", "-p", "say hello"]
    done = subprocess.run(
        command, env=env, cwd=home, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert "Hello from Rorqual!" in done.stdout, done
