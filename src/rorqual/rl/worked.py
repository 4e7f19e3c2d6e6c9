"""The cold start: supervised steps on worked examples, so that sampling finds right answers at all."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rorqual.errors import ConfigError
from rorqual.model.moe import update_selection_bias
from rorqual.model.transformer import Transformer
from rorqual.rl.config import ColdStart, RLConfig
from rorqual.rl.judge import Encode
from rorqual.rl.problems import WORKED, Mix
from rorqual.rl.rows import PAD
from rorqual.rl.update import Autocast
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.batch import Lesson
from rorqual.train.config import Optim
from rorqual.train.objective import objective
from rorqual.train.optim import Optimizer, clip_


def optimizer(model: Transformer, cold: ColdStart) -> Optimizer:
    """At the rates that a worked example deserves: Muon's defaults scaled, or AdamW at one rate."""
    if cold.optimizer == "adamw":
        config = Optim.even("adamw", cold.lr, weight_decay=0.0)
    else:
        config = Optim.even("muon", cold.lr, embedding_lr=cold.lr * 3)
    return Optimizer(model.named_parameters(), config)


@dataclass
class Teacher:
    """Draws worked examples and takes supervised steps. `place` is its position in the line of problems."""

    config: RLConfig
    mix: Mix
    tokenizer: Tokenizer
    encode: Encode
    place: int = 0

    def lesson(self) -> Lesson:
        """The next batch of rows, one example each."""
        cold = self.config.cold_start
        rows: list[tuple[list[int], int]] = []
        while len(rows) < cold.batch:
            place = self.place % cold.examples if cold.examples else self.place
            self.place += 1
            posed = self.mix.at(place, 0.0, WORKED)
            prompt, text = self.encode(posed), posed.problem.worked
            if text is None:
                raise ConfigError(f"cold_start: task {posed.task.name} has no worked answers; set steps=0")
            answer = [*self.tokenizer.encode(text, add_bos=False), *self.tokenizer.eos_ids[:1]]
            rows.append((prompt + answer, len(prompt)))
        return as_lesson(rows, cold.whole)

    def step(self, model: Transformer, opt: Optimizer, step: int, autocast: Autocast) -> tuple[float, bool]:
        """One supervised step, number `step` from 0; returns its loss, and whether it was skipped as not finite."""
        cold = self.config.cold_start
        lesson = self.lesson()
        model.train()
        with autocast():
            loss, routing = objective(model, lesson, float(lesson.weights.sum()))
        loss.total.backward()
        norm = clip_([p for p in model.parameters() if p.requires_grad], 1.0)
        skipped = not math.isfinite(norm + float(loss.language))
        if not skipped:
            opt.step(min(1.0, (step + 1) / max(cold.warmup, 1)))
        model.zero_grad(set_to_none=True)
        if skipped:
            return float(loss.language), True
        for layer, router in model.routers():
            if router.e_score_correction_bias is not None and routing is not None and layer in routing.load:
                update_selection_bias(router.e_score_correction_bias, routing.load[layer], Optim.bias_speed)
        return float(loss.language), False


def as_lesson(rows: Sequence[tuple[list[int], int]], whole: bool) -> Lesson:
    """Rows of (ids, length of the prompt), padded; weights on the answer, or on all but the first token."""
    longest = max(len(ids) for ids, _ in rows) - 1
    length = -(-longest // PAD) * PAD
    ids = torch.zeros(len(rows), length + 1, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for i, (row, prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        weights[i, (0 if whole else prompt - 1) : len(row) - 1] = 1
    positions = torch.arange(length).expand(len(rows), length)
    return Lesson(ids, positions, None, weights)


def shuffled(seed: int, count: int) -> list[int]:
    """A fixed order of the numbers below `count`."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
