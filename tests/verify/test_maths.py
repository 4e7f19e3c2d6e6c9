# ruff: noqa: E501 (tables of hostile text)
"""Mathematical answers: equal is equal in any writing, nothing hangs, and a failing grader blames nobody."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rorqual.errors import ConfigError
from rorqual.verify import maths
from rorqual.verify.calculator import calculate
from rorqual.verify.outcome import Verdict
from rorqual.verify.sandbox import Limits

EQUAL = [
    ("3/4", "0.75"), ("3/4", "\\frac{3}{4}"), ("3/4", "75%"), ("3/4", "\\dfrac34"), ("1000", "1,000"), ("1000", "1,000.00"),
    ("-1", "e^{i\\pi}"), ("2", "\\sqrt{4}"), ("\\sqrt{8}", "2\\sqrt2"), ("\\frac{1}{\\sqrt2}", "\\frac{\\sqrt{2}}{2}"),
    ("x^2-1", "(x-1)(x+1)"), ("\\sin^2 x+\\cos^2 x", "1"), ("\\{1,2\\}", "{2,1}"), ("(1,2)", "( 1 , 2 )"),
    ("[0,1)", "[0, 1)"), ("5", "x=5"), ("x=5", "5"), ("2", "$2$"), ("90", "90^\\circ"), ("12", "12\\text{ cm}"),
    ("120", "5!"), ("\\pi/2", "π/2"), ("3", "\\log_2 8"), ("2x", "x*2"), ("\\frac{x}{2}", "0.5x"), ("8", "2^3"),
    ("y=2x+1", "2x+1"), ("2", "\\sqrt[3]{8}"), ("1/3", "\\frac13"), ("7", "|-7|"), ("\\infty", "oo"),
    ("2^{100}", "1267650600228229401496703205376"), ("x+y=3", "3=y+x"), ("-3", "−3"), ("2\\eta", "\\eta\\cdot 2"),
    ("(\\sqrt2+\\sqrt3)^2", "5+2\\sqrt6"), ("e^{-100}", "1/e^{100}"), ("(x,y)=(1,2)", "(1,2)"),
    # what is no expression, as text
    ("the answer", "the answer"), ("\\text{Evelyn}", "Evelyn"), ("\\textbf{(C)}", "C"), ("x \\leq 3", "$x\\le3$"), ("x<3", "x < 3."),
    ("2\\pm\\sqrt{3}", "2 \\pm \\sqrt{3}"), ("[1,2]\\cup[3,4]", "\\left[1, 2\\right] \\cup [3,4]"), ("x ≠ 1", "x \\neq 1"),
]  # fmt: skip
UNEQUAL = [
    ("1/3", "0.33"), ("{1,2}", "1"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("x^2", "x^3"), ("x", "y"), ("2", "3"),
    ("\\sqrt{x^2}", "x"), ("5", ""), ("5", "five"), ("5", "5 or 6"), ("5", "5 6"), ("5", "5,6"), ("{1,2}", "{1,1}"),
    ("\\infty", "1"), ("x", "x+0.0000001"), ("10", "1０"), ("4", "\\boxed{4"),
    ("the answer", "5"), ("\\text{Evelyn}", "\\text{Bob}"), ("x \\leq 3", "3 \\leq x"), ("x < 3", "x > 3"), ("3\\pm 2", "3+2mp"),
    ("(\\text{C})", "(\\text{D})"), ("[1,2]\\cup[3,4]", "7"), ("(x,y)=(1,2)", "(1,3)"), ("(x+1,y)=(1,2)", "5"), ("e^{-100}", "0"), ("e^{-100}", "e^{-200}"),
    ("\\pi\\cdot 10^{-50}", "0"), ("xi", "\\xi"), ("10^{-50}x", "0"),
]  # fmt: skip
HOSTILE = [
    "9**9**9", "9^9^9^9", "9^{9^{9^9}}", "2^{10^{10}}", "(10^{10})!", "99999!", "((((9!)!)!)!)!", "9!" + "!" * 90,
    "10^{10}!", "1/0", "0/0", "0^0", "0^{-1}", "\\frac{1}{0}", "\\log 0", "\\tan(\\pi/2)", "-" * 400 + "1", "(" * 400,
    "(" * 200 + "1" + ")" * 200, "{" * 400, "[" * 30 + "1" + "]" * 30, "\\frac" * 60, "\\sqrt" * 60 + "2", "\\sqrt{" * 30 + "2" + "}" * 30,
    "1" * 499, "1" * 10**6, "x" * 300, "x^" * 100 + "x", "(x+1)^{999999}", "(x+y+z)^{300}", "\\sin(10^{10^{10}})",
    "e^{e^{e^{e^{e^e}}}}", "e^{-e^{e^{e^{e}}}}", "\\sqrt[10^{9}]{2}", "2^{0.00000000000001}", "(-8)^{1/3}", "i^{i^{i^i}}",
    "\\arcsin(10^{100})", "__import__('os').system('touch /tmp/escaped')", "().__class__.__bases__[0]", "lambda: 0",
    "open('/etc/passwd').read()", "exec('x')", "1;import os", "x.__class__", "os._exit(0)", "S('9**9**9')", "Symbol('x')",
    "１２３", "٣", "²³", "x\u202e5", "5\u0000", "\ud800", "5\u200b", "½½½½", "\u0661\u0662", "ⅷ", "𝟓", "e\u0301", "\\unicode{53}",
    "\\input{/etc/passwd}", "\\write18{ls}", "\\def\\x{\\x\\x}\\x", "\\begin{matrix}1\\end{matrix}", "%" * 100, "5" + "%" * 200,
    "_" * 100, "x_{x_{x_x}}", "=" * 50, "1=1=1", ",," * 100, "1," * 200, "{" + ",".join("1" * 1 for _ in range(200)) + "}",
    "|" * 100, "||x||", "nan", "inf", "-inf", "1e999999999", "1e-999999999", "0x10", "1_000", "1.2.3", "..", ".", "+", "^", "!",
    "\\", "\\\\", "$$$$", "\\left(", "\\right)", "{}", "()", "[]", "\\{\\}", "", " ", "\n" * 400, "\\text{5}", "\\boxed{5}", "5\\", "a" * 3 + "!" * 50,
    "\\sin" * 80 + "x", "\\log_{0}5", "\\log_1 5", "100000000000!/99999999999!", "2^{2^{2^{2^{2^2}}}}-2^{2^{2^{2^{2^2}}}}",
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_in_another_writing(gold: str, answer: str) -> None:
    assert maths.equal(gold, answer).verdict is Verdict.RIGHT, maths.equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), UNEQUAL)
def test_not_equal(gold: str, answer: str) -> None:
    assert maths.equal(gold, answer).verdict is Verdict.WRONG, maths.equal(gold, answer)


def test_a_hundred_hostile_answers_neither_hang_nor_pass() -> None:
    assert len(HOSTILE) >= 100
    limits = Limits(seconds=0.3, memory_mb=1024, result_kb=64)
    maths.shared().start()
    begin = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda text: maths.equal("12345.678", text, limits), HOSTILE))
    assert {o.verdict for o in outcomes} == {Verdict.WRONG}
    assert time.monotonic() - begin < 11 * 0.3 * len(HOSTILE)  # the bound that cannot be passed, not a speed


def test_a_right_answer_that_takes_too_long_is_the_graders_failure() -> None:
    limits = Limits(seconds=0.3, memory_mb=1024)
    assert maths.equal("(10^{9})!", "x", limits).verdict is Verdict.GRADER_FAILED
    assert maths.equal("x", "(10^{9})!", limits).verdict is Verdict.WRONG


def test_two_hundred_right_answers_from_sixteen_threads() -> None:
    """verl-project/verl#5635: signal.alarm in a worker thread scored every answer 0."""
    with ThreadPoolExecutor(16) as pool:
        outcomes = list(
            pool.map(lambda i: maths.equal(f"\\sqrt{{{i * i + 2}}}", f"({i * i + 2})^{{1/2}}"), range(200))
        )
    assert [o.reward for o in outcomes] == [1.0] * 200


