"""Quantised models: close to what they were made from, stored with their scheme, and refused when damaged."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.inspect import inspect
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.cli import main
from rorqual.engine import packed_folder, quantize
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.llm import load_any
from rorqual.engine.quantised import QuantEmbedding, QuantExperts, QuantLinear
from rorqual.engine.quantize_command import read_text
from rorqual.engine.request import Request, SamplingParams
from rorqual.errors import CheckpointError, ConfigError
from rorqual.kernels.quantised import Format
from rorqual.model.attend import Cached, Causal, KVCache
from rorqual.model.transformer import Transformer


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(ids.shape[1]).expand_as(ids), Causal())).float()


def perplexity(model: Transformer, ids: torch.Tensor) -> float:
    scores = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(scores, ids[:, 1:].flatten()).exp())


def text(model: Transformer) -> torch.Tensor:
    """4,096 tokens that the model itself finds likely, so that its perplexity is far below the vocabulary's size."""
    ids = torch.randint(0, model.config.vocab_size, (32, 1), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    cache, new = KVCache(), ids
    with torch.inference_mode():
        for position in range(127):
            h = model(new, torch.full_like(new, position), Cached(cache))
            p = (2 * model.logits(h[:, -1]).float()).softmax(-1)
            new = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat((ids, new), 1)
    return ids


@pytest.mark.parametrize("name", ["mla", "gqa"])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.02), (4, 0.15)])
def test_perplexity_stays(name: str, bits: int, bound: float, fresh) -> None:
    """ikawrakow/ik_llama.cpp#245, #285: finite, and within 2% (8 bits) or 15% (4 bits)."""
    model = fresh(name, 1)
    ids = text(model)
    before = perplexity(model, ids)
    after = perplexity(quantize.quantize(model, quantize.formats(model, bits)), ids)
    assert before < model.config.vocab_size / 2
    assert abs(after / before - 1) < bound


def test_sensitive_matrices_keep_8_bits(fresh) -> None:
    model = fresh("mla", 1)
    formats = quantize.formats(model, 4)
    for name in ("lm_head", "embed_tokens", "layers.0.self_attn.kv_b_proj"):
        assert formats[name] == Format("int8")
    assert formats["layers.1.mlp.experts"] == Format("int4_min")
    assert not any("router" in name or "norm" in name for name in formats)
    quantize.quantize(model, formats)
    assert isinstance(model.layers[1].mlp.experts, QuantExperts)
    assert model.layers[1].mlp.router.weight.dtype == torch.float32


def test_a_head_of_4_bits_is_asked_for_and_a_tied_one_is_the_embedding(fresh) -> None:
    model = fresh("gqa", 1)
    found = quantize.formats(model, 4, head=4)
    assert (found["lm_head"], found["embed_tokens"]) == (Format("int4_min"), Format("int8"))
    tied = Transformer(dataclasses.replace(fresh("qwen", 1).config, tie_word_embeddings=True)).init_weights(1)
    found = quantize.formats(tied, 4, head=4)
    assert found["embed_tokens"] == found["lm_head"] == Format("int4_min")
    wide, ids = logits(tied.eval(), torch.arange(40)[None]), torch.arange(40)[None]
    quantize.quantize(tied, found)
    assert tied.lm_head.packed is tied.embed_tokens.packed
    assert (logits(tied, ids) - wide).norm() < 0.5 * wide.norm()


@pytest.mark.parametrize("group", [32, 128])
def test_both_forms_of_attention_agree(fresh, group: int) -> None:
    """The absorbed form has its own copies of kv_b_proj's halves, rounded in their own groups."""
    model = fresh("mla", 1)
    quantize.quantize(model, quantize.formats(model, 8, group))
    ids = torch.randint(0, 96, (1, 12))
    positions = torch.arange(12)[None]
    with torch.inference_mode():
        forms = [model(ids, positions, Cached(KVCache(), form=form)) for form in ("expanded", "absorbed")]
    assert (forms[0] - forms[1]).norm() < 0.05 * forms[0].norm()


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_a_folder_brings_back_the_same_model(name: str, fresh, tmp_path: Path) -> None:
    model = fresh(name, 2)
    formats = quantize.formats(model, 4)
    quantize.quantize(model, formats)
    packed_folder.save(model, formats, tmp_path / "q")
    loaded = load_any(tmp_path / "q")
    ids = torch.randint(0, 96, (2, 9))
    assert torch.equal(logits(loaded.model, ids), logits(model, ids))
    scheme = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert scheme["quant_method"] == "rorqual"
    assert scheme["formats"]["lm_head"] == "int8/32"


def test_a_tied_head_is_stored_once(fresh, tmp_path: Path) -> None:
    config = dataclasses.replace(fresh("gqa", 1).config, tie_word_embeddings=True)
    model = Transformer(config).init_weights(1).eval()
    formats = quantize.formats(model, 8)
    quantize.quantize(model, formats)
    assert isinstance(model.lm_head, QuantLinear)
    assert isinstance(model.embed_tokens, QuantEmbedding)
    assert model.lm_head.packed is model.embed_tokens.packed
    packed_folder.save(model, formats, tmp_path / "q")
    assert not any("lm_head" in n for n in TensorFile(tmp_path / "q" / hf.SINGLE).entries)
    ids = torch.randint(0, 96, (1, 5))
    assert torch.equal(logits(packed_folder.load(tmp_path / "q"), ids), logits(model, ids))


