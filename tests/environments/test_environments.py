"""Each environment reads its scheduler's variables and writes none."""

from __future__ import annotations

import pytest

from lite import ConfigError
from lite.environments import detect_environment
from lite.environments.slurm import first_host

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29555",
}
INTEL_MPI = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}


@pytest.mark.parametrize(
    ("environ", "name", "world", "rank", "local", "node", "local_world", "nodes", "method"),
    [
        ({}, "this process", 1, 0, 0, 0, 1, 1, None),
        (TORCHRUN, "torchrun", 4, 3, 1, 1, 2, 2, "env://"),
        (SLURM, "srun", 6, 5, 1, 2, 2, 3, "tcp://gpu003:18456"),
        (OPEN_MPI, "mpirun", 4, 3, 1, 1, 2, 2, "tcp://head:29555"),
        (INTEL_MPI, "mpirun", 2, 1, 1, 0, 2, 1, "tcp://127.0.0.1:29500"),
        ({**SLURM, **TORCHRUN}, "torchrun", 4, 3, 1, 1, 2, 2, "env://"),
        ({**SLURM, "SLURM_JOB_NAME": "bash"}, "this process", 1, 0, 0, 0, 1, 1, None),
    ],
)
def test_ranks_and_addresses(
    environ: dict[str, str],
    name: str,
    world: int,
    rank: int,
    local: int,
    node: int,
    local_world: int,
    nodes: int,
    method: str | None,
) -> None:
    """torchrun counts before SLURM; an interactive SLURM shell is no job step."""
    before = dict(environ)
    found = detect_environment(environ)
    assert found.name == name
    assert (found.world_size(), found.global_rank(), found.local_rank(), found.node_rank()) == (
        world,
        rank,
        local,
        node,
    )
    assert (found.local_world_size(), found.num_nodes(), found.init_method()) == (local_world, nodes, method)
    assert found.started == (name != "this process")
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-3]", "n1"),
        ("n[007,9]", "n007"),
        ("r[1-2]-x,z", "r1-x"),
        ("gpu-a[10-12,20]", "gpu-a10"),
    ],
)
def test_first_machine_of_a_node_list(nodes: str, host: str) -> None:
    """SLURM's compressed forms."""
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two'"),
        ({k: v for k, v in TORCHRUN.items() if k != "RANK"}, "RANK is not set"),
        ({k: v for k, v in OPEN_MPI.items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
    ],
)
def test_broken_variables_are_named(environ: dict[str, str], part: str) -> None:
    """The variable and its value."""
    found = detect_environment(environ)
    with pytest.raises(ConfigError, match=part):
        for read in (found.global_rank, found.local_world_size, found.main_address, found.world_size):
            read()
