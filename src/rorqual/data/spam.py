"""Stage: what was put into a text to be found rather than read. Lines of search-engine bait are cut out of an article;
a text that is mostly bait, or spun from synonyms by a machine, is dropped."""

from __future__ import annotations

import re
from collections import Counter

from rorqual.data.document import Document

# Phrases of link sellers, shops and casinos; one line with two of them, or one beside an address, is bait.
# fmt: off
_BAIT = (
    "buy cheap", "buy online", "buy now", "cheap price", "cheapest price",
    "cheap viagra", "cheap cialis", "cheap replica", "online casino", "free download",
    "free shipping", "free spins", "best price", "click here", "order now",
    "limited offer", "payday loan", "seo services", "backlink", "replica watch",
    "weight loss", "no prescription", "lowest price", "discount code", "work from home",
    "make money fast", "make money online", "100% free", "100% guaranteed", "在线赌博",
    "真人娱乐", "博彩", "代开发票", "办证", "加微信",
    "低价批发", "点击这里", "包邮", "刷单", "六合彩",
    "彩票网",
)
# fmt: on
_SENTENCE_END = re.compile(r"[.!?。！？]\s*")
_ADDRESS = re.compile(r"https?://|www\.|\.com\b|\.net\b|[\w.]+@[\w.]+\.\w+|微信号|QQ[::]?\d")


def spam(doc: Document) -> str | None:
    """Cut bait lines out in place; a reason where the whole document is spam. Source code is left alone."""
    if doc.kind == "code":
        return None
    lowered = doc.text.lower()
    if not any(phrase in lowered for phrase in _BAIT):
        return "spam: machine-spun text" if is_spun(doc.text) else None
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
    lowered = line.lower()
    hits = sum(phrase in lowered for phrase in _BAIT)
    return hits >= 2 or (hits == 1 and _ADDRESS.search(line) is not None)


def is_spun(text: str) -> bool:
    """Spun text says the same sentence over and over with words exchanged: its sentences share their frames.

    A frame is a sentence's short words in order; in human prose of 12 or more sentences they hardly repeat.
    """
    frames = []
    for sentence in _SENTENCE_END.split(text):
        found = sentence.split()
        if len(found) >= 8:
            frames.append(tuple([w if len(w) <= 3 else "_" for w in found]))
    if len(frames) < 12:
        return False
    repeated = sum(n for n in Counter(frames).values() if n > 1)
    return repeated / len(frames) > 0.5
