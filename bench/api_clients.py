"""Scripted sessions of clients that people use, each in an environment of its own, against a scripted server.

    python bench/api_clients.py --environments DIR [--only litellm codex …]

Missing environments are made in DIR with pip and npm (about 2 GB in all); the sessions themselves are offline.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from api_matrix import free_port, make_key, running
from record import Row, write_record

FOLDER = Path(__file__).parent / "clients"


@dataclass(frozen=True)
class Client:
    """A client: its packages, its session, and the binary that the session needs."""

    name: str
    packages: tuple[str, ...]
    session: str
    binary: str = ""

    @property
    def node(self) -> bool:
        return self.session.endswith(".mjs") or bool(self.binary)


CLIENTS = (
    Client("litellm", ("litellm",), "litellm_session.py"),
    Client("langchain-openai", ("langchain-openai",), "langchain_openai_session.py"),
    Client("langchain-deepseek", ("langchain-deepseek",), "langchain_deepseek_session.py"),
    Client("pydantic-ai", ("pydantic-ai-slim[openai]",), "pydantic_ai_session.py"),
    Client("instructor", ("instructor",), "instructor_session.py"),
    Client("llm", ("llm",), "llm_session.py"),
    Client("aider", ("aider-chat",), "aider_session.py"),
    Client("openai for Node", ("openai",), "openai_node_session.mjs"),
    Client("AI SDK", ("ai", "@ai-sdk/openai-compatible"), "ai_sdk_session.mjs"),
    Client("codex", ("@openai/codex",), "codex_session.py", "codex"),
    Client("opencode", ("opencode-ai",), "opencode_session.py", "opencode"),
    Client("qwen-code", ("@qwen-code/qwen-code",), "qwen_code_session.py", "qwen"),
)


@dataclass(frozen=True)
class Options:
    """Which clients to run, and where their environments are."""

    environments: Path
    """Folder of environments; missing ones are made."""
    only: tuple[str, ...] = ()
    """Names of clients; all by default."""


def command(client: Client, folder: Path, url: str, key: str) -> list[str]:
    """How a session is run; makes the client's environment where it is missing."""
    home = folder / client.name.replace(" ", "-").lower()
    session = str(FOLDER / client.session)
    if not client.node:
        python = home / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *client.packages], check=True)
        return [str(python), session, url, key]
    if not (home / "node_modules").exists():
        home.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "init", "-y"], cwd=home, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["npm", "install", "--silent", *client.packages], cwd=home, check=True)
    if client.binary:
        return [sys.executable, session, url, key, str(home / "node_modules" / ".bin" / client.binary)]
    copied = home / client.session  # Node looks for packages beside the script
    copied.write_text(Path(session).read_text())
    return ["node", str(copied), url, key]


def run(client: Client, folder: Path, url: str, key: str) -> str:
    """Empty when the session passed, else the end of what it said."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command(client, folder, url, key), capture_output=True, text=True, env=env, timeout=300
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-1500:] or "failed"


def main() -> None:
    """Run every session and write bench/records/api_clients.json."""
    options = tyro.cli(Options)
    chosen = [c for c in CLIENTS if not options.only or c.name in options.only]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        ledger, port = Path(scratch, "ledger.db"), free_port()
        key, url = make_key(ledger), f"http://127.0.0.1:{port}"
        serve = [sys.executable, "-m", "rorqual.cli", "serve", "--scripted", str(FOLDER / "script.json")]
        serve += ["--port", str(port), "--ledger", str(ledger)]
        with running(serve, url, Path(scratch, "log.txt")):
            for client in chosen:
                fault = run(client, options.environments, url, key)
                print(f"{client.name:20} {'passed' if not fault else 'FAILED'}\n{fault}", flush=True)
                rows.append(
                    Row(f"client session: {client.name}", float(not fault), None, "", float(not fault), 1.0)
                )
    if not options.only:
        print(write_record("api_clients", rows))


if __name__ == "__main__":
    main()
