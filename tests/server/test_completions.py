"""The older completions: prompts in every form, echo and scores, fill-in-the-middle."""

from __future__ import annotations

import json
import math

import pytest

from rorqual.server.completions import _FIM
from rorqual.server.scripted import ScriptedAnswer

TEXT = "on and on"


@pytest.fixture(scope="module")
def live(start):
    pieces = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
    return start(
        ScriptedAnswer(match="fim▁hole", text="middle"),
        ScriptedAnswer(match="unused", pieces=pieces),
        ScriptedAnswer(text=TEXT),
        script={"max_model_len": 128},
    )


def complete(live, prompt, **fields):
    return live.client.post("/v1/completions", json={"model": "scripted", "prompt": prompt, **fields})


def test_row_56_shape(live):
    answer = complete(live, "go").json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("prompt", "count"), [("go", 1), (["go", "stay"], 2), ([103, 111], 1), ([[103], [111, 112]], 2)]
)
def test_row_56_prompts_in_every_form(live, prompt, count):
    """A text, texts, ids, lists of ids; choices in order; n of each."""
    assert len(complete(live, prompt).json()["choices"]) == count
    answer = complete(live, prompt, n=2).json()
    assert [c["index"] for c in answer["choices"]] == list(range(2 * count))
    assert answer["usage"]["completion_tokens"] == 2 * count * (len(TEXT) + 1)


@pytest.mark.parametrize("prompt", [[], "", [[]], ["a", 1], [999999], [[-1]], 7, None, [["a"]]])
def test_prompts_that_are_none(live, prompt):
    if prompt == "":
        assert complete(live, prompt).status_code == 200  # the begin token alone
        return
    answer = complete(live, prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")


def test_default_of_16_tokens(live):
    """OpenAI's, on this route."""
    long = "x" * 30
    assert len(complete(live, long, logit_bias={"97": 100}).json()["choices"][0]["text"]) == 16


def test_b007_one_begin_token(live):
    """Added once, whether or not the prompt begins with its text."""
    for prompt in ("go", "<bos>go"):
        assert complete(live, prompt).json()["usage"]["prompt_tokens"] == 3


def test_row_56_echo_and_logprobs(live):
    """The four lists of the older shape over prompt and completion; the first token has no score."""
    choice = complete(live, "go", echo=True, logprobs=2, max_tokens=4).json()["choices"][0]
    assert choice["text"] == "goon a"
    block = choice["logprobs"]
    assert block["tokens"] == ["<bos>", "g", "o", "o", "n", " ", "a"]
    assert block["token_logprobs"] == [None] + [pytest.approx(math.log(0.5))] * 6
    assert block["top_logprobs"][0] is None
    assert all(len(top) == 2 for top in block["top_logprobs"][1:])
    assert block["text_offset"] == [0, 0, 1, 2, 3, 4, 5]  # the text does not show the begin token


def test_offsets_are_places_in_the_text(live):
    """Of characters, which take several tokens here; a special token counts where the prompt spells it."""
    choice = complete(live, "<bos>a👋b", echo=True, logprobs=0, max_tokens=2).json()["choices"][0]
    places = choice["logprobs"]["text_offset"]
    assert places == [0, 5, 6, 6, 6, 6, 7, 8, 9]
    shown = [t for t in choice["logprobs"]["tokens"] if "\ufffd" not in t]
    assert [choice["text"][at:][: len(t)] for t, at in zip(shown, [0, 5, 7, 8, 9], strict=True)] == shown


def test_b061_logprobs_0(live):
    """vllm-project/vllm#3179: 0 still gives the chosen tokens' scores."""
    block = complete(live, "go", logprobs=0).json()["choices"][0]["logprobs"]
    assert len(block["token_logprobs"]) == len(TEXT)
    assert block["top_logprobs"] == [{}] * len(TEXT)


def test_b046_scoring_a_full_window(live):
    """EleutherAI/lm-evaluation-harness#2880: 128 tokens in a context of 128 can be scored, not continued."""
    ids = [97] * 128
    answer = complete(live, ids, echo=True, logprobs=1, max_tokens=0).json()
    scores = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert len([s for s in scores if s is not None]) == 127
    assert answer["choices"][0]["finish_reason"] == "length"
    assert complete(live, ids, max_tokens=1).json()["error"]["code"] == "context_length_exceeded"


def test_streamed(live):
    """Chunks, usage where asked, [DONE]; echo comes first."""
    body = {"model": "scripted", "prompt": "go", "echo": True, "stream_options": {"include_usage": True}}
    frames = live.frames("/v1/completions", body)
    assert frames[-1] == b"data: [DONE]"
    chunks = [json.loads(f[6:]) for f in frames[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "go" + TEXT
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(TEXT) + 1
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_row_56_suffix_fills_in_the_middle(live):
    """With the model's own markers; DeepSeek's /beta path too."""
    for path in ("/v1/completions", "/beta/completions"):
        body = {"model": "scripted", "prompt": "def f(", "suffix": "):", "max_tokens": 20}
        assert live.client.post(path, json=body).json()["choices"][0]["text"] == "middle"


def test_suffix_on_a_model_without_the_markers(start):
    live = start(ScriptedAnswer(text=TEXT))
    error = complete(live, "a", suffix="b")
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "suffix"
    assert len(_FIM) == 3


@pytest.mark.parametrize(
    ("field", "value"), [("best_of", 3), ("logprobs", 21), ("n", 65), ("max_tokens", -1), ("suffix", 3)]
)
def test_fields_out_of_range(live, field, value):
    answer = complete(live, "go", **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_too_many_prompts(live):
    assert complete(live, ["a"] * 257).status_code == 400
    assert complete(live, ["a"] * 128, n=3).status_code == 400
