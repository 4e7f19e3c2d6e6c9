"""Accuracy of a model on families of problems at fixed seeds, with intervals."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual.engine.llm import LLM
from rorqual.engine.request import SamplingParams
from rorqual.errors import ConfigError
from rorqual.eval.config import HUMANEVAL, EvalConfig, parse_task
from rorqual.eval.humaneval import STOPS, HumanEval
from rorqual.verify import tasks
from rorqual.verify.interval import pass_at, wilson
from rorqual.verify.outcome import Outcome, Verdict
from rorqual.verify.tasks import Problem

BATCH = 256  # requests given to the engine at once


class Grader(Protocol):
    """What is needed of a task here."""

    def grade(self, problem: Problem, completion: str) -> Outcome: ...


@dataclass(frozen=True)
class Suite:
    """A family's problems and how its completions end."""

    spec: str
    task: Any
    problems: list[Problem]
    chat: bool
    stop: tuple[str, ...] = ()


def suite(spec: str, config: EvalConfig, has_template: bool) -> Suite:
    """The problems of a task spec. Raises ConfigError for what does not exist or does not fit."""
    chat = has_template if config.chat == "auto" else config.chat == "yes"
    name, options = parse_task(spec)
    if name == HUMANEVAL:
        if options:
            raise ConfigError(f"task {spec!r}: humaneval has no options")
        human = HumanEval(chat)
        human.prepare()
        return Suite(spec, human, human.problems(config.problems), chat, () if chat else STOPS)
    task = tasks.create(name, **options)
    task.prepare()
    problems = tasks.held_out(task, config.problems, config.seed, config.difficulty)
    if chat and options.get("style") in ("bare", "continue"):
        chat = False  # the style says that the completion goes on with the prompt
    stop = ("\n",) if not chat and getattr(task, "style", "") == "bare" else ()
    return Suite(spec, task, problems, chat, stop)


def evaluate(llm: LLM, suite: Suite, config: EvalConfig) -> dict[str, Any]:
    """Generate, grade, count. What the grader could not judge is left out of the accuracy and counted apart."""
    begin = time.monotonic()
    prompts: list[Any] = [
        [{"role": "user", "content": p.prompt}] if suite.chat else p.prompt for p in suite.problems
    ]
    texts: list[list[str]] = [[] for _ in suite.problems]
    truncated = 0
    jobs = [(i, k) for i in range(len(prompts)) for k in range(config.samples)]
    for at in range(0, len(jobs), BATCH):
        part = jobs[at : at + BATCH]
        params = [
            SamplingParams(
                max_tokens=config.max_tokens,
                temperature=config.temperature,
                seed=(config.seed * 1_000_003 + i * 1009 + k) % 2**31,
                stop=suite.stop,
            )
            for i, k in part
        ]
        for (i, _), answer in zip(part, llm.generate([prompts[i] for i, _ in part], params), strict=True):
            texts[i].append(answer.text)
            truncated += answer.finish_reason == "length"
    pairs = [(p, t) for p, found in zip(suite.problems, texts, strict=True) for t in found]
    outcomes = tasks.grade_all(suite.task, pairs, threads=2)
    groups = [outcomes[i : i + config.samples] for i in range(0, len(outcomes), config.samples)]
    return {
        "task": suite.spec,
        "fingerprint": fingerprint(suite, config),
        "chat": suite.chat,
        **count(groups),
        "truncated": truncated,
        "seconds": time.monotonic() - begin,
        "examples": [
            {"prompt": p.prompt, "completion": t, "verdict": o.verdict.value, "reason": o.reason}
            for (p, t), o in list(zip(pairs, outcomes, strict=True))[:8]
        ],
    }


def count(groups: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Right and judged completions of each problem, accuracy with its 95% interval, unbiased pass@k."""
    right = [sum(o.verdict is Verdict.RIGHT for o in g) for g in groups]
    judged = [sum(o.verdict is not Verdict.GRADER_FAILED for o in g) for g in groups]
    shares = [r / j for r, j in zip(right, judged, strict=True) if j]
    accuracy = sum(shares) / len(shares) if shares else 0.0
    samples = max(map(len, groups))
    if samples == 1:
        low, high = wilson(sum(right), sum(judged))
    else:  # completions of one problem are not independent: the problems are what was drawn
        spread = sum((s - accuracy) ** 2 for s in shares) / max(len(shares) - 1, 1)
        half = 1.96 * math.sqrt(spread / max(len(shares), 1))
        low, high = max(0.0, accuracy - half), min(1.0, accuracy + half)
    passes = {}
    for k in (k for k in (1, 2, 4, 5, 8, 10, 16, 32, 64, 100) if k <= samples):
        known = [pass_at(k, r, j) for r, j in zip(right, judged, strict=True) if j >= k]
        passes[f"pass@{k}"] = sum(known) / len(known) if known else None
    return {
        "problems": len(groups),
        "samples": samples,
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "passes": passes,
        "grader_failed": sum(map(len, groups)) - sum(judged),
        "right": right,
        "judged": judged,
    }


def fingerprint(suite: Suite, config: EvalConfig) -> str:
    """Equal for results that may be compared: the same problems, sampled in the same way."""
    digest = hashlib.sha256()
    for problem in suite.problems:
        digest.update(f"{problem.key}\0".encode())
    digest.update(f"{config.samples} {config.temperature} {config.max_tokens}".encode())
    return digest.hexdigest()[:16]
