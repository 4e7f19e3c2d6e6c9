"""Every way to attend gives the same logits: fused and plain, cached in chunks, both forms of MLA, packed
documents."""

import pytest
import torch

from rorqual.kernels.attention import attention, attention_reference
from rorqual.model.attend import Cached, Causal, KVCache

FAMILIES = ["deepseek", "llama"]


def positions(batch: int, length: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + length).expand(batch, length)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 40])
@pytest.mark.parametrize("form", ["expanded", "absorbed", "auto"])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunked_decoding_equals_one_pass(
    make_model, family: str, chunk: int, form: str, batch: int, yarn
) -> None:
    """ikawrakow/ik_llama.cpp#386, ggml-org/llama.cpp#26509."""
    model = make_model(family, rope=yarn) if family == "deepseek" else make_model(family)
    ids = torch.randint(0, 160, (batch, 40))
    with torch.no_grad():
        whole = model.logits(model(ids, positions(batch, 40), Causal(plain=True)))
        cache = KVCache()
        parts = [
            model(ids[:, s : s + chunk], positions(batch, 40)[:, s : s + chunk], Cached(cache, form))
            for s in range(0, 40, chunk)
        ]
        torch.testing.assert_close(model.logits(torch.cat(parts, 1)), whole, atol=1e-4, rtol=0)
    assert cache.length == 40


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_agree_in_bfloat16(make_model, family: str) -> None:
    """Without experts: a near tie in a router may fall either way, which says nothing of the attention."""
    model = make_model(family, initializer_range=0.05, n_routed_experts=0).to(torch.bfloat16)
    ids = torch.randint(0, 160, (3, 34))
    outs = []
    with torch.no_grad():
        for form in ("expanded", "absorbed"):
            cache = KVCache()
            model(ids[:, :33], positions(3, 33), Cached(cache, form))
            outs.append(model.logits(model(ids[:, 33:], positions(3, 1, 33), Cached(cache, form))).float())
    torch.testing.assert_close(*outs, atol=2e-2, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_plain_with_gradients(make_model, family: str) -> None:
    model = make_model(family)
    ids = torch.randint(0, 160, (2, 21))
    results = []
    for plain in (True, False):
        model.zero_grad()
        logits = model.logits(model(ids, positions(2, 21), Causal(plain=plain)))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        results.append(
            (logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=0)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(
            grad, results[1][1][name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_do_not_see_each_other(make_model, family: str, plain: bool) -> None:
    """huggingface/nanoVLM#204: B after A equals B after A2 equals B alone."""
    extra = {
        "architecture": "RorqualForCausalLM",
        "ngram_table_size": 64,
        "triple_table_size": 96,
        "induction": 3,
        "smear": True,
    }
    model = make_model(family, **extra)
    a, a2, b = (torch.randint(0, 160, (1, n)) for n in (9, 9, 12))
    documents = torch.tensor([[0] * 9 + [1] * 12])
    place = torch.cat((torch.arange(9), torch.arange(12)))[None]
    with torch.no_grad():
        packed = [
            model(torch.cat((first, b), 1), place, Causal(documents, plain=plain))[:, 9:] for first in (a, a2)
        ]
        alone = model(b, positions(1, 12), Causal(plain=plain))
    torch.testing.assert_close(packed[0], packed[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(packed[0], alone, atol=1e-5, rtol=0)


def test_tables_and_smear_decode_as_they_train(make_model) -> None:
    extra = {
        "architecture": "RorqualForCausalLM",
        "ngram_table_size": 64,
        "triple_table_size": 96,
        "induction": 3,
        "smear": True,
        "value_embeddings": True,
        "x0_residual": True,
        "logit_softcap": 15.0,
        "qk_norm": True,
    }
    for family in FAMILIES:
        model = make_model(family, **extra)
        for p in model.parameters():
            if p.dim() == 1:
                p.data += 0.1
        ids = torch.randint(0, 160, (2, 15))
        with torch.no_grad():
            whole = model.logits(model(ids, positions(2, 15), Causal()))
            cache = KVCache()
            parts = [
                model(ids[:, s : s + 4], positions(2, 15)[:, s : s + 4], Cached(cache))
                for s in range(0, 15, 4)
            ]
            torch.testing.assert_close(model.logits(torch.cat(parts, 1)), whole, atol=1e-4, rtol=0)
        assert whole.abs().max() < 15


@pytest.mark.parametrize("op", [attention_reference, attention])
def test_a_row_that_sees_nothing_gives_zeros(op) -> None:
    """ikawrakow/ik_llama.cpp#2344."""
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 6)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[..., 0, :] = False
    out = op(q, k, v, 0.3, mask)
    assert torch.equal(out[:, :, 0], torch.zeros(1, 2, 6))
    assert out.isfinite().all()


@pytest.mark.parametrize(("kv_heads", "v_width"), [(4, 8), (2, 8), (1, 5), (1, 12)])
def test_fused_op_equals_its_definition(kv_heads: int, v_width: int) -> None:
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, v_width)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    want = attention_reference(q, k, v, 0.4, mask)
    torch.testing.assert_close(attention(q, k, v, 0.4, mask), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(attention(q, k, v, 0.4, causal=True), want, atol=1e-5, rtol=0)
