"""Processes started by torchrun (or anything else that sets its variables)."""

from __future__ import annotations

from collections.abc import Mapping

from lite.environments.base import Environment
from lite.errors import ConfigError


class TorchrunEnvironment(Environment):
    """Reads what torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK, MASTER_ADDR, MASTER_PORT.

    Source: https://pytorch.org/docs/stable/elastic/run.html#environment-variables
    """

    name = "torchrun"

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        return "TORCHELASTIC_RUN_ID" in environ or ("RANK" in environ and "LOCAL_RANK" in environ)

    def world_size(self) -> int:
        return self._number("WORLD_SIZE")

    def global_rank(self) -> int:
        return self._number("RANK")

    def local_rank(self) -> int:
        return self._number("LOCAL_RANK")

    def main_address(self) -> str:
        address = self._environ.get("MASTER_ADDR", "").strip()
        if not address:
            raise ConfigError(
                "MASTER_ADDR is not set, but RANK is; set MASTER_ADDR and MASTER_PORT to the first machine's address "
                "and a free port there, or start the job by torchrun."
            )
        return address

    def main_port(self) -> int:
        return self._number("MASTER_PORT")

    def node_rank(self) -> int:
        return self._optional("GROUP_RANK", "NODE_RANK") or 0

    def local_world_size(self) -> int | None:
        return self._optional("LOCAL_WORLD_SIZE")

    def num_nodes(self) -> int | None:
        return self._optional("GROUP_WORLD_SIZE")

    def num_restarts(self) -> int:
        return self._optional("TORCHELASTIC_RESTART_COUNT") or 0

    def job_id(self) -> str | None:
        return self._environ.get("TORCHELASTIC_RUN_ID")

    def init_method(self) -> str | None:
        return "env://"  # uses the agent's own store, where torchrun made one
