"""Packed weights: exact to unpack, with the rounding error that their bits allow."""

import math

import pytest
import torch

from rorqual.kernels.quantised import (
    GROUPS,
    KINDS,
    Format,
    Rounded,
    dequantise,
    pack,
    quantise,
    restore,
    round_activations,
    round_matrix,
    unpack,
)

ALL = [Format(kind, group) for kind in KINDS for group in GROUPS]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("format", ALL, ids=lambda f: f"{f.kind}/{f.group}")
@pytest.mark.parametrize(("rows", "width"), [(16, 32), (48, 256), (5, 7), (33, 130)])
def test_packing_is_exact(format: Format, rows: int, width: int) -> None:
    rounded = round_matrix(torch.randn(rows, width), format)
    packed = quantise(torch.zeros(rows, width), format)
    data = pack(rounded, format)
    assert data.shape == packed.data.shape == format.shape(rows, width)
    again = unpack(type(packed)(data, rows, width, format))
    assert torch.equal(again.values, rounded.values)
    assert torch.equal(again.scales, rounded.scales)
    assert (again.mins is None) == (format.kind != "int4_min")


def test_the_layout_of_a_block() -> None:
    """Row j is lane j: its inputs 0-3 are the low nibbles of bytes 4j to 4j + 3, its inputs 4-7 the high ones."""
    values = torch.arange(16 * 32).view(16, 32) % 16
    scales = torch.arange(1, 17).half().view(16, 1)
    data = pack(Rounded(values.to(torch.uint8), scales, None), Format("int4"))
    assert data.shape == (1, 256 + 32)
    row, vector = 3, 2  # inputs 16 to 23
    stored = data[0, vector * 64 + 4 * row : vector * 64 + 4 * row + 4]
    assert torch.equal(stored & 15, values[row, 16:20].to(torch.uint8))
    assert torch.equal(stored >> 4, values[row, 20:24].to(torch.uint8))
    assert torch.equal(data[0, 256:].view(torch.float16), scales[:, 0])


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        (Format("int8"), 8.5),
        (Format("int4"), 4.5),
        (Format("int4_min"), 5.0),
        (Format("int4_min", 128), 4.25),
    ],
)
def test_bits_a_weight_count_the_scales(format: Format, bits: float) -> None:
    assert format.bits == bits
    assert quantise(torch.randn(64, 512), format).data.numel() * 8 == bits * 64 * 512


@pytest.mark.parametrize(
    ("format", "bound"),
    # uniform rounding of normal weights with the largest of 32 (about 2.1 sigma) at the last step: step / sqrt(12)
    [
        (Format("int8"), 0.006),
        (Format("int4"), 0.085),
        (Format("int4_min"), 0.076),
        (Format("int8", 128), 0.007),
    ],
)
def test_rounding_error_of_normal_weights(format: Format, bound: float) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    assert relative(dequantise(quantise(w, format)), w) < bound


def test_mins_serve_weights_that_are_all_of_one_sign() -> None:
    w = torch.rand(32, 64) + 3
    symmetric, offset = (relative(dequantise(quantise(w, Format(k))), w) for k in ("int4", "int4_min"))
    assert offset < symmetric / 5


@pytest.mark.parametrize("format", ALL, ids=lambda f: f"{f.kind}/{f.group}")
@pytest.mark.parametrize("value", [0.0, 1.0, -0.25, 1e-3])
def test_constant_weights(format: Format, value: float) -> None:
    w = torch.full((16, 128), value)
    torch.testing.assert_close(dequantise(quantise(w, format)), w, rtol=0.02, atol=3e-8)


@pytest.mark.parametrize("format", ALL, ids=lambda f: f"{f.kind}/{f.group}")
def test_scales_are_rounded_before_they_divide(format: Format) -> None:
    """huggingface/transformers#46763: each stored value is the best one for the scale that is stored."""
    w = torch.randn(16, 128) * 0.01
    rounded = round_matrix(w, format)
    here = (restore(rounded, format) - w).abs()
    for step in (1, -1):
        near = Rounded((rounded.values.int() + step).to(torch.uint8), rounded.scales, rounded.mins)
        inside = (rounded.values.int() + step >= (1 if format.kind == "int8" else 0)) & (
            rounded.values.int() + step <= (255 if format.kind == "int8" else 15)
        )
        assert (here <= (restore(near, format) - w).abs() + 1e-9)[inside].all()


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    w = torch.randn(64, 128)
    importance = torch.ones(128)
    importance[::2] = 100
    for kind in ("int4", "int4_min"):
        plain, weighed = (dequantise(quantise(w, Format(kind), i)) for i in (None, importance))
        assert (weighed - w)[:, ::2].norm() < (plain - w)[:, ::2].norm()


def test_a_stack_of_matrices_is_each_by_itself() -> None:
    w = torch.randn(3, 20, 40)
    packed = quantise(w, Format("int4"))
    for i in range(3):
        assert torch.equal(packed[i].data, quantise(w[i], Format("int4")).data)
    assert dequantise(packed).shape == w.shape


def test_activations_round_in_their_own_groups() -> None:
    """Two groups of very different size: each keeps its own half step, 1/254 of its largest value."""
    x = torch.cat((torch.randn(5, 32) * 1000, torch.randn(5, 32) * 0.001, torch.zeros(5, 32)), 1)
    error = (round_activations(x, 32) - x).abs().view(5, 3, 32)
    peaks = x.view(5, 3, 32).abs().amax(-1, keepdim=True)
    assert (error <= peaks / 254 * 1.001).all()
    assert math.isfinite(float(error.sum()))
