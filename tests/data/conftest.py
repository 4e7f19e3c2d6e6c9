"""Made-up but well-formed text: grammar from a seed, so that documents differ and rules are content."""

import random
from collections.abc import Callable

import pytest

SUBJECTS = [
    "the river",
    "a gardener",
    "my neighbour",
    "the committee",
    "an engineer",
    "the old clock",
    "every student",
    "this letter",
]
VERBS = [
    "carries",
    "repairs",
    "remembers",
    "describes",
    "follows",
    "measures",
    "paints",
    "considers",
    "gathers",
    "translates",
]
OBJECTS = [
    "the bridge",
    "a quiet morning",
    "three maps",
    "the broken engine",
    "her notes",
    "a basket of apples",
    "the northern wall",
]
ENDS = [
    "with great care",
    "before the rain",
    "and of course nobody minds",
    "to be certain",
    "that autumn",
    "have faith in that",
]


def article(seed: int, sentences: int = 40) -> str:
    """English of about 400 words, in lines of three sentences."""
    rng = random.Random(seed)
    out = []
    for _ in range(sentences):
        extra = " ".join(
            f"{rng.choice('abcdefgh')}{rng.randrange(10**6):x}" for _ in range(rng.randrange(1, 4))
        )
        out.append(
            f"{rng.choice(SUBJECTS).capitalize()} {rng.choice(VERBS)} {rng.choice(OBJECTS)} "
            f"{extra} {rng.choice(ENDS)}."
        )
    return "\n".join(" ".join(out[i : i + 3]) for i in range(0, len(out), 3)) + "\n"


def source_code(seed: int, functions: int = 12) -> str:
    """Python that parses."""
    rng = random.Random(seed)
    out = ["import math\n"]
    for _ in range(functions):
        name, a, b = (f"{rng.choice('fghk')}_{rng.randrange(10**6):x}" for _ in range(3))
        out.append(
            f"def {name}({a}, {b}={rng.randrange(9)}):\n    total = {a} + {b} * {rng.randrange(99)}\n    return total\n"
        )
    return "\n".join(out)


def chinese(seed: int, sentences: int = 30) -> str:
    rng = random.Random(seed)
    characters = [chr(0x4E00 + rng.randrange(3000)) for _ in range(600)]
    return "".join(
        "".join(rng.choice(characters) for _ in range(rng.randrange(8, 20))) + "。" for _ in range(sentences)
    )


@pytest.fixture
def make_article() -> Callable[..., str]:
    return article


@pytest.fixture
def make_code() -> Callable[..., str]:
    return source_code


@pytest.fixture
def make_chinese() -> Callable[..., str]:
    return chinese
