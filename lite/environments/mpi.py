"""Processes started by an MPI launcher: Open MPI, MPICH, Intel MPI."""

from __future__ import annotations

from collections.abc import Mapping

from lite.environments.base import Environment
from lite.errors import ConfigError

_SIZE = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANK = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_LOCAL_RANK = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_SIZE = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE")


class MPIEnvironment(Environment):
    """Reads the variables that MPI launchers set; MPI itself is used for nothing."""

    name = "mpirun"

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        return any(name in environ for name in _SIZE) and any(name in environ for name in _RANK)

    def world_size(self) -> int:
        return self._number(*_SIZE)

    def global_rank(self) -> int:
        return self._number(*_RANK)

    def local_rank(self) -> int:
        local = self._optional(*_LOCAL_RANK)
        if local is not None:
            return local
        if self._single_machine():
            return self.global_rank()
        raise ConfigError(
            "MPI_LOCALRANKID is not set, so this process's device can't be known; use Open MPI, MPICH 4 or torchrun."
        )

    def local_world_size(self) -> int | None:
        return self._optional(*_LOCAL_SIZE)

    def num_nodes(self) -> int | None:
        local = self.local_world_size()
        return None if local is None or self.world_size() % local else self.world_size() // local

    def node_rank(self) -> int:
        local = self.local_world_size()
        return 0 if local is None else self.global_rank() // local

    def main_address(self) -> str:
        if self._environ.get("MASTER_ADDR"):
            return self._environ["MASTER_ADDR"]
        if self._single_machine():
            return "127.0.0.1"
        raise ConfigError(
            "MASTER_ADDR is not set and the job has several machines; run mpirun -x MASTER_ADDR=<first machine>."
        )

    def main_port(self) -> int:
        return self._optional("MASTER_PORT") or 29500

    def _single_machine(self) -> bool:
        return self.local_world_size() in (None, self.world_size())
