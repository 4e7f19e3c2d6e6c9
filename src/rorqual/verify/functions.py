"""Small Python functions, written from a signature and a docstring and judged by hidden tests.

`style="chat"` asks for the whole function in a code block; `style="continue"` gives the signature and docstring, and the
completion goes on with the body, as in HumanEval: for models that know nothing but to go on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

from rorqual.errors import ConfigError
from rorqual.verify import code
from rorqual.verify.outcome import Outcome, wrong
from rorqual.verify.sandbox import Limits
from rorqual.verify.tasks import Family, Problem

EXAMPLES, HIDDEN = 2, 8


class Template(NamedTuple):
    """`{a}` and `{b}` stand for constants drawn from `span`; the types of the arguments say how inputs are drawn."""

    name: str
    arguments: str
    returns: str
    doc: str
    body: str
    span: tuple[int, int] = (2, 9)


X, V, S, W = "x: int", "values: list[int]", "text: str", "words: list[str]"
# The first level: one expression.
PLAIN = (
    Template("add", X, "int", "Return x plus {a}.", "return x + {a}"),
    Template("subtract", X, "int", "Return x minus {a}.", "return x - {a}"),
    Template("times", X, "int", "Return x times {a}.", "return x * {a}"),
    Template("scale", X, "int", "Return {a} times x, plus {b}.", "return {a} * x + {b}"),
    Template("remainder", X, "int", "Return the remainder of x divided by {a}.", "return x % {a}"),
    Template("is_multiple", X, "bool", "Return whether x is a multiple of {a}.", "return x % {a} == 0"),
    Template("power", X, "int", "Return x to the power {a}, plus {b}.", "return x ** {a} + {b}", (2, 5)),
    Template("distance", X, "int", "Return the distance between x and {a}.", "return abs(x - {a})"),
    Template("at_most", X, "int", "Return x, but at most {a}.", "return min(x, {a})"),
    Template("first", V, "list[int]", "Return the first {a} values.", "return values[:{a}]"),
    Template("last", V, "list[int]", "Return the last {a} values.", "return values[-{a}:]"),
    Template("skip", V, "list[int]", "Return the values without the first {a}.", "return values[{a}:]"),
    Template("every", V, "list[int]", "Return every {a}th value, from the first on.", "return values[::{a}]"),
    Template("repeat", S, "str", "Return the text {a} times in a row.", "return text * {a}"),
    Template("cut", S, "str", "Return the first {a} characters of the text.", "return text[:{a}]"),
    Template("ending", S, "str", "Return the last {a} characters of the text.", "return text[-{a}:]"),
    Template(
        "is_longer",
        S,
        "bool",
        "Return whether the text has more than {a} characters.",
        "return len(text) > {a}",
    ),
)
# The second: one pass over the input.
PASSES = (
    Template("add_to_each", V, "list[int]", "Add {a} to each value.", "return [v + {a} for v in values]"),
    Template(
        "scale_each",
        V,
        "list[int]",
        "Multiply each value by {a} and add {b}.",
        "return [v * {a} + {b} for v in values]",
    ),
    Template(
        "above",
        V,
        "list[int]",
        "Return the values greater than {a}.",
        "return [v for v in values if v > {a}]",
    ),
    Template(
        "multiples",
        V,
        "list[int]",
        "Return the values that are multiples of {a}.",
        "return [v for v in values if v % {a} == 0]",
    ),
    Template(
        "count_above", V, "int", "Count the values greater than {a}.", "return sum(v > {a} for v in values)"
    ),
    Template(
        "sum_above",
        V,
        "int",
        "Return the sum of the values greater than {a}.",
        "return sum(v for v in values if v > {a})",
    ),
    Template(
        "clip",
        V,
        "list[int]",
        "Replace each value greater than {a} by {a}.",
        "return [min(v, {a}) for v in values]",
    ),
    Template("total", V, "int", "Return {a} times the sum of the values.", "return {a} * sum(values)"),
    Template(
        "longer",
        W,
        "list[str]",
        "Return the words with more than {a} letters.",
        "return [w for w in words if len(w) > {a}]",
    ),
    Template(
        "count_longer",
        W,
        "int",
        "Count the words with at least {a} letters.",
        "return sum(len(w) >= {a} for w in words)",
    ),
    Template(
        "shorten",
        W,
        "list[str]",
        "Return the first {a} letters of each word.",
        "return [w[:{a}] for w in words]",
    ),
    Template("join", W, "str", "Join the first {a} words with '-'.", "return '-'.join(words[:{a}])"),
    Template(
        "upper_first",
        S,
        "str",
        "Make the first {a} characters upper case.",
        "return text[:{a}].upper() + text[{a}:]",
    ),
    Template("spread", S, "str", "Repeat each character {a} times.", "return ''.join(c * {a} for c in text)"),
    Template(
        "shift",
        S,
        "str",
        "Shift each letter (a to z) by {a} in the alphabet, z going on with a; keep other characters.",
        "return ''.join(chr((ord(c) - 97 + {a}) % 26 + 97) if 'a' <= c <= 'z' else c for c in text)",
    ),
)
# The third: state, or more than one step.
STATE = (
    Template(
        "chunks",
        V,
        "list[list[int]]",
        "Split the values into lists of {a}; the last may be shorter.",
        "return [values[i:i + {a}] for i in range(0, len(values), {a})]",
    ),
    Template(
        "window_sums",
        V,
        "list[int]",
        "Return the sums of each {a} neighbouring values.",
        "return [sum(values[i:i + {a}]) for i in range(len(values) - {a} + 1)]",
        (2, 4),
    ),
    Template(
        "largest",
        V,
        "list[int]",
        "Return the {a} largest values, the largest first.",
        "return sorted(values, reverse=True)[:{a}]",
    ),
    Template(
        "rotate",
        V,
        "list[int]",
        "Move the first {a} values to the end, one after the other.",
        "if not values:\n    return []\nk = {a} % len(values)\nreturn values[k:] + values[:k]",
    ),
    Template(
        "running",
        V,
        "list[int]",
        "Return the running sums, beginning anew when one is greater than {a}.",
        "out = []\ntotal = 0\nfor v in values:\n    total = v if total > {a} else total + v\n"
        "    out.append(total)\nreturn out",
        (10, 40),
    ),
    Template(
        "digits_sum",
        X,
        "int",
        "Return {a} times the sum of the decimal digits of x.",
        "return {a} * sum(int(d) for d in str(abs(x)))",
    ),
    Template(
        "base",
        X,
        "str",
        "Write the absolute value of x in base {a}.",
        "x = abs(x)\nout = str(x % {a})\nwhile x >= {a}:\n    x //= {a}\n    out = str(x % {a}) + out\nreturn out",
    ),
    Template(
        "collatz",
        X,
        "int",
        "From the absolute value of x (0 counts as 1), count the steps to 1, halving even numbers and "
        "taking an odd n to 3n+1; stop at {a} steps.",
        "n = abs(x) or 1\nsteps = 0\nwhile n != 1 and steps < {a}:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n"
        "    steps += 1\nreturn steps",
        (5, 30),
    ),
    Template(
        "group_lengths",
        W,
        "dict[str, int]",
        "Map each word of more than {a} letters to its length.",
        "return {{w: len(w) for w in words if len(w) > {a}}}",
        (1, 4),
    ),
    Template(
        "count_words",
        W,
        "dict[str, int]",
        "Count how often each word occurs; leave out those of fewer than {a} letters.",
        "out = {{}}\nfor w in words:\n    if len(w) >= {a}:\n        out[w] = out.get(w, 0) + 1\nreturn out",
        (1, 4),
    ),
    Template(
        "without_near",
        V,
        "list[int]",
        "Drop each value that differs by less than {a} from the one kept before it.",
        "out = []\nfor v in values:\n    if not out or abs(v - out[-1]) >= {a}:\n        out.append(v)\nreturn out",
    ),
    Template(
        "pairs",
        V,
        "int",
        "Count the pairs of positions whose values add up to {a}.",
        "n = len(values)\nreturn sum(values[i] + values[j] == {a} for i in range(n) for j in range(i + 1, n))",
        (2, 20),
    ),
)
LADDER = (PLAIN, PASSES, STATE)


@dataclass(frozen=True)
class Functions(Family):
    """Level 0 asks for one expression, 1 for one pass over the input, 2 for state. `level` is the hardest of them."""

    level: int = 2
    style: Literal["chat", "continue"] = "chat"
    examples: int = EXAMPLES  # calls that the docstring shows
    seconds: float = 3.0  # for all hidden tests of one function

    name: ClassVar[str] = "functions"
    waits: ClassVar[bool] = True  # for other processes: several are graded at once

    def __post_init__(self) -> None:
        if not 0 <= self.level < len(LADDER):
            raise ConfigError(f"tasks.functions.level={self.level}: must be 0 to {len(LADDER) - 1}")
        if not 0 <= self.examples <= EXAMPLES:
            raise ConfigError(f"tasks.functions.examples={self.examples}: must be 0 to {EXAMPLES}")
        if not self.seconds > 0:
            raise ConfigError(f"tasks.functions.seconds={self.seconds}: must be above 0")

    @property
    def levels(self) -> int:
        return self.level + 1

    def prepare(self) -> None:
        """Start the sandbox. Raises SandboxError where there is none to be had, so that a run is refused at once."""
        code.shared().start()

    def draw(self, rng: random.Random, level: int) -> Problem:
        while True:
            template = rng.choice(LADDER[level])
            constants = {"a": rng.randint(*template.span), "b": rng.randint(*template.span)}
            body = "".join(f"    {line}\n" for line in template.body.format(**constants).split("\n"))
            head = f"def {template.name}({template.arguments}) -> {template.returns}:\n"
            reference = _compiled(head + body, template.name)
            calls = self._inputs(rng, template)
            expected = [reference(*arguments) for arguments in calls]
            hidden = [repr(value) for value in expected[EXAMPLES:]]
            if max(map(hidden.count, hidden)) <= HIDDEN - 2:  # else a constant comes too near
                break
        shown = "".join(
            f"    >>> {template.name}({', '.join(map(repr, arguments))})\n    {value!r}\n"
            for arguments, value in list(zip(calls, expected, strict=True))[: self.examples]
        )
        doc = template.doc.format(**constants) + (f"\n\n{shown}    " if shown else "")
        stub = f'{head}    """{doc}"""\n'
        if self.style == "chat":
            ask = "Write this Python function. Answer with the whole function in one code block."
            prompt = f"{ask}\n```python\n{stub}```"
            worked = f"```python\n{head}{body}```"
        else:
            prompt, worked = stub, body
        key = f"{template.name} {constants['a']} {constants['b'] if '{b}' in template.body else ''}"
        meta = {"entry": template.name, "stub": stub, "calls": calls[EXAMPLES:]}
        return Problem(prompt, expected[EXAMPLES:], key, worked, meta)

    def judge(self, problem: Problem, completion: str) -> Outcome:
        if self.style == "chat":
            source = code.source_of(completion)
        else:
            source = problem.meta["stub"] + code.body_of(completion)
        if not source.strip():
            return wrong("no code")
        limits = Limits(seconds=self.seconds, memory_mb=512, result_kb=256)
        entry, calls = problem.meta["entry"], problem.meta["calls"]
        return code.grade_calls(source, entry, calls, problem.answer, limits=limits)

    def _inputs(self, rng: random.Random, template: Template) -> list[tuple[Any, ...]]:
        """Two for the examples and the hidden ones, each other, the empty or smallest input among the latter."""
        draw = {X: _number, V: _numbers, S: _text, W: _words}[template.arguments]
        empty: Any = {X: 0, V: [], S: "", W: []}[template.arguments]
        found: list[Any] = []
        while len(found) < EXAMPLES + HIDDEN - 1:
            value = draw(rng)
            if value not in found and value != empty:
                found.append(value)
        return [(value,) for value in [*found, empty]]


def _number(rng: random.Random) -> int:
    return rng.randint(-20, 100)


def _numbers(rng: random.Random) -> list[int]:
    return [rng.randint(-9, 20) for _ in range(rng.randint(1, 9))]


def _text(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(rng.randint(1, 12)))


def _words(rng: random.Random) -> list[str]:
    return [
        "".join(rng.choice("aeinorst") for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 7))
    ]


@lru_cache(maxsize=4096)
def _compiled(source: str, name: str) -> Any:
    """The reference: source of this file, never of a model."""
    space: dict[str, Any] = {}
    exec(compile(source, "<reference>", "exec"), space)
    return space[name]