def test_an_embedding_widens_only_the_rows_asked_for(fresh) -> None:
    wide = fresh("gqa", 1).embed_tokens
    packed = QuantEmbedding.of(wide, Format("int8"))
    ids = torch.tensor([[0, 95, 17], [17, 16, 15]])
    assert (packed(ids) - wide(ids)).abs().max() < wide.weight.abs().max() / 200


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_the_engine_answers_as_the_model_does(name: str, fresh) -> None:
    """Greedy tokens through the paged cache, in chunks of 3, equal those of whole passes at 8 bits: the cache is
    bfloat16 where the passes have float32, which moves these logits by far less than their gaps."""
    model = quantize.quantize(fresh(name, 4), quantize.formats(fresh(name, 4), 8))
    engine = Engine(model, None, EngineConfig(cache_tokens=64, max_num_seqs=2, max_num_batched_tokens=3))
    assert (engine.cache.latent or engine.cache.keys)[0].dtype == torch.bfloat16
    prompt = [5, 17, 33, 2, 80, 41, 9]
    engine.add(Request("r", prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)))
    got: list[int] = []
    while engine.has_work():
        for delta in engine.step():
            got += delta.token_ids
    ids = list(prompt)
    for token in got:
        scores = logits(model, torch.tensor([ids]))[0, -1]
        assert scores[token] > scores.max() - 0.05 * scores.std()
        ids.append(token)
    assert len(got) == 6


@pytest.fixture
def folder(fresh, tmp_path: Path) -> Path:
    model = fresh("mla", 3)
    formats = quantize.formats(model, 4)
    packed_folder.save(quantize.quantize(model, formats), formats, tmp_path / "q")
    return tmp_path / "q"


def change(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version=2"),
        ("formats", None, "version=1"),
        ("formats", {"model.layers.0.self_attn.q_proj": "int5/32"}, "int5/32"),
        ("formats", {"model.layers.9.self_attn.q_proj": "int8/32"}, "layers.9"),
        ("formats", {"lm_head": "int8/64"}, "int8/64"),
        ("formats", {"model.norm": "int8/32"}, "norm: not a matrix"),
        ("formats", {"lm_head": "int8/32"}, "missing"),
    ],
)
def test_metadata_is_checked_against_the_tensors(folder: Path, key: str, value: object, message: str) -> None:
    """vllm-project/vllm-gaudi#1220: a scheme that does not fit its weights is refused at once."""
    change(folder, key, value)
    with pytest.raises(CheckpointError, match=message):
        packed_folder.load(folder)


def test_a_format_of_another_size_names_the_tensor(folder: Path) -> None:
    formats = json.loads((folder / "config.json").read_text())["quantization_config"]["formats"]
    change(folder, "formats", {**formats, "lm_head": "int4/32"})
    with pytest.raises(CheckpointError, match=r"lm_head.packed \[6, 544\] \(needs \[6, 288\]\)"):
        packed_folder.load(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    file = TensorFile(folder / hf.SINGLE)
    write_tensors(folder / hf.SINGLE, [(n, file.read(n)) for n in file.entries if "lm_head" not in n])
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(lm_head.packed\)"):
        packed_folder.load(folder)


@pytest.mark.parametrize(("bits", "group"), [(3, 32), (4, 64)])
def test_unknown_schemes_are_refused(bits: int, group: int, fresh) -> None:
    with pytest.raises(ConfigError, match=f"bits={bits}" if bits == 3 else f"group={group}"):
        quantize.formats(fresh("gqa", 1), bits, group)


def test_calibration_sees_every_matrix(fresh) -> None:
    """Mean squares of inputs: those of the head are the final norm's, whose mean square is its weight's, 1."""
    model = fresh("mla", 1)
    seen = quantize.calibrate(model, torch.randint(0, 96, (3, 16)))
    apart = {
        n for n in quantize.formats(model, 4) if not n.endswith(("mlp", "shared_experts", "embed_tokens"))
    }
    assert apart | {"layers.0.mlp.gate_proj", "layers.0.mlp.down_proj"} <= set(seen)
    assert abs(float(seen["lm_head"].mean()) - 1) < 0.02


def test_bits_a_weight_by_hand(fresh) -> None:
    """All at 8.5 bits but norms, of 2 layers x (input 32, post 32, q 8, k 8) and the last 32, at 16."""
    model = fresh("qwen", 1)
    formats = quantize.formats(model, 8)
    total = sum(p.numel() for p in model.parameters())
    norms = 2 * (32 + 32 + 8 + 8) + 32
    assert quantize.bits_a_weight(model.config, formats) == pytest.approx(8.5 + 7.5 * norms / total)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("q", ["--tokens", "-5"], "tokens=-5: must be 256 or more"),
        ("q", ["--text", "missing"], "missing: No such file"),
        ("q", ["--text", "."], "Is a directory"),
        ("q", ["--text", "binary"], "not UTF-8"),
        ("binary/q", [], "binary/q: cannot be made"),
        ("/proc/nope/q", [], "/proc/nope/q: cannot be made"),
        ("binary", [], "exists already"),
    ],
)
def test_what_the_command_cannot_do_is_said_before_the_model_is_loaded(
    out: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rorqual.checkpoint.loaded.load", lambda *_: pytest.fail("loaded"))
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert main(["quantize", "model", out, *options]) == 2
    assert message in capsys.readouterr().err


def test_no_more_of_a_text_is_read_than_is_needed(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 100_000)
    assert len(read_text(tmp_path / "long.txt", 256)) == 2 * 256 * 32


def test_a_quantised_folder_is_no_problem(folder: Path) -> None:
    report = inspect(folder)
    assert report.problems == []
    assert report.kind == "folder of rorqual quantize"
