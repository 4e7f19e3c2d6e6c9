"""Runs that stop, go on, skip and go back."""

import importlib
import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.checkpoint import fp8, hf
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError, ConfigError, DataError, NumericsError, RunError
from rorqual.parallel.config import Parallel
from rorqual.train import checkpoint, folders
from rorqual.train.config import Optim, TrainConfig
from rorqual.train.lock import Lock
from rorqual.train.metrics import read
from rorqual.train.run import train
from rorqual.train.shape import Shape
from rorqual.train.stop import exit_code
from rorqual.train.trainer import Trainer

Make = Callable[..., TrainConfig]
SMALL = {"depth": 2, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 2}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in hf.load_model(folder).state_dict().items()}


def moments(folder: Path) -> bytes:
    return (folder / checkpoint.TENSORS).read_bytes()


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, selection biases, moments, random state and losses, to the bit."""
    last = folders.steps(a)[-1]
    one, two = folders.folder_of(a, last), folders.folder_of(b, last)
    for name, tensor in weights(one).items():
        assert torch.equal(tensor, weights(two)[name]), name
    assert moments(one) == moments(two)
    assert [(x["step"], x["loss"]) for x in read(a)] == [(x["step"], x["loss"]) for x in read(b)]


@pytest.mark.parametrize(
    ("dtype", "name", "share"),
    [
        ("float32", "muon", 1.0),
        ("bfloat16", "muon", 0.5),
        ("float32", "adamw", 0.5),
        ("bfloat16", "adamw", 1.0),
    ],
)
def test_a_resumed_run_equals_one_that_went_through(
    make_config: Make, tmp_path: Path, silent: Any, dtype: str, name: str, share: float
) -> None:
    """pytorch/torchtitan#809, huggingface/nanotron#245: 6 steps straight against 3, a stop and 3 more; rates are in
    warm-up at the stop."""
    more = {"dtype": dtype, "optim": Optim(name), "steps": 6, "softmax_share": share}
    train(make_config(out=tmp_path / "a", **more), show=silent)
    stopped = train(make_config(out=tmp_path / "b", stop_at=3, **more), show=silent)
    assert stopped.step == 3
    train(make_config(out=tmp_path / "b", **more), resume=True, show=silent)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    logits = [[x.get("logits") for x in read(tmp_path / run)] for run in "ab"]
    assert logits[0] == logits[1]
    assert (logits[0][-1] is None) == (share == 1)


def test_the_first_step_after_a_resume_is_the_next(make_config: Make, silent: Any) -> None:
    """huggingface/trl#3179."""
    train(make_config(stop_at=3), show=silent)
    silent.lines.clear()
    train(make_config(), resume=True, show=silent)
    assert silent.lines[0]["step"] == 4
    assert [x["step"] for x in read(make_config().out)] == list(range(1, 9))


def test_accumulation_and_one_batch_give_the_same_biases(
    make_config: Make, tmp_path: Path, silent: Any
) -> None:
    """pytorch/torchtitan#1304: one update a step from the counts of the whole step; layers and the MTP module alike."""
    found = []
    for i, sizes in enumerate(({"batch_size": 4, "accumulate": 1}, {"batch_size": 1, "accumulate": 4})):
        result = train(make_config(out=tmp_path / str(i), steps=2, save_every=1, **sizes), show=silent)
        found.append(
            {k: v for k, v in weights(result.folder).items() if k.endswith("e_score_correction_bias")}
        )
    assert set(found[0]) == {
        "layers.1.mlp.router.e_score_correction_bias",
        "mtp.0.block.mlp.router.e_score_correction_bias",
    }
    for name, bias in found[0].items():
        assert torch.equal(bias, found[1][name])
        assert bias.abs().max() > 0
        assert bias.sum().abs() < 1e-6


def test_the_log_shows_every_part_of_the_loss(make_config: Make, silent: Any) -> None:
    train(make_config(steps=2), show=silent)
    line = silent.lines[-1]
    assert line["balance_alpha"] == 1e-4
    parts = (
        line["loss"] + line["balance_alpha"] * line["balance_loss"] + line["mtp_weight"] * line["mtp_loss"]
    )
    assert line["total_loss"] == pytest.approx(parts, abs=1e-6)


