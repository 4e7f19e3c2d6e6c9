"""Initialisation, recomputation, tied heads and MTP."""

import subprocess
import sys

import pytest
import torch

from rorqual.model.attend import Causal
from rorqual.model.mtp import MTP
from rorqual.model.transformer import Transformer


def run(model: Transformer, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, positions, Causal(), **kwargs)


def test_the_same_seed_gives_the_same_weights(make_model) -> None:
    a, b, c = make_model(seed=3), make_model(seed=3), make_model(seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


def test_a_model_built_without_storage_initialises_like_any_other(make_config) -> None:
    config = make_config(num_nextn_predict_layers=1)
    with torch.device("meta"):
        empty = Transformer(config)
    empty.to_empty(device="cpu").init_weights(7)
    want = Transformer(config).init_weights(7)
    assert all(
        torch.equal(x, y)
        for x, y in zip(empty.state_dict().values(), want.state_dict().values(), strict=True)
    )
    assert torch.equal(empty.inv_freq, want.inv_freq)


def test_zero_outputs_make_each_layer_the_identity(make_config) -> None:
    for family in ("deepseek", "llama"):
        model = Transformer(make_config(family)).init_weights(0, zero_output=True)
        ids = torch.randint(0, 160, (1, 5))
        torch.testing.assert_close(run(model, ids), model.norm(model.embed_tokens(ids)))


def test_recompute_gives_the_same_gradients(make_model) -> None:
    model = make_model()
    ids = torch.randint(0, 160, (2, 11))
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        run(model, ids, recompute=recompute).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) > 10
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_tied_head_is_the_embedding(make_model) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.embed_tokens.weight


def test_mtp_by_its_definition(make_model) -> None:
    """DeepSeek-V3, section 2.2, equations 21 to 23, embedding first as in the released weights."""
    model = make_model(num_nextn_predict_layers=1)
    module: MTP = model.mtp[0]
    h, next_ids = torch.randn(1, 6, 48), torch.randint(0, 160, (1, 6))
    positions = torch.arange(6)[None]
    got = model.predict_further(0, h, next_ids, positions, Causal())

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    left, right = module.eh_proj.weight.chunk(2, 1)
    x = rms(model.embed_tokens(next_ids)) @ left.T + rms(h) @ right.T
    want = rms(module.block(x, *model.rope(positions), Causal()))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_softcap_bounds_logits(make_model) -> None:
    model = make_model(architecture="RorqualForCausalLM", logit_softcap=2.0)
    h = 100 * torch.randn(3, 48)
    raw = model.lm_head(h)
    torch.testing.assert_close(model.logits(h), 2 * torch.tanh(raw / 2))


def test_a_pair_table_row_depends_on_order(make_model) -> None:
    table = make_model(architecture="RorqualForCausalLM", ngram_table_size=1021).ngram
    a, b = torch.tensor([5]), torch.tensor([9])
    assert table.index(a, b) != table.index(b, a)
    spread = table.index(*torch.randint(0, 160, (2, 5000)))
    assert spread.min() >= 0
    assert spread.unique().numel() > 900


@pytest.mark.parametrize("family", ["deepseek", "llama"])
def test_flat_and_batched_positions_agree_outside_attention(make_model, family: str) -> None:
    """Layers take any leading shape: rotary tables of [N] and [B, T] are the same."""
    model = make_model(family)
    flat = model.rope(torch.arange(6))
    batched = model.rope(torch.arange(6).view(2, 3))
    assert torch.equal(flat[0].view(2, 3, -1), batched[0])


def test_a_model_without_memory_is_built_without_the_compiler() -> None:
    """torch's own initialisers import torch._dynamo on the meta device: seconds in every load and every count."""
    code = (
        "import sys, torch; from rorqual.model.published import published\n"
        "from rorqual.model.transformer import Transformer\n"
        "with torch.device('meta'): Transformer(published('deepseek-v2-lite'))\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
