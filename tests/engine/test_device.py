"""Where an engine's tensors lie. Without a GPU at hand its step runs on the meta device, whose tensors have no values and
refuse to be added to or joined with those of another device."""

import contextlib

import pytest
import torch

from rorqual.engine import paged
from rorqual.engine.cache import PagedCache
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.engine.runner import Runner
from rorqual.engine.scheduler import Work
from rorqual.engine.sequence import Sequence
from rorqual.engine.stop import StopChecker
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer
from tests.engine.conftest import CONFIGS


def work(name: str, blocks: list[int], length: int, start: int, count: int) -> Work:
    s = Sequence(Request(name, list(range(length)), SamplingParams()), 0, 1, StopChecker(None, ()), 0, [])
    s.blocks = blocks
    return Work(s, start, count)


def bincount(x: torch.Tensor, minlength: int) -> torch.Tensor:
    return torch.empty(minlength, dtype=torch.long, device=x.device)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_mixes_no_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        paged, "has_triton", lambda: False
    )  # its kernels want values, and have tests of their own
    monkeypatch.setattr(torch, "bincount", bincount)  # whose size depends on values
    monkeypatch.setattr(
        torch, "autocast", lambda *a, **k: contextlib.nullcontext()
    )  # which knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    meta = torch.device("meta")
    with meta:
        model = Transformer(CONFIGS[name]).bfloat16().eval()
    runner = Runner(model, PagedCache(model.config, 64, torch.bfloat16, meta), 4)
    assert runner.decoder is None
    # a fresh prompt, a chunk after cached ones, and two decodes of different lengths
    works = [work("a", [7, 2], 6, 0, 6), work("b", [1, 3], 8, 5, 3)]
    works += [work("c", [4, 5, 6], 9, 8, 1), work("d", [8], 2, 1, 1)]
    h = runner.run(works)
    assert (h.device, tuple(h.shape)) == (meta, (11, 32))
    assert runner.model.logits(h[[0, 1]]).shape == (2, 96)


def test_a_device_that_the_weights_are_not_on(models: dict[str, Transformer]) -> None:
    with pytest.raises(ConfigError, match="cuda"):
        Engine(models["mla"], config=EngineConfig(device="cuda"))
    assert (
        Engine(models["mla"], config=EngineConfig(device="cpu", cache_tokens=64)).cache.device.type == "cpu"
    )
