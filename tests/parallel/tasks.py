"""What the processes of a test do; each function is run by all of them together."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from rorqual.config import from_dict, to_dict
from rorqual.data.loader import Batch
from rorqual.errors import CheckpointError
from rorqual.model.transformer import Transformer
from rorqual.parallel.config import Parallel
from rorqual.parallel.layout import Layout, local
from rorqual.parallel.mesh import Mesh, start
from rorqual.parallel.spread import joined, spread
from rorqual.train import folders
from rorqual.train.batch import Lesson
from rorqual.train.config import TrainConfig
from rorqual.train.shape import Shape
from rorqual.train.trainer import Trainer

VOCABULARY, ROWS, LENGTH = 64, 12, 16


class Fixed:
    """The same batches whoever asks; each process takes its share of the rows."""

    def __init__(self, mesh: Mesh, rows: int = ROWS) -> None:
        self.mesh, self.rows, self.step = mesh, rows, 0

    def __next__(self) -> Batch:
        generator = torch.Generator().manual_seed(self.step)
        self.step += 1
        ids = torch.randint(VOCABULARY, (self.rows, LENGTH + 1), generator=generator)
        documents = (torch.arange(LENGTH + 1) > 5).int().expand(self.rows, -1)
        # Rows of unequal weight: each process's mean would not be the mean over all.
        documents = documents * (torch.arange(self.rows) % 3 == 0)[:, None].int()
        positions = torch.arange(LENGTH + 1).expand(self.rows, -1)
        mine = slice(self.mesh.data.index, None, self.mesh.data.size)
        return Batch(ids[mine], positions[mine], documents[mine])

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def config_of(out: str, shape: dict[str, Any], parallel: dict[str, Any], **more: Any) -> TrainConfig:
    tree = to_dict(TrainConfig()) | {
        "out": out, "device": "cpu", "dtype": "float32", "batch_size": ROWS, "seq_len": LENGTH, "steps": 10,
        "save_every": 0,
    }  # fmt: skip
    return from_dict(TrainConfig, tree | {"shape": to_dict(Shape(**shape)), "parallel": parallel} | more)


def trainer_of(config: TrainConfig, changes: dict[str, Any] | None = None) -> Trainer:
    """A trainer over this process's part of a model."""
    torch.manual_seed(0)
    mesh = start(config.parallel, torch.device("cpu"))
    shape = dataclasses.replace(config.shape.model(VOCABULARY, LENGTH), **(changes or {}))
    config.parallel.check(mesh.world, config.batch_size, shape)
    model = Transformer(shape).init_weights(1)
    layout = spread(model, mesh, config.parallel)
    return Trainer(config, model, Fixed(mesh), Path(), layout=layout)


def gathered(t: torch.Tensor, name: str, layout: Layout) -> torch.Tensor:
    """The whole of a tensor that is placed as the parameter `name` is."""
    return joined([local(t)], name, layout)[0] if layout.of(name).cuts else local(t)


def learn(
    shape: dict[str, Any],
    parallel: dict[str, Any],
    changes: dict[str, Any] | None = None,
    steps: int = 3,
    favoured: list[int] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Loss, gradients and norm of the first step, and the weights after some. `favoured`: the only experts chosen."""
    trainer = trainer_of(config_of("unused", shape, parallel, **more), changes)
    trainer.model.train()
    if favoured is not None:
        for _, router in trainer.model.routers():
            assert router.e_score_correction_bias is not None
            router.e_score_correction_bias.fill_(-10.0)[favoured] = 10.0
    rows = [next(trainer.source) for _ in range(trainer.config.accumulate)]
    update = trainer.gradients([Lesson.of(r, True) for r in rows])
    named = dict(trainer.model.named_parameters())
    gradients = {n: gathered(p.grad, n, trainer.layout) for n, p in named.items() if p.grad is not None}
    gradients = {n: (g.to_dense() if g.is_sparse else g).clone() for n, g in gradients.items()}
    trainer.model.zero_grad(set_to_none=True)
    trainer.source.load_state_dict({"step": 0})
    losses = [trainer.one_step().loss for _ in range(steps)]
    weights = {n: gathered(p.detach(), n, trainer.layout).clone() for n, p in named.items()}
    buffers = {n: b.clone() for n, b in trainer._buffers().items()}
    return {
        "loss": update.loss, "balance": update.balance, "mtp": update.mtp, "norm": update.norm, "loads": update.loads,
        "gradients": gradients, "losses": losses, "weights": weights | buffers,
        "held": sum(local(p).numel() for p in named.values()),
    }  # fmt: skip


def begin_and_save(out: str, shape: dict[str, Any], parallel: dict[str, Any], steps: int, **more: Any) -> str:
    """Train some steps from nothing or from the last checkpoint, and save; where it was saved."""
    trainer = trainer_of(config_of(out, shape, parallel, **more))
    trainer.model.train()
    there = folders.steps(Path(out))
    if there:
        trainer.resume(folders.folder_of(Path(out), there[-1]))
    for _ in range(steps):
        trainer.one_step()
    return str(trainer.save())


def resumed(folder: str, shape: dict[str, Any], parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Everything that a checkpoint gives back, put together over all processes."""
    trainer = trainer_of(config_of("unused", shape, parallel, **more))
    trainer.resume(Path(folder))
    named = dict(trainer.model.named_parameters())
    found = {n: gathered(p.detach(), n, trainer.layout).clone() for n, p in named.items()}
    found |= {n: b.clone() for n, b in trainer._buffers().items()}
    return {"tensors": found, "step": trainer.step, "position": trainer.source.state_dict()}


def orders(data: str, steps: int, stop: int) -> dict[str, Any]:
    """The rows that a process draws, straight through and after a resume at `stop`."""
    from rorqual.data.loader import Loader, LoaderConfig

    mesh = start(Parallel(), torch.device("cpu"))

    def loader() -> Loader:
        return Loader(
            LoaderConfig((Path(data),)),
            12 // mesh.world,
            8,
            steps,
            rank=mesh.data.index,
            world=mesh.data.size,
        )

    straight = loader()
    all_rows = [next(straight).ids for _ in range(steps)]
    first = loader()
    for _ in range(stop):
        next(first)
    again = loader()
    again.load_state_dict(first.state_dict())
    return {"straight": all_rows[stop:], "resumed": [next(again).ids for _ in range(steps - stop)]}


def fail_to_save(out: str, shape: dict[str, Any], parallel: dict[str, Any]) -> str:
    """What is said where the second process cannot write its part."""
    from rorqual.train import checkpoint

    trainer = trainer_of(config_of(out, shape, parallel))
    trainer.resume(folders.folder_of(Path(out), folders.steps(Path(out))[-1]))
    trainer.model.train()
    trainer.one_step()
    write = checkpoint.write_pieces

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint.write_pieces = full if trainer.mesh.rank == 1 else write  # type: ignore[attr-defined]
    try:
        trainer.save()
    except CheckpointError as e:
        return str(e)
    finally:
        checkpoint.write_pieces = write  # type: ignore[attr-defined]
    return "saved"
