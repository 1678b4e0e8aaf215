"""The sources of ranks, and which one this process has."""

from __future__ import annotations

from collections.abc import Mapping

from lite.environments.base import Environment
from lite.environments.local import LocalEnvironment
from lite.environments.mpi import MPIEnvironment
from lite.environments.slurm import SlurmEnvironment
from lite.environments.torchrun import TorchrunEnvironment

__all__ = [
    "Environment",
    "LocalEnvironment",
    "MPIEnvironment",
    "SlurmEnvironment",
    "TorchrunEnvironment",
    "detect_environment",
]


def detect_environment(environ: Mapping[str, str]) -> Environment:
    """The environment that started this process; torchrun inside a SLURM job counts as torchrun."""
    kinds: tuple[type[Environment], ...] = (TorchrunEnvironment, SlurmEnvironment, MPIEnvironment, LocalEnvironment)
    return next(kind for kind in kinds if kind.detect(environ))(environ)
