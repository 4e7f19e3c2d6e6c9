"""Native quantised products equal their definitions: odd sizes, every format, every variant.

Whole-number sums are exact on both sides, so only the order of a few float additions differs: 1e-5 of the norm. Two
products after one another round their middle to 8 bits, where a last-digit difference can tip a value: 2e-3.
"""

import pytest
import torch

from rorqual.kernels.native import Native
from rorqual.kernels.quantised import GROUPS, KINDS, Format, dequantise, quantise
from rorqual.kernels.quantised_experts import (
    join_up,
    pack_up,
    quantised_experts,
    quantised_experts_reference,
    split_up,
)
from rorqual.kernels.quantised_heads import quantised_heads, quantised_heads_reference
from rorqual.kernels.quantised_linear import quantised_linear, quantised_linear_reference
from rorqual.kernels.quantised_rows import quantised_rows, quantised_rows_reference

ALL = [Format(kind, group) for kind in KINDS for group in GROUPS]
formats = pytest.mark.parametrize("format", ALL, ids=lambda f: f"{f.kind}/{f.group}")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@formats
@pytest.mark.parametrize(
    ("rows", "width", "n"),
    [
        (48, 96, 1),
        (17, 40, 3),
        (100, 300, 13),
        (5, 7, 2),
        (64, 256, 30),
        (150, 96, 1),
        (150, 72, 2),
        (150, 64, 4),
    ],
)
def test_linear_equals_its_definition(library: Native, format: Format, rows: int, width: int, n: int) -> None:
    packed = quantise(torch.randn(rows, width), format)
    x = torch.randn(n, width)
    x[0, : width // 2] = 0
    for given in (x, x.bfloat16()):
        assert relative(quantised_linear(given, packed), quantised_linear_reference(given, packed)) < 1e-5


@formats
def test_linear_is_close_to_the_exact_product(library: Native, format: Format) -> None:
    """What rounding activations to 8 bits costs: under 1% of the output's norm."""
    packed = quantise(torch.randn(64, 512), format)
    x = torch.randn(4, 512)
    assert relative(quantised_linear(x, packed), x @ dequantise(packed).T) < 0.01


@formats
def test_a_row_does_not_depend_on_its_neighbours(library: Native, format: Format) -> None:
    packed = quantise(torch.randn(64, 64), format)
    x = torch.randn(29, 64)
    whole = quantised_linear(x, packed)
    for i in range(29):
        assert torch.equal(quantised_linear(x[i : i + 1], packed)[0], whole[i])


def test_views_and_leading_dimensions(library: Native) -> None:
    packed = quantise(torch.randn(24, 40), Format("int4"))
    x = torch.randn(3, 40, 5).transpose(1, 2)
    assert quantised_linear(x, packed).shape == (3, 5, 24)
    assert torch.equal(quantised_linear(x, packed), quantised_linear(x.contiguous(), packed))
    assert quantised_linear(x[:0], packed).shape == (0, 5, 24)


def test_extreme_values(library: Native) -> None:
    """The largest sums that whole numbers can reach: 127 * 127 * 128 in a group, and 127 against 15 in 4 bits."""
    for kind in KINDS:
        packed = quantise(torch.full((16, 256), -1.0), Format(kind, 128))
        x = torch.full((2, 256), 3.0)
        torch.testing.assert_close(
            quantised_linear(x, packed), torch.full((2, 16), -768.0), rtol=0.02, atol=0
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(library: Native, bad: float) -> None:
    """An engine refuses such a request by its logits; rounding must not turn them into numbers."""
    packed = quantise(torch.randn(16, 64), Format("int4_min"))
    x = torch.randn(3, 64)
    x[1, 40] = bad
    y = quantised_linear(x, packed)
    assert y[1].isfinite().sum() == 0
    assert y[[0, 2]].isfinite().all()


@formats
@pytest.mark.parametrize("n", [1, 3])
def test_heads_equal_their_definition(library: Native, format: Format, n: int) -> None:
    packed = quantise(torch.randn(5, 20, 36), format)
    x = torch.randn(n, 5, 36)
    assert relative(quantised_heads(x, packed), quantised_heads_reference(x, packed)) < 1e-5


def experts(format: Format, count: int = 6, hidden: int = 40, inner: int = 24):
    gate, up = torch.randn(2, count, inner, hidden) * 0.2
    return pack_up(gate, up, format), quantise(torch.randn(count, hidden, inner) * 0.2, format)


@formats
@pytest.mark.parametrize("n", [1, 4, 50])
def test_experts_equal_their_definition(library: Native, format: Format, n: int) -> None:
    up, down = experts(format)
    x, weights = torch.randn(n, 40), torch.rand(n, 3)
    ids = torch.stack([torch.randperm(5)[:3] for _ in range(n)])  # expert 5 is never chosen
    for given in (x, x.bfloat16()):
        arguments = (given, ids, weights, up, down)
        assert relative(quantised_experts(*arguments), quantised_experts_reference(*arguments)) < 2e-3


def test_a_token_of_experts_does_not_depend_on_its_neighbours(library: Native) -> None:
    up, down = experts(Format("int4"))
    x, weights = torch.randn(40, 40), torch.rand(40, 2)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(40)])
    whole = quantised_experts(x, ids, weights, up, down)
    for i in range(0, 40, 7):
        part = slice(i, i + 1)
        assert torch.equal(quantised_experts(x[part], ids[part], weights[part], up, down)[0], whole[i])


def test_one_expert_is_a_swiglu(library: Native) -> None:
    """By hand: down(silu(gate x) * up x) with identity-like matrices."""
    eye = torch.eye(32)[None]
    up, down = pack_up(eye, 2 * eye, Format("int8")), quantise(eye, Format("int8"))
    x = torch.linspace(-4, 4, 32)[None]
    got = quantised_experts(x, torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 0.5), up, down)
    torch.testing.assert_close(got, x * torch.sigmoid(x) * x, atol=0.07, rtol=0.02)


def test_up_is_gate_and_value_joined() -> None:
    up, _ = experts(Format("int4_min"))
    gate, value = split_up(up)
    assert torch.equal(join_up(gate, value).data, up.data)
    assert gate.rows == value.rows == 24


@formats
@pytest.mark.parametrize("width", [7, 96, 300])
def test_rows_equal_their_definition(library: Native, format: Format, width: int) -> None:
    packed = quantise(torch.randn(50, width), format)
    ids = torch.tensor([[0, 49, 17], [17, 16, 31]])
    torch.testing.assert_close(
        quantised_rows(ids, packed), quantised_rows_reference(ids, packed), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(quantised_rows(ids, packed)[0, 2], dequantise(packed)[17], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 50])
def test_an_id_that_is_no_row(library: Native, wrong: int) -> None:
    with pytest.raises(IndexError, match="50 rows"):
        quantised_rows(torch.tensor([3, wrong]), quantise(torch.randn(50, 32), Format("int8")))
