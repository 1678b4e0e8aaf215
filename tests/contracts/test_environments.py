"""Laws that every environment keeps."""

from __future__ import annotations

import os

import pytest

from lite.environments import (
    Environment,
    LocalEnvironment,
    MPIEnvironment,
    SlurmEnvironment,
    TorchrunEnvironment,
    detect_environment,
)
from tests.environments.test_environments import INTEL_MPI, OPEN_MPI, SLURM, TORCHRUN

CASES: dict[str, tuple[type[Environment], dict[str, str]]] = {
    "local": (LocalEnvironment, {}),
    "torchrun": (TorchrunEnvironment, TORCHRUN),
    "srun": (SlurmEnvironment, SLURM),
    "open mpi": (MPIEnvironment, OPEN_MPI),
    "intel mpi": (MPIEnvironment, INTEL_MPI),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_found_by_its_own_variables_and_reads_only(name: str) -> None:
    """Ranks lie below their sizes; neither the mapping nor the process's variables are written."""
    kind, environ = CASES[name]
    before, process = dict(environ), dict(os.environ)
    found = detect_environment(environ)
    assert type(found) is kind
    assert 0 <= found.global_rank() < found.world_size()
    local_world, nodes = found.local_world_size(), found.num_nodes()
    assert local_world is not None
    assert 0 <= found.local_rank() < local_world <= found.world_size()
    assert nodes is not None
    assert 0 <= found.node_rank() < nodes
    assert found.num_restarts() >= 0
    found.check()
    assert found.main_address()
    assert 0 < found.main_port() < 2**16
    assert found.job_id() == kind(environ).job_id()
    assert (found.init_method() is None) == (not found.started)
    assert (environ, dict(os.environ)) == (before, process)


@pytest.mark.parametrize("kind", [TorchrunEnvironment, SlurmEnvironment, MPIEnvironment])
def test_it_is_not_found_without_its_variables(kind: type[Environment]) -> None:
    """An empty environment is a plain process."""
    assert not kind.detect({})
    assert type(detect_environment({})) is LocalEnvironment
