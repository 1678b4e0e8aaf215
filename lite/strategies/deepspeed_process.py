"""DeepSpeed in this process: which one there is, the device that it computes on, the process group that it knows."""

from __future__ import annotations

import os
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from lite.errors import ConfigError, MissingExtraError

_OLDEST = (0, 19)  # as in setup.cfg
_seen: list[Any] = []  # the process group that DeepSpeed knows


def check_installed() -> None:
    """Refuse to go on without DeepSpeed, or with one whose inner parts are not those that are used here.

    Raises:
        MissingExtraError: It is not installed, or older.
    """
    if find_spec("deepspeed") is None:
        raise MissingExtraError("DeepSpeedStrategy needs deepspeed; pip install lite[deepspeed].")
    try:
        found = version("deepspeed")
    except PackageNotFoundError:  # a checkout on the path, which says nothing
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    if numbers < _OLDEST:
        raise MissingExtraError(
            f"deepspeed {found} is installed, and DeepSpeedStrategy needs {'.'.join(map(str, _OLDEST))} or later; "
            "pip install --upgrade lite[deepspeed]."
        )


def bring_in(device: torch.device) -> None:
    """Import DeepSpeed, let it find the process group that there is, and refuse another device than this one.

    Raises:
        ConfigError: DeepSpeed has chosen another kind of device.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        theirs = get_accelerator().device_name()
        if theirs != device.type:
            raise ConfigError(
                f"DeepSpeed computes on {theirs!r} on this machine, and this Lite on {device.type!r}; set the "
                f"environment variable DS_ACCELERATOR={device.type} before the script starts."
            )
        if "LOCAL_RANK" not in os.environ:
            raise ConfigError(
                "DeepSpeed reads LOCAL_RANK from the environment, which is not set here; start the script with "
                "torchrun, or export LOCAL_RANK on each process."
            )
        if _seen and _seen[0] is not dist.group.WORLD:  # it was destroyed by somebody else
            _forget_group()
        _seen[:] = [dist.group.WORLD]
        deepspeed.init_distributed(dist_init_required=False, auto_mpi_discovery=False)

    # torch 2.13 renames what deepspeed 0.19.8 still calls, at each step.
    renamed = r".torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)


def let_go() -> None:
    """Let DeepSpeed forget its process group, where that has ended: the next one is another."""
    if _seen and not dist.is_initialized():
        _forget_group()


def _forget_group() -> None:
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references()  # deepspeed 0.19.8: its own destroy_process_group calls it
    comm.cdb = None
    _seen.clear()
