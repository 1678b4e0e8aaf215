"""Each environment reads its scheduler's variables and writes none."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from torch.distributed import HashStore

from lite import ConfigError
from lite.accelerators import DeviceProbe
from lite.environments import check_company, detect_environment
from lite.environments.slurm import first_host
from lite.plan import resolve
from tests.support.processes import ROOT, free_port, run_python

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
SHELL = {"SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": "1"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234"}
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
        ({**SLURM, **SHELL}, "this process", 1, 0, 0, 0, 1, 1, None),
        ({**SLURM, **SHELL, "SLURM_STEP_NUM_TASKS": "6"}, "srun", 6, 5, 1, 2, 2, 3, "tcp://gpu003:18456"),
        ({**SLURM, "SLURM_STEP_ID": "2"}, "srun", 6, 5, 1, 2, 2, 3, "tcp://gpu003:30470"),
        ({**SLURM, "RANK": "5", "WORLD_SIZE": "6"}, "srun", 6, 5, 1, 2, 2, 3, "tcp://gpu003:18456"),
        ({**INTEL_MPI, "PMI_JOBID": "77"}, "mpirun", 2, 1, 1, 0, 2, 1, "tcp://127.0.0.1:31126"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "this process", 1, 0, 0, 0, 1, 1, None),
        ({**BY_HAND, "LOCAL_RANK": "0"}, "torchrun", 2, 1, 0, 0, None, None, "env://"),  # type: ignore[list-item]
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
        ("rack[0-3]node[0-7],z", "rack0node0"),
    ],
)
def test_first_machine_of_a_node_list(nodes: str, host: str) -> None:
    """SLURM's compressed forms."""
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["[n1-n2]", "n[1-", "a b"])
def test_a_node_list_that_is_not_understood_is_refused(nodes: str) -> None:
    """It is quoted, and the way out is named."""
    with pytest.raises(ConfigError, match=f"SLURM_JOB_NODELIST='{re.escape(nodes)}'.*MASTER_ADDR"):
        first_host(nodes)


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in environ.items() if k not in names}


@pytest.mark.parametrize(
    ("environ", "part"),
    [
        ({**SLURM, "SLURM_PROCID": "x"}, "SLURM_PROCID='x'"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "two"}, "SLURM_STEP_TASKS_PER_NODE='two'"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(TORCHRUN, "RANK"), "RANK is not set"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set"),
        (without(OPEN_MPI, "MASTER_ADDR"), "MASTER_ADDR"),
        (BY_HAND, "LOCAL_RANK is not set"),
        (without({**BY_HAND, "LOCAL_RANK": "0"}, "WORLD_SIZE"), "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_RANK is not set"),
        ({"PMI_RANK": "1"}, "PMI_SIZE is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4, which must be from 0 to 3"),
        ({**TORCHRUN, "RANK": "-1"}, "rank -1"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "local rank 2, which must be from 0 to 1"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "world size of 0"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "local world size of 0"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "8 processes on this machine but 4 altogether"),
        ({**TORCHRUN, "GROUP_RANK": "2"}, "machine's number 2"),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, "port 99999"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "0"}, "local world size of 0"),
    ],
)
def test_impossible_and_missing_variables_are_named(environ: dict[str, str], part: str) -> None:
    """While planning: a process never runs for itself because a variable is missing."""
    with pytest.raises(ConfigError, match=part):
        resolve({}, environ, DeviceProbe(cuda=8))


def test_a_rank_that_meets_another_job_says_so() -> None:
    """Two steps of one allocation, at one port by the user's MASTER_PORT."""
    here = {**SLURM, "SLURM_PROCID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    store, device = HashStore(), torch.device("cpu")
    check_company(store, detect_environment(here), device)
    check_company(store, detect_environment({**here, "SLURM_PROCID": "1"}), device)
    other = {**here, "SLURM_PROCID": "1", "SLURM_STEP_ID": "1"}
    with pytest.raises(ConfigError, match=r"step 123456\.1'.*step 123456\.0' at 127\.0\.0\.1:29400"):
        check_company(store, detect_environment(other), device)


def test_two_jobs_at_one_port_are_never_one() -> None:
    """Real processes: a rank 0 and a rank 1 of different steps don't train together."""
    common = {**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    common.update(SLURM_NODEID="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", "from lite import Lite; Lite(accelerator='cpu')"]
    zero = {**os.environ, **common, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with subprocess.Popen(command, env=zero, stderr=subprocess.DEVNULL) as first:
        try:
            mixed = {**common, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "1"}
            done = run_python(*command[1:], env=mixed)
            assert done.returncode == 1
            assert "belongs to the job" in done.stderr
        finally:
            first.kill()


def test_mpirun_inside_a_slurm_job_is_mpirun() -> None:
    """srun starts its daemons, whose own step must not be taken for the job; srun's own PMI_SIZE is srun's."""
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_STEP_TASKS_PER_NODE": "1",
        "SLURM_NTASKS": "1",
    }
    found = detect_environment({**step, **OPEN_MPI})
    assert (found.name, found.world_size(), found.global_rank()) == ("mpirun", 4, 3)
    hydra = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert detect_environment({**step, **hydra}).world_size() == 4
    own = {**step, "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "PMI_SIZE": "4", "PMI_RANK": "0"}
    assert detect_environment(own).name != "mpirun"