def test_training_learns(make_config: Make, silent: Any) -> None:
    train(make_config(steps=60, eval_every=60), show=silent)
    assert silent.lines[0]["loss"] == pytest.approx(math.log(320), abs=0.3)  # an even guess at first
    assert silent.lines[-1]["loss"] < 2.5
    assert 0 < silent.lines[-1]["heldout_bpb"] < 3


def break_steps(monkeypatch: pytest.MonkeyPatch, bad: Callable[[Trainer], bool]) -> None:
    """Put an infinite gradient where `bad` says so."""
    honest = Trainer.gradients

    def broken(self: Trainer, lessons: Any) -> Any:
        update = honest(self, lessons)
        if bad(self):
            update.norm = float("inf")
            self.params[0].grad.fill_(float("inf"))
        return update

    monkeypatch.setattr(Trainer, "gradients", broken)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """karpathy/nanoGPT#215."""
    break_steps(monkeypatch, lambda t: t.step == 4)
    result = train(make_config(), show=silent)
    assert [x["skipped"] for x in silent.lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(t.isfinite().all() for t in weights(result.folder).values())


def test_three_in_a_row_go_back_and_pass_over_the_data(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [0]

    def bad(trainer: Trainer) -> bool:
        drawn[0] += 1
        return 5 <= drawn[0] <= 7

    break_steps(monkeypatch, bad)
    result = train(make_config(save_every=2), show=silent)
    assert result.step == 8
    assert any("back to step 4" in said for said in silent.said)
    assert [x["step"] for x in read(make_config().out)] == list(range(1, 9))
    state = json.loads((result.folder / checkpoint.STATE).read_text())
    assert state["skipped"] == 3
    assert state["loader"]["step"] == 8 + 3  # the rows that broke it were not drawn again


@pytest.mark.parametrize("at", [5, 7], ids=["stopped", "at the end"])
def test_weights_that_are_not_finite_are_never_saved(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """An update of a finite gradient throws a weight too far, in the last step or the one before a signal."""
    honest, thrown = Trainer.one_step, [False]

    def throwing(self: Trainer) -> Any:
        update = honest(self)
        if self.step == at + 1 and not thrown[0]:
            thrown[0] = True
            with torch.no_grad():
                self.params[0].fill_(float("inf"))
            if at == 5:
                signal.raise_signal(signal.SIGTERM)
        return update

    monkeypatch.setattr(Trainer, "one_step", throwing)
    result = train(make_config(save_every=3), show=silent)
    assert result.step == (3 if at == 5 else 8)
    assert all(t.isfinite().all() for t in weights(result.folder).values())
    assert any("weights are not finite; back to step" in said for said in silent.said)


def test_it_ends_where_going_back_does_not_help(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, lambda t: t.step >= 3)
    with pytest.raises(NumericsError, match=r"again after going back.*optim\.lr"):
        train(make_config(save_every=2), show=silent)
    assert folders.steps(make_config().out) == [2]


def test_without_a_checkpoint_it_ends_at_once(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(monkeypatch, lambda t: True)
    with pytest.raises(NumericsError, match="before the first checkpoint"):
        train(make_config(), show=silent)


def test_a_damaged_checkpoint_costs_one_interval(make_config: Make, tmp_path: Path, silent: Any) -> None:
    train(make_config(out=tmp_path / "a"), show=silent)
    train(make_config(out=tmp_path / "b", save_every=2, stop_at=6), show=silent)
    path = folders.folder_of(tmp_path / "b", 6) / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    train(make_config(out=tmp_path / "b", save_every=2), resume=True, show=silent)
    assert any("step-00000006 is damaged (model.safetensors has another checksum)" in s for s in silent.said)
    assert "going on from step 4" in silent.said
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_neither_stops_training_nor_leaves_halves(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = checkpoint.write_tensors, [0]

    def full(path: Path, tensors: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        honest(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    config = make_config(save_every=2)
    train(config, show=silent)
    assert any("no checkpoint at step 4" in s and "No space left" in s for s in silent.said)
    assert folders.steps(config.out) == [6, 8]
    assert not list((config.out / "checkpoints").glob(".*"))


def test_where_the_last_checkpoint_cannot_be_written_the_run_fails_by_name(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        train(make_config(steps=1), show=silent)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_after_the_step(
    make_config: Make,
    tmp_path: Path,
    silent: Any,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    train(make_config(out=tmp_path / "a"), show=silent)
    honest = Trainer.one_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 4:
            signal.raise_signal(number)
        return honest(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", interrupted)
        result = train(make_config(out=tmp_path / "b"), show=silent)
    assert (result.step, exit_code(result.stopped)) == (5, code)
    assert exit_code(train(make_config(out=tmp_path / "b"), resume=True, show=silent).stopped) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_signal_during_the_last_step_finds_the_run_finished(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Trainer.one_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 7:
            signal.raise_signal(signal.SIGTERM)
        return honest(self)

    monkeypatch.setattr(Trainer, "one_step", interrupted)
    assert train(make_config(), show=silent).stopped is None
    assert "heldout_bpb" in silent.lines[-1]


@pytest.mark.parametrize(
    "writes", ["rorqual.train.checkpoint.write_tensors", "rorqual.train.run.write_report"]
)
def test_signals_while_the_end_is_written_cost_nothing(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch, writes: str
) -> None:
    package, _, name = writes.rpartition(".")
    honest = getattr(importlib.import_module(package), name)

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return honest(*arguments)

    monkeypatch.setattr(writes, interrupted)
    unheard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))
    try:
        result = train(make_config(steps=1), show=silent)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unheard
    assert (result.step, result.stopped) == (1, None)
    assert (make_config().out / "report.html").is_file()


def test_a_folder_in_use_or_used_is_refused(make_config: Make, silent: Any) -> None:
    config = make_config(steps=1)
    with Lock(config.out), pytest.raises(RunError, match=r"in use by process \d+"):
        train(config, show=silent)
    train(config, show=silent)
    with pytest.raises(RunError, match="holds a run of 1 steps; add --resume"):
        train(config, show=silent)


def test_a_resume_with_another_model_or_rate_is_refused_by_name(make_config: Make, silent: Any) -> None:
    train(make_config(stop_at=1), show=silent)
    wider = {"depth": 2, "width": 32, "heads": 2, "experts": 8, "experts_per_token": 2, "mtp": 1}
    with pytest.raises(RunError, match=r"shape\.experts=8, but the run was started with 4"):
        train(make_config(shape=wider), resume=True, show=silent)
    with pytest.raises(RunError, match=r"optim\.lr=0.5"):
        train(make_config(optim=Optim(lr=0.5)), resume=True, show=silent)
    folder = folders.folder_of(make_config().out, 1)
    with pytest.raises(RunError, match="n_routed_experts=4, the run now asks for 8"):
        checkpoint.restore(folder, Shape(**wider).model(300, 32, 0, 1))


def test_nothing_to_resume_is_said(make_config: Make, silent: Any) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        train(make_config(), resume=True, show=silent)


def test_what_does_not_fit_is_said_before_work(
    make_config: Make, token_set: Path, tmp_path: Path, silent: Any
) -> None:
    with pytest.raises(ConfigError, match="data: name at least one folder"):
        train(make_config(data=()), show=silent)
    with pytest.raises(DataError, match=f"{tmp_path}/nope: no meta.json"):
        train(make_config(data=(tmp_path / "nope",)), show=silent)
    with pytest.raises(DataError, match="held-out set is shorter than a row of 4096 tokens"):
        train(make_config(seq_len=4096), show=silent)
    result = train(make_config(steps=1), show=silent)
    other = tmp_path / "other"
    with pytest.raises(
        ConfigError, match=r"seq_len=64: .* has 32 positions; stretch them with extend_context=64"
    ):
        train(make_config(out=other, init_from=result.folder, shape={}, seq_len=64), show=silent)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        train(make_config(out=other, init_from=tmp_path / "nope", shape={}), show=silent)
    assert not (other / "checkpoints").exists()


def test_a_run_from_8_bit_weights_is_resumed(make_config: Make, tmp_path: Path, silent: Any) -> None:
    """What it begins with is quantised, its own checkpoints are not."""
    base = train(make_config(shape=SMALL, steps=1), show=silent).folder
    file = TensorFile(base / "model.safetensors")
    tensors = {n: file.read(n) for n in file.entries}
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name], tensors[name + fp8.SCALE] = fp8.quantize(tensors[name], (128, 128))
    write_tensors(base / "model.safetensors", sorted(tensors.items()))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    more: dict[str, Any] = {"out": tmp_path / "on", "init_from": base, "shape": {}, "steps": 2}
    train(make_config(stop_at=1, **more), show=silent)
    assert train(make_config(**more), resume=True, show=silent).step == 2


def test_ids_of_another_tokenizer_are_refused(
    make_config: Make, token_set: Path, tmp_path: Path, silent: Any
) -> None:
    """As many tokens, but two of them stand for each other's text: among the sets, and in the model to go on from."""
    other = shutil.copytree(token_set, tmp_path / "other")
    tree = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(DataError, match=f"{token_set}: its tokenizer is not that of {other}"):
        train(make_config(data=(token_set, other)), show=silent)
    base = train(make_config(steps=1), show=silent).folder
    more: dict[str, Any] = {"init_from": base, "shape": {}, "steps": 1}
    with pytest.raises(DataError, match=f"{other}: its tokenizer is not that of {base}"):
        train(make_config(out=tmp_path / "on", data=(other,), **more), show=silent)
    (base / "tokenizer.json").write_text(
        json.dumps(json.loads((base / "tokenizer.json").read_text()), indent=1)
    )
    train(make_config(out=tmp_path / "on", **more), show=silent)  # written otherwise, it is the same


def test_checkpoints_beyond_the_last_few_are_dropped(make_config: Make, silent: Any) -> None:
    train(make_config(save_every=1, keep=3), show=silent)
    assert folders.steps(make_config().out) == [6, 7, 8]


def test_a_longer_context_goes_on_from_a_checkpoint(make_config: Make, tmp_path: Path, silent: Any) -> None:
    """YaRN with the original context kept (DeepSeek-V2, section 3.1.4)."""
    first = train(make_config(steps=30), show=silent)
    config = make_config(
        out=tmp_path / "long", init_from=first.folder, shape={}, extend_context=128, seq_len=64, steps=2
    )
    result = train(config, show=silent)
    rope = hf.load_config(result.folder).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("yarn", 4.0, 32)
    assert hf.load_config(result.folder).max_position_embeddings == 128
    assert silent.lines[-1]["loss"] < 4.0  # it goes on from what was learnt: an even guess is 5.8


def test_recompute_trains_the_same_weights(make_config: Make, tmp_path: Path, silent: Any) -> None:
    one = train(make_config(out=tmp_path / "a", steps=3), show=silent)
    two = train(make_config(out=tmp_path / "b", steps=3, recompute=True), show=silent)
    for name, tensor in weights(one.folder).items():
        torch.testing.assert_close(tensor, weights(two.folder)[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bfloat16_experts_learn_as_float32_ones_do(make_config: Make, tmp_path: Path, silent: Any) -> None:
    """pytorch/torchtitan#2389: with the router in bfloat16 losses stay up. Here they end within 5% of each other."""
    ends = []
    for dtype in ("float32", "bfloat16"):
        silent.lines.clear()
        train(make_config(out=tmp_path / dtype, dtype=dtype, steps=60), show=silent)
        ends.append(sum(x["loss"] for x in silent.lines[-10:]) / 10)
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_the_report_stands_alone(make_config: Make, silent: Any) -> None:
    config = make_config(eval_every=4, sample_every=4)
    train(config, show=silent)
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<svg") >= 5
    for words in (
        "Held-out bits per byte",
        "Busiest expert",
        "parse as Python",
        "optimizer&#x27;s share",
        "moe_intermediate_size",
    ):
        assert words in page, words


def test_samples_are_kept_whatever_is_logged(make_config: Make, silent: Any) -> None:
    train(make_config(steps=7, sample_every=3, log_every=4), show=silent)
    assert [x["step"] for x in read(make_config().out)] == [3, 4, 6, 7]
    assert [x["step"] for x in silent.lines if "sample" in x] == [3, 6, 7]


def test_what_would_do_nothing_is_said(make_config: Make, tmp_path: Path, silent: Any) -> None:
    base = train(make_config(shape=SMALL, steps=1, parallel=Parallel(shard=True)), show=silent).folder
    assert any("parallel.shard=true: one process has nothing to divide" in said for said in silent.said)
    with pytest.raises(ConfigError, match=r"mtp_weight=0\.2: .* has no MTP modules"):
        train(make_config(out=tmp_path / "on", init_from=base, shape={}, mtp_weight=0.2), show=silent)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"out=.*/file: no folder to write a run to"):
        train(make_config(out=tmp_path / "file"), show=silent)


def test_evaluation_off_still_ends_with_final_figures(make_config: Make, silent: Any) -> None:
    """karpathy/nanochat#324."""
    train(make_config(eval_every=-1, sample_every=-1, save_every=-1, steps=10), show=silent)
    assert [x["step"] for x in silent.lines if "heldout_bpb" in x] == [10]
