"""One thread, no leftovers of another job's variables, and the same seed for every test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

_FOREIGN = ("LITE_", "SLURM_", "OMPI_", "PMI_", "TORCHELASTIC_")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith(_FOREIGN) or name in _TORCHRUN:
            monkeypatch.delenv(name)
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose processes ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish() -> None:
    from tests.support.processes import close_pools

    close_pools()
