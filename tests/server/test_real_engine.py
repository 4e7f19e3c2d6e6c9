"""The API over the real engine: a random model of two layers with a byte-level tokenizer."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jsonschema
import pytest
import torch

from rorqual.checkpoint import hf
from rorqual.data.bpe import BOS, EOS, train_bpe, write_tokenizer
from rorqual.engine.config import EngineConfig
from rorqual.model.attend import Causal
from rorqual.model.transformer import Transformer
from rorqual.server.loading import load_served
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import VISIBLE, Tokenizer
from rorqual.train.config import Shape

CONTEXT = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with ChatML as its template."""
    work = tmp_path_factory.mktemp("served")
    write_tokenizer(work, train_bpe(["def f(x):\n    return x\n", "the sea is blue, ďábel 👋"] * 3, 320))
    shape = Shape(depth=2, width=32, heads=2, experts=4, experts_per_token=2)
    model = Transformer(shape.model(Tokenizer.load(work).vocab_size, CONTEXT, 0, 1)).init_weights(0)
    hf.save_model(model, work / "model", tokenizer_from=work)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    (work / "model" / "chat_template.jinja").write_text(template)
    return work / "model"


@pytest.fixture(scope="module")
def live(start, folder):
    server = start()
    model = load_served("tiny", folder, 64, EngineConfig(cache_tokens=8192, block_size=16), "float32")
    server.service.models.add(model)
    server.loop_call(model.bridge.start)
    return server


def ask(live, content: str = "the sea", **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}
    answer = live.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(answer) -> str:
    return answer["choices"][0]["message"]["content"]


def test_row_12_a_seed_is_the_same_alone_and_among_others(live):
    """One request alone, then with 15 neighbours at once."""
    alone = text(ask(live, seed=7, temperature=1.2))
    with ThreadPoolExecutor(16) as pool:
        others = [
            pool.submit(ask, live, "x" * i, seed=i, temperature=1.2, max_tokens=30) for i in range(1, 16)
        ]
        again = pool.submit(ask, live, seed=7, temperature=1.2)
        assert text(again.result()) == alone
        assert len({text(o.result()) for o in others}) > 10


def test_row_13_a_seed_is_the_same_after_a_restart_and_with_a_warm_cache(live, start, folder):
    long = "the sea is blue " * 8
    cold, warm = (ask(live, long, seed=3, temperature=1.0, user_id="r13") for _ in range(2))
    assert warm["usage"]["prompt_cache_hit_tokens"] > 0
    other = start()
    model = load_served("tiny", folder, 64, EngineConfig(cache_tokens=8192), "float32")
    other.service.models.add(model)
    other.loop_call(model.bridge.start)
    assert text(cold) == text(warm) == text(ask(other, long, seed=3, temperature=1.0))


def test_row_15_logprobs_are_the_models_own(live):
    """Each token's log-probability against a forward pass over prompt and completion, to 1e-4."""
    answer = ask(live, logprobs=True, top_logprobs=5, temperature=1.0, seed=1)
    engine = live.service.models.find("tiny").bridge.engine
    ids = live.client.post(
        "/tokenize", json={"model": "tiny", "messages": [{"role": "user", "content": "the sea"}]}
    ).json()["tokens"]
    entries = answer["choices"][0]["logprobs"]["content"]
    vocabulary = {engine.tokenizer.token_bytes(i): i for i in range(engine.vocab_size)}
    drawn = [vocabulary[bytes(e["bytes"])] for e in entries]
    whole = torch.tensor([ids + drawn])
    with torch.inference_mode():
        h = engine.model(whole, torch.arange(whole.shape[1])[None], Causal())
        want = engine.model.logits(h).float().log_softmax(-1)[0, len(ids) - 1 : -1]
    for row, entry, token_id in zip(want, entries, drawn, strict=True):
        assert entry["logprob"] == pytest.approx(float(row[token_id]), abs=1e-4)
        assert [t["logprob"] for t in entry["top_logprobs"]] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-4
        )


