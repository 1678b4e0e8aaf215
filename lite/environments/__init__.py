"""The sources of ranks, and which one this process has."""

from __future__ import annotations

from collections.abc import Mapping

from lite.environments.base import Environment, check_company
from lite.environments.local import LocalEnvironment
from lite.environments.mpi import MPIEnvironment, starts_by_mpi
from lite.environments.slurm import SlurmEnvironment
from lite.environments.torchrun import TorchrunEnvironment

__all__ = [
    "Environment",
    "LocalEnvironment",
    "MPIEnvironment",
    "SlurmEnvironment",
    "TorchrunEnvironment",
    "check_company",
    "detect_environment",
]


def detect_environment(environ: Mapping[str, str]) -> Environment:
    """The environment that started this process; torchrun and mpirun inside a SLURM job count as themselves."""
    kinds: tuple[type[Environment], ...] = (TorchrunEnvironment, SlurmEnvironment, MPIEnvironment)
    if starts_by_mpi(environ):  # whose daemons srun may have started, with variables of their own
        kinds = (TorchrunEnvironment, MPIEnvironment)
    for kind in kinds:
        if kind.detect(environ):
            return kind(environ)
    # Set by hand, or by Kubeflow: ranks then, or an error that names what is missing, but never one process for itself.
    several = environ.get("WORLD_SIZE", "").strip() not in ("", "0", "1")
    several = several or ("RANK" in environ and "MASTER_ADDR" in environ)
    return TorchrunEnvironment(environ) if several else LocalEnvironment(environ)
