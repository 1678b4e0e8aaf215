"""Who this process is in a job: one source of ranks and addresses each, read-only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from lite.errors import ConfigError


class Environment(ABC):
    """A source of ranks. A third party subclasses it and passes an instance as `plugins=`.

    Args:
        environ: The environment variables that it reads; they are never written.

    Attributes:
        name: As messages call it.
        started: Whether whoever made this environment has started all processes of the job already.
    """

    name: ClassVar[str]
    started: ClassVar[bool] = True

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

    def _number(self, *names: str) -> int:
        """The first of the variables that is set, as a whole number."""
        value = self._optional(*names)
        if value is None:
            raise ConfigError(
                f"{names[0]} is not set, but the other variables of {self.name} are; start the job by {self.name}."
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
