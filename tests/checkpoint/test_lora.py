"""Adapters that other programs wrote: their options are honoured or refused, and a damaged folder is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from rorqual.checkpoint.lora import Lora, LoraLinear, add_lora, load_adapter, save_adapter
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError
from rorqual.model.transformer import Transformer

LORA = Lora(rank=4, alpha=8.0, targets=("o_proj",))


@pytest.fixture
def folder(tiny: Transformer, tmp_path: Path) -> Path:
    save_adapter(add_lora(tiny, LORA, seed=1), tmp_path / "adapter", LORA, "base")
    return tmp_path / "adapter"


def change(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def base(tiny: Transformer) -> Transformer:
    return Transformer(tiny.config).init_weights(0)


def test_rank_stabilised_adapters_count_by_the_root_of_the_rank(tiny: Transformer, folder: Path) -> None:
    change(folder, use_rslora=True)
    model = load_adapter(base(tiny), folder)
    assert {m.scaling for m in model.modules() if isinstance(m, LoraLinear)} == {8.0 / 2}


@pytest.mark.parametrize(
    "change_of",
    [
        {"use_dora": True},
        {"alpha_pattern": {"o_proj": 32}},
        {"rank_pattern": {"o_proj": 8}},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0]},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"peft_type": "IA3"},
        {"of_the_future": 1},
        {"target_modules": ".*o_proj"},
    ],
    ids=str,
)
def test_what_we_do_not_compute_is_refused_by_name(
    tiny: Transformer, folder: Path, change_of: dict[str, Any]
) -> None:
    change(folder, **change_of)
    with pytest.raises(CheckpointError, match=f"adapter_config.json.*{next(iter(change_of))}"):
        load_adapter(base(tiny), folder)


def test_unset_options_and_those_of_training_are_no_hindrance(tiny: Transformer, folder: Path) -> None:
    change(
        folder, use_dora=False, alpha_pattern={}, lora_dropout=0.1, inference_mode=True, modules_to_save=None
    )
    load_adapter(base(tiny), folder)


def test_mtp_modules_may_have_none(tiny: Transformer, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    file = TensorFile(path)
    main = {n: file.read(n).clone() for n in file.entries if ".layers.2." not in n}
    assert len(main) == len(file.entries) - 2
    path.unlink()
    write_tensors(path, list(main.items()))
    load_adapter(base(tiny), folder)


def test_a_folder_without_its_tensors_is_named(tiny: Transformer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: missing"):
        load_adapter(base(tiny), folder)
