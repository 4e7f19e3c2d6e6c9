"""Text comes back as it went in, BOS comes once, and half characters wait."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers

from rorqual.errors import TokenizerError
from rorqual.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEXTS = [
    "How are you doing?",
    "def f(n):\n    return n",
    "   leading",
    "a ℕ b",
    "👋🏽 ďábel",
    "one\r\ntwo",
    "\t",
    "中文,全角",
    "",
    "1234567",
]


def pipeline_json() -> str:
    p = Pipeline(models.BPE())
    p.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    p.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    p.train_from_iterator(["def f(n):\n    return n + 1\n", "How are you doing today?", "你好"], trainer)
    return p.to_str()


PIPELINE = pipeline_json()
CONFIG = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_json(PIPELINE, CONFIG)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_decoding_gives_back_what_was_encoded(tmp_path: Path, text: str, class_name: str) -> None:
    """huggingface/transformers#48206: tokenizer.json decides, whatever class the config names."""
    (tmp_path / "tokenizer.json").write_text(PIPELINE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "tokenizer_class": class_name}))
    t = Tokenizer.load(tmp_path)
    assert t.decode(t.encode(text, add_bos=False)) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_whole_and_in_pieces(text: str) -> None:
    t = Tokenizer.from_json(PIPELINE, CONFIG)
    text = text.encode("utf-8", "ignore").decode()
    ids = t.encode(text, add_bos=False)
    assert t.decode(ids) == text
    assert b"".join(map(t.token_bytes, ids)) == text.encode()
    stream = t.detokenizer(skip_special=False)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in p for p in pieces)


def test_decoder_of_another_class_in_the_file_is_put_right() -> None:
    tree = json.loads(PIPELINE)
    tree["decoder"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    t = Tokenizer.from_json(json.dumps(tree), CONFIG)
    assert t.decode(t.encode("a b\nc", add_bos=False)) == "a b\nc"


@pytest.mark.parametrize("text", ["hi", BOS + "hi", BOS + BOS + "hi"])
def test_exactly_one_bos(tokenizer: Tokenizer, text: str) -> None:
    """deepseek-ai/DeepSeek-Coder-V2#50: the template writes one, the tokenizer must not add another."""
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1


def test_bos_only_where_wanted(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id not in tokenizer.encode("hi", add_bos=False)
    assert tokenizer.encode("hi", add_bos=False) == tokenizer.encode("hi")[1:]


def test_untrusted_text_cannot_write_markers(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOS}b", add_bos=False, special=False)
    assert not set(ids) & set(tokenizer.eos_ids)
    assert tokenizer.decode(ids) == f"a{EOS}b"


def test_a_character_cut_by_the_end_is_flushed_without_a_crash(tokenizer: Tokenizer) -> None:
    """ggml-org/llama.cpp#4036."""
    ids = tokenizer.encode("👋", add_bos=False)
    stream = tokenizer.detokenizer()
    assert "".join(stream.push(i) for i in ids[:-1]) == ""
    assert stream.flush() == "\ufffd"


def test_digits_are_single(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2026", add_bos=False)) == 4


def test_special_ids_from_the_config_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(PIPELINE)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 7]}))
    t = Tokenizer.load(tmp_path)
    assert t.bos_id == 0
    assert t.eos_ids == (1, 7)


@pytest.mark.parametrize("content", ["{", '{"model": 3}', "", "[]"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
