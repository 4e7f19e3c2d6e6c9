"""Text to token ids and back. tokenizer.json decides the pipeline; what a config calls the class does not
matter.

A folder's special ids come from tokenizer_config.json, generation_config.json and config.json, in this order.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Pipeline

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a thought stands between is text that people see and that prompts quote, whatever a tokenizer.json says.
VISIBLE = ("<think>", "</think>")
_TURN = re.compile(r"<[|｜][^<>]*[|｜]>")
REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


class Tokenizer:
    """A tokenizer.json with its special ids. `encode` adds nothing but, where asked, one BOS."""

    def __init__(
        self,
        pipeline: Pipeline,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        add_bos: bool = False,
    ) -> None:
        self._pipeline = pipeline
        self.bos_id, self.eos_ids, self.pad_id = bos_id, tuple(eos_ids), pad_id
        self.add_bos = add_bos  # whether plain text starts with BOS when nobody says otherwise
        self.vocab_size = pipeline.get_vocab_size(with_added_tokens=True)
        added = pipeline.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self.special_ids = frozenset(i for i, t in added.items() if t.special and t.content not in VISIBLE)
        # Files of R1's distillations do not call <｜User｜> special, but it begins a turn all the same.
        turns = (i for i, text in self._added.items() if _TURN.fullmatch(text))
        self.marker_ids = self.special_ids | frozenset(turns)
        self._byte_level = "ByteLevel" in str(_part(pipeline, "decoder"))
        if self._byte_level:
            # Some configs tidy spaces when they decode; text must come back as it went in.
            pipeline.no_padding()
            pipeline.no_truncation()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """The tokenizer of a model folder. Raises TokenizerError where there is none or it is damaged."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder.resolve()}: no tokenizer.json; put the model's own file there")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise TokenizerError(f"{path.resolve()}: cannot be read ({e})") from e
        return cls.from_json(
            text, read_json(folder / "tokenizer_config.json"), _special_ids(folder), str(path.resolve())
        )

    @classmethod
    def from_json(
        cls,
        text: str,
        config: dict[str, Any] | None = None,
        ids: dict[str, Any] | None = None,
        where: str = "tokenizer.json",
    ) -> Tokenizer:
        """Build from the text of a tokenizer.json and, where known, its tokenizer_config and model ids."""
        from tokenizers import Tokenizer as Pipeline

        config, ids = config or {}, ids or {}
        try:
            pipeline = Pipeline.from_str(_exact(text))
        except Exception as e:  # the library raises a bare Exception for every fault
            raise TokenizerError(f"{where}: not a tokenizer.json that can be read ({e})") from e

        def token_id(key: str) -> int | None:
            named = config.get(key)
            content = named.get("content") if isinstance(named, dict) else named
            found = pipeline.token_to_id(content) if isinstance(content, str) else None
            if found is not None:
                return found
            fallback = ids.get(f"{key}_id")
            return fallback if isinstance(fallback, int) else None

        eos = [token_id("eos_token")]
        listed = ids.get("eos_token_id")
        eos += listed if isinstance(listed, list) else [listed]
        eos_ids = list(dict.fromkeys(i for i in eos if isinstance(i, int)))
        bos = token_id("bos_token")
        add_bos = bos is not None and _adds_bos(pipeline, config, bos)
        return cls(pipeline, bos, eos_ids, token_id("pad_token"), add_bos)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json into a folder."""
        Path(folder, "tokenizer.json").write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The pipeline as the text of a tokenizer.json."""
        return self._pipeline.to_str(pretty=False)

    @property
    def digest(self) -> str:
        """sha256 of vocabulary and merges: what decides which text an id stands for."""
        model = json.loads(self._pipeline.to_str())["model"]
        kept = [model.get("vocab"), model.get("merges")]
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """Token ids of a text. BOS comes first where asked (None: as the tokenizer does by itself) and only
        once, also where the text begins with it. `special=False` reads the markers' own letters, for
        untrusted text."""
        ids = self._encode(text) if special else self._encode_plain(text)
        want = self.add_bos if add_bos is None else add_bos
        if self.bos_id is not None:
            while len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
                ids = ids[1:]
            if want and ids[:1] != [self.bos_id]:
                ids = [self.bos_id, *ids]
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts on all cores, without BOS."""
        return [e.ids for e in self._pipeline.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of token ids; bytes that are no whole character come back as U+FFFD."""
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids]
        if self._byte_level:
            return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")
        return self._pipeline.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id without a token (padding of the embedding)."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._pipeline.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            table = _bytes_of_letters()
            try:
                return bytes(table[c] for c in token)
            except KeyError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def token_id(self, token: str) -> int | None:
        """The id of a token's own text, such as a marker; None where there is no such token."""
        return self._pipeline.token_to_id(token)

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A decoder for ids that arrive one by one."""
        return Detokenizer(self, skip_special)

    def _encode(self, text: str) -> list[int]:
        return list(self._pipeline.encode(text, add_special_tokens=False).ids)

    def _encode_plain(self, text: str) -> list[int]:
        """Encode with every marker broken up, so that text from outside cannot speak as the template does."""
        from tokenizers import Tokenizer as Pipeline

        if not hasattr(self, "_plain"):
            tree = json.loads(self._pipeline.to_str())
            tree["added_tokens"] = [t for t in tree["added_tokens"] if t["id"] not in self.marker_ids]
            self._plain = Pipeline.from_str(json.dumps(tree))
        return list(self._plain.encode(text, add_special_tokens=False).ids)


class Detokenizer:
    """Text of a growing answer: `push` returns whole characters only, at a cost that does not grow with the
    answer."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._bytes = b""  # byte-level: the start of a character
        self._ids: list[int] = []  # otherwise: ids since the last point where the text was whole
        self._said = ""

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._skip:
            return ""
        if self._tokenizer._byte_level:
            self._bytes += self._tokenizer.token_bytes(token_id)
            whole, self._bytes = _split_whole(self._bytes)
            return whole
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT):
            return ""
        new, self._said = text[len(self._said) :], text
        if len(self._ids) > 16:  # keep the last token: the first of a text is spelt without its space
            self._ids = self._ids[-1:]
            self._said = self._tokenizer.decode(self._ids)
        return new

    def flush(self) -> str:
        """What is left at the end: an unfinished character as U+FFFD."""
        if self._tokenizer._byte_level:
            rest, self._bytes = self._bytes, b""
            return rest.decode("utf-8", errors="replace")
        text = self._tokenizer.decode(self._ids)
        new, self._said = text[len(self._said) :], text
        return new


