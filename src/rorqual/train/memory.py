"""Whether a batch fits, said before work begins."""

from __future__ import annotations

import os

from rorqual.device import available_memory, format_bytes
from rorqual.errors import CapacityError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import cost
from rorqual.parallel.mesh import Mesh
from rorqual.train.config import TrainConfig

LOGITS_ROWS = 1024  # of the loss at a time, in float32 and products' dtype


def training_bytes(config: TrainConfig, model: ModelConfig, batch_size: int, world: int = 1) -> float:
    """An estimate: weights, gradients and two moments in float32, and the activations that the backward pass keeps, of
    one of `world` processes that takes `batch_size` rows."""
    bill = cost(model)
    parameters = (bill.parameters + bill.mtp) / (world if config.parallel.shard else 1)
    fixed = 16 * parameters + 3 * 4 * LOGITS_ROWS * model.vocab_size
    size = 2 if config.dtype == "bfloat16" else 4
    dense = model.intermediate_size
    moe = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    feed_forward = max(dense, moe) if model.n_routed_experts else dense
    heads = model.num_attention_heads * (2 * model.qk_head_dim + 2 * model.value_head_dim)
    scores = model.num_attention_heads * min(config.seq_len, 1024) / 2
    # Norms and rotations keep float32; products their own dtype: gate, up, their product and its parts.
    routed = model.num_experts_per_tok * model.hidden_size if model.n_routed_experts else 0
    per_layer = 4 * (6 * model.hidden_size + heads) + size * (5 * feed_forward + scores + 2 * routed)
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    kept = per_layer + 4 * model.hidden_size * layers if config.recompute else per_layer * layers
    return fixed + batch_size * config.seq_len * kept


def check_memory(config: TrainConfig, model: ModelConfig, mesh: Mesh | None = None) -> None:
    """Raise CapacityError where the batch cannot fit, saying which would. Processes of one machine share its memory."""
    mesh = mesh or Mesh()
    world, data = mesh.world, mesh.data.size
    there = available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", world))

    def needs(rows: int) -> float:
        return training_bytes(config, model, rows // data, world)

    if needs(config.batch_size) <= there:
        return
    fits = [b for b in range(config.batch_size - data, 0, -data) if needs(b) <= there]
    if fits:
        rows = config.batch_size * config.accumulate
        divides = next((b for b in fits if rows % b == 0), fits[0])
        cure = f"batch_size={divides} with accumulate={-(-rows // divides)} is the same step and would fit"
    elif not config.recompute:
        cure = "set recompute=true, or lower seq_len or shape.depth"
    else:
        cure = "lower seq_len or shape.depth"
    whose = " by each process" if world > 1 else ""
    raise CapacityError(
        f"batch_size={config.batch_size} rows of seq_len={config.seq_len}: about "
        f"{format_bytes(needs(config.batch_size))} of memory are needed{whose}, {format_bytes(there)} are available; "
        f"{cure}"
    )
