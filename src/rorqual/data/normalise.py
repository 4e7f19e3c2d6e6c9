"""Stage: one form for the same text. Unicode NFC, one kind of line end, no control characters or trailing spaces."""

from __future__ import annotations

import re
import unicodedata

from rorqual.data.document import Document

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")
_TRAILING = re.compile(r"[ \t]+$", re.MULTILINE)
_BLANKS = re.compile(r"\n{4,}")
MAX_BROKEN = 0.001  # share of characters that were no valid UTF-8


def normalise(doc: Document) -> str | None:
    """Rewrite a document in place; a reason where its encoding is broken beyond use."""
    text = doc.text
    if text.count("\ufffd") > max(2, MAX_BROKEN * len(text)):
        return "broken encoding"
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _TRAILING.sub("", _CONTROL.sub("", text))
    doc.text = _BLANKS.sub("\n\n\n", text).strip("\n") + "\n"
    return None
