"""Joining the job's process group, and leaving it; every strategy of several processes holds one of these."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lite import collectives
from lite.environments.base import Environment, check_company
from lite.errors import ConfigError, choose

_GLOO_DRAIN_S = 0.1
_PATIENCE_IN_DEBUG = timedelta(minutes=2)  # what waits for another group's collective is not compared


class ProcessGroup:
    """torch's default process group, made here unless it is there already.

    Args:
        backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default, or two minutes where
            collectives are compared (LITE_DEBUG).

    Raises:
        ConfigError: `timeout` is no timedelta, or this torch has no such backend.
    """

    def __init__(self, backend: str | None, timeout: timedelta | None) -> None:
        if timeout is not None and not isinstance(timeout, timedelta):
            raise ConfigError(f"timeout={timeout!r} is not a timedelta; use datetime.timedelta(seconds={timeout!r}).")
        if backend is not None:
            _check_backend(backend)
        self.backend = backend
        self.timeout = timeout
        self._owned = False
        self._silent: Any = None  # for DDP, where the default group compares collectives

    def join(self, environment: Environment, device: torch.device) -> Any:
        """Meet the other ranks. Collective: call on all ranks.

        Returns:
            The store that the ranks share, or None where no launcher has started this process.
        """
        if not environment.started:
            return None
        world_size, rank = environment.world_size(), environment.global_rank()
        if dist.is_initialized():
            if dist.get_world_size() != world_size:
                raise ConfigError(
                    f"a process group of {dist.get_world_size()} ranks exists, but {environment.name} started "
                    f"{world_size} processes; remove your own init_process_group call."
                )
            return dist.distributed_c10d._get_default_store()
        backend = self.backend or ("nccl" if device.type == "cuda" else "gloo")
        if self.timeout is None and collectives.are_compared():
            self.timeout = _PATIENCE_IN_DEBUG
        store, _, _ = next(rendezvous(environment.init_method() or "env://", rank, world_size))
        store.set_timeout(self.timeout or timedelta(minutes=30))
        check_company(store, environment, device)
        # torch 2.13: torchrun's store keeps the addresses of the processes that it restarted, and gloo would try them.
        life = f"lite/{environment.num_restarts()}"
        dist.init_process_group(
            backend,
            store=PrefixStore(life, store),
            rank=rank,
            world_size=world_size,
            timeout=self.timeout,
            device_id=device if backend == "nccl" else None,
        )
        self._owned = True
        return store

    def for_ddp(self) -> Any:
        """The group that DDP sends gradients over, None for the default one. Collective: call on all ranks.

        Where the default group compares collectives (LITE_DEBUG, or torch's TORCH_DISTRIBUTED_DEBUG=DETAIL), it is one
        that doesn't: torch 2.13's DDP ends the process (SIGSEGV) on a group that does.
        """
        if not collectives.are_compared():
            return None
        if self._silent is None:
            level: Any = dist.DebugLevel  # type: ignore[attr-defined]
            dist.set_debug_level(level.INFO)  # type: ignore[attr-defined]
            try:
                self._silent = dist.new_group(backend=dist.get_backend(), timeout=self.timeout)
            finally:
                dist.set_debug_level(level.DETAIL)  # type: ignore[attr-defined]
        return self._silent

    def leave(self) -> None:
        """Destroy the group, if it was made here, after those that run beside it."""
        collectives.destroy_cpu_groups()
        if self._owned and dist.is_initialized():
            gloo = "gloo" in dist.get_backend()
            dist.destroy_process_group()  # and all others with it
            if gloo:
                # torch 2.13: once a DDP was built, gloo's threads outlive the group, and one that still drops the last
                # collective's tensors while the interpreter shuts down aborts the process. This lets it finish.
                time.sleep(_GLOO_DRAIN_S)
        self._owned = False
        self._silent = None


def _check_backend(backend: Any) -> None:
    """Refuse what init_process_group would, in "gloo" as in "cpu:gloo,cuda:nccl", before any process starts."""
    known = [name for name in dist.Backend.backend_list if name != dist.Backend.UNDEFINED]
    for part in backend.split(",") if isinstance(backend, str) else [backend]:
        name = part.rpartition(":")[2] if isinstance(part, str) else part
        name = choose("process_group_backend", name, known)
        if not dist.is_backend_available(name):
            there = ", ".join(repr(other) for other in known if dist.is_backend_available(other))
            raise ConfigError(f"process_group_backend={backend!r}: this torch has no {name!r}; it has {there}.")
