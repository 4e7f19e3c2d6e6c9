"""Fine-tuning: only the assistant's words are learnt, with all weights or with adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.lora import Lora, LoraLinear, add_lora, load_adapter, merge_lora, save_adapter
from rorqual.checkpoint.tensors import TensorFile
from rorqual.errors import CheckpointError, ConfigError, DataError, RunError
from rorqual.model.attend import Causal
from rorqual.model.transformer import Transformer
from rorqual.train import checkpoint, folders
from rorqual.train.command import SftOptions
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import read
from rorqual.train.run import train
from rorqual.train.sft import SftConfig, sft

Make = Callable[..., TrainConfig]
TINY = {"depth": 2, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 2}


@pytest.fixture
def base(make_config: Make, silent: Any) -> Path:
    """A model folder of 96 positions."""
    return train(make_config(shape=TINY, steps=2, seq_len=96, batch_size=1), show=silent).folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"size {i % 5}"},
                {"role": "assistant", "content": f"Box{i % 5}"},
            ]
        }
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


def config_of(base: Path, chats: Path, tmp_path: Path, **changes: Any) -> SftConfig:
    small: dict[str, Any] = {
        "out": tmp_path / "sft",
        "batch_size": 1,
        "seq_len": 64,
        "dtype": "float32",
        "eval_every": 0,
    }
    return SftConfig(base, (chats,), **{**small, **changes})


def forward(model: Transformer) -> torch.Tensor:
    ids = torch.arange(12).view(1, 12) + 20
    return model(ids, torch.arange(12)[None], Causal())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_it_learns_the_answers(base: Path, chats: Path, tmp_path: Path, lora: Lora | None) -> None:
    result = sft(config_of(base, chats, tmp_path, lora=lora, epochs=20, lr=0.01))
    losses = [line["loss"] for line in read(tmp_path / "sft")]
    # adapters move less: embeddings and head of this hardly trained model stay as they are
    assert losses[-1] < losses[0] - (4 if lora is None else 0.5)
    assert hf.load_config(result.folder) == hf.load_config(base)
    hf.load_model(result.folder)  # a whole model, adapters merged


def test_adapters_are_all_that_changes_and_the_checkpoint_has_them_merged(
    base: Path, chats: Path, tmp_path: Path
) -> None:
    lora = Lora(rank=4, targets=("o_proj", "kv_b_proj"))
    result = sft(config_of(base, chats, tmp_path, lora=lora, epochs=2))
    before, after = hf.load_model(base).state_dict(), hf.load_model(result.folder).state_dict()
    changed = {n for n, t in before.items() if not torch.equal(t, after[n])}
    assert changed == {f"layers.{i}.self_attn.{t}.weight" for i in (0, 1) for t in lora.targets}
    adapted = load_adapter(hf.load_model(base), tmp_path / "sft" / "adapter")
    torch.testing.assert_close(forward(adapted), forward(hf.load_model(result.folder)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["full", "lora"])
def test_a_resumed_run_equals_one_that_went_through(
    base: Path, chats: Path, tmp_path: Path, lora: Lora | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"lora": lora, "epochs": 4, "save_every": 2}
    whole = sft(config_of(base, chats, tmp_path, out=tmp_path / "a", **more))
    sft(config_of(base, chats, tmp_path, out=tmp_path / "b", **more))
    last = folders.steps(tmp_path / "b")[-1]
    checkpoint.clean(tmp_path / "b", last - 1)  # as if it had been stopped before the end
    again = sft(config_of(base, chats, tmp_path, out=tmp_path / "b", **more), resume=True)
    for name in ("model.safetensors", checkpoint.TENSORS):
        assert (whole.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        (Lora(4, alpha=64.0), r"lora\.alpha=64\.0, but the run was started with 8\.0"),
        (Lora(8, alpha=8.0), r"lora\.rank=8, but the run was started with 4"),
        (None, "lora=None, but the run was started with"),
    ],
)
def test_a_resume_keeps_its_adapters(
    base: Path, chats: Path, tmp_path: Path, lora: Lora | None, named: str
) -> None:
    sft(config_of(base, chats, tmp_path, lora=Lora(4, alpha=8.0), epochs=1))
    with pytest.raises(RunError, match=named):
        sft(config_of(base, chats, tmp_path, lora=lora, epochs=1), resume=True)


def test_a_resume_keeps_its_conversations(base: Path, chats: Path, tmp_path: Path) -> None:
    """As many of them, but with other words."""
    sft(config_of(base, chats, tmp_path, epochs=1))
    chats.write_text(chats.read_text().replace("Box3", "Box4"))
    with pytest.raises(DataError, match="not those of the saved position"):
        sft(config_of(base, chats, tmp_path, epochs=1), resume=True)


def test_figures_are_held_out_ones_or_none(base: Path, chats: Path, tmp_path: Path) -> None:
    said: list[str] = []
    sft(config_of(base, chats, tmp_path, epochs=1, heldout=0.04), say=said.append)
    assert said == ["heldout=0.04 of 24 conversations is none of them: no held-out figures"]
    assert not [x for x in read(tmp_path / "sft") if "heldout_bpb" in x]
    sft(config_of(base, chats, tmp_path, epochs=1, heldout=0.05, out=tmp_path / "more"))
    assert "heldout_bpb" in read(tmp_path / "more")[-1]


def test_adapters_begin_as_nothing_and_merge_to_what_they_compute(base: Path) -> None:
    plain = hf.load_model(base)
    adapted = add_lora(hf.load_model(base), Lora(rank=4, alpha=8.0), seed=0)
    assert torch.equal(forward(plain), forward(adapted))
    assert {n.rpartition(".")[2] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
    }
    with torch.no_grad():
        for module in adapted.modules():
            if isinstance(module, LoraLinear):
                module.lora_b.normal_(0, 0.1)
    merged = merge_lora(adapted)
    assert set(dict(merged.named_parameters())) == set(dict(plain.named_parameters()))
    assert not torch.equal(forward(plain), forward(merged))
    torch.testing.assert_close(forward(merged), forward(adapted), atol=1e-5, rtol=1e-4)


def test_saved_adapters_have_pefts_names_and_fit_their_model_only(base: Path, tmp_path: Path) -> None:
    """The layout of Hugging Face's PEFT: base_model.model.<module>.lora_A.weight [r, in], lora_B.weight [out, r]."""
    adapted = add_lora(hf.load_model(base), Lora(rank=4, targets=("q_proj",)), seed=0)
    save_adapter(adapted, tmp_path / "adapter", Lora(rank=4, targets=("q_proj",)), "base")
    entries = TensorFile(tmp_path / "adapter" / "adapter_model.safetensors").entries
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert entries[f"{name}.lora_A.weight"].shape == (4, 32)
    assert entries[f"{name}.lora_B.weight"].shape == (32, 4)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    with torch.device("cpu"):
        other = Transformer(hf.load_config(base)).init_weights(0)
    del other.layers[1]
    with pytest.raises(CheckpointError, match=r"does not fit the model: base_model.model.model.layers.1"):
        load_adapter(other, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not an adapter"):
        load_adapter(hf.load_model(base), tmp_path)


def test_what_cannot_work_is_refused_by_name(base: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seq_len=128: .* has 96 positions"):
        sft(config_of(base, chats, tmp_path, seq_len=128))
    with pytest.raises(ConfigError, match="epochs=0"):
        config_of(base, chats, tmp_path, epochs=0)
    with pytest.raises(ConfigError, match=r"lora.targets=\['qproj'\]"):
        Lora(targets=("qproj",))
    with pytest.raises(ConfigError, match="this model has none of them"):
        add_lora(hf.load_model(base), Lora(targets=("k_proj",)), seed=0)
    with pytest.raises(ConfigError, match="need --lora-rank"):
        SftOptions(base, (chats,), lora_alpha=8.0).config()
    assert SftOptions(base, (chats,), lora_rank=4).config().lora == Lora(4, 8.0)
