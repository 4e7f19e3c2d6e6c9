"""The reinforcement loop: cold start, then rollouts, verdicts, updates; able to stop and go on at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rorqual.checkpoint import hf
from rorqual.errors import ConfigError, NumericsError
from rorqual.model.transformer import Transformer
from rorqual.rl import judge
from rorqual.rl.config import RLConfig
from rorqual.rl.guard import Watch
from rorqual.rl.losses import advantages
from rorqual.rl.problems import Mix, Posed
from rorqual.rl.rollout import Rollout, Sampler
from rorqual.rl.update import Figures, Updater
from rorqual.rl.worked import Teacher, optimizer, shuffled
from rorqual.text.tokenizer import Tokenizer
from rorqual.train import checkpoint
from rorqual.train.config import Optim, due
from rorqual.train.metrics import Log, View
from rorqual.train.objective import autocast
from rorqual.train.optim import Optimizer
from rorqual.train.schedule import rate
from rorqual.train.stop import Stop
from rorqual.train.trainer import MAX_BAD_STEPS, Result, spread
from rorqual.verify.tasks import grade_all

BEST = "best"  # a folder beside the checkpoints: where a collapsed run goes back to
REFERENCE = "reference"  # the weights from which the divergence is measured


@dataclass
class Group:
    """A problem's rollouts and their verdicts: 1 right, 0 wrong, None where the grader failed."""

    posed: Posed
    rollouts: list[Rollout]
    rewards: list[float | None]

    @property
    def live(self) -> bool:
        """Whether it has both right and wrong answers, so that there is something to learn."""
        return len({r for r in self.rewards if r is not None}) > 1


@dataclass
class Drawn:
    """What a step sampled: all groups, and those that are learnt from."""

    groups: list[Group] = field(default_factory=list)
    live: list[Group] = field(default_factory=list)


