"""`lite.trainer.seed_everything` with Lightning's arguments."""

from __future__ import annotations

import pytest
import torch

from lite.errors import ConfigError
from lite.trainer import seed_everything


def test_seeds_as_scripts_for_lightning_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """workers= and verbose= are known; without a seed the environment's counts, or 0."""
    assert seed_everything(5, workers=True, verbose=False) == 5
    first = torch.rand(2)
    assert seed_everything(5) == 5
    assert torch.equal(torch.rand(2), first)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert seed_everything() == 0
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert seed_everything() == 7
    monkeypatch.setenv("PL_GLOBAL_SEED", "x")
    with pytest.raises(ConfigError, match="PL_GLOBAL_SEED='x'"):
        seed_everything()
    with pytest.raises(ConfigError, match="seed=-1"):
        seed_everything(-1)
