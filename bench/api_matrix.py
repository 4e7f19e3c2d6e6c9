"""The API beside its peers: 38 requests that must be refused (or borne) well, and behaviours that clients rely on.

    python bench/api_matrix.py --model MODEL_FOLDER [--vllm PYTHON] [--llama-server BINARY --gguf FILE]
                               [--transformers PYTHON]
    python bench/api_matrix.py --model x --url NAME=http://127.0.0.1:8000 …      # servers that run already

A negative probe passes with the right status and an error that the official OpenAI client can read: nested, its
message a text. Every server is started with the key "secret", where it knows keys.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from record import faster, write_record

KEY = "secret"
CONTEXT = 1024
JSON = {"content-type": "application/json"}


@dataclass
class Server:
    """A server under test."""

    name: str
    url: str
    model: str
    key: str = KEY
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.key}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False)

    def body(self, **fields: Any) -> dict[str, Any]:
        """A small sound chat request with some fields changed; None takes a field away."""
        messages = [{"role": "user", "content": "Say a word."}]
        whole = {"model": self.model, "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
        return {k: v for k, v in whole.items() if v is not None}

    def chat(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=self.body(**fields))

    def raw(self, content: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        return self.client.post(path, content=content, headers={**JSON, **headers})

    def stranger(self, headers: dict[str, str]) -> httpx.Response:
        return httpx.get(f"{self.url}/v1/models", headers=headers, trust_env=False)

    def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[str]:
        body = self.body(stream=True, **fields)
        with self.client.stream("POST", path, json=body) as response:
            return "".join(response.iter_text()).split("\n\n")


def refused(answer: httpx.Response, *statuses: int) -> bool:
    """Right status, and a nested error with a message."""
    try:
        error = answer.json()["error"]
        return answer.status_code in statuses and isinstance(error["message"], str) and bool(error["message"])
    except (ValueError, KeyError, TypeError):
        return False


def bad(**fields: Any) -> Callable[[Server], bool]:
    """A chat request that must be a 400 (or 422)."""
    return lambda s: refused(s.chat(**fields), 400, 422)


def raw(content: bytes, *statuses: int, **headers: str) -> Callable[[Server], bool]:
    return lambda s: refused(s.raw(content, **headers), *statuses)


def closed_to_other_origins(s: Server) -> bool:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = s.client.options("/v1/chat/completions", headers=asked)
    allowed = answer.headers.get("access-control-allow-origin")
    return not allowed or (allowed == "*" and "access-control-allow-credentials" not in answer.headers)


def huge_body(s: Server) -> bool:
    """120 MB: refused before it is taken in; a closed connection after the answer counts as the answer's."""
    host, port = s.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {s.key}\r\n"
        sock.sendall((head + "Content-Type: application/json\r\nContent-Length: 120000000\r\n\r\n").encode())
        with contextlib.suppress(OSError):
            for _ in range(120):
                sock.sendall(b" " * 1_000_000)
        with contextlib.suppress(OSError):
            answer = sock.recv(65536)
            return answer.startswith(b"HTTP/1.1 413") and b'"error"' in answer + sock.recv(65536)
    return False


IMAGE = [
    {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}],
    }
]
BROKEN = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "nope"}}}},
}

