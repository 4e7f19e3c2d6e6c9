"""Mathematical text, plain or LaTeX, as a small tree of plain lists. Nothing is evaluated and nothing can run away.

A tree is `["num", "1.5"]`, `["var", "x"]`, `["const", "pi"]`, `["call", name, tree…]`, `["+", a, b]` (also - * / ^ =),
`["neg", a]`, `["!", a]`, or `["group", "(", ")", items]` with the brackets as written ("{" for sets).
Text that is no such expression, or is larger than the limits, is a `ParseError`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

Tree = list[Any]

MAX_TEXT, MAX_NODES, MAX_DEPTH, MAX_DIGITS = 500, 300, 40, 60
MAX_BITS = 4096  # of a number computed in this process

FUNCTIONS = [
    "sqrt",
    "sin",
    "cos",
    "tan",
    "cot",
    "sec",
    "csc",
    "arcsin",
    "arccos",
    "arctan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
    "log",
    "ln",
    "exp",
    "abs",
]
CONSTANTS = {"pi": "pi", "e": "e", "i": "i", "infty": "oo", "oo": "oo", "infinity": "oo"}
GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "theta",
    "lambda",
    "mu",
    "nu",
    "rho",
    "sigma",
    "tau",
    "phi",
    "omega",
]
UNICODE = {
    "π": "\\pi ",
    "∞": "\\infty ",
    "×": "*",
    "·": "*",
    "÷": "/",
    "−": "-",
    "–": "-",
    "√": "\\sqrt ",
    "²": "^2",
    "³": "^3",
    "½": "(1/2)",
    "θ": "\\theta ",
    "\u00a0": " ",
}
DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad| |limits)|\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}"
    r"|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree|\\\$|\$"
)
# With a backslash only; else xi is x times i.
MORE_GREEK = frozenset({"zeta", "eta", "iota", "kappa", "xi", "upsilon", "chi", "psi"})
TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\?[A-Za-z]+)|(\*\*|[-+*/^!()\[\],=|_%]|\\?[{}]))")


class ParseError(ValueError):
    """The text is no expression within the limits."""


def parse(text: str) -> Tree:
    """The tree of a text."""
    if len(text) > MAX_TEXT:
        raise ParseError(f"{len(text)} characters")
    for sign, plain in UNICODE.items():
        text = text.replace(sign, plain)
    if not text.isascii():
        raise ParseError("letters or signs of another script")
    text = DROPPED.sub(" ", text).replace("\\%", "%").strip().rstrip(".")
    if re.fullmatch(r"-?\s*[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?", text):
        text = text.replace(",", "")
    return _Parser(text).whole()


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                raise ParseError(f"{text[at : at + 10]!r}")
            number, name, sign = match.groups()
            if number:
                if len(number) > MAX_DIGITS:
                    raise ParseError("a number too long")
                self.tokens.append(("num", number))
            elif name:
                self.tokens += self._words(name)
            else:
                self.tokens.append(("sign", sign))
            at = match.end()
        self.at = self.nodes = self.depth = 0

    @staticmethod
    def _words(name: str) -> list[tuple[str, str]]:
        command, name = name.startswith("\\"), name.removeprefix("\\")
        plain = {"dfrac": "frac", "tfrac": "frac", "cfrac": "frac"}.get(name, name)
        if plain in ("cdot", "times", "ast"):
            return [("sign", "*")]
        if plain == "div":
            return [("sign", "/")]
        known = plain in FUNCTIONS or plain in CONSTANTS or plain in GREEK or plain == "frac"
        if known or (command and plain in MORE_GREEK) or (len(plain) == 1 and not command):
            return [("name", plain)]
        if command or len(plain) > 3:  # \leq is not l times e times q
            raise ParseError(f"the word {name!r}")
        return [("name", letter) for letter in plain]

    def peek(self) -> str | None:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else None

    def take(self, sign: str) -> bool:
        if self.at < len(self.tokens) and self.tokens[self.at] == ("sign", sign):
            self.at += 1
            return True
        return False

    def need(self, *signs: str) -> str:
        for sign in signs:
            if self.take(sign):
                return sign
        raise ParseError(f"{' or '.join(signs)} expected")

    def node(self, *parts: Any) -> Tree:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ParseError("too large")
        return list(parts)

    def whole(self) -> Tree:
        items = [self.relation()]
        while self.take(","):
            items.append(self.relation())
        if self.at != len(self.tokens):
            raise ParseError(f"{self.peek()!r} not expected")
        return items[0] if len(items) == 1 else self.node("group", "(", ")", items)

    def relation(self) -> Tree:
        left = self.sum()
        if self.take("="):
            right = self.sum()
            names = left[3] if left[0] == "group" else [left]  # x=1 and (x,y)=(1,2) say what x and y are
            return right if names and all(n[0] == "var" for n in names) else self.node("=", left, right)
        return left

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deep")
        tree = self.product()
        while (sign := self.peek()) in ("+", "-"):
            self.at += 1
            tree = self.node(sign, tree, self.product())
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        signs = 0
        while (sign := self.peek()) in ("+", "-") and self.tokens[self.at][0] == "sign":
            signs += sign == "-"
            self.at += 1
        tree = self.power()
        while self.at < len(self.tokens):
            kind, sign = self.tokens[self.at]
            if kind == "sign" and sign in ("*", "/"):
                self.at += 1
                negative = self.take("-")
                factor = self.power()
                tree = self.node(sign, tree, self.node("neg", factor) if negative else factor)
            elif kind in ("num", "name") or sign in ("(", "{"):
                if kind == "num" and self.tokens[self.at - 1][0] == "num":
                    raise ParseError("two numbers in a row")
                tree = self.node("*", tree, self.power())
            else:
                break
        return self.node("neg", tree) if signs % 2 else tree

    def power(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError("nested too deep")
        tree = self.atom()
        while True:
            if self.take("!"):
                tree = self.node("!", tree)
            elif self.take("%"):
                tree = self.node("/", tree, ["num", "100"])
            elif self.take("^") or self.take("**"):
                negative = self.take("-")
                exponent = self.power()
                tree = self.node("^", tree, self.node("neg", exponent) if negative else exponent)
            else:
                break
        self.depth -= 1
        return tree

    def atom(self) -> Tree:
        if self.at >= len(self.tokens):
            raise ParseError("something is missing at the end")
        kind, word = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            return self.node("num", word)
        if kind == "name":
            return self.name(word)
        if word == "|":
            inner = self.sum()
            self.need("|")
            return self.node("call", "abs", inner)
        if word in ("(", "[", "{", "\\{"):
            return self.group(word)
        raise ParseError(f"{word!r} not expected")

    def group(self, opening: str) -> Tree:
        items = []
        if self.peek() not in ("}", "\\}"):
            items.append(self.relation())
            while self.take(","):
                items.append(self.relation())
        closing = (
            self.need("}")
            if opening == "{"
            else self.need("\\}")
            if opening == "\\{"
            else self.need(")", "]")
        )
        if len(items) == 1 and (opening, closing) in (("(", ")"), ("{", "}")):
            return items[0]
        if not items and opening in ("(", "["):
            raise ParseError("empty brackets")
        return self.node("group", opening[-1], closing[-1], items)

    def name(self, word: str) -> Tree:
        if word == "frac":
            return self.node("/", self.argument(), self.argument())
        if word in FUNCTIONS:
            if word == "sqrt" and self.take("["):
                degree = self.sum()
                self.need("]")
                return self.node("^", self.argument(), self.node("/", ["num", "1"], degree))
            if word == "log" and self.take("_"):
                base = self.argument()
                return self.node(
                    "/", self.node("call", "log", self.argument()), self.node("call", "log", base)
                )
            exponent = self.power() if word != "sqrt" and self.take("^") else None
            call = self.node("call", word, self.argument())
            return call if exponent is None else self.node("^", call, exponent)
        if word in CONSTANTS:
            return self.node("const", CONSTANTS[word])
        if self.take("_"):
            index = self.argument()
            return self.node("var", f"{word}_{index[1]}" if index[0] in ("num", "var") else word)
        return self.node("var", word)

    def argument(self) -> Tree:
        """What a function or fraction is of: a group, or the next atom (of `\\frac12` the next digit)."""
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "num" and len(self.peek() or "") > 1:
            word = self.tokens[self.at][1]
            if self.tokens[self.at - 1] in (("name", "frac"),) and "." not in word:
                self.tokens[self.at : self.at + 1] = [("num", word[0]), ("num", word[1:])]
        return self.power() if self.peek() not in ("(", "{") else self.atom()


def rational(tree: Tree) -> Fraction | None:
    """The exact value of a tree of numbers and + - * / ^, or None where it is none or would be large."""
    kind = tree[0]
    if kind == "num":
        return Fraction(tree[1])
    if kind == "neg":
        inner = rational(tree[1])
        return None if inner is None else -inner
    if kind not in ("+", "-", "*", "/", "^"):
        return None
    a, b = rational(tree[1]), rational(tree[2])
    if a is None or b is None:
        return None
    size = a.numerator.bit_length() + a.denominator.bit_length()
    if kind == "^":
        if b.denominator != 1 or abs(b) * size > MAX_BITS or (a == 0 and b <= 0):
            return None
        return a ** int(b)
    if size + b.numerator.bit_length() + b.denominator.bit_length() > MAX_BITS or (kind == "/" and b == 0):
        return None
    return {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[kind]
