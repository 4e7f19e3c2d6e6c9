"""Held-out accuracy: greedy answers to problems that are never trained on, and pass@k of drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rorqual.rl.problems import Posed
from rorqual.rl.rollout import Rollout, Sampler
from rorqual.verify.interval import pass_at, wilson
from rorqual.verify.outcome import Outcome
from rorqual.verify.tasks import grade_all

JUDGE_SEED = 77_003  # of drawn answers; greedy ones need none

Encode = Callable[[Posed], list[int]]


@dataclass
class Verdicts:
    """Counts of one family; what the grader could not judge is neither right nor wrong."""

    right: int = 0
    wrong: int = 0
    failed: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)

    def count(self, outcome: Outcome) -> None:
        """Add a verdict."""
        self.right += outcome.reward == 1
        self.wrong += outcome.reward == 0
        self.failed += outcome.reward is None

    @property
    def judged(self) -> int:
        return self.right + self.wrong


def sample_of(posed: Posed, rollout: Rollout, verdict: str) -> dict[str, Any]:
    """A rollout as it is shown and kept."""
    return {
        "task": posed.label,
        "prompt": posed.problem.prompt,
        "completion": rollout.text,
        "verdict": verdict,
        "tokens": len(rollout.ids),
        "truncated": rollout.truncated,
    }


def greedy(sampler: Sampler, encode: Encode, held_out: Mapping[str, Sequence[Posed]]) -> dict[str, Any]:
    """heldout: accuracy over all families with its interval, and each family's right answers and count."""
    families: dict[str, Verdicts] = {}
    for name, posed in held_out.items():
        rollouts = [g[0] for g in sampler.draw([encode(p) for p in posed], 1, [0] * len(posed), 0.0)]
        families[name] = found = Verdicts()
        texts = [(p.problem, r.text) for p, r in zip(posed, rollouts, strict=True)]
        outcomes = grade_all(posed[0].task, texts)
        for p, r, outcome in zip(posed, rollouts, outcomes, strict=True):
            found.count(outcome)
            found.samples.append(sample_of(p, r, outcome.verdict.value))
    right = sum(v.right for v in families.values())
    judged = sum(v.judged for v in families.values())
    low, high = wilson(right, judged)
    return {
        "accuracy": right / judged if judged else 0.0,
        "accuracy_low": low,
        "accuracy_high": high,
        "heldout": {n: [v.right, v.judged, v.failed] for n, v in families.items()},
        "samples": [s for v in families.values() for s in v.samples[:6]],
    }


def drawn(
    sampler: Sampler, encode: Encode, held_out: Mapping[str, Sequence[Posed]], k: int
) -> dict[str, Any]:
    """pass@1 and pass@k at the sampling temperature, over a quarter of the problems."""
    ones, ks = [], []
    for posed in held_out.values():
        some = posed[: max(1, len(posed) // 4)]
        seeds = [JUDGE_SEED + i for i in range(len(some))]
        for p, group in zip(some, sampler.draw([encode(p) for p in some], k, seeds), strict=True):
            found = Verdicts()
            for outcome in grade_all(p.task, [(p.problem, r.text) for r in group]):
                found.count(outcome)
            if found.judged:
                ones.append(found.right / found.judged)
                ks.append(pass_at(min(k, found.judged), found.right, found.judged))
    size = max(len(ones), 1)
    return {"pass_1": sum(ones) / size, "pass_k": sum(ks) / size, "k": k}
