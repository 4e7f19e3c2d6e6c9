"""A run from its config: model, data, validation, training, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.files import write_whole
from rorqual.config import to_dict
from rorqual.data.loader import Loader, LoaderConfig, Stage
from rorqual.data.shards import read_meta
from rorqual.device import measure_limits, resolve_device
from rorqual.errors import ConfigError, DataError, RunError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import Cost, cost
from rorqual.model.transformer import Transformer
from rorqual.parallel.environment import world_of
from rorqual.parallel.mesh import Mesh, start
from rorqual.parallel.spread import spread
from rorqual.text.tokenizer import Tokenizer
from rorqual.train import checkpoint, folders
from rorqual.train.allocator import keep_freed_memory
from rorqual.train.bill import bill_lines
from rorqual.train.config import TrainConfig
from rorqual.train.extend import extended
from rorqual.train.lock import Lock
from rorqual.train.memory import check_memory
from rorqual.train.metrics import NoView, View
from rorqual.train.optim import flops
from rorqual.train.report import write_report
from rorqual.train.speed import Speed
from rorqual.train.stop import Stop
from rorqual.train.trainer import Export, Result, Source, Trainer, Validate
from rorqual.train.validation import Validation
from rorqual.train.view import TensorBoard, view

# What may change when a run is resumed: it does not touch the weights.
FREE = frozenset({
    "out", "device", "stop_at", "save_every", "keep", "log_every", "tensorboard", "eval_every", "eval_rows",
    "sample_every", "compile", "parallel",
})  # fmt: skip
RUN = "run.json"  # a run's config, in its folder


class Settled(Protocol):
    """A config of a run folder, a frozen dataclass."""

    @property
    def out(self) -> Path: ...


def train(config: TrainConfig, resume: bool = False, show: View | None = None) -> Result:
    """Run a config to its end or to a signal. Raises before any work for what cannot work: data that is not there,
    a folder in use or already used, a batch that cannot fit, a resume with another model or with nothing there."""
    if not config.data:
        raise ConfigError("data: name at least one folder made by `rorqual data build`")
    for folder in config.data:
        read_meta(folder)
    tokenizer = Tokenizer.load(config.data[0])
    shape = model_config(config, tokenizer)
    check_tokenizers(config, tokenizer)
    if not (resume or shape.num_nextn_predict_layers) and config.mtp_weight not in (
        0,
        TrainConfig.mtp_weight,
    ):
        raise ConfigError(
            f"mtp_weight={config.mtp_weight}: {config.init_from} has no MTP modules; leave it out"
        )
    _, world = world_of()
    config.parallel.check(world, config.batch_size, shape)
    if config.compile and world > 1:
        raise ConfigError(f"compile=true: is for one process, and there are {world}; set it to false")
    validation = Validation(config, tokenizer, shape.vocab_size)
    mesh = start(config.parallel, resolve_device(config.device))
    loader = Loader(
        LoaderConfig(config.data, tuple(Stage(s, w) for s, w in config.curriculum), config.seed),
        config.batch_size // mesh.data.size,
        config.seq_len,
        config.steps * config.accumulate,
        mesh.data.index,
        mesh.data.size,
        vocab_size=shape.vocab_size,
    )
    return conduct(config, shape, loader, config.data[0], validation, resume, show, mesh=mesh)


def conduct(
    config: TrainConfig,
    shape: ModelConfig,
    source: Source,
    tokenizer_from: Path,
    validation: Validate,
    resume: bool,
    show: View | None = None,
    kept: Settled | None = None,
    adapt: Export = lambda model: model,
    export: Export = lambda model: model,
    mesh: Mesh | None = None,
) -> Result:
    """Train in the run folder, with its lock, its checkpoints and its report. `kept` are the caller's own settings, which
    a resumed run compares as well; `adapt` makes what is trained of the model that is begun with, `export` what is saved
    of what is trained; `mesh` are the processes that share the run."""
    mesh = mesh or Mesh()
    check_sampling(config, shape, mesh)
    check_memory(config, shape, mesh)
    keep_freed_memory()
    lock = mesh.together(lambda: Lock(config.out).__enter__(), alone=True)
    try:
        show = _view(config, show) if mesh.first else NoView()
        try:
            found = mesh.together(lambda: _begin(config, resume, show, kept), alone=True)
            step = mesh.told(-1 if found is None else folders.step_of(found))
            device = resolve_device(config.device)
            model = adapt(begin_model(config, shape)).to(device)
            layout = spread(model, mesh, config.parallel)
            trainer = Trainer(config, model, source, tokenizer_from, validation, export=export, layout=layout)
            bill = cost(shape)
            peak = _peak(config)
            trainer.speed = Speed(
                config, step_flops(config, bill, trainer), peak and peak * mesh.world, mesh.world
            )
            torch.manual_seed(config.seed)
            if step >= 0:
                trainer.resume(folders.folder_of(config.out, step))
                show.say(f"going on from step {trainer.step}")
            if config.parallel.shard and mesh.world == 1:
                show.say("parallel.shard=true: one process has nothing to divide; --nproc starts more")
            for line in bill_lines(config, bill):
                show.say(line)
            with Stop() as stop:  # until the report is written: a signal that comes late costs neither
                result = trainer.run(show, stop)
                if mesh.first:
                    write_report(config, bill)
        finally:
            show.close()
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
    return result


def _view(config: TrainConfig, show: View | None) -> View:
    show = show or view(config.out.name, config.steps)
    return TensorBoard(config.out, show) if config.tensorboard else show


def _begin(config: TrainConfig, resume: bool, show: View, kept: Settled | None) -> Path | None:
    """The checkpoint to go on from, if there is to be one; the run's config is in its folder from here on."""
    there = folders.steps(config.out)
    if there and not resume:
        raise RunError(
            f"{config.out.resolve()}: holds a run of {there[-1]} steps; add --resume to go on, or take another folder"
        )
    found = checkpoint.latest(config.out, show.say)
    if resume and found is None:
        raise RunError(f"{config.out.resolve()}: nothing to resume; it has no whole checkpoint")
    if kept is not None:
        settle(kept, resume, name="settings.json")
    settle(config, resume)
    return found


