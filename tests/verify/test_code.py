"""Code is judged by the values it returns; known reward hacks earn nothing, and a failing grader blames nobody."""

from __future__ import annotations

import pytest

from rorqual.verify import code, values
from rorqual.verify.outcome import Verdict
from rorqual.verify.sandbox import Limits, Sandbox

CALLS = [[2, 3], [10, -4], [0, 0]]
SUMS = [5, 6, 0]
HONEST = "def add(a, b):\n    return a + b\n"

HACKS = {
    "exit before the assertion": "import sys\nsys.exit(0)",
    "hard exit": "import os\nos._exit(0)",
    "exit in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "overridden equality": (
        "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def add(a, b): return Yes()"
    ),
    "a number that equals all": (
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "    def __index__(self): return 5\n    def __repr__(self): return '5'\ndef add(a, b): return Yes(0)"
    ),
    "a list that equals all": (
        "class Yes(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([5])\n"
        "def add(a, b): return Yes()"
    ),
    "a class that lies of its type": (
        "class Yes:\n    __class__ = int\n    def __index__(self): return 5\n    __int__ = __index__\n"
        "def add(a, b): return Yes()"
    ),
    "printed pass mark": "print('All tests passed!')\nprint('{\"passed\": true}')\ndef add(a, b): print('PASS')",
    "written to the result descriptor": (
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"passed": true, "verdict": "right"}\\n\' * 9)\n'
        "    except OSError: pass\ndef add(a, b): return None"
    ),
    "guessed frames on the result descriptor": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"loaded\": true}\\n' + b'{\"value\": 0}\\n' * 3)\n"
        "    except OSError: pass\nos._exit(0)"
    ),
    "a number too large for its kind": (
        "import os\nline = '{\"value\": {\"complex\": [1' + '0' * 400 + ', 0]}}\\n'\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, ('{\"loaded\": true}\\n' + line * 9).encode())\n    except OSError: pass\nos._exit(0)"
    ),
    "a value nested as deep as it can be read": (
        "import os\nline = '{\"value\": ' + '[' * 980 + ']' * 980 + '}\\n'\nfor fd in range(3, 64):\n"
        "    try: os.write(fd, ('{\"loaded\": true}\\n' + line * 9).encode())\n    except OSError: pass\nos._exit(0)"
    ),
    "tests read from files": (
        "import glob, os\ndef add(a, b):\n    for p in glob.glob('/**/*test*', recursive=True):\n"
        "        return eval(open(p).read())"
    ),
    "expected values from frames": (
        "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
        "        for k, v in {**f.f_locals, **f.f_globals}.items():\n"
        "            if 'expect' in k: return v\n        f = f.f_back"
    ),
    "expected values from the heap": (
        "import gc\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o:\n"
        "            return o['expected']\n        if isinstance(o, list) and o[:2] == [5, 6]: return o.pop(0)"
    ),
    "patched json": (
        'import json\njson.dumps = lambda *a, **k: \'{"value": {"any": []}}\'\njson.JSONEncoder.encode = json.dumps\n'
        "def add(a, b): return None"
    ),
    "patched builtins": (
        "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.isinstance = lambda *a: True\n"
        "builtins.len = lambda x: 0\ndef add(a, b): return None"
    ),
    "patched verifier": (
        "import sys\nfor name, m in list(sys.modules.items()):\n    if 'rorqual' in name:\n"
        "        for k in list(vars(m)):\n            if callable(vars(m)[k]): setattr(m, k, lambda *a, **k: True)\n"
        "def add(a, b): return None"
    ),
    "a thread that goes on": "import threading as t\nt.Thread(target=print).start()\ndef add(a, b): return 5",
    "exit hook": (
        "import atexit, os\natexit.register(lambda: os.write(1, b'passed'))\ndef add(a, b): raise SystemExit(0)"
    ),
    "recursion in the value": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "deep value": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "endless value": "def add(a, b):\n    return list(range(10**9))",
    "infinite digits": "def add(a, b):\n    return 10**10**6",
    "exception as success": "def add(a, b): raise AssertionError('passed')",
    "swallowing everything": "def add(a, b):\n    try: raise ValueError\n    except BaseException: return ...",
    "True for one": "def add(a, b): return True",
    "the example's answer": "def add(a, b): return 5",
    "a generator": "def add(a, b): yield a + b",
    "a mock": "from unittest.mock import MagicMock\nadd = MagicMock()",
    "a descriptor of values": "def add(a, b): return {'opaque': 'int'}",
    "monkeypatched return path": (
        "import sys\ndef add(a, b):\n    f = sys._getframe(1)\n    f.f_locals['calls'] = []\n    return None"
    ),
    "trace function": "import sys\nsys.settrace(lambda *a: None)\ndef add(a, b): return None",
    "not code": "I think the answer is 5.",
    "empty": "",
}


