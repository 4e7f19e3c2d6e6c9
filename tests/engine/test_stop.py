"""Text is sent when it is certain: stop strings over token borders, whole characters, nothing lost at the end."""

import random

import pytest
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, trainers

from rorqual.engine.stop import StopChecker
from rorqual.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Bytes only: every character of more than one byte is cut."""
    p = Pipeline(models.BPE())
    p.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    p.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    p.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    )
    return Tokenizer.from_json(p.to_str())


def feed(tokenizer: Tokenizer, text: str, stops: list[str]) -> tuple[list[str], str | None]:
    checker = StopChecker(tokenizer, stops)
    pieces = []
    for i in tokenizer.encode(text, add_bos=False):
        pieces.append(checker.push(i))
        if checker.matched:
            return pieces, checker.matched
    pieces.append(checker.flush())
    return pieces, checker.matched


def test_text_held_for_a_stop_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    """ggml-org/llama.cpp#9867."""
    pieces, matched = feed(tokenizer, "UNO DUE TRE", ["TRE\nAAAA"])
    assert "".join(pieces) == "UNO DUE TRE"
    assert matched is None
    assert "T" not in "".join(pieces[:-1])


def test_the_earliest_stop_wins_and_is_not_sent(tokenizer: Tokenizer) -> None:
    pieces, matched = feed(tokenizer, "one END two STOP", ["STOP", "END"])
    assert "".join(pieces) == "one "
    assert matched == "END"


def test_characters_are_whole(tokenizer: Tokenizer) -> None:
    """waybarrios/vllm-mlx#109."""
    pieces, _ = feed(tokenizer, "ďábel 👋", ["👋👋"])
    assert "".join(pieces) == "ďábel 👋"
    assert not any("\ufffd" in p for p in pieces)


def test_random_stops_are_never_leaked_or_retracted(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("abé👋") for _ in range(30))
        stops = ["".join(rng.choice("abé👋") for _ in range(rng.randrange(1, 5))) for _ in range(2)]
        pieces, matched = feed(tokenizer, text, stops)
        found = [text.find(s) for s in stops if s in text]
        want = text[: min(found)] if found else text
        sent = "".join(pieces)
        # the stop that completes first ends the answer, so one that begins earlier but ends later may be in it
        assert text.startswith(sent)
        assert not any(s in sent for s in stops)
        assert matched is None or sent + matched == text[: len(sent) + len(matched)]
        if matched is None:
            assert sent == want == text


def test_without_a_tokenizer_there_is_no_text() -> None:
    checker = StopChecker(None, [])
    assert checker.push(3) == ""
    assert checker.flush() == ""
