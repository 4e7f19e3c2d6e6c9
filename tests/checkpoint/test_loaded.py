"""The small Python API."""

from pathlib import Path

import pytest
import torch

import rorqual
from rorqual.errors import ConfigError, RequestError


def test_logits_are_float32_of_the_right_shape(saved: Path) -> None:
    m = rorqual.load(saved, dtype="bfloat16")
    out = m.logits(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert out.shape == (2, 3, 160)
    assert out.dtype == torch.float32
    assert m.tokenizer is None


def test_generation_continues_and_repeats_with_a_seed(saved: Path) -> None:
    m = rorqual.load(saved)
    a = m.generate([[1, 2, 3]], max_new_tokens=6, temperature=0)
    assert a.shape == (1, 9)
    assert a[0, :3].tolist() == [1, 2, 3]
    b, c = (m.generate([[1, 2, 3]], max_new_tokens=6, temperature=1.0, seed=5) for _ in range(2))
    assert torch.equal(b, c)


@pytest.mark.parametrize("ids", [[[160]], [[-1]], [[]], [[0.5]]])
def test_ids_out_of_range_are_refused(saved: Path, ids: list[list[int]]) -> None:
    with pytest.raises(RequestError):
        rorqual.load(saved).logits(ids)


def test_dtype_and_temperature_are_checked(saved: Path) -> None:
    with pytest.raises(ConfigError, match="dtype='int3'"):
        rorqual.load(saved, dtype="int3")
    with pytest.raises(RequestError, match="temperature=-1"):
        rorqual.load(saved).generate([[1]], temperature=-1)
