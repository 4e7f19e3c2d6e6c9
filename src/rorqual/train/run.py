"""A run from its config: model, data, validation, training, report."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.files import write_whole
from rorqual.config import to_dict
from rorqual.data.loader import Loader, LoaderConfig, Stage, heldout_batches
from rorqual.data.shards import TokenSet, read_meta
from rorqual.device import measure_limits, require_memory
from rorqual.errors import ConfigError, DataError, RunError
from rorqual.model.config import ModelConfig, RopeConfig
from rorqual.model.cost import Cost, cost
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train import checkpoint
from rorqual.train.config import TrainConfig
from rorqual.train.evaluate import PROMPTS, bits_per_byte, heldout_loss, parses, sample
from rorqual.train.lock import Lock
from rorqual.train.metrics import TensorBoard, View, view
from rorqual.train.report import write_report
from rorqual.train.trainer import Result, Trainer

SAMPLE_TOKENS = 120


def train(config: TrainConfig, resume: bool = False, show: View | None = None) -> Result:
    """Run a config to its end or to a signal. Raises before any work for what cannot work: data that is not there,
    a folder in use or already used, a batch that cannot fit, a resume with another model or with nothing there."""
    if not config.data:
        raise ConfigError("data: name at least one folder made by `rorqual data build`")
    tokenizer = Tokenizer.load(config.data[0])
    model_config = _model_config(config, tokenizer)
    bill = cost(model_config)
    check_memory(config, bill)
    heldout = _heldout(config)
    with Lock(config.out):
        show = show or view(config.steps)
        found = checkpoint.latest(config.out, show.say)
        if resume and found is None:
            raise RunError(
                f"{config.out.resolve()}: nothing to resume (no whole checkpoint in {config.out / 'checkpoints'})"
            )
        if found is not None and not resume:
            raise RunError(
                f"{config.out.resolve()}: holds a run; add --resume to go on, or choose another folder"
            )
        _settle(config, resume)
        model = _model(config, model_config)
        loader = Loader(
            LoaderConfig(config.data, tuple(Stage(s, w) for s, w in config.curriculum), config.seed),
            config.batch_size,
            config.seq_len,
            config.steps * config.accumulate,
            vocab_size=model_config.vocab_size,
        )
        validation = Validation(config, tokenizer, heldout)
        peak = _peak(config)
        trainer = Trainer(config, model, loader, config.data[0], validation, peak)
        if found is not None:
            trainer.resume(found)
            show.say(f"going on from step {trainer.step}")
        show.say(_headline(config, bill))
        board = TensorBoard(config.out) if config.tensorboard else None
        try:
            result = trainer.run(show)
        finally:
            show.close()
        if board is not None:
            for line in result.history:
                board.write(line)
            board.close()
        write_report(config.out, config, bill, validation.samples, validation.parsed)
    return result


class Validation:
    """Held-out bits per byte and samples, at the steps that ask for them."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, heldout: tuple[list[Any], float]) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.batches, self.bytes_per_token = heldout
        self.samples: list[str] = []
        self.parsed: float | None = None
        self._python = _is_python(config.data[0])

    def __call__(self, model: Transformer, step: int) -> dict[str, Any]:
        c, end = self.config, step == self.config.steps
        figures: dict[str, Any] = {}
        if end or (c.eval_every and step % c.eval_every == 0):
            loss = heldout_loss(model, self.batches, c.document_masks)
            figures |= {"heldout_loss": loss, "heldout_bpb": bits_per_byte(loss, self.bytes_per_token)}
        if c.sample_every and (end or step % c.sample_every == 0):
            count = len(PROMPTS) if end else 1
            texts = sample(model, self.tokenizer, PROMPTS[:count], SAMPLE_TOKENS, seed=step)
            figures["sample"] = texts[0]
            self.samples = texts
            if end and self._python:
                more = [
                    *texts,
                    *(t for s in (1, 2, 3) for t in sample(model, self.tokenizer, PROMPTS, SAMPLE_TOKENS, s)),
                ]
                self.parsed = sum(map(parses, more)) / len(more)
                figures["parsed"] = self.parsed
        return figures


def _model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    if config.init_from is None:
        eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
        return config.shape.model(tokenizer.vocab_size, config.seq_len, tokenizer.bos_id, eos)
    found = hf.load_config(config.init_from)
    if found.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{config.data[0]}: the data's tokenizer has {tokenizer.vocab_size} tokens, {config.init_from} has "
            f"{found.vocab_size}; build the data with --tokenizer {config.init_from}"
        )
    return found if config.extend_context is None else extended(found, config.extend_context)


