"""Chat completions: shapes, counts, limits and options, over a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rorqual.server.scripted import ScriptedAnswer

TEXT = "Hello there! ďábel 👋 and 世界"


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(match="endless", text="ab", endless=True, tokens_per_step=4),
        ScriptedAnswer(match="random", random=True, tokens_per_step=8),
        ScriptedAnswer(match="hold", text="UNO DUE TRE"),
        ScriptedAnswer(text=TEXT, tokens_per_step=1),
    )
    return start(*answers, script={"max_model_len": 512})


def stream(live, content: str = "hi", **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}], **fields}
    frames = live.frames("/v1/chat/completions", body)
    assert frames[-1] == b"data: [DONE]"
    return [json.loads(f.removeprefix(b"data: ")) for f in frames[:-1]]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])


def test_row_1_with_and_without_v1(live):
    """The same answer under both paths, but for id and time."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "paths"}], "seed": 1}
    first, second = (
        live.client.post(path, json=body).json() for path in ("/v1/chat/completions", "/chat/completions")
    )
    for answer in (first, second):
        assert answer.pop("id").startswith("chatcmpl-")
        answer.pop("created")
        usage = answer.pop("usage")
        assert usage["prompt_tokens"] == usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"]
    assert first == second


def test_row_2_shape(live):
    """DeepSeek's documented fields, ids all different."""
    answer = live.chat().json()
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    assert answer["model"] == "scripted"
    assert isinstance(answer["system_fingerprint"], str)
    choice = answer["choices"][0]
    assert choice == {
        "index": 0,
        "message": {"role": "assistant", "content": TEXT},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert len({live.chat().json()["id"] for _ in range(20)}) == 20


def test_row_3_usage_adds_up(live):
    """prompt + completion = total, hit + miss = prompt, cached_tokens = hit, whatever the request."""
    for size in range(0, 200, 20):
        usage = live.chat("endless" + "x" * size, max_tokens=1 + size % 7).json()["usage"]
        assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]
        assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_cache_hit_tokens"]
        assert usage["completion_tokens"] == 1 + size % 7


def test_row_4_usage_is_the_count_of_the_template_and_the_text(live):
    """Bytes are tokens here: <bos>, <|user|>, text, <eos>, newline, <|assistant|>; the answer's bytes and
    <eos>.
    """
    usage = live.chat("count me").json()["usage"]
    assert usage["prompt_tokens"] == 1 + len("<|user|>") + len("count me") + 1 + 1 + len("<|assistant|>")
    assert usage["completion_tokens"] == len(TEXT.encode()) + 1
    counted = live.client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "count me"}]}
    ).json()
    assert counted["count"] == usage["prompt_tokens"]


def test_row_5_n_choices_usage_sums_all(live):
    """llama-server counts one choice only; ours counts all."""
    answer = live.chat("endless", n=3, max_tokens=5).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 15


def test_row_6_finish_reasons_in_both_modes(live):
    """stop and length, always present, once per choice in a stream."""
    for content, fields, reason in (("hi", {}, "stop"), ("endless", {"max_tokens": 3}, "length")):
        assert live.chat(content, **fields).json()["choices"][0]["finish_reason"] == reason
        reasons = [c["choices"][0]["finish_reason"] for c in stream(live, content, **fields)]
        assert reasons[-1] == reason
        assert set(reasons[:-1]) == {None}


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 4}, {"max_completion_tokens": 4}, {"max_tokens": 4, "max_completion_tokens": 4}]
)
def test_row_7_both_names_of_the_limit(live, fields):
    """abetlen/llama-cpp-python#1907: max_completion_tokens means max_tokens."""
    answer = live.chat("endless", **fields).json()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "length"


def test_row_7_two_limits_that_differ(live):
    """Two different limits are a contradiction."""
    error = live.chat(max_tokens=3, max_completion_tokens=4)
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "max_completion_tokens"


def test_row_8_max_tokens_beyond_the_context_is_clamped(live):
    """Agents send 32,000 whatever the model; the answer ends with length at the context's end."""
    answer = live.chat("endless", max_tokens=32000).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 512


def test_row_9_prompt_beyond_the_context(live):
    """400 with both numbers and OpenAI's code, before any compute."""
    answer = live.chat("x" * 4000)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "4025" in error["message"] or "4026" in error["message"] or "4024" in error["message"]


def test_b045_a_thought_cut_by_the_context_does_not_shrink_the_next(start):
    """kvcache-ai/ktransformers#1795: context 64, prompt 50, a thought that never ends: always 14 tokens."""
    live = start(ScriptedAnswer(text="hm", endless=True), script={"max_model_len": 64, "thinks": True})
    rest = (
        50
        - live.client.post("/tokenize", json={"messages": [{"role": "user", "content": ""}]}).json()["count"]
    )
    for _ in range(3):
        answer = live.chat("x" * rest).json()
        assert answer["usage"]["completion_tokens"] == 14
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["message"]["content"] == ""
        assert answer["choices"][0]["message"]["reasoning_content"].startswith("hmhm")


