"""What a build removed, stage by stage, with a few examples of each reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.data.document import Document


@dataclass
class Tally:
    """What each stage removed and why, with a few examples."""

    documents: int = 0
    raw_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    removed: dict[str, dict[str, int]] = field(default_factory=dict)  # stage → reason → documents
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # reason → origin and beginning
    boilerplate_lines: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def drop(self, stage: str, reason: str, doc: Document) -> None:
        reasons = self.removed.setdefault(stage, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < 3:
            shown.append({"origin": _short(doc.origin), "text": doc.text[:300]})


def _short(origin: str) -> str:
    """The end of a path: enough to recognise it, without the folders of the machine."""
    return "/".join(Path(origin).parts[-3:])
