"""The training loop: batches in, updates out, figures at every step; able to stop and go on at any moment."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.device import resolve_device
from rorqual.errors import CheckpointError, NumericsError
from rorqual.model.moe import update_selection_bias
from rorqual.model.transformer import Transformer
from rorqual.train import checkpoint
from rorqual.train.batch import Lesson, Rows
from rorqual.train.config import TrainConfig, due
from rorqual.train.metrics import Log, View
from rorqual.train.objective import autocast, objective
from rorqual.train.optim import Optimizer, clip_
from rorqual.train.schedule import rate
from rorqual.train.speed import Speed
from rorqual.train.stop import Stop

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run goes back to its last checkpoint


class Source(Protocol):
    """Where micro-batches come from; `rorqual.data.loader.Loader` is one."""

    def __next__(self) -> Rows: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Validate = Callable[[Transformer, int], dict[str, Any]]
Export = Callable[[Transformer], Transformer]


@dataclass(frozen=True)
class Result:
    """How a run ended: `stopped` is the signal where one ended it early; `folder` the last checkpoint."""

    step: int
    folder: Path
    stopped: signal.Signals | None = None


@dataclass
class Update:
    """One step's outcome. `loads` counts each layer's tokens per expert over the whole step."""

    loss: float = 0.0
    balance: float = 0.0
    mtp: float = 0.0
    norm: float = 0.0
    targets: float = 0.0
    loads: dict[int, Tensor] | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm) and math.isfinite(self.loss)


class Trainer:
    """One run over one model.

    `validate(model, step)` returns further figures every `eval_every` and `sample_every` steps and at the end.
    `export` makes the model that is saved from the one that is trained, where they differ (adapters).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        source: Source,
        tokenizer_from: Path,
        validate: Validate | None = None,
        speed: Speed | None = None,
        export: Export = lambda model: model,
    ) -> None:
        self.config, self.source = config, source
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.tokenizer_from, self.validate, self.export = tokenizer_from, validate, export
        self.params = [p for p in model.parameters() if p.requires_grad]
        products = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(model.named_parameters(), config.optim, products)
        self.speed = speed or Speed(config)
        self.step = self.skipped = 0
        self._forward: Any = torch.compile(model) if config.compile else model

    def resume(self, folder: Path) -> None:
        """Take weights, moments, position, counters and random state of a checkpoint."""
        weights, saved = checkpoint.restore(folder, self.model.config)
        tensors = dict(saved.tensors)
        adapters = {n: tensors.pop(f"adapter.{n}") for n, _ in self._adapters()}
        if adapters:
            # The saved weights have them merged: only the buffers (selection biases) are the run's own.
            buffers = dict(self.model.named_buffers())
            weights = adapters | {n: t for n, t in weights.items() if n in buffers}
        self.model.load_state_dict(weights, strict=not adapters)
        self.optimizer.load_state_dict(tensors)
        self.source.load_state_dict(saved.state["loader"])
        self.step, self.skipped = saved.step, int(saved.state["skipped"])
        self.speed.before = float(saved.state["seconds"])
        self.speed.stepping, self.speed.processor = saved.state["stepping"]

    def save(self) -> Path:
        """Write a checkpoint of where the run is."""
        tensors = self.optimizer.state_dict() | {f"adapter.{n}": p for n, p in self._adapters()}
        state = {
            "skipped": self.skipped,
            "seconds": self.speed.seconds,
            "stepping": [self.speed.stepping, self.speed.processor],
            "loader": self.source.state_dict(),
        }
        saved = checkpoint.Saved(self.step, tensors, state)
        return checkpoint.save(
            self.config.out, self.export(self.model), saved, self.tokenizer_from, self.config.keep
        )

    def run(self, view: View) -> Result:
        """Train to the last step, or until a signal; a checkpoint is written either way.

        Raises NumericsError where losses are non-finite three times in a row, and again after going back; CheckpointError
        where the last checkpoint cannot be written.
        """
        checkpoint.clean(self.config.out, self.step)
        end = self.config.stop_at or self.config.steps
        bad, went_back_to = 0, None
        self.model.train()
        with Stop() as stop, Log(self.config.out, self.step) as log:
            while self.step < end and not stop.asked():
                self.speed.begin()
                update = self.one_step()
                self.speed.end()
                bad = 0 if update.finite else bad + 1
                if bad == MAX_BAD_STEPS:
                    went_back_to, bad = self._go_back(went_back_to, view), 0
                    log.rewind(self.step)
                    continue
                line = self._line(update)
                if not stop.asked() or self.step == end:
                    line |= self._validate()
                if self.step % self.config.log_every == 0 or self.step == end or "heldout_bpb" in line:
                    log.write(line)
                    view.update(line)
                # Not amid bad steps: they may be why the run goes back.
                if due(self.config.save_every, self.step) and self.step < end and not bad:
                    self._save_or_say(view)
        return Result(self.step, self.save(), stop.signal if self.step < end else None)

    def one_step(self) -> Update:
        """Draw the step's rows, take their gradients and update, or skip what is not finite."""
        c = self.config
        rows = [next(self.source) for _ in range(c.accumulate)]
        update = self.gradients([Lesson.of(r, c.document_masks) for r in rows])
        if update.finite:
            begin = time.perf_counter()
            self.optimizer.step(rate(c.schedule, self.step, c.steps))
            self._balance(update.loads or {})
            self.speed.optimizer(time.perf_counter() - begin)
        else:
            self.skipped += 1
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return update

    def gradients(self, lessons: list[Lesson]) -> Update:
        """Gradients of the mean loss over all targets of the lessons, clipped, in the parameters' `.grad`."""
        c = self.config
        update = Update(targets=sum(float(x.weights.sum()) for x in lessons), loads={})
        for lesson in lessons:
            with autocast(self.device, c.dtype):
                loss, routing = objective(
                    self.model,
                    lesson.to(self.device),
                    max(update.targets, 1.0),
                    1 / len(lessons),
                    c.mtp_weight,
                    c.recompute,
                    self._forward,
                )
            loss.total.backward()
            update.loss += float(loss.language)
            update.balance += float(loss.balance)
            update.mtp += float(loss.mtp)
            for layer, load in (routing.load if routing is not None else {}).items():
                assert update.loads is not None
                update.loads[layer] = update.loads.get(layer, 0) + load
        update.norm = clip_(self.params, c.optim.clip)
        return update

    def _balance(self, loads: dict[int, Tensor]) -> None:
        """Loss-free balancing, once a step, with the counts of the whole step (pytorch/torchtitan#1304)."""
        for layer, router in self.model.routers():
            if router.e_score_correction_bias is not None and layer in loads:
                update_selection_bias(
                    router.e_score_correction_bias, loads[layer], self.config.optim.bias_speed
                )

    def _line(self, update: Update) -> dict[str, Any]:
        c, m = self.config, self.model.config
        line: dict[str, Any] = {"step": self.step, "loss": update.loss, "grad_norm": update.norm}
        line["rate"] = rate(c.schedule, self.step - 1, c.steps)
        total = update.loss
        if m.n_routed_experts and update.loads:
            line |= {"balance_loss": update.balance, "balance_alpha": m.aux_loss_alpha}
            total += m.aux_loss_alpha * update.balance
            spreads = [spread(load) for load in update.loads.values()]
            line |= {"load_spread": max(spreads), "load_spreads": spreads}
        if len(self.model.mtp):
            line |= {"mtp_loss": update.mtp, "mtp_weight": c.mtp_weight}
            total += c.mtp_weight * update.mtp
        line |= {"total_loss": total, "skipped": self.skipped, "tokens": self.step * c.tokens_per_step}
        return line | self.speed.figures(self.step)

    def _validate(self) -> dict[str, Any]:
        c, step = self.config, self.step
        asked = due(c.eval_every, step) or due(c.sample_every, step) or step == c.steps
        return self.validate(self.model, step) if asked and self.validate is not None else {}

    def _save_or_say(self, view: View) -> None:
        try:
            self.save()
        except CheckpointError as e:
            view.say(f"no checkpoint at step {self.step}: {e}; training goes on")

    def _go_back(self, before: Path | None, view: View) -> Path:
        """To the last checkpoint, but not to the data after it: what broke the steps is passed over."""
        folder = checkpoint.latest(self.config.out, view.say)
        if folder is None or folder == before:
            raise NumericsError(
                f"step {self.step}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row"
                + (" before the first checkpoint" if folder is None else " again after going back")
                + "; lower the rates (optim.lr, optim.embedding_lr), or set dtype=float32"
            )
        at, skipped, speed, position = self.step, self.skipped, self.speed, self.source.state_dict()
        seconds = speed.before, speed.stepping, speed.processor
        self.resume(folder)
        self.skipped, (speed.before, speed.stepping, speed.processor) = skipped, seconds
        self.source.load_state_dict(position)
        view.say(
            f"step {at}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row; back to step {self.step}, past "
            "the data in between"
        )
        return folder

    def _adapters(self) -> list[tuple[str, Tensor]]:
        """What is trained where the rest is frozen; nothing where all is trained."""
        named: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        trained = [(n, p) for n, p in named if p.requires_grad]
        return trained if len(trained) < len(named) else []


def spread(load: Tensor) -> float:
    """The busiest expert against the mean, minus 1: 0 where all are even (DeepSeek's MaxVio)."""
    return float(load.max() / load.float().mean()) - 1
