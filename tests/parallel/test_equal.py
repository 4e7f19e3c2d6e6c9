"""Any number of processes computes what one does: loss, gradients, updates."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rorqual.errors import ConfigError
from rorqual.parallel.config import Parallel
from rorqual.train.shape import Shape

DEEPSEEK = {
    "depth": 3, "width": 32, "heads": 4, "experts": 12, "experts_per_token": 3, "mtp": 1, "qk_norm": True,
    "x0_residual": True, "value_embeddings": True, "ngram_table_size": 32, "induction": 2, "smear": True,
    "zero_output": False,
}  # fmt: skip
V2 = {
    "depth": 2,
    "width": 32,
    "heads": 4,
    "experts": 4,
    "experts_per_token": 2,
    "balance": "loss",
    "zero_output": False,
}
LLAMA = {
    "family": "llama", "depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "qk_norm": True, "zero_output": False,
    "tie_word_embeddings": True, "value_embeddings": True,
}  # fmt: skip
WAYS = {
    "data of 2": (2, {}),
    "data of 3": (3, {}),
    "shard of 2": (2, {"shard": True}),
    "shard of 3": (3, {"shard": True}),
    "expert of 2": (2, {"expert": 2}),
    "expert of 4": (4, {"expert": 4}),
    "expert of 2, data of 2": (4, {"expert": 2}),
    "expert of 2, shard of 4": (4, {"expert": 2, "shard": True}),
    "expert of 2, shard of 2": (2, {"expert": 2, "shard": True}),
    "tensor of 2": (2, {"tensor": 2}),
    "tensor of 2, data of 2": (4, {"tensor": 2}),
    "tensor of 2, expert of 4": (4, {"tensor": 2, "expert": 4}),
}

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def one(team: Run) -> Callable[..., dict[str, Any]]:
    """What one process computes, once for each setting."""
    known: dict[str, dict[str, Any]] = {}

    def find(**arguments: Any) -> dict[str, Any]:
        key = repr(arguments)
        if key not in known:
            (known[key],) = team(1, "learn", parallel={}, **arguments)
        return known[key]

    return find


def assert_equal(many: dict[str, Any], one: dict[str, Any]) -> None:
    for key in ("loss", "balance", "mtp", "norm"):
        assert abs(many[key] - one[key]) <= 1e-5, (key, many[key], one[key])
    assert many["gradients"].keys() == one["gradients"].keys()
    for name, want in one["gradients"].items():
        worst = (many["gradients"][name] - want).abs().max()
        assert worst <= 1e-5, f"gradient of {name}: {worst}"
    assert many["losses"] == pytest.approx(one["losses"], abs=1e-4)
    for name, want in one["weights"].items():
        torch.testing.assert_close(many["weights"][name], want, atol=2e-3, rtol=0, msg=name)
    for layer, load in (one["loads"] or {}).items():
        assert torch.equal(many["loads"][layer], load)


@pytest.mark.parametrize("way", WAYS)
def test_deepseek_style(team: Run, one: Callable[..., dict[str, Any]], way: str) -> None:
    world, parallel = WAYS[way]
    found = team(world, "learn", shape=DEEPSEEK, parallel=parallel, accumulate=2)
    for each in found:
        assert_equal(each, one(shape=DEEPSEEK, accumulate=2))
    for name, tensor in found[0]["weights"].items():
        assert all(torch.equal(each["weights"][name], tensor) for each in found), f"{name} drifts apart"


@pytest.mark.parametrize("way", ["data of 2", "shard of 2", "expert of 2", "tensor of 2, data of 2"])
def test_the_balance_loss_over_the_whole_batch(
    team: Run, one: Callable[..., dict[str, Any]], way: str
) -> None:
    """DeepSeek-V2's expert-level loss counts the batch of all processes, not each one's."""
    world, parallel = WAYS[way]
    for each in team(world, "learn", shape=V2, parallel=parallel):
        assert_equal(each, one(shape=V2))


@pytest.mark.parametrize("way", ["data of 2", "shard of 2", "tensor of 2"])
def test_llama_style(team: Run, one: Callable[..., dict[str, Any]], way: str) -> None:
    world, parallel = WAYS[way]
    adamw = {"optim": {"name": "adamw"}}
    for each in team(world, "learn", shape=LLAMA, parallel=parallel, **adamw):
        assert_equal(each, one(shape=LLAMA, **adamw))


@pytest.mark.parametrize("way", ["shard of 2", "expert of 2, data of 2", "tensor of 2, expert of 4"])
def test_layers_computed_again(team: Run, one: Callable[..., dict[str, Any]], way: str) -> None:
    world, parallel = WAYS[way]
    for each in team(world, "learn", shape=V2, parallel=parallel, recompute=True):
        assert_equal(each, one(shape=V2))


@pytest.mark.parametrize("way", ["data of 2", "shard of 2", "expert of 2", "tensor of 2"])
def test_products_in_bfloat16(team: Run, one: Callable[..., dict[str, Any]], way: str) -> None:
    """Roundings differ with the order of sums: losses and gradients stay within bfloat16's own error."""
    world, parallel = WAYS[way]
    alone = one(shape=V2, dtype="bfloat16")
    for each in team(world, "learn", shape=V2, parallel=parallel, dtype="bfloat16"):
        assert each["loss"] == pytest.approx(alone["loss"], abs=5e-3)
        for name, want in alone["gradients"].items():
            error = (each["gradients"][name] - want).norm() / want.norm().clamp(min=1e-6)
            assert error < 0.05, name