@pytest.mark.parametrize("stops", [["TRE\nAAAA"], ["TRE\nAAAA", "ZZ"]])
def test_b057_held_text_is_given_out_at_the_end(live, stops):
    """ggml-org/llama.cpp#9867: what might have begun a stop string is not lost."""
    assert live.chat("hold", stop=stops).json()["choices"][0]["message"]["content"] == "UNO DUE TRE"
    assert text_of(stream(live, "hold", stop=stops)) == "UNO DUE TRE"


def test_row_14_stop_strings_never_leak(live):
    """Every substring of the answer as a stop string: the text up to its first place, streamed or whole."""
    for begin in range(0, len(TEXT), 3):
        for size in (1, 2, 5, 9):
            stop = TEXT[begin : begin + size]
            want = TEXT[: TEXT.index(stop)]
            assert live.chat(stop=[stop]).json()["choices"][0]["message"]["content"] == want
    assert text_of(stream(live, stop=["there", "👋"])) == "Hello "


def test_row_16_logit_bias(live):
    """+100 forces a token, -100 bans it; bytes are tokens."""
    assert live.chat(max_tokens=3, logit_bias={"65": 100}).json()["choices"][0]["message"]["content"] == "AAA"
    text = live.chat("random", max_tokens=200, seed=1, logit_bias={"65": -100}).json()
    assert "A" not in text["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "bias", ['{"1":null}', '{"1":true}', '{"1":Infinity}', '{"x":1}', '{"99999":1}', '{"1":101}']
)
def test_b075_logit_bias_that_makes_no_sense(live, bias):
    """ml-explore/mlx-lm#1527: 400 with the field's name, never a dropped connection."""
    body = f'{{"model":"scripted","messages":[{{"role":"user","content":"hi"}}],"logit_bias":{bias}}}'
    answer = live.client.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == ("logit_bias" if "Infinity" not in bias else None)


def test_row_12_seed(live):
    """The same seed gives the same text; choice i of n draws with seed + i."""
    texts = [
        live.chat("random", max_tokens=20, seed=7).json()["choices"][0]["message"]["content"]
        for _ in range(3)
    ]
    assert len(set(texts)) == 1
    both = live.chat("random", max_tokens=20, seed=7, n=2).json()["choices"]
    assert both[0]["message"]["content"] == texts[0] != both[1]["message"]["content"]


def test_b078_no_seed_is_fresh_randomness(live):
    """vllm-project/vllm#11953: a default seed would make all answers alike."""
    texts = {live.chat("random", max_tokens=32).json()["choices"][0]["message"]["content"] for _ in range(4)}
    assert len(texts) == 4


