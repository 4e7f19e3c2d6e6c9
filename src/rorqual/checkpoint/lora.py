"""Low-rank adapters (LoRA, arXiv 2106.09685): frozen weights, and beside them a small product that is trained."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.checkpoint.files import whole_folder
from rorqual.checkpoint.names import published_name
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError, ConfigError
from rorqual.model.transformer import Transformer

# fmt: off
TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
    "gate_proj", "up_proj", "down_proj",
)
# Keys of an adapter_config.json that change no number that we compute; any other that is set is refused.
HARMLESS = frozenset({
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules", "use_rslora", "bias",
    "init_lora_weights", "lora_dropout", "inference_mode", "auto_mapping", "revision", "peft_version", "layers_pattern",
    "loftq_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "eva_config", "runtime_config",
})
# fmt: on


@dataclass(frozen=True)
class Lora:
    """Which projections get adapters, and of which size. Routed experts have none: they are fused."""

    rank: int = 8
    alpha: float = 16.0  # the product is scaled by alpha / rank
    targets: tuple[str, ...] = TARGETS  # those that the model has

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank={self.rank}: must be 1 or more")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha={self.alpha}: must be above 0")
        wrong = [t for t in self.targets if t not in TARGETS]
        if wrong or not self.targets:
            raise ConfigError(f"lora.targets={list(self.targets)}: must be among {', '.join(TARGETS)}")


class LoraLinear(nn.Linear):
    """y = W x + alpha / rank * B A x, with W frozen; B starts at 0, so nothing changes before the first update."""

    def __init__(self, base: nn.Linear, lora: Lora, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        bound = math.sqrt(1 / base.in_features)
        a = torch.empty(lora.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, lora.rank))
        self.scaling = lora.alpha / lora.rank

    def forward(self, x: Tensor) -> Tensor:
        """x [*L, in] → [*L, out]."""
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(
            F.linear(x, self.lora_a), self.lora_b
        )

    def merged(self) -> nn.Linear:
        """A plain layer with the product added to its weight."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        delta = self.scaling * self.lora_b.detach() @ self.lora_a.detach()
        plain.weight = nn.Parameter(self.weight.detach() + delta.to(self.weight.dtype))
        plain.bias = self.bias
        return plain


def add_lora(model: Transformer, lora: Lora, seed: int) -> Transformer:
    """Freeze the model and put adapters beside its targets, in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in list(linears(model)):
        if name in lora.targets:
            setattr(parent, name, LoraLinear(layer, lora, generator))
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(f"lora.targets={list(lora.targets)}: this model has none of them")
    return model


def merge_lora(model: Transformer) -> Transformer:
    """A copy of the model without adapters, their products added to its weights."""
    plain = copy.deepcopy(model)
    for parent, name, layer in list(linears(plain)):
        if isinstance(layer, LoraLinear):
            setattr(parent, name, layer.merged())
    return plain.requires_grad_(True)


def save_adapter(model: Transformer, folder: Path, lora: Lora, base: str) -> None:
    """Write the adapters alone, in the layout that Hugging Face's PEFT reads. `base` names the model beneath."""
    tensors = []
    for name, layer in _adapters(model):
        published = "base_model.model." + published_name(model.config, f"{name}.weight").removesuffix(
            ".weight"
        )
        tensors += [
            (f"{published}.lora_A.weight", layer.lora_a),
            (f"{published}.lora_B.weight", layer.lora_b),
        ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in _adapters(model)}),
    }
    with whole_folder(folder, replace=folder.exists()) as work:
        write_tensors(work / "adapter_model.safetensors", tensors)
        (work / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_adapter(model: Transformer, folder: Path) -> Transformer:
    """Put saved adapters beside a model's weights, in place. MTP modules, which other programs do not know, may have
    none. Raises CheckpointError for adapters that do not fit the model and for options that we do not compute."""
    lora = _read_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path.resolve()}: missing; save the adapter as safetensors")
    file = TensorFile(path)
    add_lora(model, lora, seed=0)
    wanted: dict[str, Tensor] = {}
    for name, layer in _adapters(model):
        published = "base_model.model." + published_name(model.config, f"{name}.weight").removesuffix(
            ".weight"
        )
        both = {f"{published}.lora_A.weight": layer.lora_a, f"{published}.lora_B.weight": layer.lora_b}
        if not name.startswith("mtp.") or both.keys() & file.entries.keys():
            wanted |= both
    wrong = sorted(set(wanted) ^ set(file.entries))
    wrong += [n for n, t in wanted.items() if n in file.entries and file.entries[n].shape != tuple(t.shape)]
    if wrong:
        raise CheckpointError(
            f"{file.path}: does not fit the model: {wrong[0]} and {len(wrong) - 1} more differ"
        )
    for name, tensor in wanted.items():
        file.read_into(name, tensor.data)
    return model


def _read_config(path: Path) -> Lora:
    """An adapter_config.json of PEFT. Raises CheckpointError for what is not one, and for keys that change the maths."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = int(tree["r"]), float(tree["lora_alpha"]), tree["target_modules"]
        if isinstance(targets, str) and targets != "all-linear":
            raise ValueError(f"target_modules={targets!r}: must be a list of names")
        # Scaled by alpha / sqrt(rank) there (arXiv 2312.03732).
        lora = Lora(
            rank,
            alpha * math.sqrt(rank) if tree.get("use_rslora") else alpha,
            TARGETS if targets == "all-linear" else tuple(targets),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{path.resolve()}: not an adapter that can be read ({type(e).__name__}: {e})"
        ) from e
    unknown = {k: v for k, v in tree.items() if v and k not in HARMLESS}
    if tree.get("peft_type", "LORA") != "LORA":
        unknown["peft_type"] = tree["peft_type"]
    if tree.get("bias", "none") != "none":
        unknown["bias"] = tree["bias"]
    if tree.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        unknown["init_lora_weights"] = tree["init_lora_weights"]  # those that change the base's weights too
    if unknown:
        key, value = next(iter(unknown.items()))
        raise CheckpointError(
            f"{path.resolve()}: {key}={value!r}: not computed here; merge the adapter into its model where it was made"
        )
    return lora


def _adapters(model: Transformer) -> list[tuple[str, LoraLinear]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]


def linears(model: Transformer) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of every linear layer inside the layers and MTP modules."""
    for root in (*model.layers, *model.mtp):
        for parent in root.modules():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child
