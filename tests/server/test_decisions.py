"""Typed questions answered by probabilities: with the scripted engine every token has probability one half."""

from __future__ import annotations

import pytest

from rorqual.server.scripted import ScriptedAnswer


@pytest.fixture(scope="module")
def live(start):
    return start(ScriptedAnswer(text="x"))


def decide(live, *questions, **fields):
    body = {"model": "scripted", "input": "The sky is blue.", "questions": list(questions), **fields}
    return live.client.post("/v1/decisions", json=body)


def test_row_65_probabilities_by_hand(live):
    """A token is a byte of probability 1/2: "yes" 1/8 against "no" 1/4 is 1/3; a, bb, ccc are 4 : 2 : 1."""
    answer = decide(
        live,
        {"type": "predicate", "instructions": "It is day.", "name": "day"},
        {
            "type": "choice",
            "instructions": "Which?",
            "choices": [{"value": "a"}, {"value": "bb", "description": "two"}, {"value": "ccc"}],
        },
        {
            "type": "score",
            "instructions": "How?",
            "levels": [{"label": "a"}, {"label": "bb"}, {"label": "ccc"}],
        },
    ).json()
    day, which, how = answer["answers"]
    assert day == {"type": "predicate", "name": "day", "probability": pytest.approx(1 / 3)}
    assert which["choice"] == "a"
    assert [p["probability"] for p in which["probabilities"]] == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert which["confidence"] == pytest.approx(4 / 7)
    assert how["score"] == pytest.approx((0 * 4 + 1 * 2 + 2 * 1) / 7)
    assert [(p["label"], p["value"]) for p in how["probabilities"]] == [("a", 0), ("bb", 1), ("ccc", 2)]
    assert answer["usage"]["output_tokens"] == 0


def test_values_keep_their_type(live):
    """A boolean and a text of the same letters are distinct."""
    question = {"type": "choice", "instructions": "?", "choices": [{"value": True}, {"value": "true"}]}
    values = [p["value"] for p in decide(live, question).json()["answers"][0]["probabilities"]]
    assert values == [True, "true"]
    assert [type(v) for v in values] == [bool, str]


@pytest.mark.parametrize(
    ("question", "param"),
    [
        ({"type": "choice", "instructions": "?"}, "questions[0].choices"),
        ({"type": "choice", "instructions": "?", "choices": [{"value": "a"}]}, "questions[0].choices"),
        (
            {"type": "choice", "instructions": "?", "choices": [{"value": "a"}, {"value": "a"}]},
            "questions[0].choices",
        ),
        ({"type": "score", "instructions": "?"}, "questions[0].levels"),
        ({"type": "essay", "instructions": "?"}, "questions[0].type"),
        ({"type": "predicate"}, "questions[0].instructions"),
    ],
)
def test_questions_that_make_no_sense(live, question, param):
    answer = decide(live, question)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_no_questions(live):
    assert decide(live).json()["error"]["param"] == "questions"


def test_a_predicate_with_choices_is_still_a_predicate(live):
    """Found by fuzzing: fields of another type of question are ignored."""
    question = {"type": "predicate", "instructions": "?", "choices": [{"value": str(i)} for i in range(5)]}
    assert decide(live, question).json()["answers"][0]["probability"] == pytest.approx(1 / 3)
