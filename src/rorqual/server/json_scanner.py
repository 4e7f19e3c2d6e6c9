"""One JSON value read character by character: where it ends, and whether it is valid so far."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$")
_LITERALS = ("true", "false", "null")
_BLANK = " \t\r\n"


class JsonScanner:
    """`feed` takes text and says how much of it belongs to the value; then `done` or `bad` may be set."""

    def __init__(self) -> None:
        self.done = False
        self.bad = False
        self._open: list[str] = []  # "{" and "[" not yet closed
        self._expect = "value"  # value, first (value or ]), key (or }), name, colon, next
        self._word = ""  # a number or literal being read
        self._string = False
        self._escape = 0  # characters of an escape still to come; 5 right after a backslash

    def feed(self, text: str) -> int:
        """Read on. Returns the count of characters read; less than all only when `done` or `bad`."""
        for at, c in enumerate(text):
            if self.done or self.bad:
                return at
            if not self._step(c):
                return at
        return len(text)

    def _step(self, c: str) -> bool:
        """False where `c` is not part of the value."""
        if self._string:
            return self._in_string(c)
        if self._word:
            if c.isalnum() or c in "+-.":
                self._word += c
                return True
            if not self._end_word():
                return False
            if self.done:
                return False
        if c in _BLANK:
            return True
        return self._structure(c)

    def _in_string(self, c: str) -> bool:
        if self._escape == 5:
            self._escape = 4 if c == "u" else 0
            return c in '"\\/bfnrtu' or self._fail()
        if self._escape:
            self._escape -= 1
            return c in "0123456789abcdefABCDEF" or self._fail()
        if c == "\\":
            self._escape = 5
        elif c == '"':
            self._string = False
            if self._expect == "colon":
                return True
            self._value_over()
        elif c < " ":
            return self._fail()
        return True

    def _structure(self, c: str) -> bool:
        expect = self._expect
        if expect in ("value", "first"):
            if c == "]" and expect == "first":
                return self._close("[")
            return self._begin_value(c)
        if expect in ("key", "name"):
            if c == "}" and expect == "key":
                return self._close("{")
            if c != '"':
                return self._fail()
            self._string, self._expect = True, "colon"
            return True
        if expect == "colon":
            self._expect = "value"
            return c == ":" or self._fail()
        if c == ",":
            self._expect = "name" if self._open[-1] == "{" else "value"
            return True
        return self._close("{" if c == "}" else "[") if c in "}]" else self._fail()

    def _begin_value(self, c: str) -> bool:
        if c == "{":
            self._open.append(c)
            self._expect = "key"
        elif c == "[":
            self._open.append(c)
            self._expect = "first"
        elif c == '"':
            self._string = True
        elif c == "-" or c.isalnum():
            self._word = c
        else:
            return self._fail()
        return True

    def _close(self, opener: str) -> bool:
        if not self._open or self._open[-1] != opener:
            return self._fail()
        self._open.pop()
        self._value_over()
        return True

    def _end_word(self) -> bool:
        word, self._word = self._word, ""
        if word not in _LITERALS and not _NUMBER.match(word):
            return self._fail()
        self._value_over()
        return True

    def _value_over(self) -> None:
        if self._open:
            self._expect = "next"
        else:
            self.done = True

    def _fail(self) -> bool:
        self.bad = True
        return False
