"""A tokenizer for new models: one token a character of printable ASCII, and the special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from rorqual.data.bpe import SPECIAL, write_tokenizer


def write_characters(folder: Path) -> None:
    """Put the tokenizer's files into a folder. Other characters are spelt by nothing: tasks must not use them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = ["Ċ", "Ġ", *map(chr, range(0x21, 0x7F))]  # as byte-level BPE writes line feed and space
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    write_tokenizer(folder, json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False))
