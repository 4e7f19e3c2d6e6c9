"""The cost model of a training run on many devices; ARCHITECTURE.md derives it and shows its errors.

Compute: FLOPs over the device's peak, at DENSE of it for wide products and attention; products of experts of width w
reach w / (w + HALF) of that. P pipeline stages wait P - 1 of a step's micro-batches (1F1B). What is recomputed costs no
time of its own: DeepSeek's runs recompute the cheap parts, and their shares of the peak have that in them. Traffic
between experts' devices hides behind compute as far as it is no longer. DENSE comes from DeepSeek's 67B model (300.6K
H800 hours for 1e12 tokens) and HALF from V2 (172.8K hours), both in arXiv 2405.04434, section 3.2.3; V3 (180K hours,
arXiv 2412.19437) had no part in them and is the check.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import Cost, cost
from rorqual.plan.device import Device

DENSE = 0.4672
HALF = 2377.0
BATCH = 9216 * 4096.0  # tokens a step, as V2 had them
ACTIVATION_BYTES = (
    34  # of one layer, a token and an element of its width, without recomputation (arXiv 2205.05198)
)
RECOMPUTED_BYTES = 2  # with recomputation only the layer's input stays


@dataclass(frozen=True)
class Layout:
    """How a model is spread: `pipeline` stages, experts over `expert` devices, the rest is data parallel with the
    optimizer's state sharded over it."""

    gpus: int
    pipeline: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for name in ("gpus", "pipeline", "expert"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        if self.gpus % (self.pipeline * self.expert):
            raise ConfigError(
                f"gpus={self.gpus}: must be a multiple of pipeline={self.pipeline} x expert={self.expert}"
            )


@dataclass(frozen=True)
class Plan:
    """An estimate. `compute` and `sending` are what one token costs one device, in seconds."""

    layout: Layout
    tokens: float
    flops: float  # a token
    compute: float  # device seconds a token
    bubble: float  # share of a step's time that pipeline stages wait
    traffic: float  # bytes that a token sends between experts' devices, forward and backward
    sending: float  # device seconds a token, as far as not hidden
    memory: dict[str, float]  # bytes of a device, by what
    device: Device

    @property
    def gpu_hours(self) -> float:
        return self.tokens * max(self.compute, self.sending) / (1 - self.bubble) / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.layout.gpus / 24

    @property
    def utilisation(self) -> float:
        """Model FLOPs over the bfloat16 peak."""
        return self.flops * (1 - self.bubble) / max(self.compute, self.sending) / self.device.bf16

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def estimate(
    config: ModelConfig,
    layout: Layout,
    tokens: float,
    device: Device,
    length: int = 4096,
    micro_batch: int = 1,
    fp8: bool = False,
    recompute: bool = True,
    batch: float = BATCH,
) -> Plan:
    """`batch`: tokens a step. Raises ConfigError for stages without a layer, for experts that do not spread evenly, for
    fewer rows a step than pipelines, and for products the device does not have."""
    if layout.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"pipeline={layout.pipeline}: the model has {config.num_hidden_layers} layers; a stage needs one"
        )
    micro_batches = batch / (length * micro_batch) / (layout.gpus / layout.pipeline)
    if micro_batches < 1:
        raise ConfigError(
            f"batch={batch:g}: fewer rows of {length} a step than the {layout.gpus // layout.pipeline} pipelines; take a "
            "larger batch or more stages"
        )
    if layout.expert > 1 and not config.n_routed_experts:
        raise ConfigError(f"expert={layout.expert}: this model has no experts; leave it 1")
    if config.n_routed_experts % layout.expert:
        raise ConfigError(
            f"expert={layout.expert}: must divide the model's {config.n_routed_experts} routed experts"
        )
    if fp8 and device.fp8 is None:
        raise ConfigError(f"fp8: {device.name} has no such products; leave it out")
    bill = cost(config)
    moe_layers = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    one = 3 * config.hidden_size * config.moe_intermediate_size
    narrow = (
        6.0 * moe_layers * (config.num_experts_per_tok + config.n_shared_experts) * one if moe_layers else 0.0
    )
    attention = 3 * bill.attention_flops(length / 2, absorbed=False)
    head = config.vocab_size * config.hidden_size
    further = 6.0 * config.num_nextn_predict_layers * ((bill.matmul - head) / config.num_hidden_layers + head)
    wide = 6.0 * bill.matmul - narrow + further
    peak = device.fp8 if fp8 and device.fp8 else device.bf16
    width = config.moe_intermediate_size
    compute = wide / (DENSE * peak) + attention / (DENSE * device.bf16)
    if narrow:
        compute += narrow / (DENSE * width / (width + HALF) * peak)
    traffic = _traffic(config, layout, moe_layers, fp8)
    link = device.inside if layout.expert <= device.per_node else device.between
    memory = _memory(config, bill, layout, moe_layers, length * micro_batch, recompute)
    wait = layout.pipeline - 1
    bubble = wait / (micro_batches + wait)
    return Plan(
        layout, tokens, wide + narrow + attention, compute, bubble, traffic, traffic / link, memory, device
    )


