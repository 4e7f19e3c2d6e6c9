"""What a person points at, as a stream of units of work: files, and the documents in each.

A unit is small enough to hand to another process and large enough to be worth it.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rorqual.data.document import CODE_SUFFIXES, Document, kind_of
from rorqual.errors import DataError

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".html", ".htm", ".text", ".log", ".csv", ".xml"})
TABLES = frozenset({".jsonl", ".ndjson", ".parquet"})
PACKED = frozenset({".gz", ".zst"})
SKIPPED_FOLDERS = frozenset({"__pycache__", "node_modules", ".git", ".hg", ".venv", "dist-info"})
LINES = frozenset({".jsonl", ".ndjson", ".txt", ".text", ".log"})  # plain files that can be cut between lines
UNIT_BYTES = 4_000_000
_HALF_PAIRS = re.compile("[\ud800-\udfff]")  # JSON can hold what is no character and no UTF-8


@dataclass(frozen=True)
class Unit:
    """Some whole files, or a part of one large file of lines, to be read by one process."""

    paths: tuple[str, ...]
    start: int = 0  # bytes into the only path
    stop: int | None = None


@dataclass
class Skipped:
    """Why something was not read, with a few examples of each reason."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < 3:
            shown.append(example)

    def merge(self, other: Skipped) -> None:
        for reason, n in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + n
            shown = self.examples.setdefault(reason, [])
            shown += other.examples[reason][: 3 - len(shown)]


def find_files(sources: Sequence[str], skipped: Skipped) -> list[Path]:
    """Every file that the sources name, sorted within each source, none twice. Raises DataError for a source
    that is not there or that holds nothing we read."""
    found: dict[Path, None] = {}
    for source in sources:
        before = len(found)
        for path in _files_of(source):
            suffix = _suffix(path)
            if suffix in TEXT_SUFFIXES | CODE_SUFFIXES | TABLES:
                found.setdefault(path.resolve())
            else:
                skipped.add(f"not a text type ({suffix or 'no suffix'})", str(path))
        if len(found) == before and source != "python":
            known = " ".join(sorted(TEXT_SUFFIXES | TABLES))
            raise DataError(
                f"source {source!r}: no readable file in it; known types: {known} and source code, plain or .gz .zst"
            )
    return list(found)


def _files_of(source: str) -> Iterator[Path]:
    if source == "python":
        for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            yield from _python_files(Path(root))
        return
    path = Path(source).expanduser()
    if path.is_file():
        yield path
    elif path.is_dir():
        for found in sorted(path.rglob("*")):
            if found.is_file() and not SKIPPED_FOLDERS & set(found.parts):
                yield found
    else:
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise DataError(
                f"source {source!r}: no such file, folder or pattern (looked for {path.absolute()})"
            )
        yield from (Path(m) for m in matches if Path(m).is_file())


def _python_files(root: Path) -> Iterator[Path]:
    """Python source under a folder, tests left out: they repeat themselves more than they teach."""
    for found in sorted(root.rglob("*.py")):
        parts = set(found.relative_to(root).parts)
        if not parts & {"test", "tests", "testing", "site-packages", "__pycache__", "_vendor", "idlelib"}:
            yield found


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def units(paths: Sequence[Path], limit_bytes: int | None) -> Iterator[Unit]:
    """Group small files, cut large files of lines; stop after `limit_bytes` of input."""
    group: list[str] = []
    size = total = 0
    for path in paths:
        n = size_of_file = path.stat().st_size
        if limit_bytes is not None and total + n > limit_bytes:
            n = limit_bytes - total
            if n <= 0:
                break
        if (n > UNIT_BYTES or n < size_of_file) and path.suffix.lower() in LINES:
            yield from (Unit((str(path),), at, min(at + UNIT_BYTES, n)) for at in range(0, n, UNIT_BYTES))
        else:
            group.append(str(path))
            size += n
        total += n
        if size >= UNIT_BYTES:
            yield Unit(tuple(group))
            group, size = [], 0
    if group:
        yield Unit(tuple(group))


def read_unit(unit: Unit, skipped: Skipped, text_key: str = "text") -> Iterator[Document]:
    """The documents of a unit. What cannot be read is counted in `skipped`, with its reason."""
    for name in unit.paths:
        path = Path(name)
        suffix = _suffix(path)
        try:
            if suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(path, unit, skipped, text_key)
            elif suffix == ".parquet":
                yield from _parquet(path, skipped, text_key)
            else:
                yield from _plain(path, unit, suffix, skipped)
        except (OSError, EOFError, zlib.error) as e:
            skipped.add(f"unreadable ({getattr(e, 'strerror', None) or e or type(e).__name__})", name)


def _plain(path: Path, unit: Unit, suffix: str, skipped: Skipped) -> Iterator[Document]:
    data = _span(path, unit)
    if not data.strip():
        skipped.add("empty", str(path))
        return
    if b"\0" in data[:8192]:
        skipped.add("binary", str(path))
        return
    text = data.decode("utf-8", errors="replace")
    yield Document(text, str(path), kind_of(text, suffix))


def _span(path: Path, unit: Unit) -> bytes:
    """The bytes of a unit's part, extended to whole lines: a part owns the lines that begin in it."""
    with _open(path) as file:
        if unit.stop is None:
            return file.read()
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()
        data = file.read(max(0, unit.stop - file.tell()))
        return data + (file.readline() if data and not data.endswith(b"\n") else b"")


def _open(path: Path) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        import pyarrow

        # zstandard's own reader takes a file that was cut off for one that ended.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _json_lines(path: Path, unit: Unit, skipped: Skipped, key: str) -> Iterator[Document]:
    with _open(path) if unit.stop is None else io.BytesIO(_span(path, unit)) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
            except (ValueError, KeyError, TypeError):
                skipped.add(f"malformed line (no JSON object with {key!r})", f"{path}:{number}")
                continue
            yield from _from_record(text, f"{path}:{number}", skipped)


def _parquet(path: Path, skipped: Skipped, key: str) -> Iterator[Document]:
    import pyarrow.parquet as parquet
    from pyarrow.lib import ArrowInvalid

    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as e:
        skipped.add("malformed parquet", f"{path} ({e})")
        return
    if key not in table.schema_arrow.names:
        skipped.add(f"parquet without a column {key!r}", str(path))
        return
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for text in batch.column(0).to_pylist():
            row += 1
            yield from _from_record(text, f"{path}:{row}", skipped)


def _from_record(text: Any, origin: str, skipped: Skipped) -> Iterator[Document]:
    if not isinstance(text, str) or not text.strip():
        skipped.add(
            "empty" if text in ("", None) or isinstance(text, str) else "text is not a string", origin
        )
        return
    text = _HALF_PAIRS.sub("\ufffd", text)
    yield Document(text, origin, kind_of(text, ""))
