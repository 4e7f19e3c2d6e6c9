"""simonw/llm: a prompt, streamed, and one with a schema, through its command line."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, key = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    model = {
        "model_id": "mine",
        "model_name": "scripted",
        "api_base": f"{url}/v1",
        "api_key_name": "mine",
        "supports_schema": True,
        "supports_tools": True,
    }
    Path(folder, "extra-openai-models.yaml").write_text(json.dumps([model]))
    Path(folder, "keys.json").write_text(json.dumps({"mine": key}))
    llm = [sys.executable, "-m", "llm"]
    env = {**os.environ, "LLM_USER_PATH": folder}
    said = subprocess.run([*llm, "-m", "mine", "hi"], env=env, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "Hello from Rorqual!", said
    shaped = subprocess.run(
        [*llm, "-m", "mine", "--schema", "name, age int", "Ann is 30"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(shaped.stdout) == {"name": "Ann", "age": 30}, shaped