def model_config(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model that a config asks for, over a tokenizer."""
    if config.init_from is None:
        eos = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
        return config.shape.model(tokenizer.vocab_size, config.seq_len, tokenizer.bos_id, eos)
    found = hf.load_config(config.init_from)
    if found.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"{config.data[0]}: the tokenizer has {tokenizer.vocab_size} tokens, {config.init_from} has "
            f"vocab_size={found.vocab_size}; build the data with --tokenizer {config.init_from}"
        )
    if config.extend_context is None and config.seq_len > found.max_position_embeddings:
        raise ConfigError(
            f"seq_len={config.seq_len}: {config.init_from} has {found.max_position_embeddings} positions; stretch them "
            f"with extend_context={config.seq_len}"
        )
    return found if config.extend_context is None else extended(found, config.extend_context)


def check_tokenizers(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises DataError where a set, or the model to go on from, has another tokenizer than the first set: with as many
    tokens it would train, on ids that stand for other text."""
    others = list(config.data[1:])
    if config.init_from is not None and (config.init_from / "tokenizer.json").is_file():
        others.append(config.init_from)
    for folder in others:
        if Tokenizer.load(folder).digest != tokenizer.digest:
            raise DataError(
                f"{config.data[0].resolve()}: its tokenizer is not that of {folder.resolve()}; build the data with "
                f"--tokenizer {folder}"
            )


def begin_model(config: TrainConfig, shape: ModelConfig) -> Transformer:
    """Fresh weights from the seed, or those of `init_from`."""
    model = Transformer(shape)
    if config.init_from is None:
        model.init_weights(config.seed, config.shape.zero_output)
        if not shape.tie_word_embeddings:
            with torch.no_grad():
                model.lm_head.weight.mul_(HEAD_SCALE)
        return model
    loaded = hf.load_model(config.init_from, torch.float32)
    if loaded.config.num_nextn_predict_layers != shape.num_nextn_predict_layers:
        raise ConfigError(
            f"{config.init_from}: its MTP modules are not in the file; set num_nextn_predict_layers=0 in its config.json"
        )
    model.load_state_dict(loaded.state_dict())
    return model


HEAD_SCALE = 0.1  # a head that starts near nothing predicts evenly, and its first steps do not undo noise


def settle(config: Settled, resume: bool, free: frozenset[str] = FREE, name: str = RUN) -> None:
    """Write run.json, or compare it: a resumed run keeps what its curve depends on. Raises RunError naming the key."""
    path = config.out / name
    tree = json.loads(json.dumps(to_dict(config)))
    if resume and path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for key, old, new in _differences(before, tree):
            if key.partition(".")[0] not in free:
                raise RunError(f"--resume: {key}={new!r}, but the run was started with {old!r}; keep it")
    elif resume:
        return  # begun by a version that did not keep it
    write_whole(path, json.dumps(tree, indent=1) + "\n")


def _differences(before: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value before, value now) of everything that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in sorted({*before, *now}):
            dotted = f"{where}.{key}" if where else key
            found += _differences(before.get(key), now.get(key), dotted)
        return found
    return [] if before == now else [(where, before, now)]


def check_sampling(config: TrainConfig, shape: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError where sampled softmax cannot be."""
    if config.softmax_share == 1:
        return
    if mesh.world > 1:
        raise ConfigError(
            f"softmax_share={config.softmax_share}: is for one process, and there are {mesh.world}; set it to 1"
        )
    if shape.logit_softcap is not None:
        raise ConfigError(
            f"softmax_share={config.softmax_share}: does not go with logit_softcap={shape.logit_softcap}; leave one out"
        )


def step_flops(config: TrainConfig, bill: Cost, trainer: Trainer) -> float:
    """FLOPs of a whole step: forward and backward of its tokens, and Muon's orthogonalisation. Sampled softmax counts
    with the share that was asked for."""
    return bill.train_flops(config.seq_len, config.softmax_share) * config.tokens_per_step + flops(
        trainer.optimizer, config.tokens_per_step
    )


def _peak(config: TrainConfig) -> float | None:
    """The measured matmul peak of the processor; unknown on other devices."""
    if resolve_device(config.device).type != "cpu":
        return None
    limits = measure_limits(0.05)
    return limits.flops_bfloat16 if config.dtype == "bfloat16" else limits.flops_float32