def test_what_cannot_be_drawn_is_no_alternative(live):
    """Minus infinity is not JSON: the token drawn is the only alternative left by top_k=1."""
    entry = ask(live, logprobs=True, top_logprobs=4, top_k=1)["choices"][0]["logprobs"]["content"][0]
    assert [(t["token"], t["logprob"]) for t in entry["top_logprobs"]] == [(entry["token"], 0.0)]
    body = {"model": "tiny", "prompt": "the sea", "max_tokens": 1, "logprobs": 3, "top_k": 1}
    block = live.client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert block["top_logprobs"] == [{block["tokens"][0]: 0.0}]


def test_row_53_a_warm_cache_changes_no_logprob(live):
    """All full blocks are found the second time, and the scores are those of the first to 1e-5."""
    long = "blue is the sea " * 10
    first, second = (ask(live, long, logprobs=True, temperature=0, user_id="r53") for _ in range(2))
    prompt = second["usage"]["prompt_tokens"]
    assert first["usage"]["prompt_cache_hit_tokens"] == 0
    assert second["usage"]["prompt_cache_hit_tokens"] >= (prompt - 1) // 16 * 16
    scores = [[e["logprob"] for e in a["choices"][0]["logprobs"]["content"]] for a in (first, second)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_row_54_another_user_finds_nothing(live):
    long = "sea the blue is " * 10
    ask(live, long, user_id="one")
    assert ask(live, long, user_id="two")["usage"]["prompt_cache_hit_tokens"] == 0
    assert ask(live, long, user_id="one")["usage"]["prompt_cache_hit_tokens"] > 0


def test_row_20_b058_stream_equals_whole_in_whole_characters(live):
    """Random tokens are mostly broken UTF-8: still the same text either way."""
    for seed in range(5):
        whole = text(ask(live, seed=seed, temperature=1.5, max_tokens=60))
        said = [{"role": "user", "content": "the sea"}]
        body = {"model": "tiny", "messages": said, "max_tokens": 60, "seed": seed, "temperature": 1.5}
        frames = live.frames("/v1/chat/completions", body)[:-1]
        parts = [json.loads(f[6:])["choices"][0]["delta"].get("content", "") for f in frames]
        assert "".join(parts) == whole


def test_row_43_a_schema_on_random_weights(live):
    """Every finished answer validates, and nearly all finish."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}}},
        "required": ["name", "tags"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    choices = ask(live, response_format=form, n=20, max_tokens=120, temperature=1.5, seed=1)["choices"]
    finished = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert len(finished) >= 19
    for answer in finished:
        jsonschema.validate(json.loads(answer), schema)


def test_row_46_a_forced_call_on_random_weights(live):
    parameters = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    choices = ask(live, tools=tools, tool_choice="required", n=10, max_tokens=150, temperature=1.5, seed=2)[
        "choices"
    ]
    for choice in choices:
        assert choice["finish_reason"] == "tool_calls", choice
        for call in choice["message"]["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), parameters)


@pytest.fixture(scope="module")
def thinker(live):
    """The same model with DeepSeek-V3's template: its thoughts stand between tokens of our own tokenizer."""
    tokens = {"bos_token": BOS, "eos_token": EOS}
    template = ChatTemplate.built_in("deepseek-v3", tokens)
    live.service.models.add(replace(live.service.models.find("tiny"), name="thinker", template=template))
    return live


def test_a_thought_ends_at_its_own_token(thinker):
    """After the budget comes the token itself, and what follows is the answer: text, JSON or a call."""
    fields = {
        "model": "thinker",
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "max_tokens": 150,
        "seed": 1,
    }
    message = ask(thinker, **fields)["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    form = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {**schema, "additionalProperties": False}},
    }
    assert type(json.loads(text(ask(thinker, response_format=form, **fields)))["a"]) is bool
    function = {"name": "f", "parameters": {"type": "object", "additionalProperties": False}}
    tools = [{"type": "function", "function": function}]
    choice = ask(thinker, tools=tools, tool_choice="required", **fields)["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert choice["message"]["reasoning_content"]


def test_an_earlier_thought_stands_between_its_tokens(thinker):
    """Where tools are in play: by the server's own tags, as the template knows no `reasoning_content`."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ]
    ids = thinker.client.post("/tokenize", json={"model": "tiny", "messages": said}).json()["tokens"]
    tokenizer = thinker.service.models.find("tiny").tokenizer
    assert [tokenizer.decode([i]) for i in ids if i in map(tokenizer.token_id, VISIBLE)] == list(VISIBLE)


def test_row_14_stop_strings(live):
    """Pieces of what the model says greedily, as stop strings."""
    said = text(ask(live, temperature=0, max_tokens=40))
    for at in range(0, len(said) - 3, 3):
        stop = said[at : at + 3]
        assert text(ask(live, temperature=0, max_tokens=40, stop=[stop])) == said[: said.index(stop)]


def test_b043_context_ends_requests_and_not_the_server(live):
    """ggml-org/llama.cpp#8862: three at once run into the end; all finish with length, and the next is answered."""
    count = ask(live, "", max_tokens=1)["usage"]["prompt_tokens"]
    with ThreadPoolExecutor(3) as pool:
        long = [
            pool.submit(ask, live, "x" * (CONTEXT - 60), max_tokens=32000, ignore_eos=True) for _ in range(3)
        ]
        for one in long:
            answer = one.result()
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["total_tokens"] <= CONTEXT
    assert ask(live, "", max_tokens=1)["usage"]["prompt_tokens"] == count


def test_row_65_decisions_sum_to_one(live):
    question = {
        "type": "choice",
        "instructions": "?",
        "choices": [{"value": "yes"}, {"value": "no"}, {"value": "maybe"}],
    }
    body = {"model": "tiny", "input": "x", "questions": [question]}
    answer = live.client.post("/v1/decisions", json=body).json()["answers"][0]
    assert sum(p["probability"] for p in answer["probabilities"]) == pytest.approx(1)


def test_row_56_echo_scores(live):
    """Prompt and completion scored in one call."""
    body = {
        "model": "tiny",
        "prompt": "the sea is",
        "echo": True,
        "logprobs": 2,
        "max_tokens": 3,
        "temperature": 0,
    }
    choice = live.client.post("/v1/completions", json=body).json()["choices"][0]
    block = choice["logprobs"]
    assert block["token_logprobs"][0] is None
    assert all(isinstance(v, float) for v in block["token_logprobs"][1:])
    assert "".join(block["tokens"]).startswith("the sea is") or block["tokens"][0].startswith("<")


def test_b012_non_finite_logits_are_an_error(start, folder):
    """vllm-project/vllm#8283: a weight that overflows gives a 500, never text of token 0; the server lives."""
    server = start()
    model = load_served("broken", folder, 64, EngineConfig(cache_tokens=1024), "float32")
    with torch.no_grad():
        model.bridge.engine.model.layers[0].self_attn.o_proj.weight.mul_(float("inf"))
    server.service.models.add(model)
    server.loop_call(model.bridge.start)
    body = {"model": "broken", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert "non-finite" in answer.json()["error"]["message"]
    assert server.chat().status_code == 200


def test_no_request_leaves_a_block_behind(live):
    """After all of the above the engine holds nothing."""
    engine = live.service.models.find("tiny").bridge.engine
    assert not engine.has_work()
    engine.check()


def test_models_take_turns_on_one_thread(live, folder, monkeypatch):
    """Two threads that compute would each have OpenMP workers, more than there are cores; both models answer at once."""
    second = load_served("second", folder, 64, EngineConfig(cache_tokens=8192), "float32")
    live.service.models.add(second)
    live.loop_call(second.bridge.start)
    first, threads = live.service.models.find("tiny"), {}
    for model in (first, second):
        step = model.bridge.engine.step

        def watched(name=model.name, step=step):
            threads.setdefault(name, set()).add(threading.get_ident())
            return step()

        monkeypatch.setattr(model.bridge.engine, "step", watched)
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, live, f"{i}", model=("tiny", "second")[i % 2], seed=i) for i in range(8)]
        assert all(text(a.result()) is not None for a in asked)
    assert threads["tiny"] == threads["second"]
    assert len(threads["tiny"]) == 1
