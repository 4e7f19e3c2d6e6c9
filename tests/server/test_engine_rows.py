"""Rows of the table that need the real engine: adapters that come and go, logits that neighbours cannot change, a cache
that outlives the server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.lora import Lora, LoraLinear, add_lora, save_adapter
from rorqual.data.bpe import train_bpe, write_tokenizer
from rorqual.engine.config import EngineConfig
from rorqual.model.transformer import Transformer
from rorqual.server.loading import load_served
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.config import Shape


def base_and_adapter(folder: Path) -> tuple[Path, Path]:
    """A tiny model with a tokenizer, and an adapter that changes its answers."""
    write_tokenizer(folder, train_bpe(["def f(x):\n    return x\n"] * 3, 300))
    vocab = Tokenizer.load(folder).vocab_size
    shape = Shape(depth=2, width=32, heads=2, experts=4, experts_per_token=2, zero_output=False)
    model = Transformer(shape.model(vocab, 512, 0, None)).init_weights(0)
    hf.save_model(model, folder / "model", tokenizer_from=folder)
    add_lora(model, Lora(), 0)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_b, std=0.5)
    save_adapter(model, folder / "adapter", Lora(), "base")
    return folder / "model", folder / "adapter"


def test_row_68_an_adapter_comes_and_goes_without_dropping_streams(start, tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path)
    live = start(
        load=lambda name, path: load_served(name, path, 8, EngineConfig(cache_tokens=2048), "float32"),
        prices={"price": [{"model": "base", "miss": "1", "output": "1"}]},
    )
    assert live.client.post("/v1/models/load", json={"model": "base", "path": str(base)}).status_code == 200

    def ask(model: str, **more: object) -> dict[str, object]:
        return {
            "model": model, "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 12,
            "ignore_eos": True, **more,
        }  # fmt: skip

    def text(model: str) -> str:
        answer = live.client.post("/v1/chat/completions", json=ask(model)).json()
        return str(answer["choices"][0]["message"]["content"])

    alone = text("base")
    body = ask("base", stream=True, max_tokens=200)
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        parts = response.iter_bytes()
        got = next(parts)
        wish = {"lora_name": "mine", "lora_path": str(adapter), "base_model": "base"}
        assert live.client.post("/v1/load_lora_adapter", json=wish).status_code == 200
        assert live.client.post("/v1/load_lora_adapter", json=wish).status_code == 409
        adapted = text("mine")
        assert adapted != alone
        gone = live.client.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
        assert gone.json()["deleted"]
        got += b"".join(parts)
    assert got.endswith(b"data: [DONE]\n\n")
    assert text("base") == alone
    assert live.client.post("/v1/chat/completions", json=ask("mine")).status_code == 404
    assert live.client.post("/v1/load_lora_adapter", json=wish).status_code == 200
    assert text("mine") == adapted
    assert live.client.get("/v1/models/mine").json()["prices"]["output"] == "1.00", "as its base"
    paid = live.client.post("/v1/chat/completions", json=ask("mine", x_usage=True)).json()["usage"]
    assert float(paid["x_cost"]["amount"]) > 0
    for _ in range(2):  # by either route the engine forgets it, so that its name is free again
        assert live.client.post("/v1/models/unload", json={"model": "mine"}).json()["deleted"]
        assert live.client.post("/v1/load_lora_adapter", json=wish).status_code == 200
    for path, body in (
        ("/v1/load_lora_adapter", {**wish, "lora_name": "x", "lora_path": "\0"}),
        ("/v1/models/load", {"model": "x", "path": "\0"}),
        ("/v1/load_lora_adapter", {**wish, "lora_name": "x", "lora_path": "x" * 5000}),
        ("/v1/models/load", {"model": "x", "path": "x" * 5000}),
    ):
        assert live.client.post(path, json=body).status_code == 400
    wrong = live.client.post("/v1/load_lora_adapter", json={**wish, "lora_name": "x", "lora_path": str(base)})
    assert wrong.status_code == 400
    assert "adapter_config" in wrong.json()["error"]["message"]


def test_row_66_logits_are_equal_to_the_bit_for_one_and_for_eight_at_once(start, tmp_path: Path) -> None:
    base, _ = base_and_adapter(tmp_path)
    config = EngineConfig(cache_tokens=4096, batch_invariant=True)
    live = start(load=lambda name, path: load_served(name, path, 16, config, "float32"))
    assert live.client.post("/v1/models/load", json={"model": "base", "path": str(base)}).status_code == 200

    def scores(i: int) -> list[float]:
        body = {
            "model": "base", "messages": [{"role": "user", "content": "x" * (20 + i)}], "max_tokens": 16, "seed": i,
            "ignore_eos": True, "logprobs": True,
        }  # fmt: skip
        answer = live.client.post("/v1/chat/completions", json=body).json()
        return [t["logprob"] for t in answer["choices"][0]["logprobs"]["content"]]

    alone = [scores(i) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(scores, range(8))) == alone


def test_row_55_a_restarted_server_answers_from_the_disk_and_says_so(start, tmp_path: Path) -> None:
    base, _ = base_and_adapter(tmp_path)
    config = EngineConfig(cache_tokens=2048, disk_cache=tmp_path / "blocks")
    body = {"model": "base", "messages": [{"role": "user", "content": "a long text " * 6}], "max_tokens": 4}
    usages = []
    for _ in range(2):
        live = start(load=lambda name, path: load_served(name, path, 8, config, "float32"))
        assert (
            live.client.post("/v1/models/load", json={"model": "base", "path": str(base)}).status_code == 200
        )
        usages.append(live.client.post("/v1/chat/completions", json=body).json()["usage"])
    first, second = usages
    assert first["prompt_cache_hit_tokens"] == 0
    assert second["prompt_cache_hit_tokens"] == (first["prompt_tokens"] - 1) // 16 * 16 > 0
    assert second["prompt_cache_miss_tokens"] == second["prompt_tokens"] - second["prompt_cache_hit_tokens"]