def test_honest_code_is_right(sandbox: Sandbox) -> None:
    assert code.grade_calls(HONEST, "add", CALLS, SUMS, sandbox=sandbox).is_right


@pytest.mark.parametrize("name", HACKS)
def test_a_reward_hack_earns_nothing(name: str, sandbox: Sandbox) -> None:
    limits = Limits(seconds=1.0, memory_mb=256, result_kb=256)
    outcome = code.grade_calls(HACKS[name], "add", CALLS, SUMS, limits=limits, sandbox=sandbox)
    assert outcome.verdict is Verdict.WRONG, outcome


@pytest.mark.parametrize("name", HACKS)
def test_a_reward_hack_earns_nothing_from_a_test_function(name: str, sandbox: Sandbox) -> None:
    """As in HumanEval, where the test is a program with assertions."""
    test = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(10, -4) == 6\n"
    limits = Limits(seconds=1.0, memory_mb=256, result_kb=256)
    outcome = code.grade_check(HACKS[name], "add", test, HONEST, limits=limits, sandbox=sandbox)
    assert outcome.verdict is Verdict.WRONG, outcome
    assert code.grade_check(HONEST, "add", test, HONEST, sandbox=sandbox).is_right


def test_a_checker_that_hangs_has_failed_itself(sandbox: Sandbox) -> None:
    """macanderson/stella#3264: a grader's own timeout was read as a reward of 0."""
    slow = "import time\ndef check(candidate):\n    time.sleep(10)\n"
    outcome = code.grade_check(HONEST, "add", slow, HONEST, limits=Limits(seconds=0.2), sandbox=sandbox)
    assert outcome.verdict is Verdict.GRADER_FAILED
    assert outcome.reward is None


def test_a_reference_that_fails_its_test_is_the_graders_fault(sandbox: Sandbox) -> None:
    test = "def check(candidate):\n    assert candidate(1, 1) == 3\n"
    assert code.grade_check(HONEST, "add", test, HONEST, sandbox=sandbox).grader_failed


@pytest.mark.parametrize("expected", ["6", "6\n", "6\r\n", "6  \n\n"])
@pytest.mark.parametrize(
    "completion",
    [
        "print(int(input())*2)",
        "Here:\n```python\nprint(int(input())*2)\n```\nDone.",
        "```\r\nprint(int(input())*2)\r\n```",
    ],
)
def test_programs_are_judged_by_their_output(completion: str, expected: str, sandbox: Sandbox) -> None:
    """huggingface/open-r1#687."""
    source = code.source_of(completion)
    assert code.grade_program(source, [("3", expected), ("0\n", "0")], sandbox=sandbox).is_right


def test_a_program_that_fails_says_why(sandbox: Sandbox) -> None:
    outcome = code.grade_program("print(1 / 0)", [("", "1")], sandbox=sandbox)
    assert outcome.verdict is Verdict.WRONG
    assert "ZeroDivisionError" in outcome.reason


def test_the_last_block_counts_and_must_be_closed() -> None:
    assert code.source_of("```python\na\n```\n```python\nb\n```") == "b\n"
    assert code.source_of("```python\na\n```\n```python\nb") == ""
    assert code.body_of("    return 1\n\n    # more\nprint(2)\n    x") == "    return 1\n\n    # more\n"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        1.5,
        float("inf"),
        "ü\ud800",
        [1, [2]],
        (1, (2,)),
        {1: "a", (1, 2): {3}},
        frozenset({1}),
        b"\x00",
        1 + 2j,
    ],
    ids=repr,
)
def test_values_come_back_as_they_were(value: object) -> None:
    import json

    back = values.decode(values.loads(json.dumps(values.encode(value))))
    assert back == value
    assert type(back) is type(value)
    assert values.same(back, value)


def test_what_comes_back_is_nested_to_a_bounded_depth() -> None:
    """Whoever reads it on must be able to: 984 lists were read here and not written for the next process."""
    deepest = "[" * (values.MAX_DEPTH - 1) + "]" * (values.MAX_DEPTH - 1)
    assert values.encode(values.decode(values.loads(deepest)))
    with pytest.raises(ValueError, match="nested deeper"):
        values.loads(f"[[{deepest}]]")


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [(1, True, False), (1.0, 1, True), ([1], (1,), False), ({True: 1}, {1: 1}, False), ("1", 1, False), 
     (float("nan"), float("nan"), False),
     (0.1 + 0.2, 0.3, True), (10**400, 1.0, False), ([[1.0]], [[1]], True)],
)  # fmt: skip
def test_equality_is_by_content_and_kind(found: object, expected: object, same: bool) -> None:
    assert values.same(found, expected, tolerance=1e-9) is same
