"""The cost model against what DeepSeek published, by hand where a hand suffices, and its refusals."""

import pytest

from rorqual.cli import main
from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.published import published
from rorqual.plan.device import device
from rorqual.plan.estimate import Layout, estimate, fit

H800 = device("h800")
DENSE_67B = published("deepseek-67b")


@pytest.mark.parametrize(
    ("config", "tokens", "fp8", "hours", "within"),
    [
        (DENSE_67B, 1e12, False, 300.6e3, 0.05),  # what DENSE was taken from
        (published("deepseek-v2"), 1e12, False, 172.8e3, 0.05),  # and HALF
        (published("deepseek-v3"), 14.8e12, True, 2.664e6, 0.2),  # neither
    ],
    ids=["67b", "v2", "v3"],
)
def test_published_hours(config: ModelConfig, tokens: float, fp8: bool, hours: float, within: float) -> None:
    found = fit(config, 2048, tokens, H800, fp8=fp8)
    assert abs(found.gpu_hours / hours - 1) < within
    assert found.bytes < H800.memory


def test_v3s_traffic_by_hand() -> None:
    """58 layers, forward and backward, 4 groups of 8, 7,168 values: 1 byte there and 2 back, 1/64 of it at home."""
    found = estimate(published("deepseek-v3"), Layout(2048, 16, 64), 1e12, H800, fp8=True)
    assert found.traffic == pytest.approx(58 * 2 * 4 * (1 - 1 / 64) * 7168 * 3)
    assert found.sending == pytest.approx(found.traffic / 50e9)


def test_memory_by_hand() -> None:
    """A dense model on 16 devices in 2 stages: half the weights each, the optimizer's state over 8."""
    found = estimate(DENSE_67B, Layout(16, 2), 1e9, H800)
    parameters = 67.42e9
    assert found.memory["weights"] == pytest.approx(2 * parameters / 2, rel=0.01)
    assert found.memory["gradients"] == pytest.approx(4 * parameters / 2, rel=0.01)
    assert found.memory["optimizer"] == pytest.approx(12 * parameters / 2 / 8, rel=0.01)


def test_more_devices_take_less_time_and_the_same_hours() -> None:
    a, b = (fit(published("deepseek-v2"), n, 1e12, H800) for n in (512, 1024))
    assert a.days == pytest.approx(2 * b.days, rel=0.2)


@pytest.mark.parametrize(
    ("gpus", "model", "more", "message"),
    [
        (8, "deepseek-v3", {}, "does not fit"),
        (7, "deepseek-v3", {}, "does not fit"),
        (2048, "deepseek-v3", {"device": "a100", "fp8": True}, "a100 has no such products"),
    ],
)
def test_what_cannot_be_is_refused(gpus: int, model: str, more: dict[str, object], message: str) -> None:
    kind = device(str(more.pop("device", "h800")))
    with pytest.raises(ConfigError, match=message):
        fit(published(model), gpus, 1e12, kind, **more)  # type: ignore[arg-type]


def test_layouts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpus=100: must be a multiple"):
        Layout(100, 3, 8)
    with pytest.raises(ConfigError, match="expert=48: must divide the model's 256"):
        estimate(published("deepseek-v3"), Layout(96, 2, 48), 1e12, H800)
    with pytest.raises(ConfigError, match="has no experts"):
        estimate(DENSE_67B, Layout(8, 1, 8), 1e12, H800)


def test_stages_wait_for_their_first_and_last_micro_batches() -> None:
    """1F1B: of m micro-batches and p stages, p - 1 in m + p - 1 turns of each device are idle."""
    model = published("deepseek-v3")
    none, some = (estimate(model, Layout(2048, p, 64), 1e12, H800, batch=2048 * 4096.0 * 2) for p in (1, 8))
    assert none.bubble == 0
    assert some.bubble == pytest.approx(7 / (16 + 7))
    assert some.gpu_hours == pytest.approx(none.gpu_hours / (1 - some.bubble))


def test_stages_without_a_layer_and_pipelines_without_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline=64: the model has 61 layers"):
        estimate(published("deepseek-v3"), Layout(2048, 64, 32), 1e12, H800)
    with pytest.raises(
        ConfigError, match=r"batch=4.1e\+06: fewer rows of 4096 a step than the 2048 pipelines"
    ):
        estimate(DENSE_67B, Layout(2048), 1e12, H800, batch=4.1e6)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "2048", "--model", "deepseek-v3", "--tokens", "14.8e12", "--fp8"]) == 0
    out = capsys.readouterr().out
    for word in ("device hours", "memory", "all-to-all", "price"):
        assert word in out
    assert main(["plan", "--gpus", "8", "--model", "deepseek-v2-lite", "--tokens", "0"]) == 2
    assert "tokens=0" in capsys.readouterr().err
    assert main(["plan", "--gpus", "8", "--model", "deepseek-v2-lite", "--tokens", "nan"]) == 2
    assert "tokens=nan" in capsys.readouterr().err
    assert (
        main(["plan", "--gpus", "8", "--model", "deepseek-v2-lite", "--tokens", "1e9", "--device", "abacus"])
        == 2
    )
    assert "--device abacus" in capsys.readouterr().err