def _traffic(config: ModelConfig, layout: Layout, moe_layers: int, fp8: bool) -> float:
    """A token's hidden state goes to the groups of its experts and comes back, forward and backward; what stays at home
    is not sent. Dispatched at 8 bits where products are, combined at 16."""
    if layout.expert == 1:
        return 0.0
    places = min(
        layout.expert, config.topk_group if (config.n_group or 1) > 1 else config.num_experts_per_tok
    )
    away = places * (1 - 1 / layout.expert)
    return 2 * moe_layers * away * config.hidden_size * ((1 if fp8 else 2) + 2)


def _memory(
    config: ModelConfig, bill: Cost, layout: Layout, moe_layers: int, tokens: int, recompute: bool
) -> dict[str, float]:
    """Weights at 2 bytes, gradients at 4, a float32 copy and two moments sharded over the data-parallel devices."""
    experts = (
        moe_layers * config.n_routed_experts * 3.0 * config.hidden_size * (config.moe_intermediate_size or 0)
    )
    rest = bill.parameters + bill.mtp - experts
    own_experts, own_rest = experts / (layout.pipeline * layout.expert), rest / layout.pipeline
    shared = layout.gpus / layout.pipeline
    layers = config.num_hidden_layers / layout.pipeline
    kept = RECOMPUTED_BYTES if recompute else ACTIVATION_BYTES
    # The first stage holds as many micro-batches as there are stages.
    activations = tokens * config.hidden_size * (layers * layout.pipeline * kept + ACTIVATION_BYTES)
    return {
        "weights": 2 * (own_experts + own_rest),
        "gradients": 4 * (own_experts + own_rest),
        "optimizer": 12 * (own_experts * layout.expert / shared + own_rest / shared),
        "activations": activations,
    }


def fit(config: ModelConfig, gpus: int, tokens: float, device: Device, **more: bool | float) -> Plan:
    """The plan of the fewest pipeline stages that fits: experts within a node first, then over nodes. Raises ConfigError
    where none does."""
    spreads = [1, *(n * device.per_node for n in (1, 2, 4, 8))] if config.n_routed_experts else [1]
    spreads = [e for e in spreads if config.n_routed_experts % e == 0]
    tightest: Plan | None = None
    refused: ConfigError | None = None
    for stages in (1, 2, 4, 8, 16, 32):
        for expert in spreads:
            if gpus % (stages * expert) or stages > config.num_hidden_layers:
                continue
            try:
                plan = estimate(config, Layout(gpus, stages, expert), tokens, device, **more)  # type: ignore[arg-type]
            except ConfigError as e:
                refused = e  # more stages may have rows enough
                continue
            if plan.bytes <= 0.92 * device.memory:  # the rest is the allocator's and the links' buffers
                return plan
            if tightest is None or plan.bytes < tightest.bytes:
                tightest = plan
    if tightest is None and refused is not None:
        raise refused
    if tightest is None:
        raise ConfigError(
            f"gpus={gpus}: no layout of this model divides it; try a multiple of {device.per_node}"
        )
    raise ConfigError(
        f"gpus={gpus}: the model does not fit; the smallest layout (pipeline={tightest.layout.pipeline}, "
        f"expert={tightest.layout.expert}) needs {tightest.bytes / 1e9:.0f} GB of the {device.memory / 1e9:.0f} of each "
        f"{device.name}; take more of them"
    )
