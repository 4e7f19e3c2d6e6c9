"""Supervised fine-tuning on conversations: all weights, or adapters."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rorqual.checkpoint import hf
from rorqual.checkpoint.loaded import check_vocabulary
from rorqual.checkpoint.lora import Lora, add_lora, merge_lora, save_adapter
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from rorqual.text.template import ChatTemplate
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.chat import Example, read_chats
from rorqual.train.config import Optim, Schedule, TrainConfig, due
from rorqual.train.evaluate import byte_lengths, heldout
from rorqual.train.packs import Packs
from rorqual.train.run import conduct
from rorqual.train.sample import sample
from rorqual.train.trainer import Result
from rorqual.train.view import echo


@dataclass(frozen=True)
class SftConfig:
    """A fine-tuning run. `model` is a folder, `data` JSON lines of {"messages": […]}."""

    model: Path
    data: tuple[Path, ...]
    out: Path = Path("runs/sft")
    epochs: int = 3
    lr: float | None = None  # 1e-4, or 1e-3 with lora
    lora: Lora | None = None  # none: all weights are trained
    batch_size: int = 4  # rows of a micro-batch
    accumulate: int = 2
    seq_len: int = 512  # conversations are packed into rows of this many tokens, each seeing itself only
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    heldout: float = 0.05  # share of the conversations kept for evaluation
    eval_every: int = 50  # steps; 0 or less: only at the end
    save_every: int = 200
    keep: int = 2
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "seq_len", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout={self.heldout}: must be 0 to below 1")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr={self.lr}: must be above 0")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must be 0 or more")
        if not self.data:
            raise ConfigError("data: name at least one file of JSON lines")

    def training(self, steps: int) -> TrainConfig:
        """The run as the trainer knows it: AdamW at one rate, half a cosine."""
        lr = self.lr or (1e-3 if self.lora is not None else 1e-4)
        return TrainConfig(
            out=self.out,
            data=self.data,
            optim=Optim.even("adamw", lr, weight_decay=0.0),
            schedule=Schedule("cosine", warmup=0.05, floor=0.1),
            steps=steps,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            seq_len=self.seq_len,
            dtype=self.dtype,
            mtp_weight=0.0,
            recompute=self.recompute,
            init_from=self.model,
            eval_every=self.eval_every,
            sample_every=self.eval_every,
            save_every=self.save_every,
            keep=self.keep,
            seed=self.seed,
        )


def sft(config: SftConfig, resume: bool = False, say: Any = echo) -> Result:
    """Fine-tune. Every checkpoint is a whole model, adapters merged; `out`/adapter has the adapters alone."""
    shape = hf.load_config(config.model)
    tokenizer = Tokenizer.load(config.model)
    check_vocabulary(tokenizer, shape.vocab_size, config.model)
    template = ChatTemplate.load(config.model) or ChatTemplate.built_in("chatml")
    if config.seq_len > shape.max_position_embeddings:
        raise ConfigError(
            f"seq_len={config.seq_len}: {config.model} has {shape.max_position_embeddings} positions"
        )
    chats = read_chats(config.data)
    random.Random(config.seed).shuffle(chats.conversations)
    made = chats.examples(tokenizer, template)
    if chats.bad:
        say(chats.summary())
    held = math.floor(len(made) * config.heldout)
    source = _packs(config, made[held:])
    if source.shortened:
        say(f"{source.shortened} conversations are longer than seq_len={config.seq_len} tokens and were cut")
    rows = config.batch_size * config.accumulate
    training = config.training(max(1, round(config.epochs * source.rows_per_epoch / rows)))
    if not held:
        say(f"heldout={config.heldout} of {len(made)} conversations is none of them: no held-out figures")
    judged = _packs(config, made[:held]) if held else None
    prompt = _first_question(chats.conversations[0].messages, template)
    validation = SftValidation(training, tokenizer, judged, prompt, shape.vocab_size)
    return conduct(
        training,
        shape,
        source,
        config.model,
        validation,
        resume,
        kept=config,
        adapt=lambda model: _adapted(model, config),
        export=lambda model: _exported(model, config),
    )


class SftValidation:
    """Loss and bits per byte of held-out answers, where there are some, and the answer to one question."""

    def __init__(
        self, config: TrainConfig, tokenizer: Tokenizer, judged: Packs | None, prompt: str, vocab_size: int
    ) -> None:
        self.config, self.tokenizer, self.prompt = config, tokenizer, prompt
        self.batches = judged.in_order()[:32] if judged is not None else []
        self.byte_lengths = byte_lengths(tokenizer, vocab_size)

    def __call__(self, model: Transformer, step: int) -> dict[str, Any]:
        c = self.config
        if not due(c.eval_every, step) and step != c.steps:
            return {}
        answer = sample(merge_lora(model), self.tokenizer, [self.prompt], 100, seed=step, temperature=0.7)[0]
        if not self.batches:
            return {"sample": answer}
        found = heldout(model, self.batches, self.byte_lengths)
        return {"heldout_loss": found.loss, "heldout_bpb": found.bits_per_byte, "sample": answer}


def _packs(config: SftConfig, made: list[list[Example]]) -> Packs:
    flat = [e for found in made for e in found]
    return Packs(flat, config.batch_size, config.seq_len, config.seed)


def _first_question(messages: Any, template: ChatTemplate) -> str:
    end = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    return template.render(messages[:end], add_generation_prompt=True) if end else ""


def _adapted(model: Transformer, config: SftConfig) -> Transformer:
    return model if config.lora is None else add_lora(model, config.lora, config.seed)


def _exported(model: Transformer, config: SftConfig) -> Transformer:
    """The model that a checkpoint holds; adapters are written beside it as well."""
    if config.lora is None:
        return model
    save_adapter(model, config.out / "adapter", config.lora, str(config.model))
    return merge_lora(model)