@pytest.mark.parametrize("favoured", [[0, 1, 2], [9, 10, 11]])
def test_experts_without_a_token(team: Run, one: Callable[..., dict[str, Any]], favoured: list[int]) -> None:
    """NVIDIA-NeMo/Automodel#935, huggingface/transformers#39275: all tokens go to one process; the other joins every
    exchange and its experts' gradients are zeros, not nothing."""
    want = one(shape=DEEPSEEK, favoured=favoured)
    for parallel in ({"expert": 2}, {"expert": 2, "shard": True}):
        for each in team(2, "learn", shape=DEEPSEEK, parallel=parallel, favoured=favoured, steps=5):
            assert set(each["loads"][1].nonzero().flatten().tolist()) == set(favoured)
            for name, gradient in want["gradients"].items():
                torch.testing.assert_close(each["gradients"][name], gradient, atol=1e-5, rtol=0, msg=name)
            idle = [i for i in range(12) if i not in favoured]
            assert (each["gradients"]["layers.1.mlp.experts.down_proj"][idle] == 0).all()


def test_each_process_holds_its_part(team: Run, one: Callable[..., dict[str, Any]]) -> None:
    whole = one(shape=DEEPSEEK)["held"]
    for parallel, share in (({"shard": True}, 0.5), ({"expert": 2}, 0.8), ({"tensor": 2}, 0.95)):
        for each in team(2, "learn", shape=DEEPSEEK, parallel=parallel):
            assert each["held"] < share * whole * 1.05, parallel


@pytest.mark.parametrize(
    ("parallel", "shape", "changes", "rows", "says"),
    [
        ({"expert": 3}, DEEPSEEK, {}, 12, "parallel.expert=3: must divide the number of processes, 4"),
        ({"expert": 4}, {**DEEPSEEK, "experts": 10}, {}, 12, "n_routed_experts=10"),
        ({"expert": 4}, DEEPSEEK, {"n_group": 2, "topk_group": 1}, 12, "n_group=2"),
        ({"tensor": 4}, LLAMA, {}, 12, "num_key_value_heads=2"),
        ({}, DEEPSEEK, {}, 10, "batch_size=10: must be a multiple of 4"),
    ],
    ids=["processes", "experts", "groups", "heads", "rows"],
)
def test_a_layout_that_does_not_divide_is_refused_at_once(
    parallel: dict[str, Any], shape: dict[str, Any], changes: dict[str, Any], rows: int, says: str
) -> None:
    """sgl-project/sglang#8253: said before anything starts, with the numbers."""
    model = dataclasses.replace(Shape(**shape).model(64, 16), **changes)
    with pytest.raises(ConfigError, match=re.escape(says)):
        Parallel(**parallel).check(4, rows, model)


def test_heads_that_are_divided_are_not_sharded_as_well() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.shard with parallel\.tensor=2"):
        Parallel(shard=True, tensor=2)