def test_row_15_logprobs_rebuild_the_text(live):
    """Bytes in order are the text's bytes, no token lost or doubled, the best alternatives first."""
    choice = live.chat(logprobs=True, top_logprobs=3).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(b for entry in content for b in entry["bytes"]).decode() == TEXT
    for entry in content:
        tops = [t["logprob"] for t in entry["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        assert len(tops) == 3
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"]


def test_b061_logprobs_without_alternatives(live):
    """vllm-project/vllm#4795: the chat shape with an empty list, one entry a token."""
    content = live.chat("endless", logprobs=True, max_tokens=3).json()["choices"][0]["logprobs"]["content"]
    assert [e["token"] for e in content] == ["a", "b", "a"]
    assert all(e["top_logprobs"] == [] for e in content)


def test_row_15_streamed_logprobs_are_the_same(live):
    """In a stream the entries come with the text that their tokens end up in."""
    whole = live.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = stream(live, logprobs=True)
    assert [e for c in chunks for e in (c["choices"][0]["logprobs"] or {}).get("content", [])] == whole


def test_row_15_logprobs_end_with_the_stop_string(live):
    """Tokens of a stop string are no part of the answer."""
    content = live.chat("hold", logprobs=True, stop=["TRE"]).json()["choices"][0]["logprobs"]["content"]
    assert "".join(e["token"] for e in content) == "UNO DUE "


def test_row_19_usage_chunk(live):
    """One chunk before [DONE] with no choices, only where asked; `usage` is null elsewhere."""
    chunks = stream(live, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert all(c["usage"] is None for c in chunks[:-1])
    whole = live.chat().json()["usage"]
    last = chunks[-1]["usage"]
    assert (last["prompt_tokens"], last["completion_tokens"]) == (
        whole["prompt_tokens"],
        whole["completion_tokens"],
    )
    assert all(c["usage"] is None and c["choices"] for c in stream(live))


def test_b055_stream_options_need_a_stream(live):
    """400 rather than an option that does nothing."""
    error = live.chat(stream_options={"include_usage": True})
    assert error.status_code == 400
    assert error.json()["error"]["param"] == "stream_options"


def test_continuous_usage(live):
    """Every chunk carries the counts so far, as load generators ask for."""
    chunks = stream(live, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [c["usage"]["completion_tokens"] for c in chunks[1:]]
    assert counts == sorted(counts)
    assert counts[-1] == len(TEXT.encode()) + 1


def test_row_20_b058_stream_equals_whole_and_no_half_characters(live):
    """ggml-org/llama.cpp#4036: each byte is a token here, and still no chunk holds U+FFFD."""
    chunks = stream(live)
    assert text_of(chunks) == TEXT
    assert all("\ufffd" not in c["choices"][0]["delta"].get("content", "") for c in chunks)


def test_b058_cut_in_the_middle_of_a_character(live):
    """max_tokens inside the emoji: the text so far, and no crash."""
    cut = len("Hello there! ďábel ".encode()) + 2
    text = live.chat(max_tokens=cut).json()["choices"][0]["message"]["content"]
    assert text.startswith("Hello there! ďábel ")


def test_b054_one_id_for_the_whole_stream(live):
    """ggml-org/llama.cpp#5876: one id, one created, one model; the first delta has the role."""
    chunks = stream(live)
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


def test_row_53_54_prefix_cache_is_reported_and_kept_apart(live):
    """A second identical prompt hits all full blocks (16 tokens here); another user_id hits none."""
    content = "cache " * 20
    first = live.chat(content, user_id="alice").json()["usage"]
    second = live.chat(content, user_id="alice").json()["usage"]
    other = live.chat(content, user_id="bob").json()["usage"]
    assert first["prompt_cache_hit_tokens"] == other["prompt_cache_hit_tokens"] == 0
    assert second["prompt_cache_hit_tokens"] == (second["prompt_tokens"] - 1) // 16 * 16


def test_row_31_alias(live):
    """An alias answers, under the name that was asked for."""
    assert live.chat(model="alias").json()["model"] == "alias"


@pytest.mark.parametrize("fields", [{"model": "nope"}, {"model": None}, {"model": ""}])
def test_row_31_unknown_or_missing_model(live, fields):
    """404 model_not_found, not an answer from whatever is loaded."""
    answer = live.chat(**fields)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_row_57_prefix_completion(live):
    """The reply is only the continuation; the prompt ends with the prefix, unclosed."""
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "The answer is", "prefix": True},
    ]
    body = {"model": "scripted", "messages": said}
    answer = live.client.post("/beta/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == TEXT
    ids = live.client.post("/tokenize", json={"messages": said}).json()["tokens"]
    prompt = live.client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert prompt.endswith("<|assistant|>The answer is")
    assert prompt.count("<|assistant|>") == 1


@pytest.mark.parametrize("role", ["user", "system"])
def test_row_57_prefix_of_another_role(live, role):
    """Only a last assistant message can be continued."""
    said = [{"role": role, "content": "hi", "prefix": True}]
    answer = live.client.post("/beta/chat/completions", json={"model": "scripted", "messages": said})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].prefix"


def test_b007_one_begin_token(live):
    """ollama/ollama#7548: the template writes it, so the tokenizer must not."""
    ids = live.client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()[
        "tokens"
    ]
    assert ids.count(256) == 1
    assert ids[0] == 256


def test_row_63_cost_on_demand(start):
    """usage.x_cost only where asked; 10 tokens at 2 a million are 0.00002."""
    live = start(ScriptedAnswer(text="a" * 100), prices={"price": [{"miss": "0", "output": "2"}]})
    assert "x_cost" not in live.chat(max_tokens=10).json()["usage"]
    assert live.chat(max_tokens=10, x_usage=True).json()["usage"]["x_cost"] == {
        "amount": "0.00002",
        "currency": "USD",
    }


def test_a_chunk_of_text_is_written_as_any_other_chunk() -> None:
    """The short way for plain text gives the very bytes of the general one."""
    from types import SimpleNamespace

    from rorqual.server.chat import _Writer
    from rorqual.server.events import Text

    request = SimpleNamespace(model='a "model"', logprobs=None)
    service = SimpleNamespace(settings=SimpleNamespace(reasoning_alias=False))
    writer = _Writer(request, SimpleNamespace(), SimpleNamespace(id="x", service=service))  # type: ignore[arg-type]
    for text in ("", "plain", 'quotes " and \\ and \n', "é 漢 🏖"):
        assert writer._event(3, Text(text), False) == writer._chunk(3, {"content": text})
