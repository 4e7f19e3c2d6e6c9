"""Bits per byte of a text under a model: what compares across tokenizers. Windows overlap by half, so every token but
those at a text's beginning is predicted from at least half a window."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rorqual.checkpoint.loaded import Model
from rorqual.data.shards import TokenSet
from rorqual.errors import DataError, TokenizerError
from rorqual.text.tokenizer import Tokenizer

PIECES = 32  # a text's windows are summed into so many pieces, which a comparison pairs


def of_file(model: Model, path: Path, window: int) -> dict[str, Any]:
    """A text file, all of it. Raises DataError for what is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as e:
        raise DataError(f"text {path.resolve()}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise DataError(f"text {path.resolve()}: not UTF-8 ({e.reason} at byte {e.start})") from e
    if not text.strip():
        raise DataError(f"text {path.resolve()}: empty")
    # Pieces of the text, not of its tokens: the same for every tokenizer, so that two models can be paired.
    size = max(1, math.ceil(len(text) / PIECES))
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    tokenizer = _tokenizer(model)
    bits, counts = [], []
    for piece in pieces:
        ids = tokenizer.encode(piece, special=False)
        nats, _, first = score(model, ids, window, _start(model))
        # A first token of the text that nothing predicts; a BOS is no part of it.
        lost = len(tokenizer.token_bytes(ids[0])) if first and ids[0] not in tokenizer.special_ids else 0
        bits.append(nats / math.log(2))
        counts.append(len(piece.encode()) - lost)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return _result(str(path), f"{digest} window {window}", bits, counts)


def of_data(model: Model, folder: Path, window: int, limit: int = 2_000_000) -> dict[str, Any]:
    """The held-out split of a built folder, up to `limit` tokens. Raises DataError where it is for another
    tokenizer."""
    tokens = TokenSet(folder, "heldout")
    if tokens.vocab_size > model.config.vocab_size:
        raise DataError(
            f"data {folder.resolve()}: made for a vocabulary of {tokens.vocab_size}, the model has "
            f"{model.config.vocab_size}; evaluate on a text file instead (--text)"
        )
    tokenizer = _tokenizer(model)
    _check_tokens(tokenizer, folder, tokens.vocab_size)
    bits, counts, seen = [0.0] * PIECES, [0] * PIECES, 0
    for number in range(len(tokens)):
        ids = [int(i) for i in tokens.document(number)]
        if seen + len(ids) > limit and seen:
            break
        seen += len(ids)
        nats, _, first = score(model, ids, window, _start(model))
        bits[number % PIECES] += nats / math.log(2)
        scored = ids[1:] if first else ids
        counts[number % PIECES] += sum(
            len(tokenizer.token_bytes(i)) for i in scored if i not in tokenizer.special_ids
        )
    return _result(str(folder), f"{tokens.fingerprint} {seen} window {window}", bits, counts)


def score(model: Model, ids: Sequence[int], window: int, start: int | None) -> tuple[float, int, bool]:
    """Nats and number of the predicted tokens of `ids`; whether the first was left out for want of anything before it."""
    import torch

    ids = list(ids)
    sequence = ids if start is None or ids[:1] == [start] else [start, *ids]
    nats, count = 0.0, 0
    for begin, fresh, end in windows(len(sequence), min(window, model.config.max_position_embeddings)):
        piece = torch.tensor([sequence[begin:end]])
        logits = model.logits(piece)[0, fresh - begin - 1 : -1]  # [T, V] predicts sequence[fresh:end]
        targets = torch.tensor(sequence[fresh:end])
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += end - fresh
    return nats, count, len(sequence) == len(ids)


def windows(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first predicted, end) of each window; every position but 0 is predicted exactly once."""
    fresh = 1
    while fresh < length:
        begin = max(0, fresh - size // 2) if fresh > 1 else 0
        end = min(length, begin + size)
        yield begin, fresh, end
        fresh = end


def _start(model: Model) -> int | None:
    tokenizer = _tokenizer(model)
    ids = tokenizer.encode("")
    return ids[0] if ids else None


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise TokenizerError("bits per byte: the model has no tokenizer.json")
    return model.tokenizer


def _check_tokens(tokenizer: Tokenizer, folder: Path, vocab_size: int) -> None:
    """That the ids of a built folder stand for the same bytes here."""
    if not (folder / "tokenizer.json").is_file():
        return
    own = Tokenizer.load(folder)
    for i in range(vocab_size):
        there, here = own.token_bytes(i), tokenizer.token_bytes(i)
        if there != here:
            raise DataError(
                f"data {folder.resolve()}: made by another tokenizer (id {i} is {there!r} there, {here!r} in the model); "
                "evaluate on a text file instead (--text)"
            )


def _result(name: str, fingerprint: str, bits: list[float], counts: list[int]) -> dict[str, Any]:
    total = max(sum(counts), 1)
    value = sum(bits) / total
    rates = [b / c for b, c in zip(bits, counts, strict=True) if c]
    mean = sum(rates) / len(rates)
    half = 1.96 * math.sqrt(sum((r - mean) ** 2 for r in rates) / max(len(rates) - 1, 1) / len(rates))
    return {
        "text": name,
        "fingerprint": fingerprint,
        "bits_per_byte": value,
        "low": value - half,
        "high": value + half,
        "bytes": sum(counts),
        "bits": bits,
        "byte_counts": counts,
    }
