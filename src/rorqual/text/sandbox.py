"""The jinja2 environment in which chat templates run: immutable, and on a budget.

A template is a program from a stranger. Every loop turn, call, filter and produced text is charged to the
budget of the rendering, and no single operation may make more than `MAX_TEXT`, so that whatever a template
does ends within `MAX_SECONDS` and about a gigabyte, in any thread.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TURNS = 200_000  # of all loops and calls of one rendering; 1,000 messages take a few thousand
MAX_TEXT = 64 * 1024 * 1024  # characters (16 a list item) that one operation or a whole prompt may make
MAX_MADE = 512 * 1024 * 1024  # the same of all operations of one rendering together
MAX_SECONDS = 10.0


class Budget:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.turns = self.made = self.emitted = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def turn(self) -> None:
        """Charge one loop turn or call."""
        self.turns += 1
        if self.turns > MAX_TURNS:
            raise SecurityError(f"takes more than {MAX_TURNS} turns of loops and calls")
        self.check_time()

    def make(self, value: Any) -> Any:
        """Charge a text or list that an operation has made."""
        self.check_time()
        if isinstance(value, (str, bytes, list, tuple)):
            size = len(value) * (1 if isinstance(value, (str, bytes)) else 16)
            self.made += size
            if size > MAX_TEXT or self.made > MAX_MADE:
                raise SecurityError("makes too much text")
        return value

    def emit(self, text: str) -> None:
        """Charge text that goes into the prompt or a block."""
        self.check_time()
        self.emitted += len(text)
        if self.emitted > MAX_TEXT:
            raise SecurityError(f"makes more than {MAX_TEXT} characters")

    def check_time(self) -> None:
        """Between operations, each of which is bounded, so that the deadline holds in any thread."""
        if time.monotonic() > self.deadline:
            raise SecurityError(f"takes more than {MAX_SECONDS:.0f} seconds")


_budget: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def rendering() -> Iterator[None]:
    """A fresh budget for what is rendered inside."""
    token = _budget.set(Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class _Charge(NodeTransformer):
    """Charges loops, printed text and joined text where the template is parsed."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_counted")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [_filtered(_constant(n), "_emitted") for n in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "_made")


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's immutable sandbox with every operation charged to the budget."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        charged = _Charge().visit(tree)
        assert isinstance(charged, nodes.Template)
        return charged

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("text method format is not available to chat templates")

    def getattr(self, obj: Any, attribute: str) -> Any:
        if attribute.startswith("_"):
            raise SecurityError(f"reaches for attribute {attribute!r}")
        return super().getattr(obj, attribute)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"reaches for attribute {attribute!r}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" or (operator == "*" and _amount(left) * _amount(right) > MAX_TEXT):
            raise SecurityError(f"{operator} makes something too large")
        if operator == "%" and isinstance(left, (str, bytes)):
            raise SecurityError("% formatting is not allowed")
        return _budget.get().make(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.turn()
        owner = getattr(obj, "__self__", None)
        # A macro, a look-up in a list or an object, a namespace: a number makes nothing there, and may be a client's.
        harmless = (
            isinstance(obj, Macro) or isinstance(owner, (list, dict)) or obj is dict or obj is Namespace
        )
        if not harmless:
            _check_numbers((*args, *kwargs.values()))
        if isinstance(owner, str):
            _check_text_method(obj, args)
        return budget.make(super().call(context, obj, *args, **kwargs))


def environment() -> Sandbox:
    """The environment of chat templates: what published ones use, and nothing that could run away."""
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    for name in ("lipsum", "cycler", "joiner"):
        env.globals.pop(name, None)
    refused = (
        "pprint", "center", "format", "urlize", "random", "filesizeformat", "xmlattr", "batch", "wordwrap",
    )  # fmt: skip
    own = {"join": _join, "replace": _replace, "indent": _indent, "tojson": _tojson}
    env.filters = {name: _charged(name, filter_) for name, filter_ in (env.filters | own).items()}
    env.filters |= {name: _refuse(name) for name in refused}
    env.filters |= {"_counted": _counted, "_emitted": _emitted, "_made": _made}
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}` marks the assistant's words in some templates; they pass
    through."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _filtered(value: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(value, nodes.Expr)
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _constant(node: nodes.Node) -> nodes.Expr:
    """A stretch of the template's own text as an expression, so that repeating it is charged too."""
    if isinstance(node, nodes.TemplateData):
        return nodes.Const(node.data, lineno=node.lineno)
    assert isinstance(node, nodes.Expr)
    return node


@pass_context  # so that jinja2 does not run it when it compiles
def _counted(context: Any, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each charged as it is taken."""
    budget = _budget.get()
    for item in items:
        budget.turn()
        yield item


@pass_context
def _emitted(context: Any, value: Any) -> str:
    """What a place in the template prints."""
    text = str(value)
    _budget.get().emit(text)
    return text


@pass_context
def _made(context: Any, value: Any) -> Any:
    """What an operator that jinja2 does not let us intercept has made."""
    return _budget.get().make(value)


def _charged(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose numbers are bounded, but for the value that it is put to, and whose result is charged."""
    first = 2 if hasattr(filter_, "jinja_pass_arg") else 1

    @functools.wraps(filter_)  # also carries jinja2's mark of what the filter wants passed
    def charged(*args: Any, **kwargs: Any) -> Any:
        if name not in ("default", "d"):
            _check_numbers((*args[first:], *kwargs.values()))
        return _budget.get().make(filter_(*args, **kwargs))

    return charged


@pass_context
def _join(context: Any, items: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    pick = (lambda x: x) if attribute is None else make_attrgetter(context.environment, attribute)
    texts: list[str] = []
    size = 0
    for item in items:
        texts.append(str(pick(item)))
        size += len(texts[-1]) + len(d)
        _check_size(size)
    return d.join(texts)


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(text)
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, margin = str(text), " " * width if isinstance(width, int) else width
    _check_size(len(text) + (text.count("\n") + 1) * len(margin))
    head, *rest = text.split("\n")
    lines = [margin + line if line or blank else line for line in rest]
    return "\n".join([margin + head if first else head, *lines])


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    if indent is not None and indent > 16:
        raise SecurityError(f"tojson indent={indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", form) or len(form) > 200:
        raise SecurityError("strftime_now with a width")
    return datetime.datetime.now().strftime(form)


def _raise_exception(message: str) -> str:
    raise TemplateError(message)


def _refuse(name: str) -> Callable[..., str]:
    def refuse(*_: Any, **__: Any) -> str:
        raise SecurityError(f"filter {name} is not available to chat templates")

    return refuse


def _check_text_method(method: Any, args: tuple[Any, ...]) -> None:
    """Bound what a method of a text may make before it makes it."""
    text, name = method.__self__, method.__name__
    if name in ("translate", "maketrans"):
        raise SecurityError(f"text method {name} is not available to chat templates")
    if name == "replace" and len(args) >= 2:
        _check_size(len(text) + text.count(args[0]) * len(args[1]))
    elif name == "join" and args and isinstance(args[0], (list, tuple)):
        _check_size(sum(len(x) + len(text) for x in args[0] if isinstance(x, str)))
    elif name == "join":
        raise SecurityError("text method join of something that is no list")
    elif name == "expandtabs":
        _check_size(len(text) + text.count("\t") * (args[0] if args and isinstance(args[0], int) else 8))


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_TURNS:
            raise SecurityError(f"a call with {value}")


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError("makes too much text")


def _amount(value: Any) -> int:
    """How large a factor is: a number's value, a text's or list's length."""
    if isinstance(value, (int, float)):
        return int(min(abs(value), 1 << 62))
    return len(value) if hasattr(value, "__len__") else 1
