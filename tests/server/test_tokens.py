"""Tokenizing without generating."""

from __future__ import annotations

import threading

import pytest


@pytest.fixture(scope="module")
def live(start):
    return start()


def test_row_58_round_trip_of_all_characters(live):
    """A text of every script, control character and emoji comes back as it went in."""
    text = "".join(map(chr, range(1, 256))) + "日本語 👩‍👩‍👧 \u2028 ďábel"
    for path in ("/tokenize", "/v1/tokenize"):
        out = live.client.post(path, json={"prompt": text, "add_special_tokens": False}).json()
        assert out["count"] == len(out["tokens"]) == len(text.encode())
        back = live.client.post("/detokenize", json={"tokens": out["tokens"]}).json()
        assert back == {"prompt": text}


def test_row_58_conversations(live):
    """As the template writes them, with and without the opening of an answer."""
    said = {"messages": [{"role": "user", "content": "hi"}]}
    whole = live.client.post("/tokenize", json=said).json()["tokens"]
    closed = live.client.post("/tokenize", json={**said, "add_generation_prompt": False}).json()["tokens"]
    assert whole[: len(closed)] == closed
    assert bytes(whole[len(closed) :]) == b"<|assistant|>"


def test_begin_token(live):
    assert live.client.post("/tokenize", json={"prompt": "a"}).json()["tokens"] == [256, 97]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_wrong_bodies(live, path, body, param):
    answer = live.client.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


QUESTIONS = [{"type": "predicate", "instructions": f"Is it {i}?"} for i in range(3)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "blue"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "blue"}]}),
        ("/detokenize", {"tokens": [97]}),
        (
            "/v1/messages/count_tokens",
            {"model": "scripted", "messages": [{"role": "user", "content": "blue"}]},
        ),
        ("/v1/decisions", {"model": "scripted", "input": "blue", "questions": QUESTIONS}),
        ("/v1/chat/completions", {"model": "scripted", "messages": [{"role": "user", "content": "blue"}]}),
    ],
)
def test_a_long_text_holds_up_nobody(live, monkeypatch, path, body):
    """Nothing is read on the thread of the event loop, and what questions share only once."""
    model = live.service.models.find("scripted")
    loop_thread, read = [], []
    live.loop_call(lambda: loop_thread.append(threading.get_ident()))

    def watched(work):
        def wrapper(value, *args, **kwargs):
            read.append((threading.get_ident(), value))
            return work(value, *args, **kwargs)

        return wrapper

    monkeypatch.setattr(model.template, "render", watched(model.template.render))
    monkeypatch.setattr(model.tokenizer, "encode", watched(model.tokenizer.encode))
    if path == "/detokenize":  # else the scripted engine's own
        monkeypatch.setattr(model.tokenizer, "decode", watched(model.tokenizer.decode))
    assert live.client.post(path, json=body).status_code == 200
    assert read
    assert loop_thread[0] not in [thread for thread, _ in read]
    assert sum("blue" in value for _, value in read if isinstance(value, str)) <= 1
