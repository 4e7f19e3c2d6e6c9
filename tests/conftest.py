"""One thread per test process: tiny models lose more to synchronisation than they gain. Every test starts
from the same seed, so that a failure comes back."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


TEXTS = [
    f"def add_{i}(a, b):\n    total = a + b + {i}\n    return total\n\n\nclass Box{i}:\n    size = {i * 7}\n"
    for i in range(60)
]


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Seeds torch where a test file has imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built folder: 56 documents to train on, 4 held out."""
    from rorqual.data.bpe import train_bpe, write_tokenizer
    from rorqual.data.shards import ShardWriter, describe
    from rorqual.text.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("set")
    write_tokenizer(folder, train_bpe(TEXTS, 300))
    tokenizer = Tokenizer.load(folder)
    splits: dict[str, Any] = {}
    for split, texts in (("train", TEXTS[:56]), ("heldout", TEXTS[56:])):
        writer = ShardWriter(folder / split, tokenizer.vocab_size)
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text, add_bos=False), tokenizer.eos_ids[0]]
            writer.add(ids, len(text.encode()))
        splits[split] = describe(writer.close())
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
        "splits": splits,
        "config": {"sources": ["python"]},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder
