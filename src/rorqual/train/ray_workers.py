"""`rorqual train --launcher ray --nproc N`: the processes of a run as Ray Train workers, on whichever machines of a
cluster have room. Needs `rorqual[ray]`; all machines see the data and the run's folder."""

from __future__ import annotations

import os
from typing import Any

from rorqual.config import from_dict, to_dict
from rorqual.errors import RunError
from rorqual.train import folders
from rorqual.train.config import TrainConfig
from rorqual.train.launch import ATTEMPTS


def launch(config: TrainConfig, processes: int, resume: bool, address: str | None = None) -> int:
    """Train in so many workers; returns the last checkpoint's step. A worker that dies takes the others with it, and all
    go on from there. Raises RunError where Ray is not there or the workers fail for good."""
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as e:
        raise RunError(f"launcher=ray: Ray is not installed ({e}); pip install 'rorqual[ray]'") from e
    path = os.pathsep.join(p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
    if not ray.is_initialized():
        where = address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=where, runtime_env={"env_vars": {"PYTHONPATH": path}})
    threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // processes)
    trainer = TorchTrainer(
        work,
        train_loop_config={"config": to_dict(config), "resume": resume, "threads": threads},
        scaling_config=ScalingConfig(num_workers=processes, resources_per_worker={"CPU": threads}),
        run_config=RunConfig(
            storage_path=str((config.out / "ray").resolve()),
            failure_config=FailureConfig(max_failures=ATTEMPTS),
        ),
    )
    try:
        trainer.fit()
    except Exception as e:  # Ray wraps what its workers raised in classes of its own
        raise RunError(f"{config.out.resolve()}: Ray's workers failed: {str(e).splitlines()[0]}") from e
    return folders.steps(config.out)[-1]


def work(given: dict[str, Any]) -> None:
    """One worker; Ray has joined it with the others."""
    import ray.train
    import torch

    from rorqual.train.run import train
    from rorqual.train.view import Lines

    torch.set_num_threads(given["threads"])
    context = ray.train.get_context()
    os.environ |= {"RANK": str(context.get_world_rank()), "WORLD_SIZE": str(context.get_world_size())}
    os.environ |= {
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
    }
    config = from_dict(TrainConfig, given["config"])
    train(config, given["resume"] or bool(folders.steps(config.out)), show=Lines())
