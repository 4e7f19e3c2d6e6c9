"""The official OpenAI and Anthropic clients against a live server: what they parse is what counts."""

from __future__ import annotations

import json

import anthropic
import openai
import pytest
from pydantic import BaseModel

from rorqual.server.scripted import ScriptedAnswer
from rorqual.server.tools import HERMES

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(match="weather in", text="hm</think>" + HERMES.write("weather", '{"city": "Rome"}')),
        ScriptedAnswer(match="fail", text="</think>abcdef", error="boom", error_after=12),
        ScriptedAnswer(match="random", random=True),
        ScriptedAnswer(text="because\n</think>\n\nHello! ďábel 👋"),
    )
    return start(*answers, script={"thinks": True}, key={})


@pytest.fixture
def client(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0) as made:
        yield made


def said(text: str):
    return [{"role": "user", "content": text}]


def test_chat(client):
    answer = client.chat.completions.create(model="scripted", messages=said("hi"))
    assert answer.choices[0].message.content == "Hello! ďábel 👋"
    assert answer.choices[0].message.reasoning_content == "because"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_stream(client):
    with client.chat.completions.stream(
        model="scripted", messages=said("hi"), stream_options={"include_usage": True}
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "Hello! ďábel 👋"
    assert final.usage.completion_tokens > 0


def test_parse(client):
    """`.parse` sends a strict schema and reads it back."""

    class Person(BaseModel):
        name: str
        age: int

    answer = client.chat.completions.parse(
        model="scripted", messages=said("random"), response_format=Person, max_tokens=300, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_tools(client):
    with client.chat.completions.stream(
        model="scripted", messages=said("weather in Rome"), tools=[TOOL]
    ) as stream:
        for _ in stream:
            pass
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Rome"}


def test_row_21_an_error_within_a_stream_is_raised(client):
    with pytest.raises(openai.APIError, match="engine failed"):
        for _ in client.chat.completions.create(model="scripted", messages=said("fail"), stream=True):
            pass


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"temperature": 9}, openai.BadRequestError),
        ({"model": "nope"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": said("x" * 9000)}, openai.BadRequestError),
    ],
)
def test_row_37_messages_survive(client, change, error):
    """The exception has our message, code and param."""
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "scripted", "messages": said("hi"), **change})
    assert caught.value.code
    assert caught.value.param
    assert caught.value.body["message"] in str(caught.value)


def test_row_37_a_wrong_key(live):
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_models(client):
    assert [m.id for m in client.models.list()] == ["scripted", "alias"]
    assert client.models.retrieve("alias").id == "alias"


def test_completions(client):
    assert client.completions.create(model="scripted", prompt="hi").choices[0].text.startswith("because")


def test_responses(client):
    answer = client.responses.create(model="scripted", input="hi", store=False)
    assert answer.output_text == "Hello! ďábel 👋"
    with client.responses.stream(model="scripted", input="hi", store=False) as stream:
        names = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Hello! ďábel 👋"
    assert names[-1] == "response.completed"


def test_row_65_decisions(client):
    questions = [{"type": "predicate", "instructions": "It is day."}]
    answer = client.decisions.create(model="scripted", input="x", questions=questions)
    assert 0 < answer.answers[0].probability < 1


def test_anthropic(live):
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    with anthropic.Anthropic(base_url=live.url, api_key=live.key, max_retries=0) as client:
        answer = client.messages.create(model="scripted", max_tokens=200, messages=said("hi"))
        assert answer.content[-1].text == "Hello! ďábel 👋"
        with client.messages.stream(
            model="scripted", max_tokens=200, messages=said("weather in Rome"), tools=tools
        ) as stream:
            final = stream.get_final_message()
        assert final.stop_reason == "tool_use"
        assert final.content[-1].input == {"city": "Rome"}
        assert client.messages.count_tokens(model="scripted", messages=said("hi")).input_tokens > 0
        with pytest.raises(anthropic.BadRequestError) as caught:
            client.messages.create(model="scripted", max_tokens=0, messages=said("hi"))
        assert "max_tokens" in str(caught.value)
        with (
            pytest.raises(anthropic.APIError),
            client.messages.stream(model="scripted", max_tokens=99, messages=said("fail")) as stream,
        ):
            stream.until_done()
