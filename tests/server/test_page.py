"""The chat page in headless Chromium, driven over WebDriver's plain HTTP."""

from __future__ import annotations

import base64
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from rorqual.server.scripted import ScriptedAnswer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs chromium and chromium-driver"),
]

MARKDOWN = """because of the sea

and more</think>

# A title

Some **bold**, *soft* and `code` <img src=x onerror="document.title='broken'"> with a [link](https://example.com) and
a [bad one](javascript:alert(1)).

1. first
2. second
   - inner

```python
def f(x):
    return x < 1
```

| a | b |
|---|---|
| 1 | 2 |

> quoted
"""


class Browser:
    """One headless window."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 860) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        self._wait(lambda: self._up())
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += f" --disable-component-update --disable-sync --window-size={width},{height} --user-data-dir={folder}"
        options = {"args": flags.split()}
        capabilities = {
            "alwaysMatch": {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
        }
        session = self._http.post("/session", json={"capabilities": capabilities}).json()["value"][
            "sessionId"
        ]
        self._base = f"/session/{session}"

    def _up(self) -> bool:
        try:
            return bool(self._http.get("/status").json()["value"]["ready"])
        except httpx.TransportError:
            return False

    def _wait(self, condition: Any, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.02)

    def call(self, path: str, **body: Any) -> Any:
        answer = self._http.post(self._base + path, json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer

    def open(self, url: str) -> None:
        self.call("/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        return self.call("/execute/sync", script=script, args=list(args))

    def text(self, selector: str) -> str:
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent).join('|')", selector
        )

    def wait(self, script: str, *args: Any) -> None:
        self._wait(lambda: self.run(script, *args))

    def keys(self, text: str, *, alt: bool = False) -> None:
        """Type into whatever has the focus."""
        events = [{"type": t, "value": c} for c in text for t in ("keyDown", "keyUp")]
        if alt:
            events = [{"type": "keyDown", "value": "\ue00a"}, *events, {"type": "keyUp", "value": "\ue00a"}]
        self.call("/actions", actions=[{"type": "key", "id": "k", "actions": events}])

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._http.get(self._base + "/screenshot").json()["value"]))

    def complaints(self) -> list[str]:
        """Errors of the console, refused loads included."""
        entries = self.call("/se/log", type="browser")
        return [e["message"] for e in entries if e["level"] == "SEVERE"]

    def close(self) -> None:
        self._http.delete(self._base)
        self._http.close()
        self._driver.terminate()
        self._driver.wait()


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(match="endless", text="hm</think>and on ", endless=True, delay_s=0.01),
        ScriptedAnswer(match="fail", text="hm</think>abcdef", error="boom", error_after=14, delay_s=0.01),
        ScriptedAnswer(text=MARKDOWN, tokens_per_step=8, delay_s=0.005),
    )
    prices = {"price": [{"miss": "1", "output": "20"}]}
    return start(*answers, script={"thinks": True, "max_model_len": 100_000}, prices=prices)


@pytest.fixture
def browser(tmp_path):
    made = Browser(tmp_path / "profile")
    yield made
    made.close()


ANSWERED = "return document.querySelectorAll('.meta button').length >= 2"
ENTER, ESCAPE = "\ue007", "\ue00c"


def test_row_69_an_answer(live, browser, tmp_path):
    """Typed and sent by keyboard alone; the thought folded, markdown as elements, numbers, nothing run or loaded."""
    browser.open(live.url)
    browser.wait("return document.querySelector('#model').options.length > 0")
    browser.keys("Why is the sea blue?" + ENTER)
    browser.wait(ANSWERED)
    assert browser.text(".user") == "Why is the sea blue?"
    assert browser.text(".thought div") == "because of the sea\n\nand more"
    assert browser.run("return document.querySelector('.thought').open") is False
    assert browser.text(".text h1") == "A title"
    assert browser.text(".text strong") == "bold"
    assert browser.text(".text pre code") == "def f(x):\n    return x < 1"
    assert browser.text(".text ol > li > ul > li") == "inner"
    assert browser.text(".text td") == "1|2"
    assert browser.text(".text blockquote") == "quoted"
    assert browser.run("return [...document.querySelectorAll('.text a')].map(a => a.href)") == [
        "https://example.com/"
    ]
    assert browser.run("return document.querySelectorAll('#log img').length") == 0
    assert browser.run("return document.title") == "Rorqual"
    numbers = browser.text(".numbers")
    assert re.search(r"\d+ tokens · [\d.]+/s · first after", numbers)
    assert "USD" in numbers
    browser.keys("t", alt=True)
    assert browser.run("return document.querySelector('.thought').open") is True
    browser.picture(tmp_path / "answer.png")
    assert browser.complaints() == []


def test_row_69_stop_frees_the_engine_and_regenerate_works(live, browser):
    """Escape ends the answer and the engine's work; again writes a new one in its place."""
    browser.open(live.url)
    browser.keys("endless" + ENTER)
    browser.wait("return (document.querySelector('.text') || {textContent: ''}).textContent.length > 20")
    assert live.stats()[0] == 1
    browser.keys(ESCAPE)
    browser.wait(ANSWERED)
    assert "stopped" in browser.text(".numbers")
    browser._wait(lambda: live.stats() == (0, 0))
    browser.keys("r", alt=True)
    browser.wait("return !document.querySelector('#stop').hidden")
    browser.keys(ESCAPE)
    browser.wait(ANSWERED)
    assert browser.run("return document.querySelectorAll('.answer').length") == 1


def test_row_69_conversations_survive_a_reload(live, browser):
    """Kept in the browser; a new one beside the old, and back by keyboard."""
    browser.open(live.url)
    browser.keys("first talk" + ENTER)
    browser.wait(ANSWERED)
    browser.open(live.url)
    browser.wait("return document.querySelectorAll('.answer').length === 1")
    assert browser.text("#talks .open") == "first talk"
    browser.keys("n", alt=True)
    assert browser.run("return document.querySelectorAll('.answer').length") == 0
    browser.keys("second talk" + ENTER)
    browser.wait(ANSWERED)
    assert browser.text("#talks .open") == "second talk|first talk"
    browser.keys("\ue015", alt=True)
    assert browser.text(".user") == "first talk"


def test_row_69_an_error_is_shown(live, browser):
    """The server's message beside what was written so far, and a way to try again."""
    browser.open(live.url)
    browser.keys("fail" + ENTER)
    browser.wait(ANSWERED)
    assert "engine failed" in browser.text(".fault")
    assert browser.text(".text p") == "abcd"
    assert "Try again" in browser.text(".meta button")


def test_row_69_on_a_phone(live, tmp_path):
    """Nothing is wider than the screen, and the list opens over it."""
    browser = Browser(tmp_path / "phone", 390, 800)
    try:
        browser.open(live.url)
        browser.keys("hello" + ENTER)
        browser.wait(ANSWERED)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
        assert browser.run("return getComputedStyle(document.querySelector('#side')).visibility") == "hidden"
        browser.run("document.querySelector('#menu').click()")
        browser.wait("return getComputedStyle(document.querySelector('#side')).visibility === 'visible'")
    finally:
        browser.close()
