"""Real processes for tests: a pool of gloo workers that lasts for the whole session, and scripts under torchrun."""

from __future__ import annotations

import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120
MAX_THREADS = 60

_pools: dict[int, Pool] = {}


class WorkerError(AssertionError):
    """A function failed in a worker; the message has its traceback."""


class Pool:
    """`world_size` processes that run one function after another, each with a process environment like torchrun's."""

    def __init__(self, world_size: int) -> None:
        context = get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, world_size), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        port = free_port()
        for pipe in self._pipes:
            pipe.send((fn, args, port))
        answers: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                done = "\n".join(a[1] for a in answers if a[0] == "error")
                raise WorkerError(f"rank {rank} did not answer within {TIMEOUT_S} s\n{done}")
            try:
                answers.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                self.close()
                raise WorkerError(f"the process of rank {rank} died") from None
        if self._is_worn():
            self.close()
        errors = [f"rank {rank}:\n{value}" for rank, (kind, value) in enumerate(answers) if kind == "error"]
        if errors:
            raise WorkerError("\n".join(errors))
        return [value for _, value in answers]

    def _is_worn(self) -> bool:
        # torch 2.13: a sharded model's process group isn't given back, and its gloo threads poll for ever.
        tasks = [Path(f"/proc/{process.pid}/task") for process in self._processes]
        return any(folder.is_dir() and len(os.listdir(folder)) > MAX_THREADS for folder in tasks)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for world_size in [size for size, pool in _pools.items() if pool is self]:
            del _pools[world_size]


def run_distributed(fn: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """Run the module-level function `fn(*args)` on every rank and return what each one returned.

    The ranks find themselves as under torchrun, so `Lite()` joins them into one job.
    """
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    return _pools[world_size].run(fn, args)


def close_pools() -> None:
    for pool in list(_pools.values()):
        pool.close()


def run_torchrun(
    script: str | Path,
    *args: str,
    nproc: int = 2,
    max_restarts: int = 0,
    env: dict[str, str] | None = None,
    timeout: float = 180,
) -> subprocess.CompletedProcess[str]:
    """Run a script under the real torchrun."""
    return run_python(*_torchrun(nproc, max_restarts), str(script), *args, env=env, timeout=timeout)


def start_torchrun(*args: str, nproc: int = 2, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a script under the real torchrun, and don't wait for it."""
    nowhere = subprocess.DEVNULL
    command = [sys.executable, *_torchrun(nproc, 0), *args]
    return subprocess.Popen(command, stdout=nowhere, stderr=nowhere, env=_variables(env), cwd=ROOT)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a process and all that it has started, at once."""
    pids = [process.pid]
    for pid in pids:  # grows meanwhile
        with suppress(OSError):
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_python(*args: str, env: dict[str, str] | None = None, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run `python *args` with one thread and return its output."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=_variables(env), cwd=ROOT)


def _torchrun(nproc: int, max_restarts: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={nproc}", f"--master-port={free_port()}"]
    return [*launcher, f"--max-restarts={max_restarts}"]


def _variables(env: dict[str, str] | None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}


def run_ranks(
    script: str | Path, *args: str, world_size: int = 2, timeout: float = 180
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script on every rank, as srun would: nobody ends one rank because another has failed."""
    shared = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    running = []
    for rank in map(str, range(world_size)):
        variables = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        running.append(
            subprocess.Popen(
                [sys.executable, str(script), *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=variables,
                cwd=ROOT,
            )
        )
    done = []
    try:
        for process in running:
            output, errors = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, output, errors))
    finally:
        for process in running:
            process.kill()
            process.wait()
    return done


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _serve(pipe: Connection, rank: int, world_size: int) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        fn, args, port = pipe.recv()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                answer = ("value", fn(*args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        if dist.is_initialized():
            dist.destroy_process_group()
        # Not send(), by which torch keeps a file descriptor for each tensor.
        pipe.send_bytes(pickle.dumps(answer))
