"""Who this process is in a job: one source of ranks and addresses each, read-only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lite.errors import ConfigError


class Environment(ABC):
    """A source of ranks. A third party subclasses it and passes an instance as `plugins=`.

    Args:
        environ: The environment variables that it reads; they are never written.

    Attributes:
        name: As messages call it.
        started: Whether whoever made this environment has started all processes of the job already.
        binds_devices: Whether it may show each process a device of its own, which each of them sees as the first.
    """

    name: ClassVar[str]
    started: ClassVar[bool] = True
    binds_devices: ClassVar[bool] = False

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)

    @classmethod
    @abstractmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        """Whether the variables say that this process was started in this way."""

    @abstractmethod
    def world_size(self) -> int:
        """Number of processes in the job."""

    @abstractmethod
    def global_rank(self) -> int:
        """This process's number in the job, from 0."""

    @abstractmethod
    def local_rank(self) -> int:
        """This process's number on its machine, from 0."""

    @abstractmethod
    def main_address(self) -> str:
        """Host name or address of rank 0's machine."""

    @abstractmethod
    def main_port(self) -> int:
        """The port on that machine where the ranks meet."""

    def node_rank(self) -> int:
        """This machine's number, from 0."""
        return 0

    def local_world_size(self) -> int | None:
        """Number of processes on this machine, or None where it can't be known."""
        return None

    def num_nodes(self) -> int | None:
        """Number of machines, or None where it can't be known."""
        return None

    def num_restarts(self) -> int:
        """How many times the whole job has been started again by whoever started it."""
        return 0

    def init_method(self) -> str | None:
        """Where torch.distributed lets the ranks meet."""
        return f"tcp://{self.main_address()}:{self.main_port()}"

    def job_id(self) -> str | None:
        """What all processes of the job have in common and those of other jobs have not; None where nothing is known.

        Ranks compare it when they meet, since two jobs may by chance meet at the same port.
        """
        return None

    def check(self) -> None:
        """Refuse ranks that no job has.

        Raises:
            ConfigError: A number lies outside its range, or a variable is missing; it names them.
        """
        world, local_world, nodes = self.world_size(), self.local_world_size(), self.num_nodes()
        for what, size in (("world size", world), ("local world size", local_world), ("number of machines", nodes)):
            if size is not None and size < 1:
                raise ConfigError(f"{self.name} gives a {what} of {size}; {self._blame()}")
        if local_world is not None and local_world > world:
            raise ConfigError(
                f"{self.name} gives {local_world} processes on this machine but {world} altogether; {self._blame()}"
            )
        ranks = (
            ("rank", self.global_rank(), world),
            ("local rank", self.local_rank(), world if local_world is None else local_world),
            ("machine's number", self.node_rank(), world if nodes is None else nodes),
        )
        for what, rank, size in ranks:
            if not 0 <= rank < size:
                raise ConfigError(
                    f"{self.name} gives the {what} {rank}, which must be from 0 to {size - 1}; {self._blame()}"
                )
        if self.started:
            port = self.main_port()
            if not (self.main_address() and 0 < port < 2**16):
                raise ConfigError(f"{self.name} gives the port {port}, which must be from 1 to 65535; {self._blame()}")

    def _blame(self) -> str:
        return f"its variables contradict each other: don't set them by hand, start the job by {self.name}."

    def _number(self, *names: str) -> int:
        """The first of the variables that is set, as a whole number."""
        value = self._optional(*names)
        if value is None:
            raise ConfigError(
                f"{names[0]} is not set, but other variables of {self.name} are, so this process would run for itself; "
                f"start the job by {self.name}, or set {names[0]} for each process."
            )
        return value

    def _optional(self, *names: str) -> int | None:
        for name in names:
            text = self._environ.get(name, "").strip()
            if text:
                try:
                    return int(text)
                except ValueError:
                    raise ConfigError(
                        f"{name}={text!r} is not a whole number; {self.name} sets it, don't set it by hand."
                    ) from None
        return None


def check_company(store: Any, environment: Environment, device: torch.device) -> None:
    """Refuse a rank that met another job at the same port, and two ranks on one GPU. Collective: call on all ranks.

    Args:
        store: Where the ranks meet.
        environment: This rank's.
        device: This rank's.

    Raises:
        ConfigError: This rank is of another job than rank 0, or its GPU is another rank's.
    """
    mine = environment.job_id() or ""
    if environment.global_rank() == 0:
        store.set("lite/job", mine)
    theirs = store.get("lite/job").decode()
    if theirs != mine:
        raise ConfigError(
            f"this process belongs to the job {mine!r}, but met rank 0 of the job {theirs!r} at "
            f"{environment.main_address()}:{environment.main_port()}; give each job a MASTER_PORT of its own."
        )
    if environment.binds_devices and device.type == "cuda":
        identity = torch.cuda.get_device_properties(device).uuid
        if store.add(f"lite/device/{identity}", 1) > 1:
            raise ConfigError(
                f"rank {environment.global_rank()} has the GPU {identity}, which another rank has too; let "
                f"{environment.name} give each process one of its own, or show all GPUs to all processes."
            )
