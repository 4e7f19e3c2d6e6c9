"""The rules that a turn's output must keep (JSON, a schema, a forced call, a thought's budget) as a token
mask.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from rorqual.engine.request import TokenMask
from rorqual.server.faults import invalid
from rorqual.server.grammar import Grammar
from rorqual.server.json_schema import inline_schema, json_schema_text, supported
from rorqual.server.models import Served
from rorqual.server.phases import Forced, Free, Phase, PhasedMask, Until
from rorqual.server.protocol import ResponseFormat
from rorqual.server.reasoning import CLOSE, OPEN
from rorqual.server.tools import ToolFormat, ToolSpec
from rorqual.server.vocabulary import Vocabulary


@dataclass(frozen=True)
class Structure:
    """What is asked of the form of the output."""

    schema: dict[str, Any] | None = None  # of the whole answer; with tools, unless it is calls
    tools: tuple[ToolSpec, ...] = ()  # calls among free text, where no schema is given
    form: ToolFormat | None = None
    many_calls: bool = True
    must_call: bool = False
    budget: int | None = None  # tokens of thought
    thinks: bool = False  # a thought comes first
    opened: bool = False  # and the prompt has opened it

    @property
    def needed(self) -> bool:
        """Whether anything restrains the output at all."""
        return self.ruled or bool(self.tools) or (self.thinks and self.budget is not None)

    @property
    def ruled(self) -> bool:
        """Whether a grammar rules all of the answer."""
        return self.schema is not None or self.must_call


def response_schema(form: ResponseFormat | None) -> dict[str, Any] | None:
    """The schema of a `response_format`; None for text. One that cannot be kept is a 400 naming the keyword."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return {"type": "object"}
    if form.json_schema is None or form.json_schema.schema is None:
        where = "response_format.json_schema" + (".schema" if form.json_schema is not None else "")
        raise invalid(f"{where} is required", where, "missing_required_parameter")
    json_schema_text(form.json_schema.schema, "response_format")
    return form.json_schema.schema


def check_tools(tools: Sequence[ToolSpec]) -> None:
    """400 for two tools of one name, and for a strict tool whose schema no grammar can keep."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise invalid(f"tools[{i}].function.name={tool.name!r}: given twice", f"tools[{i}].function.name")
        seen.add(tool.name)
        if tool.strict and tool.parameters is not None and not supported(tool.parameters):
            json_schema_text(tool.parameters, f"tools[{i}].function.parameters")


async def mask_maker(model: Served, structure: Structure) -> Callable[[int], TokenMask] | None:
    """A function that makes the mask of one completion of so many tokens, or None where nothing is
    restrained.
    """
    if not structure.needed:
        return None
    vocabulary = await model.vocabulary()
    grammar = await asyncio.to_thread(_compiled, vocabulary, structure)

    def make(max_tokens: int) -> TokenMask:
        return PhasedMask(_phases(vocabulary, structure, grammar, max_tokens), max_tokens)

    return make


def _compiled(vocabulary: Vocabulary, structure: Structure) -> Grammar | None:
    """The answer as calls, as a document, or as either."""
    rules: dict[str, str] = {}
    if structure.tools:
        assert structure.form is not None
        many = structure.many_calls and structure.ruled
        rules["calls"] = structure.form.calls(structure.tools, many=many, opened=not structure.ruled)
    if structure.schema is not None:
        rules["answer"] = f"answer: {inline_schema(structure.schema)}"
    if not rules:
        return None
    text = "\n".join([f"start: {' | '.join(rules)}", *rules.values()])
    param = "response_format" if structure.schema is not None else "tools"
    return Grammar(vocabulary, LLMatcher.grammar_from_lark(text), param)


def _phases(
    vocabulary: Vocabulary, structure: Structure, grammar: Grammar | None, max_tokens: int
) -> Iterator[Phase]:
    if structure.thinks:
        yield from _thought(vocabulary, structure, max_tokens, must=structure.ruled)
    if grammar is None:
        yield Free()
        return
    if structure.ruled:
        yield grammar.phase()
        return
    assert structure.form is not None
    while True:
        yield Until(vocabulary, structure.form.begin)
        yield grammar.phase()
        if not structure.many_calls:
            return


def _thought(vocabulary: Vocabulary, structure: Structure, max_tokens: int, *, must: bool) -> Iterator[Phase]:
    """The thought, opened where the prompt has not done so. Where a grammar follows it may take three
    quarters of the tokens, so that some are left for the answer.
    """
    budget = structure.budget
    if must:
        budget = min(budget if budget is not None else max_tokens, max(1, max_tokens * 3 // 4))
    if not structure.opened:
        yield Forced(vocabulary, OPEN + "\n")
    yield Until(vocabulary, CLOSE, budget=budget, must=must)
