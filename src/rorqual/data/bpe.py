"""Training a byte-level BPE tokenizer: digits one by one, DeepSeek's markers as special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from rorqual.errors import DataError
from rorqual.text.tokenizer import VISIBLE

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", *VISIBLE)
SMALLEST = 256 + len(SPECIAL)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """The text of a tokenizer.json with at most `vocab_size` tokens; special tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST:
        raise DataError(
            f"vocab_size={vocab_size}: must be at least {SMALLEST} (256 bytes and {len(SPECIAL)} markers)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tree = json.loads(tokenizer.to_str())
    for token in tree["added_tokens"]:
        token["special"] = token["content"] not in VISIBLE
    return json.dumps(tree, ensure_ascii=False)


def write_tokenizer(folder: Path, tokenizer_json: str) -> None:
    """tokenizer.json with a tokenizer_config.json that transformers reads and DeepSeek-V3's chat template."""
    from rorqual.text.template import DEEPSEEK_V3

    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text(DEEPSEEK_V3, encoding="utf-8")
