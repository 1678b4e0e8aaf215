"""Processes started by an MPI launcher: Open MPI, MPICH, Intel MPI."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from lite.environments.base import Environment
from lite.errors import ConfigError

# World size, rank, local rank, local world size: Open MPI, then MPICH and Intel MPI, then MVAPICH.
_FAMILIES = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
_JOB = ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID")


def starts_by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether MPI's variables outrank srun's, which sets PMI_SIZE too, but then to its own number of tasks."""
    if any(name in environ for name in ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        return True
    size = environ.get("PMI_SIZE")
    return size is not None and size != environ.get("SLURM_STEP_NUM_TASKS", size)


class MPIEnvironment(Environment):
    """Reads the variables that MPI launchers set; MPI itself is used for nothing."""

    name = "mpirun"
    binds_devices = True

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        present = [family for family in _FAMILIES if any(name in environ for name in family[:2])]
        self._size, self._rank, self._local_rank, self._local_size = (*present, _FAMILIES[0])[0]

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        return any(name in environ for family in _FAMILIES for name in family[:2])

    def world_size(self) -> int:
        return self._number(self._size)

    def global_rank(self) -> int:
        return self._number(self._rank)

    def local_rank(self) -> int:
        """Needed with several processes: without it they can't be told apart on several machines."""
        return self._number(self._local_rank) if self.world_size() > 1 else 0

    def local_world_size(self) -> int | None:
        return self._optional(self._local_size)

    def num_nodes(self) -> int | None:
        local = self.local_world_size()
        return None if not local or self.world_size() % local else self.world_size() // local

    def node_rank(self) -> int:
        local = self.local_world_size()
        return 0 if not local else self.global_rank() // local

    def main_address(self) -> str:
        if self._environ.get("MASTER_ADDR"):
            return self._environ["MASTER_ADDR"]
        if self._single_machine():
            return "127.0.0.1"
        raise ConfigError(
            "MASTER_ADDR is not set and the job has several machines; run mpirun -x MASTER_ADDR=<first machine>."
        )

    def main_port(self) -> int:
        """MASTER_PORT, or one that follows from the job, so that jobs on one machine don't meet each other."""
        given, job = self._optional("MASTER_PORT"), self.job_id()
        if given is not None:
            return given
        return 29500 if job is None else 15000 + zlib.crc32(job.encode()) % 20000

    def job_id(self) -> str | None:
        return next((f"{name}={self._environ[name]}" for name in _JOB if self._environ.get(name)), None)

    def _single_machine(self) -> bool:
        return self.world_size() == 1 or self.local_world_size() == self.world_size()