def extended(config: ModelConfig, context: int) -> ModelConfig:
    """The same model with its positions stretched to `context` by YaRN (DeepSeek-V2, section 3.1.4)."""
    if context <= config.max_position_embeddings:
        raise ConfigError(
            f"extend_context={context}: the model has {config.max_position_embeddings} positions already"
        )
    if config.rope.rope_type not in ("default", "yarn"):
        raise ConfigError(
            f"extend_context: rope_type={config.rope.rope_type!r} is not extended; only default and yarn are"
        )
    original = config.rope.original_max_position_embeddings or config.max_position_embeddings
    mla = config.attention == "mla"
    rope = RopeConfig(
        rope_theta=config.rope.rope_theta,
        rope_type="yarn",
        factor=context / original,
        original_max_position_embeddings=original,
        mscale=1.0 if mla else None,
        mscale_all_dim=1.0 if mla else None,
    )
    return dataclasses.replace(config, rope=rope, max_position_embeddings=context)


def _model(config: TrainConfig, model_config: ModelConfig) -> Transformer:
    if config.init_from is not None:
        model = hf.load_model(config.init_from, torch.float32)
        if model.config.num_nextn_predict_layers != model_config.num_nextn_predict_layers:
            raise ConfigError(
                f"{config.init_from}: its MTP modules are not in the file; set num_nextn_predict_layers=0"
            )
        extended_model = Transformer(model_config)
        extended_model.load_state_dict(model.state_dict())
        return extended_model
    model = Transformer(model_config).init_weights(config.seed, zero_output=config.optim.name == "muon")
    if config.optim.name == "muon":
        with torch.no_grad():  # Muon's orthogonal updates want a head that starts near nothing
            model.lm_head.weight.mul_(0.1)
    return model


def check_memory(config: TrainConfig, bill: Cost) -> None:
    """Refuse a batch that cannot fit, saying which would. Weights, gradients and two moments in float32; activations
    by their largest parts."""
    c = bill.config
    fixed = 16 * (bill.parameters + bill.mtp)
    active = (
        c.num_experts_per_tok * 2 * c.moe_intermediate_size if c.n_routed_experts else 2 * c.intermediate_size
    )
    width = 16 * c.hidden_size + 4 * active + c.num_attention_heads * config.seq_len // 2
    layers = 1 if config.recompute else c.num_hidden_layers
    per_token = 2 * width * layers + 4 * c.hidden_size * c.num_hidden_layers
    rows = config.batch_size * config.seq_len * per_token
    cure = "lower batch_size and raise accumulate (the step stays the same), or set recompute=true"
    require_memory(fixed + rows, f"batch_size={config.batch_size} rows of {config.seq_len} tokens", cure)


def _heldout(config: TrainConfig) -> tuple[list[Any], float]:
    """Held-out batches of every set, and their bytes per token."""
    batches: list[Any] = []
    size = tokens = 0
    for folder in config.data:
        found = TokenSet(folder, "heldout")
        if found.tokens > config.seq_len + 1:
            batches += heldout_batches(folder, 8, config.seq_len, config.eval_rows)
            size, tokens = size + found.bytes, tokens + found.tokens
    if not batches:
        raise DataError(
            f"{config.data[0]}: its held-out set is shorter than a row of {config.seq_len} tokens; build it with a "
            "larger --heldout share, or train on shorter rows"
        )
    return batches, size / tokens


def _settle(config: TrainConfig, resume: bool) -> None:
    """Write config.json of the run, or compare it: a resumed run keeps what its curve depends on."""
    path = config.out / "run.json"
    tree = to_dict(config)
    free = {
        "out",
        "save_every",
        "keep",
        "log_every",
        "tensorboard",
        "eval_every",
        "eval_rows",
        "sample_every",
        "compile",
    }
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, value in json.loads(json.dumps(tree)).items():
            if key not in free and before.get(key) != value:
                raise RunError(
                    f"--resume: {key}={value!r}, but the run was started with {before.get(key)!r}; keep it"
                )
    write_whole(path, json.dumps(tree, indent=1) + "\n")


def _peak(config: TrainConfig) -> float:
    limits = measure_limits(0.2)
    return limits.flops_bfloat16 if config.dtype == "bfloat16" else limits.flops_float32


def _headline(config: TrainConfig, bill: Cost) -> str:
    tables = f", {bill.tables / 1e6:.1f}M in tables without FLOPs" if bill.tables else ""
    return (
        f"{bill.config.architecture}: {bill.parameters / 1e6:.1f}M parameters, {bill.active / 1e6:.1f}M active{tables}; "
        f"{config.steps} steps of {config.tokens_per_step:,} tokens, "
        f"{bill.train_flops(config.seq_len) / 1e6:.0f} MFLOPs a token"
    )


def _is_python(folder: Path) -> bool:
    """Whether a set is Python source, so that samples can be parsed."""
    sources = read_meta(folder)["config"]["sources"]
    return all(s == "python" or re.search(r"\.py$", s) for s in sources)
