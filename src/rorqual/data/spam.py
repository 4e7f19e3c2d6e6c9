"""Stage: what was put into a text to be found rather than read. Lines of search-engine bait are cut out of an article;
a text that is mostly bait, or spun from synonyms by a machine, is dropped."""

from __future__ import annotations

import re
from collections import Counter

from rorqual.data.document import Document, words

# Phrases of link sellers, shops and casinos; one line with two of them, or one beside an address, is bait.
_BAIT = re.compile(
    r"buy (?:cheap|online|now)|cheap(?:est)? (?:price|viagra|cialis|replica)|online casino"
    r"|free (?:download|shipping|spins)"
    r"|best price|click here|order now|limited offer|payday loan|seo services|backlinks?|replica watch|weight loss"
    r"|no prescription|lowest price|discount code|work from home|make money (?:fast|online)|100% (?:free|guaranteed)"
    r"|在线赌博|真人娱乐|博彩|代开发票|办证|加微信|低价批发|点击这里|包邮|刷单|六合彩|彩票网",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"https?://|www\.|\.com\b|\.net\b|[\w.]+@[\w.]+\.\w+|微信号|QQ[::]?\d")


def spam(doc: Document) -> str | None:
    """Cut bait lines out in place; a reason where the whole document is spam. Source code is left alone."""
    if doc.kind == "code":
        return None
    lines = doc.text.split("\n")
    kept = [line for line in lines if not is_bait(line)]
    if len(kept) < len(lines):
        cut = sum(map(len, lines)) - sum(map(len, kept))
        if cut > 0.3 * len(doc.text):
            return "spam: mostly search-engine bait"
        doc.text = "\n".join(kept)
    return "spam: machine-spun text" if is_spun(doc.text) else None


def is_bait(line: str) -> bool:
    """Two selling phrases, or one with an address, in a line."""
    hits = len({m.lower() for m in _BAIT.findall(line)})
    return hits >= 2 or (hits == 1 and _ADDRESS.search(line) is not None)


def is_spun(text: str) -> bool:
    """Spun text says the same sentence over and over with words exchanged: its sentences share their frames.

    A frame is a sentence's short words in order; in human prose of 12 or more sentences they hardly repeat.
    """
    frames = []
    for sentence in re.split(r"[.!?。！？]\s*", text):
        found = words(sentence)
        if len(found) >= 8:
            frames.append(tuple(w if len(w) <= 3 else "_" for w in found))
    if len(frames) < 12:
        return False
    repeated = sum(n for n in Counter(frames).values() if n > 1)
    return repeated / len(frames) > 0.5
