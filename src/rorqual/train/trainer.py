"""The training loop: batches in, updates out, figures at every step; able to stop and go on at any moment."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.checkpoint import hf
from rorqual.device import resolve_device
from rorqual.errors import CheckpointError, NumericsError
from rorqual.model.moe import update_selection_bias
from rorqual.model.transformer import Transformer
from rorqual.parallel.layout import Layout, Piece, local
from rorqual.parallel.mesh import Mesh
from rorqual.parallel.spread import fold, gradient_norm, sum_gradients
from rorqual.train import checkpoint, folders
from rorqual.train.batch import Lesson, Rows
from rorqual.train.candidates import Candidates
from rorqual.train.config import TrainConfig, due
from rorqual.train.metrics import Log, NoLog, View
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
    `export` makes the model that is saved from the one that is trained, where they differ (adapters). `layout` says
    which parts of the model are other processes'.
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
        layout: Layout | None = None,
    ) -> None:
        self.config, self.source = config, source
        self.device = resolve_device(config.device)
        self.model = model.to(self.device)
        self.layout = layout or Layout(Mesh())
        self.mesh = self.layout.mesh
        self.tokenizer_from, self.validate, self.export = tokenizer_from, validate, export
        self.params = [p for p in model.parameters() if p.requires_grad]
        products = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(model.named_parameters(), config.optim, products, layout)
        self.speed = speed or Speed(config)
        self.step = self.skipped = 0
        self.logits = 0  # that sampled softmax computed
        self._forward: Any = torch.compile(model) if config.compile else model

    def resume(self, folder: Path) -> None:
        """Take weights, moments, position, counters and random state of a checkpoint."""
        weights, saved = checkpoint.restore(folder, self.model.config, self._boxes())
        tensors = dict(saved.tensors)
        adapters = {n: tensors.pop(f"adapter.{n}") for n, _ in self._adapters()}
        if adapters:
            weights = adapters  # the saved ones have them merged, and what is beneath them does not change
        if self.mesh.world == 1:
            self.model.load_state_dict(weights, strict=not adapters)
        else:
            self._load_parts(weights)
        self.optimizer.load_state_dict(tensors)
        self.source.load_state_dict(saved.state["loader"])
        self.step, self.skipped = saved.step, int(saved.state["skipped"])
        self.logits = int(saved.state.get("logits", 0))
        self.speed.before = float(saved.state["seconds"])
        self.speed.stepping, self.speed.processor = saved.state["stepping"]

    def save(self) -> Path:
        """Write a checkpoint of where the run is."""
        tensors = self.optimizer.state_dict() | {f"adapter.{n}": p for n, p in self._adapters()}
        state = {
            "skipped": self.skipped,
            "logits": self.logits,
            "seconds": self.speed.seconds,
            "stepping": [self.speed.stepping, self.speed.processor],
            "loader": self.source.state_dict(),
        }
        saved = checkpoint.Saved(self.step, tensors, state)
        if self.mesh.world > 1:
            c = self.config
            return checkpoint.save_parts(
                c.out, self.model.config, saved, self._parts(tensors), self.tokenizer_from, c.keep, self.mesh
            )
        return checkpoint.save(
            self.config.out, self.export(self.model), saved, self.tokenizer_from, self.config.keep
        )

    def run(self, view: View, stop: Stop) -> Result:
        """Train to the last step, or until a signal; a checkpoint is written either way.

        Raises NumericsError where losses are non-finite three times in a row, and again after going back; CheckpointError
        where the last checkpoint cannot be written.
        """
        first = self.mesh.first
        self.mesh.together(lambda: checkpoint.clean(self.config.out, self.step), alone=True)
        end = self.config.stop_at or self.config.steps
        bad, went_back_to = 0, None
        self.model.train()
        with Log(self.config.out, self.step) if first else NoLog() as log:
            asked = 0  # the signal that some process has got
            while self.step < end and not (asked := self.mesh.most(stop.signal or 0)):
                self.speed.begin()
                update = self.one_step()
                self.speed.end()
                bad = 0 if update.finite else bad + 1
                if bad == MAX_BAD_STEPS or (self.step == end and not self._finite()):
                    went_back_to, bad = self._go_back(went_back_to, bad, view), 0
                    log.rewind(self.step)
                    continue
                line = self._line(update)
                judged = {}
                if not self.mesh.most(stop.signal or 0) or self.step == end:
                    judged = self._validate()
                if self.step % self.config.log_every == 0 or self.step == end or judged:
                    log.write(line | judged)
                    view.update(line | judged)
                # Not amid bad steps: they may be why the run goes back.
                if due(self.config.save_every, self.step) and self.step < end and not bad and self._finite():
                    self._save_or_say(view)
            if self.step < end and not self._finite():
                self._go_back(went_back_to, bad, view)
                log.rewind(self.step)
        return Result(self.step, self.save(), signal.Signals(asked) if asked and self.step < end else None)

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
        c, data = self.config, self.mesh.data
        targets = torch.tensor(sum(float(x.weights.sum()) for x in lessons), dtype=torch.float64)
        update = Update(targets=float(data.sum_(targets.to(self.device))), loads={})
        for i, rows in enumerate(lessons):
            lesson = rows.to(self.device)
            candidates = self._candidates(lesson, i)
            with autocast(self.device, c.dtype):
                loss, routing = objective(
                    self.model,
                    lesson,
                    max(update.targets, 1.0),
                    1 / (len(lessons) * data.size),
                    c.mtp_weight,
                    c.recompute,
                    self._forward,
                    candidates,
                )
            loss.total.backward()
            update.loss += float(loss.language)
            update.balance += float(loss.balance)
            update.mtp += float(loss.mtp)
            for layer, load in (routing.load if routing is not None else {}).items():
                assert update.loads is not None
                update.loads[layer] = update.loads.get(layer, 0) + load
        if self.mesh.world > 1:
            self._add_up(update)
        update.norm = clip_(self.params, c.optim.clip, self._norm())
        return update

    def _candidates(self, lesson: Lesson, number: int) -> Candidates | None:
        """Of which tokens the loss of the step's micro-batch is: a resumed run draws the same."""
        c = self.config
        if c.softmax_share == 1:
            return None
        seed = (c.seed * c.steps + self.step) * c.accumulate + number
        drawn = Candidates.draw(lesson.targets, self.model.config.vocab_size, c.softmax_share, seed)
        self.logits += len(drawn.ids) * lesson.targets.numel()
        return drawn

    def _add_up(self, update: Update) -> None:
        """Other processes' gradients and figures to ours."""
        sum_gradients(self.model, self.layout)
        figures = torch.tensor([update.loss, update.balance, update.mtp], dtype=torch.float64)
        summed = self.mesh.data.sum_(figures.to(self.device))
        update.loss, update.balance, update.mtp = summed.tolist()
        update.loads = {layer: self.mesh.data.sum_(load) for layer, load in (update.loads or {}).items()}

    def _norm(self) -> float | None:
        """Of all processes' gradients; None: they are all here."""
        return None if self.mesh.world == 1 else float(gradient_norm(self.model, self.layout))

    def _balance(self, loads: dict[int, Tensor]) -> None:
        """Loss-free balancing, once a step, with the counts of the whole step (pytorch/torchtitan#1304). Beneath adapters
        it stays as it is: they are for the model that they were begun on."""
        for layer, router in self.model.routers():
            trained = router.weight.requires_grad
            if trained and router.e_score_correction_bias is not None and layer in loads:
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
        if c.softmax_share < 1:
            line["logits"] = self.logits
        return line | self.speed.figures(self.step)

    def _validate(self) -> dict[str, Any]:
        c, step = self.config, self.step
        asked = due(c.eval_every, step) or due(c.sample_every, step) or step == c.steps
        if not asked or self.validate is None:
            return {}
        figures = self.validate(self.model, step)
        fold(self.model)
        return figures

    def _save_or_say(self, view: View) -> None:
        try:
            self.save()
        except CheckpointError as e:
            view.say(f"no checkpoint at step {self.step}: {e}; training goes on")

    def _finite(self) -> bool:
        """Whether the weights are: a finite gradient may still throw them beyond what a number holds."""
        ours = all(bool(local(p.detach()).isfinite().all()) for p in self.params)
        return not self.mesh.most(int(not ours))

    def _go_back(self, before: Path | None, bad: int, view: View) -> Path:
        """To the last checkpoint, but not to the data after it: what broke the steps is passed over."""
        found = self.mesh.together(lambda: checkpoint.latest(self.config.out, view.say), alone=True)
        step = self.mesh.told(-1 if found is None else folders.step_of(found))
        folder = None if step < 0 else folders.folder_of(self.config.out, step)
        if folder is None or folder == before:
            raise NumericsError(
                f"step {self.step}: {_broken(bad)}"
                + (" before the first checkpoint" if folder is None else " again after going back")
                + "; lower the rates (optim.lr, optim.embedding_lr), or set dtype=float32"
            )
        at, skipped, speed, position = self.step, self.skipped, self.speed, self.source.state_dict()
        seconds = speed.before, speed.stepping, speed.processor
        self.resume(folder)
        self.skipped, (speed.before, speed.stepping, speed.processor) = skipped, seconds
        self.source.load_state_dict(position)
        view.say(f"step {at}: {_broken(bad)}; back to step {self.step}, past the data in between")
        return folder

    def _boxes(self) -> dict[str, Piece]:
        """The parts of parameters and moments that are ours, by name."""
        if self.mesh.world == 1:
            return {}
        boxes = {
            n: self.layout.of(n, tuple(p.shape)).piece(self.mesh) for n, p in self.model.named_parameters()
        }
        return boxes | self.optimizer.pieces()

    def _load_parts(self, weights: dict[str, Tensor]) -> None:
        """Raises KeyError where the checkpoint lacks one: it has been compared with the config."""
        own = {**dict(self.model.named_parameters()), **self._buffers()}
        with torch.no_grad():
            for name, t in own.items():
                local(t).copy_(weights[name])

    def _buffers(self) -> dict[str, Tensor]:
        """Those that are saved: the experts' selection biases."""
        names = self.model.state_dict(keep_vars=True)
        return {n: b for n, b in self.model.named_buffers() if n in names}

    def _parts(self, moments: Mapping[str, Tensor]) -> checkpoint.Parts:
        """What this process writes: of what several hold, the first one writes it."""
        boxes, tensors, where = self._boxes(), {}, {}
        for name, p in self.model.named_parameters():
            if self.layout.of(name, tuple(p.shape)).owned(self.mesh):
                tensors[f"{hf.MODEL}.{name}"], where[f"{hf.MODEL}.{name}"] = local(p).detach(), boxes[name]
        for name, t in moments.items():
            parameter = name.rpartition(".")[0]
            held = self.layout.of(parameter, tuple(t.shape))
            whole = name not in boxes or boxes[name].size == boxes[name].shape
            if self.mesh.first if whole else held.owned(self.mesh):
                tensors[f"state.{name}"] = t
                where[f"state.{name}"] = boxes.get(name) or Piece.whole(tuple(t.shape))
        if self.mesh.first:
            rest = {f"{hf.MODEL}.{n}": b for n, b in self._buffers().items()}
            rest["state.torch_rng"] = torch.get_rng_state()
            tensors |= rest
            where |= {n: Piece.whole(tuple(t.shape)) for n, t in rest.items()}
        return checkpoint.Parts(tensors, where)

    def _adapters(self) -> list[tuple[str, Tensor]]:
        """What is trained where the rest is frozen; nothing where all is trained."""
        named: list[tuple[str, Tensor]] = list(self.model.named_parameters())
        trained = [(n, p) for n, p in named if p.requires_grad]
        return trained if len(trained) < len(named) else []


def _broken(bad: int) -> str:
    return f"loss or gradient was not finite {bad} times in a row" if bad else "weights are not finite"


def spread(load: Tensor) -> float:
    """The busiest expert against the mean, minus 1: 0 where all are even (DeepSeek's MaxVio)."""
    return float(load.max() / load.float().mean()) - 1
