"""Loaders are looked at here, not trained on: as in evaluation, no gradient is recorded."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    # Workers are forked from this process: what other tests have left here, threads' objects among it, must not be
    # collected there.
    gc.collect()
    with torch.no_grad():
        yield
