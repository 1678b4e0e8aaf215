"""Processes started by SLURM's srun."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lite.environments.base import Environment
from lite.errors import ConfigError


class SlurmEnvironment(Environment):
    """Reads the variables of an srun step; a shell inside an allocation (salloc, an sbatch script itself) is none.

    Source: https://slurm.schedmd.com/srun.html (output environment variables)
    """

    name = "srun"
    binds_devices = True

    @classmethod
    def detect(cls, environ: Mapping[str, str]) -> bool:
        if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
            return False
        is_shell = environ.get("SLURM_JOB_NAME") in ("bash", "interactive", "sh", "zsh")
        return not is_shell or environ.get("SLURM_STEP_NUM_TASKS", "1").strip() != "1"

    def world_size(self) -> int:
        return self._number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")

    def global_rank(self) -> int:
        return self._number("SLURM_PROCID")

    def local_rank(self) -> int:
        return self._number("SLURM_LOCALID")

    def node_rank(self) -> int:
        return self._number("SLURM_NODEID")

    def num_nodes(self) -> int | None:
        return self._optional("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")

    def local_world_size(self) -> int | None:
        """From SLURM_STEP_TASKS_PER_NODE, e.g. "2(x3),1": counts with repetitions, in the order of the machines."""
        text = self._environ.get("SLURM_STEP_TASKS_PER_NODE") or self._environ.get("SLURM_TASKS_PER_NODE")
        if not text:
            return None
        counts: list[int] = []
        for part in text.split(","):
            match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
            if match is None:
                raise ConfigError(
                    f"SLURM_STEP_TASKS_PER_NODE={text!r} is not understood; expected a form such as '2(x3),1'."
                )
            counts.extend([int(match[1])] * int(match[2] or 1))
        return counts[self.node_rank()] if self.node_rank() < len(counts) else None

    def main_address(self) -> str:
        if self._environ.get("MASTER_ADDR"):
            return self._environ["MASTER_ADDR"]
        nodes = self._environ.get("SLURM_STEP_NODELIST") or self._environ.get("SLURM_JOB_NODELIST") or ""
        return first_host(nodes) if nodes else "127.0.0.1"

    def main_port(self) -> int:
        """MASTER_PORT, or one that follows from job and step, so that those on one machine don't meet each other."""
        given = self._optional("MASTER_PORT")
        if given is not None:
            return given
        return 15000 + (self._number("SLURM_JOB_ID", "SLURM_JOBID") + 6007 * self._number("SLURM_STEP_ID")) % 20000

    def job_id(self) -> str | None:
        return f"SLURM step {self._number('SLURM_JOB_ID', 'SLURM_JOBID')}.{self._number('SLURM_STEP_ID')}"


def first_host(nodes: str) -> str:
    """The first machine of a SLURM node list.

    Example:
        >>> first_host("gpu[003-005,7],cpu1")
        'gpu003'
    """
    first = re.match(r"(?:[^\[\],\s]|\[[0-9][0-9,-]*\])+", nodes.strip())
    if first is None or not re.match(r",|$", nodes.strip()[first.end() :]):
        raise ConfigError(
            f"SLURM_JOB_NODELIST={nodes!r} is not understood; set MASTER_ADDR to the first machine's name."
        )
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", first[0])
