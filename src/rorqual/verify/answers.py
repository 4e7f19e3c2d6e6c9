"""The answer in a completion: which of its words count. Strict, stated rules; nothing is guessed.

The forms, in order of rank: `<answer>…</answer>`, `\\boxed{…}`, `#### …` on its line, `the answer is …`. The form
of the highest rank that occurs decides, and of several occurrences the last. A last occurrence that is not
well-formed (an unclosed brace or tag) is no answer: an earlier one is not credited in its place.
"""

from __future__ import annotations

import re

LIMIT = 100_000  # characters of a completion that are looked at, from its end
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.])[-+\u2212]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?![0-9A-Za-z_])"
)


def extract(completion: str) -> str | None:
    """The marked answer of a completion, or None where none is marked or the last mark is malformed."""
    text = completion[-LIMIT:]
    if "<answer>" in text:
        return tagged(text)
    if re.search(r"\\f?boxed\s*\{", text):
        return boxed(text)
    if re.search(r"^####", text, re.MULTILINE):
        return hashed(text)
    return stated(text)


def tagged(text: str) -> str | None:
    """What stands in the last `<answer>…</answer>`."""
    _, _, rest = text.rpartition("<answer>")
    inner, close, _ = rest.partition("</answer>")
    return inner.strip() or None if close else None


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{…}`, braces balanced."""
    starts = list(re.finditer(r"\\f?boxed\s*\{", text))
    if not starts:
        return None
    begin, depth, escaped = starts[-1].end(), 1, False
    for at in range(begin, len(text)):
        char = text[at]
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return text[begin:at].strip() or None
    return None


def hashed(text: str) -> str | None:
    """What follows the last `####` at the beginning of a line."""
    found = re.findall(r"^####[ \t]*(.*)$", text, re.MULTILINE)
    return found[-1].strip() or None if found else None


def stated(text: str) -> str | None:
    """What follows the last `answer is` up to the end of its sentence or line."""
    found = re.findall(r"\banswer is:?[ \t]*([^\n]*)", text, re.IGNORECASE)
    if not found:
        return None
    sentence = re.split(r"\.(?:\s|$)", found[-1], maxsplit=1)[0]
    return sentence.strip().strip("*$`").strip() or None


def last_number(completion: str) -> str | None:
    """The last number of a completion, without thousands separators and a leading plus; None where there is none."""
    found = NUMBER.findall(completion[-LIMIT:])
    return found[-1].replace(",", "").replace("\u2212", "-").lstrip("+") if found else None