class Loop:
    """One run over one model. `step` counts supervised steps and reinforcement steps together."""

    def __init__(
        self, config: RLConfig, model: Transformer, tokenizer: Tokenizer, mix: Mix, tokenizer_from: Path
    ) -> None:
        self.config, self.model, self.tokenizer, self.mix = config, model, tokenizer, mix
        self.tokenizer_from = tokenizer_from
        self.encode = Encoder(config, tokenizer, tokenizer_from)
        self.sampler = Sampler(model, tokenizer, config.sampling, self.autocast)
        self.teacher = Teacher(config, mix, tokenizer, self.encode)
        self.watch = Watch(config.guard)
        self.step = 0
        self.taught: int | None = (
            None if config.cold_start.steps else 0
        )  # supervised steps, once they are over
        self.place = self.rollouts = 0
        self.seconds = 0.0
        self.skipped = self.bad = 0  # updates that were not finite: in all, in a row
        self.optimizer = optimizer(model, config.cold_start) if self.taught is None else self._optimizer()
        self.updater: Updater | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(torch.device("cpu"), self.config.dtype)

    @property
    def last(self) -> int | None:
        """The step at which the run ends; unknown while the cold start is under way."""
        return None if self.taught is None else self.taught + self.config.steps

    def run(self, view: View, stop: Stop) -> Result:
        """To the last step, the goal or a signal; a checkpoint is written either way."""
        c = self.config
        checkpoint.clean(c.out, self.step)
        checkpoint.clean(c.out / BEST, self.step)
        reached = False
        with Log(c.out, self.step) as log:
            if self.step == 0 and c.model is not None:
                line: dict[str, Any] = {"step": 0, "phase": "before", "seconds": 0.0} | self._judged(True)
                log.write(line)
                view.update(line)
            while not stop.asked() and not reached and not self._over(c.stop_at):
                begin = time.perf_counter()
                line = self._teach() if self.taught is None else self._reinforce(view)
                self.seconds += time.perf_counter() - begin
                if self.step == c.stop_at and "accuracy" not in line:
                    self.sampler.refresh()
                    line |= self._judged(False)
                line |= {"seconds": self.seconds}
                log.write(line)
                view.update(line)
                reached = c.enough is not None and line.get("accuracy_low", 0.0) > c.enough
                reached = reached and self.taught is not None
                if due(c.save_every, self.step) and not reached:
                    self.save()
            done = reached or self._over(None)
            if done:
                log.write(
                    line := {"step": self.step, "phase": "end", "seconds": self.seconds} | self._judged(True)
                )
                view.update(line)
        over = done or self._over(c.stop_at)
        return Result(self.step, self.save(), None if over else stop.signal)

    def _over(self, stop_at: int | None) -> bool:
        """Whether the last step is done, or the one to leave at."""
        return (self.last is not None and self.step >= self.last) or (
            stop_at is not None and self.step >= stop_at
        )

    # The cold start

    def _teach(self) -> dict[str, Any]:
        """A supervised step; where the base is good enough, the last one."""
        cold = self.config.cold_start
        loss, skipped = self.teacher.step(self.model, self.optimizer, self.step, self.autocast)
        self._count(skipped)
        self.step += 1
        line: dict[str, Any] = {"step": self.step, "phase": "cold start", "next_token_loss": loss}
        line["skipped"] = self.skipped
        over = self.step >= cold.steps
        if due(cold.eval_every, self.step) or over:
            line |= self._judged(False)
            over = over or line["accuracy"] >= cold.until
        if over:
            line |= (
                judge.drawn(self.sampler, self.encode, self.mix.held_out, self.config.pass_k)
                if self.config.pass_k
                else {}
            )
            self.taught = self.step
            self.optimizer = self._optimizer()
        return line

    def _optimizer(self) -> Optimizer:
        c = self.config
        more = {"momentum_start": 0.95} if c.optimizer == "muon" else {}
        rule = Optim.even(c.optimizer, c.lr, weight_decay=c.weight_decay, betas=c.betas, **more)
        return Optimizer(self.model.named_parameters(), rule)

    # Reinforcement

    def _reinforce(self, view: View) -> dict[str, Any]:
        """Rollouts, verdicts and updates of a step."""
        c = self.config
        assert self.taught is not None
        began = time.perf_counter()
        number = self.step - self.taught
        self.sampler.refresh()
        drawn = self._draw(number)
        sampled = time.perf_counter()
        figures = self._update(drawn, number)
        updated = time.perf_counter()
        self.step += 1
        line = self._line(drawn, figures)
        line |= {"sampling_seconds": sampled - began, "update_seconds": updated - sampled}
        rolled = sum(len(g.rollouts) for g in drawn.groups)
        line["rollouts_per_second"] = rolled / (updated - began)
        if self.watch.collapsed(line["reward"], line["live"]):
            self._go_back(view)
            line["collapsed"] = True
        if due(c.eval_every, number + 1):
            self.sampler.refresh()
            line |= self._judged(False)
        if due(c.save_every, self.step) and self.watch.healthy:
            self.save(c.out / BEST)
        return line

    def _draw(self, number: int) -> Drawn:
        """Groups until enough of them are live, or the refills are used up."""
        s, drawn = self.config.sampling, Drawn()
        for _ in range(1 + s.refill):
            missing = s.prompts - len(drawn.live)
            if missing <= 0:
                break
            share = (len(drawn.live) + 1) / (len(drawn.groups) + 1) if drawn.groups else 1.0
            count = min(s.prompts, math.ceil(missing / share))
            done = number / self.config.steps
            posed = [self.mix.at(self.place + i, done) for i in range(count)]
            self.place += count
            groups = self._roll(posed, number)
            drawn.groups += groups
            drawn.live += [g for g in groups if g.live]
        drawn.live = drawn.live[: s.prompts]
        return drawn

    def _roll(self, posed: Sequence[Posed], number: int) -> list[Group]:
        s = self.config.sampling
        begin = (self.config.seed + 1) * (1 << 40) + self.rollouts
        seeds = [begin + i for i in range(len(posed))]
        found = self.sampler.draw([self.encode(p) for p in posed], s.group, seeds)
        self.rollouts += len(posed) * s.group
        groups = [Group(p, rollouts, []) for p, rollouts in zip(posed, found, strict=True)]
        by_task: dict[str, list[Group]] = {}
        for group in groups:
            by_task.setdefault(group.posed.label, []).append(group)
        for some in by_task.values():  # all of a family at once: graders that wait do so side by side
            texts = [(g.posed.problem, r.text) for g in some for r in g.rollouts]
            rewards = iter([o.reward for o in grade_all(some[0].posed.task, texts)])
            for group in some:
                group.rewards = [next(rewards) for _ in group.rollouts]
        return groups

    def _update(self, drawn: Drawn, number: int) -> Figures:
        """The step's updates over its live groups; figures are those of all together."""
        c, total = self.config, Figures()
        if not drawn.live:
            return total
        if self.updater is None:
            self.updater = Updater(c, self.model, self.optimizer, self.autocast, self._reference())
        known = torch.tensor([[r is not None for r in g.rewards] for g in drawn.live])
        rewards = torch.tensor([[r or 0.0 for r in g.rewards] for g in drawn.live])
        found = advantages(rewards, known, c.scale)
        advantage = torch.where(found < 0, found * c.negative, found).tolist()
        self.updater.prepare([r for g in drawn.live for r in g.rollouts])
        share = self.watch.share * rate(c.schedule, number, c.steps)
        order = shuffled(c.seed * 1_000_003 + number, len(drawn.live))
        size = math.ceil(len(order) / c.updates)
        for i in range(0, len(order), size):  # groups stay whole: their prompt is computed once
            part = order[i : i + size]
            rollouts = [r for j in part for r in drawn.live[j].rollouts]
            values = [a for j in part for a in advantage[j]]
            figures = self.updater.step(rollouts, values, share, first=i == 0)
            if figures.tokens:  # else there was nothing to learn
                self._count(figures.skipped)
            total.add(figures)
        return total

    def _count(self, skipped: bool) -> None:
        """Of an update. Raises NumericsError where some in a row were skipped: the weights would stay as they are."""
        self.skipped += skipped
        self.bad = self.bad + 1 if skipped else 0
        if self.bad == MAX_BAD_STEPS:
            raise NumericsError(
                f"step {self.step + 1}: loss or gradient was not finite in {self.bad} updates in a row; lower "
                "the rate (lr, cold_start.lr), or set dtype=float32"
            )

    def _reference(self) -> Transformer | None:
        """The weights before reinforcement, kept beside the run where the loss looks at them."""
        if not self.config.loss.beta:
            return None
        folder = self.config.out / REFERENCE
        if not folder.is_dir():
            hf.save_model(self.model, folder, tokenizer_from=self.tokenizer_from)
        return hf.load_model(folder, torch.float32).requires_grad_(False)

    def _line(self, drawn: Drawn, figures: Figures) -> dict[str, Any]:
        groups = drawn.groups
        rollouts = [r for g in groups for r in g.rollouts]
        rewards = [r for g in groups for r in g.rewards]
        judged = [r for r in rewards if r is not None]
        by_task: dict[str, list[float]] = {}
        for g in groups:
            by_task.setdefault(g.posed.label, []).extend(r for r in g.rewards if r is not None)
        tokens = max(figures.tokens, 1.0)
        assert self.taught is not None
        number = self.step - 1 - self.taught
        return {
            "step": self.step,
            "phase": "reinforcement",
            "reward": sum(judged) / max(len(judged), 1),
            "reward_by_task": {n: sum(v) / max(len(v), 1) for n, v in by_task.items()},
            "difficulty": {m.label: m.difficulty_at(number / self.config.steps) for m in self.mix.mixes},
            "live": sum(g.live for g in groups) / len(groups),
            "learnt_groups": len(drawn.live),
            "length": sum(len(r.ids) for r in rollouts) / len(rollouts),
            "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
            "grader_failed": sum(r is None for r in rewards) / len(rewards),
            "entropy": figures.entropy / tokens,
            "mismatch": figures.mismatch / max(figures.compared, 1.0),
            "mismatch_most": figures.mismatch_most,
            "clipped": figures.clipped / tokens,
            "divergence": figures.divergence / tokens,
            "dropped": figures.dropped / tokens,
            "grad_norm": figures.norm,
            "skipped": self.skipped,
            "rate": self.config.lr * self.watch.share * rate(self.config.schedule, number, self.config.steps),
            "rollouts": self.rollouts,
            "rollout_samples": [_shown(g) for g in groups[:4]],
        } | self._balance(rollouts)

    def _balance(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """load_spread: how much busier the busiest expert of a layer is than the mean, of those that sampling chose."""
        chosen = [r.experts for r in rollouts if r.experts is not None]
        if not chosen:
            return {}
        count = self.model.config.n_routed_experts or 0
        loads = (x.flatten().long().bincount(minlength=count) for x in torch.cat(chosen).unbind(1))
        return {"load_spread": max(map(spread, loads))}

    def _judged(self, pass_k: bool) -> dict[str, Any]:
        """Held-out accuracy as it is now."""
        self.sampler.refresh()
        line = judge.greedy(self.sampler, self.encode, self.mix.held_out)
        if pass_k and self.config.pass_k:
            line |= judge.drawn(self.sampler, self.encode, self.mix.held_out, self.config.pass_k)
        return line

    def _go_back(self, view: View) -> None:
        """To the best checkpoint, past the problems in between, at a lower rate."""
        c = self.config
        folder = checkpoint.latest(c.out / BEST, view.say)
        if folder is None or self.watch.trips >= c.guard.most:
            raise NumericsError(
                f"step {self.step}: collapsed ({self.watch.live:.0%} of groups live, reward {self.watch.reward:.3f} "
                f"after {self.watch.best:.3f})"
                + (
                    " before a checkpoint worth going back to"
                    if folder is None
                    else f" {self.watch.trips + 1} times"
                )
                + "; lower lr, or start from a model that answers more of the problems"
            )
        weights, saved = checkpoint.restore(folder, self.model.config)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(dict(saved.tensors))
        self.watch.went_back()
        view.say(
            f"step {self.step}: collapsed; back to the weights of step {saved.step}, at {self.watch.share:g} of the rate"
        )

    # Saving

    def save(self, run: Path | None = None) -> Path:
        """Write a checkpoint of where the run is."""
        state = {
            "taught": self.taught,
            "taught_place": self.teacher.place,
            "place": self.place,
            "rollouts": self.rollouts,
            "watch": self.watch.state_dict(),
            "seconds": self.seconds,
            "skipped": self.skipped,
        }
        saved = checkpoint.Saved(self.step, self.optimizer.state_dict(), state)
        return checkpoint.save(
            run or self.config.out, self.model, saved, self.tokenizer_from, self.config.keep
        )

    def resume(self, folder: Path) -> None:
        """Take everything of a checkpoint."""
        weights, saved = checkpoint.restore(folder, self.model.config)
        self.model.load_state_dict(weights)
        state = saved.state
        self.step, self.taught = saved.step, state["taught"]
        self.teacher.place, self.place = int(state["taught_place"]), int(state["place"])
        self.rollouts, self.seconds = int(state["rollouts"]), float(state["seconds"])
        self.skipped = int(state.get("skipped", 0))
        self.watch.load_state_dict(state["watch"])
        if self.taught is not None:
            self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(dict(saved.tensors))


class Encoder:
    """Problems as token ids, plain or through the model's template."""

    def __init__(self, config: RLConfig, tokenizer: Tokenizer, folder: Path) -> None:
        from rorqual.text.template import ChatTemplate

        self.config, self.tokenizer = config, tokenizer
        self.template = None
        if config.sampling.prompt == "chat":
            self.template = ChatTemplate.load(folder) or ChatTemplate.built_in("chatml")

    def __call__(self, posed: Posed) -> list[int]:
        text = self.config.sampling.prefix + posed.problem.prompt
        if self.template is not None:
            text = self.template.render([{"role": "user", "content": text}], add_generation_prompt=True)
        ids = self.tokenizer.encode(text, special=self.template is not None)
        most = self.config.sampling.max_prompt
        if len(ids) > most:
            raise ConfigError(
                f"sampling.max_prompt={most}: a problem of {posed.label!r} has {len(ids)} tokens; raise it"
            )
        return ids


def _shown(group: Group) -> dict[str, Any]:
    """The first rollout of a group."""
    verdict = {1.0: "right", 0.0: "wrong", None: "grader_failed"}[group.rewards[0]]
    return judge.sample_of(group.posed, group.rollouts[0], verdict)
