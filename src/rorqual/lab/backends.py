"""The back-end that a lab's settings name."""

from __future__ import annotations

from rorqual.lab.job import Backend
from rorqual.lab.settings import Settings


def backend(settings: Settings) -> Backend:
    """Raises RunError where it is not there."""
    if settings.backend == "slurm":
        from rorqual.lab.slurm import Slurm

        return Slurm(settings.slurm)
    if settings.backend == "ray":
        from rorqual.lab.ray_actors import RayActors

        return RayActors(settings.ray)
    from rorqual.lab.local import Local

    return Local()
