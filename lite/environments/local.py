"""One process that nobody else started: the plain `python script.py`."""

from __future__ import annotations

from collections.abc import Mapping

from lite.environments.base import Environment


class LocalEnvironment(Environment):
    """A single process; more are started by a launcher."""

    name = "this process"
    started = False

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        return True

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return 0

    def main_address(self) -> str:
        return "127.0.0.1"

    def main_port(self) -> int:
        return self._optional("MASTER_PORT") or 29500

    def local_world_size(self) -> int | None:
        return 1

    def num_nodes(self) -> int | None:
        return 1

    def init_method(self) -> str | None:
        return None
