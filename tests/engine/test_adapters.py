"""An adapter's requests are answered as by the merged model, whoever shares the batch, the cache or the name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rorqual.checkpoint.lora import Lora, LoraLinear, add_lora, merge_lora, save_adapter
from rorqual.engine import quantize
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Delta, Request, SamplingParams
from rorqual.errors import CheckpointError, ConfigError, RequestError
from rorqual.model.transformer import Transformer

Fresh = Callable[[str, int], Transformer]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def config(**changes: int) -> EngineConfig:
    return EngineConfig(block_size=4, cache_tokens=1024, max_num_seqs=16, **changes)


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in range(20, 20 + 9 * count, 9)]


def finish(engine: Engine) -> dict[str, list[Delta]]:
    out: dict[str, list[Delta]] = {}
    while engine.has_work():
        for delta in engine.step():
            out.setdefault(delta.request_id, []).append(delta)
    engine.check()
    return out


def run(engine: Engine, asked: list[list[int]]) -> list[list[int]]:
    for i, prompt in enumerate(asked):
        engine.add(Request(f"r{i}", prompt, GREEDY))
    deltas = finish(engine)
    return [[t for d in deltas[f"r{i}"] for t in d.token_ids] for i in range(len(asked))]


@pytest.fixture(params=["mla", "gqa"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(fresh: Fresh, family: str, folder: Path, seed: int, rank: int = 4) -> Transformer:
    """Write an adapter that changes much; → the base with it merged."""
    model = add_lora(fresh(family, 1), Lora(rank=rank), seed)
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.5)
    save_adapter(model, folder, Lora(rank=rank), "base")
    return merge_lora(model).eval()


def test_adapters_and_the_base_in_one_batch(fresh: Fresh, family: str, tmp_path: Path) -> None:
    asked = prompts(4)
    merged = {n: make(fresh, family, tmp_path / n, seed) for seed, n in enumerate("ab")}
    expected = {n: run(Engine(m, config=config()), asked) for n, m in merged.items()}
    base = run(Engine(fresh(family, 1), config=config()), asked)
    engine = Engine(fresh(family, 1), config=config(max_num_batched_tokens=32))
    for name in merged:
        engine.load_adapter(name, tmp_path / name)
    for i, prompt in enumerate(asked):  # the same prompts: a shared cache would show
        for name in (None, "a", "b"):
            engine.add(Request(f"{name}{i}", prompt, GREEDY, model=name))
    deltas = finish(engine)
    for i in range(len(asked)):
        got = {n: [t for d in deltas[f"{n}{i}"] for t in d.token_ids] for n in (None, "a", "b")}
        assert got == {None: base[i], "a": expected["a"][i], "b": expected["b"][i]}
    assert expected["a"] != base


def test_an_adapter_shares_all_that_it_does_not_change(fresh: Fresh, family: str, tmp_path: Path) -> None:
    make(fresh, family, tmp_path / "a", 0)
    base = fresh(family, 1)
    engine = Engine(base, config=config())
    engine.load_adapter("a", tmp_path / "a")
    own = {id(p) for p in base.parameters()}
    changed = [n for n, p in engine._adapters["a"].model.named_parameters() if id(p) not in own]
    assert changed
    assert all(
        n.endswith(("_proj.weight", "_mqa.weight")) and "experts." not in n.replace("shared_experts.", "")
        for n in changed
    )


def test_unloaded_in_the_middle_it_finishes_and_takes_no_more(
    fresh: Fresh, family: str, tmp_path: Path
) -> None:
    asked = prompts(1)
    merged = make(fresh, family, tmp_path / "a", 0)
    engine = Engine(fresh(family, 1), config=config())
    engine.load_adapter("a", tmp_path / "a")
    engine.add(Request("r0", asked[0], GREEDY, model="a"))
    first = engine.step()
    engine.unload_adapter("a")
    with pytest.raises(RequestError, match="'a'"):
        engine.add(Request("r1", asked[0], GREEDY, model="a"))
    make(fresh, family, tmp_path / "a2", 5)
    engine.load_adapter("a", tmp_path / "a2")  # another one of that name finds nothing of the first's cache
    engine.add(Request("r2", asked[0], GREEDY, model="a"))
    got = [t for d in [*first, *finish(engine).get("r0", [])] if d.request_id == "r0" for t in d.token_ids]
    assert got == run(Engine(merged, config=config()), asked)[0]


def test_new_weights_beneath_an_adapter(fresh: Fresh, family: str, tmp_path: Path) -> None:
    asked = prompts(2)
    make(fresh, family, tmp_path / "a", 0)
    engine = Engine(fresh(family, 1), config=config())
    engine.load_adapter("a", tmp_path / "a")
    other = fresh(family, 2)
    engine.update_weights(dict(other.state_dict()))
    fresh_engine = Engine(fresh(family, 2), config=config())
    fresh_engine.load_adapter("a", tmp_path / "a")
    for e in (engine, fresh_engine):
        for i, prompt in enumerate(asked):
            e.add(Request(f"r{i}", prompt, GREEDY, model="a"))
    got, expected = (
        {k: [t for d in v for t in d.token_ids] for k, v in finish(e).items()} for e in (engine, fresh_engine)
    )
    assert got == expected


def test_what_cannot_be_served_is_refused_by_name(fresh: Fresh, tmp_path: Path) -> None:
    make(fresh, "mla", tmp_path / "a", 0)
    engine = Engine(fresh("mla", 1), config=config())
    engine.load_adapter("a", tmp_path / "a")
    with pytest.raises(RequestError, match="'a' is loaded already"):
        engine.load_adapter("a", tmp_path / "a")
    with pytest.raises(RequestError, match="'b': none"):
        engine.unload_adapter("b")
    with pytest.raises(CheckpointError, match="does not fit"):
        Engine(fresh("gqa", 1), config=config()).load_adapter("a", tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        engine.load_adapter("c", tmp_path)
    packed = fresh("mla", 1)
    quantize.quantize(packed, quantize.formats(packed, 8))
    with pytest.raises(ConfigError, match="quantised"):
        Engine(packed, config=config()).load_adapter("a", tmp_path / "a")
