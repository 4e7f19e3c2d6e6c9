"""The training loop: batches in, updates out, figures at every step; able to stop and go on at any moment."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.errors import CheckpointError, NumericsError
from rorqual.model.attend import Causal
from rorqual.model.cost import cost
from rorqual.model.moe import Routing, update_selection_bias
from rorqual.model.transformer import Transformer
from rorqual.train import checkpoint
from rorqual.train.config import TrainConfig
from rorqual.train.evaluate import target_weights
from rorqual.train.loss import cross_entropy
from rorqual.train.metrics import Log, View
from rorqual.train.optim import Optimizer, clip_, flops
from rorqual.train.schedule import rate

MAX_BAD_STEPS = 3  # non-finite steps in a row before the run goes back to its last checkpoint
MAX_ROLLBACKS = 2


class Source(Protocol):
    """Where batches come from; `rorqual.data.loader.Loader` is one."""

    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Result:
    """How a run ended: `stopped` names the signal where one ended it early."""

    step: int
    stopped: signal.Signals | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


Validate = Callable[[Transformer, int], dict[str, Any]]


class Trainer:
    """One run over one model. `validate(model, step)` returns further figures at evaluation and sampling steps."""

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        source: Source,
        tokenizer_from: Path,
        validate: Validate | None = None,
        peak_flops: float | None = None,
    ) -> None:
        self.config, self.model, self.source = config, model, source
        self.tokenizer_from, self.validate = tokenizer_from, validate
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
        self.optimizer = Optimizer(model.named_parameters(), config.optim, dtype)
        self.step = 0
        self.skipped = 0
        self.peak_flops = peak_flops
        self.flops_per_token = cost(model.config).train_flops(config.seq_len)
        self._forward: Any = torch.compile(model) if config.compile else model
        self._stop: signal.Signals | None = None

    # Going on from a checkpoint

    def resume(self, folder: Path) -> None:
        """Take weights, moments, position and random state of a checkpoint."""
        weights, moments, state = checkpoint.restore(folder, self.model.config)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)
        self.source.load_state_dict(state["loader"])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])

    def save(self) -> Path:
        """Write a checkpoint of where the run is."""
        state = {"skipped": self.skipped, "loader": self.source.state_dict()}
        return checkpoint.save(
            self.config.out,
            self.step,
            self.model,
            self.optimizer.state_dict(),
            state,
            self.tokenizer_from,
            self.config.keep,
        )

    # The loop

    def run(self, view: View) -> Result:
        """Train to the last step, or until a signal; a checkpoint is written either way.

        Raises NumericsError where losses stay non-finite after going back twice.
        """
        log = Log(self.config.out, self.step)
        result = Result(self.step)
        bad = rollbacks = 0
        begin, at_begin, paused = time.monotonic(), self.step, 0.0
        self.model.train()
        with self._signals():
            while self.step < self.config.steps and self._stop is None:
                line = self._one_step()
                bad = bad + 1 if line["skipped_now"] else 0
                if bad >= MAX_BAD_STEPS:
                    rollbacks += 1
                    self._roll_back(rollbacks, view)
                    bad = 0
                    continue
                del line["skipped_now"]
                pause = time.monotonic()
                line |= self._figures(time.monotonic() - begin - paused, self.step - at_begin)
                line |= self._validate()
                if self.step % self.config.log_every == 0 or len(line) > 8:
                    log.write(line)
                    result.history.append(line)
                    view.update(line)
                if self.config.save_every and self.step % self.config.save_every == 0:
                    self._save_or_say(view)
                paused += time.monotonic() - pause
        log.close()
        self.save()
        result.step, result.stopped = self.step, self._stop
        return result

    def _one_step(self) -> dict[str, Any]:
        c = self.config
        batches = [next(self.source) for _ in range(c.accumulate)]
        weights = [self.weights(b) for b in batches]
        total = sum(float(w.sum()) for w in weights)
        loads: dict[int, Tensor] = {}
        sums = {"loss": 0.0, "balance": 0.0, "mtp": 0.0}
        for batch, weight in zip(batches, weights, strict=True):
            routing = Routing() if self.model.config.n_routed_experts else None
            loss, parts = self.loss(batch, weight, total, routing)
            loss.backward()
            for key, value in parts.items():
                sums[key] += value
            for layer, load in (routing.load if routing is not None else {}).items():
                loads[layer] = loads.get(layer, 0) + load
        norm = clip_(self.model.parameters(), c.optim.clip)
        fine = math.isfinite(norm) and math.isfinite(sums["loss"])
        share = rate(c.schedule, self.step, c.steps)
        if fine:
            self.optimizer.step(share)
            self._balance(loads)
        else:
            self.skipped += 1
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        line: dict[str, Any] = {"step": self.step, "loss": sums["loss"], "grad_norm": norm, "rate": share}
        if loads:
            line["load_spread"] = _spread(loads)
            line["balance_loss"] = sums["balance"]
            line["balance_alpha"] = self.model.config.aux_loss_alpha
        if self.model.mtp:
            line["mtp_loss"] = sums["mtp"]
        if self.skipped:
            line["skipped"] = self.skipped
        line["skipped_now"] = not fine
        return line

    def loss(
        self, batch: Batch, weight: Tensor, total: float, routing: Routing | None
    ) -> tuple[Tensor, dict[str, float]]:
        """The micro-batch's part of the step's loss (language, balance and MTP), and its parts for the log."""
        c, model = self.config, self.model
        ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
        documents = batch.document_ids[:, :-1] if c.document_masks else None
        positions = (
            batch.positions if c.document_masks else torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        )
        positions = positions[:, :-1]
        with self._autocast():
            attend = Causal(documents)
            h = self._forward(ids, positions, attend, routing, c.recompute)
            cap = model.config.logit_softcap
            flat = h.flatten(0, 1)
            lm = cross_entropy(flat, model.lm_head.weight, targets.flatten(), weight.flatten(), cap) / total
            loss = lm
            parts = {"loss": float(lm.detach())}
            if model.mtp:
                extra = self._mtp_loss(h, batch, weight, positions, documents, routing) / total
                parts["mtp"] = float(extra.detach())
                loss = loss + c.mtp_weight * extra
            if routing is not None and routing.losses:
                balance = routing.balance_loss / c.accumulate
                parts["balance"] = float(balance.detach())
                loss = loss + balance
        return loss, parts

    def _mtp_loss(
        self,
        h: Tensor,
        batch: Batch,
        weight: Tensor,
        positions: Tensor,
        documents: Tensor | None,
        routing: Routing | None,
    ) -> Tensor:
        """Each module predicts one token further than the one before, from its hidden states (DeepSeek-V3, 2.2)."""
        model, ids = self.model, batch.ids
        total = h.new_zeros(())
        for k in range(len(model.mtp)):
            h = h[:, :-1]
            length = h.shape[1]
            attend = Causal(None if documents is None else documents[:, :length])
            h = model.predict_further(
                k, h, ids[:, 1 + k : 1 + k + length], positions[:, :length], attend, routing
            )
            targets = ids[:, 2 + k : 2 + k + length]
            # a target counts where every step from the position to it stays in the document
            w = torch.stack([weight[:, i : i + length] for i in range(k + 2)]).amin(0)
            flat = h.flatten(0, 1)
            total = total + cross_entropy(
                flat, model.lm_head.weight, targets.flatten(), w.flatten(), model.config.logit_softcap
            )
        return total / len(model.mtp)

    def weights(self, batch: Batch) -> Tensor:
        """Weights of the targets [B, T]: of a batch with its own, those; else 1 within documents."""
        own = getattr(batch, "loss_mask", None)
        return own[:, 1:].float() if own is not None else target_weights(batch, self.config.document_masks)

    def _autocast(self) -> Any:
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def _balance(self, loads: dict[int, Tensor]) -> None:
        """Loss-free balancing, once a step, with the counts of the whole batch (pytorch/torchtitan#1304)."""
        for layer, router in self.model.routers():
            if router.e_score_correction_bias is not None and layer in loads:
                update_selection_bias(
                    router.e_score_correction_bias, loads[layer], self.config.optim.bias_speed
                )

    def _figures(self, seconds: float, steps: int) -> dict[str, Any]:
        per_step = seconds / max(steps, 1)
        tokens = self.config.tokens_per_step / max(per_step, 1e-9)
        figures: dict[str, Any] = {
            "tokens": self.step * self.config.tokens_per_step,
            "tokens_per_second": tokens,
            "eta_seconds": per_step * (self.config.steps - self.step),
        }
        if self.peak_flops:
            work = self.flops_per_token * self.config.tokens_per_step + flops(self.optimizer)
            figures["mfu"] = work / per_step / self.peak_flops
        return figures

    def _validate(self) -> dict[str, Any]:
        c, step = self.config, self.step
        due = any(every and step % every == 0 for every in (c.eval_every, c.sample_every)) or step == c.steps
        return self.validate(self.model, step) if due and self.validate is not None else {}

    def _save_or_say(self, view: View) -> None:
        try:
            self.save()
        except CheckpointError as e:
            view.say(f"no checkpoint at step {self.step}: {e}; training goes on")

    def _roll_back(self, count: int, view: View) -> None:
        folder = checkpoint.latest(self.config.out, view.say)
        if folder is None or count > MAX_ROLLBACKS:
            raise NumericsError(
                f"step {self.step}: loss or gradient was not finite {MAX_BAD_STEPS} times in a row"
                + (" again after going back" if count > 1 else " before the first checkpoint")
                + "; lower the learning rate (optim.lr), or use dtype=float32"
            )
        at = self.step
        skipped = self.skipped
        self.resume(folder)
        self.skipped = skipped
        view.say(f"step {at}: not finite {MAX_BAD_STEPS} times in a row; back to step {self.step}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the loop after the step under way; a second Ctrl-C ends the program."""

        def stop(number: int, _: Any) -> None:
            if self._stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number)

        try:
            before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not in the main thread: whoever runs us there stops us otherwise
            yield
            return
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def _spread(loads: dict[int, Tensor]) -> float:
    """The worst layer's busiest expert against its mean, minus 1: 0 where all are even."""
    return max(float(n.max() / n.float().mean()) - 1 for n in loads.values())


def exit_code(result: Result) -> int:
    """0 done, 130 after Ctrl-C, 75 where a scheduler asked to make room (sysexits' EX_TEMPFAIL)."""
    if result.stopped is None:
        return 0
    return 130 if result.stopped == signal.SIGINT else 75
