"""Documents between the passes of a build, compressed on disk, so that memory stays flat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rorqual.data.document import Document


class Spool:
    """Documents between the passes, compressed, one file a split."""

    def __init__(self, folder: Path) -> None:
        import zstandard

        self.folder = folder
        folder.mkdir()
        self.documents = {"train": 0, "heldout": 0}
        self.bytes = {"train": 0, "heldout": 0}
        self._files = {s: zstandard.open(folder / f"{s}.zst", "wb") for s in self.documents}

    def write(self, split: str, doc: Document) -> None:
        line = (
            json.dumps({"text": doc.text, "origin": doc.origin, "kind": doc.kind}, ensure_ascii=False) + "\n"
        )
        self._files[split].write(line.encode())
        self.documents[split] += 1
        self.bytes[split] += len(line)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, split: str) -> Iterator[dict[str, str]]:
        import zstandard

        with zstandard.open(self.folder / f"{split}.zst", "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield json.loads(line)

    def remove(self) -> None:
        shutil.rmtree(self.folder)