NEGATIVE: list[tuple[str, Callable[[Server], bool]]] = [
    ("bad JSON", raw(b'{"model": ', 400)),
    ("empty body", raw(b"", 400)),
    ("array body", raw(b"[]", 400)),
    ("bad UTF-8", raw(b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}', 400)),
    (
        "NaN literal",
        raw(b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    ),
    ("messages missing", bad(messages=None)),
    ("messages empty", bad(messages=[])),
    ("messages a string", bad(messages="hi")),
    ("unknown role", bad(messages=[{"role": "robot", "content": "a"}])),
    ("content a number", bad(messages=[{"role": "user", "content": 3}])),
    ("unknown model", lambda s: refused(s.chat(model="no-such-model"), 404)),
    ("no model", lambda s: refused(s.chat(model=None), 400, 404)),
    ("temperature 5", bad(temperature=5)),
    ("temperature -1", bad(temperature=-1)),
    ("temperature a string", bad(temperature="hot")),
    ("top_p 2", bad(top_p=2)),
    ("n 0", bad(n=0)),
    ("max_tokens 0", bad(max_tokens=0)),
    ("max_tokens -5", bad(max_tokens=-5)),
    ("top_logprobs 99", bad(logprobs=True, top_logprobs=99)),
    ("logit_bias of a word", bad(logit_bias={"word": 1})),
    ("stop a number", bad(stop=7)),
    ("tools a string", bad(tools="x")),
    ("max_tokens beyond the context", lambda s: s.chat(max_tokens=32000, stop=["."]).status_code == 200),
    ("prompt beyond the context", bad(messages=[{"role": "user", "content": "word " * 9000}])),
    ("schema that cannot be", bad(response_format=BROKEN)),
    ("unknown response_format", bad(response_format={"type": "yaml"})),
    ("image for a model of text", bad(messages=IMAGE)),
    ("unknown field is ignored", lambda s: s.chat(some_future_field={"a": 1}).status_code == 200),
    ("no key", lambda s: refused(s.stranger({}), 401)),
    ("wrong key", lambda s: refused(s.stranger({"authorization": "Bearer wrong"}), 401)),
    ("malformed authorization", lambda s: refused(s.stranger({"authorization": "secret"}), 401)),
    ("unknown path", lambda s: refused(s.client.get("/v1/nope"), 404)),
    ("wrong method", lambda s: refused(s.client.get("/v1/chat/completions"), 405)),
    (
        "wrong content type",
        raw(b"model=m", 400, 415, **{"content-type": "application/x-www-form-urlencoded"}),
    ),
    ("one model by its id", lambda s: s.client.get(f"/v1/models/{s.model}").status_code == 200),
    ("closed to other origins", closed_to_other_origins),
    ("body of 120 MB", huge_body),
]


def chunks(s: Server, **fields: Any) -> list[dict[str, Any]]:
    frames = [f for f in s.stream(**fields) if f.startswith("data: {")]
    return [json.loads(f[6:]) for f in frames]


def text_of(parts: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in parts if c["choices"])


def sse_form(s: Server) -> bool:
    frames = s.stream(max_tokens=4)
    first = json.loads(frames[0].removeprefix("data: "))["choices"][0]["delta"]
    return frames[-2] == "data: [DONE]" and frames[-1] == "" and first.get("role") == "assistant"


def usage_of_all_choices(s: Server) -> bool:
    answer = s.chat(n=2, max_tokens=5, temperature=1, ignore_eos=True).json()
    return len(answer["choices"]) == 2 and answer["usage"]["completion_tokens"] == 10


def usage_chunk(s: Server) -> bool:
    last = chunks(s, stream_options={"include_usage": True})[-1]
    return last["choices"] == [] and last["usage"]["completion_tokens"] > 0


def logprobs_rebuild(s: Server) -> bool:
    choice = s.chat(max_tokens=8, logprobs=True, top_logprobs=3).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    whole = bytes(b for e in entries for b in e["bytes"]).decode("utf-8", "replace")
    return whole.startswith(choice["message"]["content"]) and len(entries[0]["top_logprobs"]) == 3


def stop_never_leaks(s: Server) -> bool:
    text = s.chat(max_tokens=24).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:3]
    want = text[: text.index(stop)]
    cut = s.chat(max_tokens=24, stop=[stop]).json()["choices"][0]["message"]["content"]
    return cut == want == text_of(chunks(s, max_tokens=24, stop=[stop]))


def forced_call(s: Server, choice: Any) -> bool:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    message = s.chat(tools=tools, tool_choice=choice, max_tokens=200).json()["choices"][0]["message"]
    return set(json.loads(message["tool_calls"][0]["function"]["arguments"])) == {"city"}


def schema_kept(s: Server) -> bool:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer"}, "c": {"enum": ["x", "y"]}},
        "required": ["age", "c"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    value = json.loads(s.chat(response_format=form, max_tokens=60).json()["choices"][0]["message"]["content"])
    return isinstance(value["age"], int) and value["c"] in ("x", "y")


def unsupported_keyword(s: Server) -> bool:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}},
        "required": ["a"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = s.chat(response_format=form, max_tokens=60)
    return refused(answer, 400) and "uniqueItems" in answer.text


def cached_tokens(s: Server) -> bool:
    messages = [{"role": "user", "content": "The same long beginning. " * 20}]
    usages = [s.chat(messages=messages).json()["usage"] for _ in range(2)]
    return usages[1]["prompt_tokens_details"]["cached_tokens"] > 50


def echo_scores(s: Server) -> bool:
    body = {"model": s.model, "prompt": "The sea is blue", "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = s.client.post("/v1/completions", json=body).json()["choices"][0]
    block = choice["logprobs"]
    return (
        choice["text"].startswith("The sea is blue")
        and len(block["token_logprobs"]) == len(block["tokens"]) > 3
    )


def responses_events(s: Server) -> bool:
    body = {"model": s.model, "input": "Say a word.", "stream": True, "max_output_tokens": 16, "store": False}
    with s.client.stream("POST", "/v1/responses", json=body) as response:
        frames = [f for f in "".join(response.iter_text()).split("\n\n") if f]
    names = [f.split("\n")[0].removeprefix("event: ") for f in frames]
    return names[0] == "response.created" and names[-1] in ("response.completed", "response.incomplete")


def anthropic_messages(s: Server) -> bool:
    body = {"model": s.model, "max_tokens": 4, "messages": [{"role": "user", "content": "Say a word."}]}
    good = s.client.post("/v1/messages", json=body, headers={"x-api-key": s.key}).json()
    wrong = s.client.post("/v1/messages", json={**body, "messages": []}, headers={"x-api-key": s.key}).json()
    return good["type"] == "message" and wrong["type"] == "error" and "error" in wrong


def decision(s: Server) -> bool:
    body = {
        "model": s.model,
        "input": "x",
        "questions": [{"type": "predicate", "instructions": "It is day."}],
    }
    return 0 < s.client.post("/v1/decisions", json=body).json()["answers"][0]["probability"] < 1


def balance(s: Server) -> bool:
    return "is_available" in s.client.get("/user/balance").json()


def request_id(s: Server) -> bool:
    return s.client.get("/v1/models", headers={"x-request-id": "mine"}).headers.get("x-request-id") == "mine"


def seeded(s: Server) -> bool:
    texts = {
        s.chat(temperature=1.5, seed=5, max_tokens=12).text.split('"content"')[1].split('"finish')[0]
        for _ in range(2)
    }
    return len(texts) == 1


def tokenize(s: Server) -> bool:
    body = {"model": s.model, "prompt": "ďábel 👋", "content": "ďábel 👋", "add_special_tokens": False}
    ids = s.client.post("/tokenize", json=body).json()["tokens"]
    back = s.client.post("/detokenize", json={"model": s.model, "tokens": ids}).json()
    return "ďábel 👋" in (back.get("prompt"), back.get("content"))


POSITIVE: list[tuple[str, Callable[[Server], bool]]] = [
    (
        "row 1: chat without /v1 too",
        lambda s: s.client.post("/chat/completions", json=s.body()).status_code == 200,
    ),
    ("row 5: usage sums all n choices", usage_of_all_choices),
    (
        "row 7: max_completion_tokens",
        lambda s: (
            s.chat(max_tokens=None, max_completion_tokens=3, ignore_eos=True).json()["usage"][
                "completion_tokens"
            ]
            == 3
        ),
    ),
    ("row 12: seed", seeded),
    ("row 14: stop strings, whole and streamed", stop_never_leaks),
    ("row 15: logprobs rebuild the text", logprobs_rebuild),
    (
        "row 16: logit_bias forces a token",
        lambda s: (
            s.chat(logit_bias={"300": 100}, max_tokens=3).json()["choices"][0]["finish_reason"] == "length"
        ),
    ),
    ("row 18: form of the stream, [DONE]", sse_form),
    ("row 19: usage chunk", usage_chunk),
    (
        "row 20: stream equals whole",
        lambda s: (
            text_of(chunks(s, max_tokens=16))
            == s.chat(max_tokens=16).json()["choices"][0]["message"]["content"]
        ),
    ),
    ("row 38: request id echoed", request_id),
    (
        "row 42: json_object",
        lambda s: isinstance(
            json.loads(
                s.chat(response_format={"type": "json_object"}, max_tokens=200).json()["choices"][0][
                    "message"
                ]["content"]
            ),
            dict,
        ),
    ),
    ("row 43: json_schema kept", schema_kept),
    ("row 44: unsupported keyword named", unsupported_keyword),
    ("row 46: tool_choice required", lambda s: forced_call(s, "required")),
    (
        "row 46: named function",
        lambda s: forced_call(s, {"type": "function", "function": {"name": "weather"}}),
    ),
    ("row 53: cached tokens reported", cached_tokens),
    ("row 56: echo with scores", echo_scores),
    ("row 58: tokenize round trip", tokenize),
    ("row 59: Responses events", responses_events),
    ("row 60: Anthropic messages and errors", anthropic_messages),
    ("row 61: balance", balance),
    ("row 65: decisions", decision),
    ("row 39: health", lambda s: s.client.get("/health").status_code == 200),
    ("row 40: metrics", lambda s: "time_to_first_token" in s.client.get("/metrics").text),
]


def probe(server: Server) -> dict[str, dict[str, bool]]:
    """Every probe's verdict; one that raises has failed."""
    out: dict[str, dict[str, bool]] = {}
    for kind, probes in (("negative", NEGATIVE), ("positive", POSITIVE)):
        out[kind] = {}
        for name, check in probes:
            try:
                out[kind][name] = bool(check(server))
            except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
                out[kind][name] = False
    return out


@dataclass(frozen=True)
class Options:
    """Which servers to probe."""

    model: Path
    """Model folder that every server loads (llama-server: see --gguf)."""
    url: tuple[str, ...] = ()
    """Servers that run already, NAME=URL; nothing is started then."""
    vllm: Path | None = None
    """Python of an environment with vLLM's CPU wheel."""
    llama_server: Path | None = None
    """llama-server binary."""
    gguf: Path | None = None
    """Model file for llama-server."""
    transformers: Path | None = None
    """Python of an environment with `transformers[serving]`."""


def commands(options: Options, port: int, folder: Path) -> dict[str, tuple[list[str], str]]:
    """How each server is started, and its name for the model."""
    model = str(options.model)
    out = {
        "rorqual": (
            [
                sys.executable,
                "-m",
                "rorqual.cli",
                "serve",
                model,
                "--name",
                "m",
                "--port",
                str(port),
                "--ledger",
                str(folder / "ledger.db"),
            ],
            "m",
        )
    }
    if options.vllm is not None:
        serve = [
            str(options.vllm),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            model,
            "--served-model-name",
            "m",
            "--port",
            str(port),
            "--max-model-len",
            str(CONTEXT),
            "--api-key",
            KEY,
        ]
        out["vLLM"] = (
            [
                *serve,
                "--enable-auto-tool-choice",
                "--tool-call-parser",
                "hermes",
                "--enable-prompt-tokens-details",
            ],
            "m",
        )
    if options.llama_server is not None and options.gguf is not None:
        serve = [
            str(options.llama_server),
            "-m",
            str(options.gguf),
            "--port",
            str(port),
            "-c",
            str(4 * CONTEXT),
            "-np",
            "4",
            "--api-key",
            KEY,
            "--jinja",
            "--metrics",
            "-a",
            "m",
        ]
        out["llama-server"] = (serve, "m")
    if options.transformers is not None:
        out["transformers serve"] = (
            [
                str(options.transformers),
                "-m",
                "transformers.cli.transformers",
                "serve",
                model,
                "--port",
                str(port),
            ],
            model,
        )
    return out


@contextlib.contextmanager
def running(command: list[str], url: str, log: Path) -> Iterator[None]:
    """A server's process, from when it answers until the end of the block."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        end = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]} did not come up:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
        return port


def main() -> None:
    """Probe every server and write bench/records/api_matrix.json."""
    options = tyro.cli(Options)
    results: dict[str, dict[str, dict[str, bool]]] = {}
    for entry in options.url:
        name, _, url = entry.partition("=")
        results[name] = probe(Server(name, url, options.model.name))
    folder = Path(tempfile.mkdtemp(prefix="api-matrix-"))
    if not options.url:
        for name in commands(options, 0, folder):
            port = free_port()
            command, model = commands(options, port, folder)[name]
            key = make_key(folder / "ledger.db") if name == "rorqual" else KEY
            with running(command, f"http://127.0.0.1:{port}", folder / "log.txt"):
                results[name] = probe(Server(name, f"http://127.0.0.1:{port}", model, key))
    shutil.rmtree(folder)
    report(results)


def make_key(ledger: Path) -> str:
    """Rorqual makes its keys itself."""
    from rorqual.server.ledger import Ledger

    made = Ledger(ledger)
    key = made.make_key("matrix")
    made.close()
    return key


def report(results: dict[str, dict[str, dict[str, bool]]]) -> None:
    """Print the matrix and write the record."""
    names = list(results)
    for kind in ("negative", "positive"):
        print(f"{kind:44}" + "".join(f"{n:>20}" for n in names))
        for what in results[names[0]][kind]:
            marks = "".join(f"{'yes' if results[n][kind][what] else '-':>20}" for n in names)
            print(f"{what:44}{marks}")
        print(f"{'':44}" + "".join(f"{sum(results[n][kind].values()):>20}" for n in names))
    ours = results.get("rorqual", results[names[0]])
    rows = []
    for kind, total in (("negative", len(NEGATIVE)), ("positive", len(POSITIVE))):
        passed = sum(ours[kind].values())
        for peer in names[1:] or [""]:
            theirs = sum(results[peer][kind].values()) if peer else None
            goal = (
                None if theirs is None or not theirs else total / theirs
            )  # every probe, whatever the peer passes
            rows.append(faster(f"API, {kind} probes passed of {total}", passed, theirs, peer, goal))
    print(write_record("api_matrix", rows, matrix=results))


if __name__ == "__main__":
    main()
