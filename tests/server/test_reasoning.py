"""Thought and answer told apart, at every cut of the output, and through the API."""

from __future__ import annotations

import json

import pytest

from rorqual.server.reasoning import ReasoningSplitter, opened_by
from rorqual.server.scripted import ScriptedAnswer

CASES = [
    # opened by the prompt, output, thought, answer
    (True, "ab</think>cd", "ab", "cd"),
    (True, "\nab\n</think>\n\ncd\n", "ab", "cd\n"),
    (True, "never closes", "never closes", ""),
    (True, "</think>cd", "", "cd"),
    (True, "a < b </thin k</think>x</think>y", "a < b </thin k", "x</think>y"),
    (False, "<think>\nab\n</think>\n\ncd", "ab", "cd"),
    (False, " \n<think>ab</think>cd", "ab", "cd"),
    (False, "no thought <think>", "", "no thought <think>"),
    (False, "  spaces stay", "", "  spaces stay"),
    (False, "<th", "", "<th"),
    (True, "ab</think>\n\n", "ab", ""),
    (True, "", "", ""),
]


def split(opened: bool, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened=opened)
    out = [p for piece in pieces for p in splitter.feed(piece)] + splitter.finish()
    return tuple("".join(p.text for p in out if p.section == s) for s in ("reasoning", "content"))


@pytest.mark.parametrize(("opened", "output", "thought", "answer"), CASES)
def test_b009_every_cut(opened, output, thought, answer):
    """deepseek-ai/DeepSeek-R1#352: also where the prompt already opened the thought."""
    assert split(opened, list(output)) == (thought, answer)
    for cut in range(len(output) + 1):
        assert split(opened, [output[:cut], output[cut:]]) == (thought, answer)


def test_whether_a_prompt_opens_the_thought():
    """An open tag after the last closing one."""
    assert opened_by("user: hi\n<think>\n")
    assert opened_by("<think>a</think> <think>")
    assert not opened_by("<think>a</think>")
    assert not opened_by("hi")


@pytest.mark.parametrize(
    ("prompt", "prefix", "opened"),
    [
        ("<|assistant|>", "<think>\nhm", True),
        ("<|assistant|><think>\n", "hm", True),
        ("<|assistant|><think>\n", "hm</think>so", False),
        ("<|assistant|>", "The tag <think>", False),
    ],
)
def test_whether_a_begun_answer_opens_the_thought(prompt, prefix, opened):
    """The template's tag, or one at its very beginning, until it is closed."""
    assert opened_by(prompt, prefix) is opened


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(match="forever", text="on and on ", endless=True),
        ScriptedAnswer(match="one step", pieces=("why", "</think>Hi", " there")),
        ScriptedAnswer(text="because ü\n</think>\n\nHello!"),
    )
    return start(*answers, script={"thinks": True, "max_model_len": 1024})


def test_row_50_thought_apart_and_counted(live):
    """reasoning_content beside content; its tokens (bytes here, the closing tag with them) within the
    completion's.
    """
    answer = live.chat().json()
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello!",
        "reasoning_content": "because ü",
    }
    usage = answer["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("because ü\n</think>".encode())
    assert usage["completion_tokens"] == len("because ü\n</think>\n\nHello!".encode()) + 1


def test_row_50_the_alias_by_flag(start):
    """`reasoning` too, for clients that read that name."""
    live = start(
        ScriptedAnswer(text="a</think>b"), script={"thinks": True}, settings={"reasoning_alias": True}
    )
    message = live.chat().json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "a"


def test_b067_never_both_in_one_delta(live):
    """vllm-project/vllm#43933: the closing tag and the first of the answer in one token."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "one step"}]}
    deltas = [
        json.loads(f[6:])["choices"][0]["delta"] for f in live.frames("/v1/chat/completions", body)[:-1]
    ]
    assert not any(d.get("content") and d.get("reasoning_content") for d in deltas)
    assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["why"]
    assert [d["content"] for d in deltas if d.get("content")] == ["Hi", " there"]


def test_b009_a_thought_that_never_closes(live):
    """All of it is thought, the content empty, finish_reason length."""
    choice = live.chat("forever", max_tokens=30).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"].startswith("on and on")


def test_row_51_thinking_off(live):
    """The prompt opens no thought, so the output is all answer."""
    for fields in (
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        message = live.chat("forever", max_tokens=9, **fields).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "on and on"}


def test_row_51_a_budget_closes_the_thought(live):
    """After 20 tokens the closing tag is forced, and the answer begins."""
    fields = {"thinking": {"type": "enabled", "budget_tokens": 20}, "max_tokens": 60}
    answer = live.chat("forever", **fields).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"] == "on and on on and on"
    assert message["content"]
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 20 + len("\n</think>")


@pytest.mark.parametrize("effort", ["minimal", "low", "medium", "high", "xhigh", "max", "ultra"])
def test_row_51_efforts(live, effort):
    """Every word that clients send is understood."""
    assert live.chat(reasoning_effort=effort).status_code == 200


def test_logprobs_of_thought_and_answer(live):
    """Apart, like the texts; each token once."""
    logprobs = live.chat(logprobs=True).json()["choices"][0]["logprobs"]
    assert "".join(e["token"] for e in logprobs["content"]) == "Hello!"
    thought = bytes(b for e in logprobs["reasoning_content"] for b in e["bytes"]).decode()
    assert thought == "because ü"


@pytest.mark.parametrize("tag", ["<think>", "</think>"])
@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_message_that_quotes_a_tag_opens_and_closes_nothing(live, tag, thinking):
    """Neither in what the user says nor in a tool's description."""
    function = {"name": "f", "description": f"writes {tag}"}
    for fields in ({}, {"tools": [{"type": "function", "function": function}]}):
        message = live.chat(f"What does {tag} mean?", thinking={"type": thinking}, **fields).json()[
            "choices"
        ][0]["message"]
        if thinking == "enabled":
            assert (message["content"], message["reasoning_content"]) == ("Hello!", "because ü")
        else:
            assert message["content"] == "because ü\n</think>\n\nHello!"
            assert "reasoning_content" not in message


def test_a_thought_that_the_client_has_begun_goes_on(live):
    """A prefix that opens it, as one writes who continues a thought."""
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>First,", "prefix": True},
    ]
    message = live.chat(messages=said).json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("Hello!", "because ü")