@pytest.mark.parametrize(
    ("completion", "gold", "reward"),
    [
        ("\\boxed{4} and then \\boxed{", "4", 0.0),
        ("\\boxed{3} then \\boxed{4}", "4", 1.0),
        ("\\boxed{4} then \\boxed{3}", "4", 0.0),
        ("\\boxed{1}", "\\{1,2\\}", 0.0),
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("<answer>3</answer> \\boxed{4}", "4", 0.0),
        ("<answer>4</answer><answer>", "4", 0.0),
        ("so\n#### 1,234", "1234", 1.0),
        ("The answer is 12.5.", "12.5", 1.0),
        ("The answer is **7**. Good.", "7", 1.0),
        ("I get 3, then 7", "7", 1.0),
        ("nothing", "7", 0.0),
    ],
)
def test_the_last_marked_answer_decides(completion: str, gold: str, reward: float) -> None:
    """huggingface/open-r1#557, marin-community/marin#9163."""
    assert maths.grade(gold, completion).reward == reward


def test_the_calculator_refuses_what_is_no_arithmetic() -> None:
    """karpathy/nanochat#165: eval on a model's text."""
    assert calculate("3*(2+1)") == "9"
    assert calculate("'strawberry'.count('r')") == "3"
    assert calculate("1/4") == "0.25"
    for text in (
        "signal.raise_signal(9) or 'd'.count('a')",
        "().__class__",
        "9**9**9",
        "x+1",
        "1/0",
        "'a'.count('')",
    ):
        with pytest.raises(ConfigError, match="calculator"):
            calculate(text)
