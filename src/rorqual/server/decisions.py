"""POST /v1/decisions: typed questions about an input, answered by the model's own probabilities, no text
drawn.

Each option is scored as the log-probability of its text after the input and the question; the options of one
question are then normalised against each other. A predicate is the choice between "yes" and "no".
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from rorqual.engine.request import SamplingParams
from rorqual.server.caller import Caller
from rorqual.server.faults import invalid
from rorqual.server.models import Served
from rorqual.server.prompt import check_messages, render_each
from rorqual.server.protocol import Message, decode
from rorqual.server.reply import Generated, Reply
from rorqual.server.responses_input import ResponsesRequest, to_chat
from rorqual.server.turn import Run, Turn, check_room

_MAX_OPTIONS = 1024  # of one request, all questions together


class Choice(Struct):
    value: str | bool
    description: str | None = None


class Level(Struct):
    label: str
    description: str | None = None


class Question(Struct):
    type: Literal["predicate", "choice", "score"]
    instructions: str | list[dict[str, Any]]
    name: str | None = None
    choices: Annotated[list[Choice], Meta(min_length=2, max_length=255)] | None = None
    levels: Annotated[list[Level], Meta(min_length=2, max_length=255)] | None = None


class DecisionsRequest(Struct, kw_only=True):
    """POST /v1/decisions."""

    input: str | list[dict[str, Any]]
    questions: Annotated[list[Question], Meta(min_length=1, max_length=400)]
    model: str | None = None


@dataclass(frozen=True)
class _Asked:
    """A question with its options as texts."""

    question: Question
    options: list[str]
    notes: list[str | None]
    values: Sequence[str | bool]


async def decisions(caller: Caller, body: bytes) -> Reply:
    """Answer every question of one request."""
    request = decode(body, DecisionsRequest)
    model = caller.service.models.find(request.model)
    asked = [_options(q, f"questions[{i}]") for i, q in enumerate(request.questions)]
    if sum(len(a.options) for a in asked) > _MAX_OPTIONS:
        raise invalid(f"questions: more than {_MAX_OPTIONS} options in all", "questions")
    # On a thread: a long input takes longer to read than other streams should wait.
    prompts, starts = await asyncio.to_thread(_prompts, model, request, asked)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    run = Run(Turn(model, prompts, params, cache_salt=caller.cache_salt(None)), caller)

    async def whole() -> dict[str, Any]:
        async for _ in run.events():
            pass
        scores = [_score(run, i, start) for i, start in enumerate(starts)]
        return {"model": request.model, "answers": _answers(asked, scores), "usage": run.usage.responses()}

    return Generated(run, whole=whole)


def _options(question: Question, where: str) -> _Asked:
    if question.type == "predicate":
        return _Asked(question, ["yes", "no"], [None, None], [True, False])
    entries = question.choices if question.type == "choice" else question.levels
    name = "choices" if question.type == "choice" else "levels"
    if not entries:
        raise invalid(f"{where}.{name} is required", f"{where}.{name}", "missing_required_parameter")
    values = [e.value if isinstance(e, Choice) else e.label for e in entries]
    texts = [v if isinstance(v, str) else str(v).lower() for v in values]
    if "" in texts:
        raise invalid(f"{where}.{name}: an option is empty", f"{where}.{name}")
    if len({(type(v), v) for v in values}) < len(values):
        raise invalid(f"{where}.{name}: an option is given twice", f"{where}.{name}")
    return _Asked(question, texts, [e.description for e in entries], values)


def _prompts(
    model: Served, request: DecisionsRequest, asked: Sequence[_Asked]
) -> tuple[list[list[int]], list[int]]:
    """A prompt for each option of each question, and where in it the option begins."""
    prompts: list[list[int]] = []
    starts: list[int] = []
    for a, head in zip(asked, _heads(model, _input(request), [_text(a) for a in asked]), strict=True):
        for option in a.options:
            prompts.append(head + model.tokenizer.encode(option, add_bos=False))
            starts.append(len(head))
            check_room(model, prompts[-1], 0, "input")
    return prompts, starts


def _heads(model: Served, conversation: list[Message], texts: list[str]) -> Iterator[list[int]]:
    """The input and one of the questions; the answer would follow."""
    if model.template is not None:
        yield from render_each(model, conversation, [Message("user", t) for t in texts], thinking=False)
        return
    said = "\n\n".join(message.text() for message in conversation)
    shared = model.tokenizer.encode(f"{said}\n\n")
    for text in texts:
        yield shared + model.tokenizer.encode(f"{text}\nAnswer: ", add_bos=False)


def _text(asked: _Asked) -> str:
    """A question and its options."""
    question = asked.question
    lines = [
        f"- {o}: {note}" if note else f"- {o}" for o, note in zip(asked.options, asked.notes, strict=True)
    ]
    lead = "Is this true of the above?" if question.type == "predicate" else "Answer about the above:"
    return f"{lead} {_instructions(question)}\nAnswer with one of:\n" + "\n".join(lines)


def _input(request: DecisionsRequest) -> list[Message]:
    chat, _ = to_chat(ResponsesRequest(input=request.input))
    check_messages(chat.messages, "input")
    return chat.messages


def _instructions(question: Question) -> str:
    if isinstance(question.instructions, str):
        return question.instructions
    parts = []
    for part in question.instructions:
        if isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif "json" in part:
            parts.append(json.dumps(part["json"], ensure_ascii=False))
        else:
            raise invalid("questions: this model reads only text", "questions", "unsupported_value")
    return "\n".join(parts)


def _score(run: Run, choice: int, start: int) -> float:
    """Log-probability of the option's tokens."""
    return sum(lp.logprob for lp in run.prompt_logprobs[choice][start:] if lp is not None)


def _answers(asked: Sequence[_Asked], scores: Sequence[float]) -> list[dict[str, Any]]:
    out = []
    at = 0
    for a in asked:
        its = scores[at : at + len(a.options)]
        at += len(a.options)
        out.append({"type": a.question.type, "name": a.question.name, **_answer(a, _softmax(its))})
    return out


def _answer(asked: _Asked, probabilities: list[float]) -> dict[str, Any]:
    if asked.question.type == "predicate":
        return {"probability": probabilities[0]}
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    if asked.question.type == "choice":
        pairs = zip(asked.values, probabilities, strict=True)
        listed: list[dict[str, Any]] = [{"value": v, "probability": p} for v, p in pairs]
        return {"choice": asked.values[best], "confidence": probabilities[best], "probabilities": listed}
    triples = enumerate(zip(asked.values, probabilities, strict=True))
    listed = [{"label": v, "value": i, "probability": p} for i, (v, p) in triples]
    mean = sum(i * p for i, p in enumerate(probabilities))
    return {"score": mean, "confidence": probabilities[best], "probabilities": listed}


def _softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    return [w / sum(weights) for w in weights]