def _split_whole(data: bytes) -> tuple[str, bytes]:
    """Decode as far as characters are whole; the rest is a beginning that later bytes may complete."""
    keep = len(data)
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue  # a continuation byte: its lead is further back
        size = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        if size > back:
            keep = len(data) - back
        break
    return data[:keep].decode("utf-8", errors="replace"), data[keep:]


_LETTERS: dict[str, int] = {}


def _bytes_of_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable letter (GPT-2's table): letter → byte."""
    if not _LETTERS:
        shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [b for b in range(256) if b not in shown]
        _LETTERS.update({chr(b): b for b in shown})
        _LETTERS.update({chr(256 + i): b for i, b in enumerate(hidden)})
    return _LETTERS


def _exact(text: str) -> str:
    """A tokenizer.json whose decoding gives back what was encoded.

    Files for byte-level BPE that name a Llama class carry decoders that eat or add spaces
    (huggingface/transformers#48206): where the model's pieces are byte-level, the decoder is too.
    """
    try:
        tree = json.loads(text)
    except ValueError:
        return text
    if not isinstance(tree, dict):
        return text
    tree["truncation"], tree["padding"] = None, None
    if "ByteLevel" in json.dumps(tree.get("pre_tokenizer")) and "ByteLevel" not in json.dumps(
        tree.get("decoder")
    ):
        tree["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    return json.dumps(tree, ensure_ascii=False)


def _adds_bos(pipeline: Pipeline, config: dict[str, Any], bos: int) -> bool:
    if isinstance(config.get("add_bos_token"), bool):
        return bool(config["add_bos_token"])
    return pipeline.encode("a", add_special_tokens=True).ids[:1] == [bos]


def _part(pipeline: Pipeline, name: str) -> Any:
    try:
        return json.loads(pipeline.to_str())[name]
    except KeyError:
        return None


def _special_ids(folder: Path) -> dict[str, Any]:
    ids: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        found = read_json(folder / name)
        ids |= {k: found[k] for k in SPECIAL_IDS if found.get(k) is not None}
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no file. Raises TokenizerError where it is damaged."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise TokenizerError(f"{path.resolve()}: not valid JSON ({e})") from e
    if not isinstance(tree, dict):
        raise TokenizerError(f"{path.resolve()}: must be a JSON object")
    return tree
