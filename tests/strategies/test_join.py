"""Ranks that run out of batches at different steps, and still end with one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lite import ConfigError, DDPStrategy, Lite, UsageError
from tests.support.models import MLP
from tests.support.processes import run_distributed

BATCHES = (2, 5)  # of rank 0 and of rank 1


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def uneven(initial: bool) -> Any:
    lite = Lite(accelerator="cpu", precision="64-true", strategy="ddp")
    torch.manual_seed(0)
    model = nn.Sequential(MLP(torch.float64), nn.BatchNorm1d(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    lite.setup(model, optimizer)
    with lite.join(model, divide_by_initial_world_size=initial):
        for step in range(BATCHES[lite.global_rank]):
            optimizer.zero_grad()
            x = batch(lite.global_rank, step)
            lite.backward((model(x) - x[:, :3]).pow(2).mean())
            optimizer.step()
    lite.check_sync(buffers=True)
    return [p.detach().tolist() for p in model.parameters()]


def single(initial: bool) -> Any:
    """The same in one process: sums over those that still have batches."""
    torch.manual_seed(0)
    model = nn.Sequential(MLP(torch.float64), nn.BatchNorm1d(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(max(BATCHES)):
        optimizer.zero_grad()
        ranks = [rank for rank in range(2) if step < BATCHES[rank]]
        for rank in ranks:
            loss = (model(batch(rank, step)) - batch(rank, step)[:, :3]).pow(2).mean()
            (loss / (2 if initial else len(ranks))).backward()
        optimizer.step()
    return [p.detach().tolist() for p in model.parameters()]


@pytest.mark.parametrize("initial", [True, False])
def test_gradients_are_means_over_the_ranks_that_train(initial: bool) -> None:
    """Of all ranks, with zeros for those that are done, or of those that still train; AdamW, float64, 1e-12."""
    first, second = run_distributed(uneven, initial)
    assert first == second
    for mine, wanted in zip(first, single(initial), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(wanted), rtol=0, atol=1e-12)


def early() -> list[str]:
    messages = []
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    try:
        with lite.join(model, throw_on_early_termination=True):
            for _ in range(BATCHES[lite.global_rank]):
                lite.backward(model(torch.ones(1, 4)).sum())
    except RuntimeError as error:
        messages.append(str(error))
    for models, kind in (((), ConfigError), ((MLP(),), UsageError)):
        with pytest.raises(kind) as caught:
            lite.join(*models)
        messages.append(str(caught.value))
    lite = Lite(accelerator="cpu", strategy=DDPStrategy(zero_optimizer=True))
    model = lite.setup(MLP())
    with pytest.raises(UsageError) as caught:
        lite.join(model)
    messages.append(str(caught.value))
    return messages


def test_the_first_end_can_end_all() -> None:
    """throw_on_early_termination raises on every rank; a foreign model or ZeRO is refused; one process needs none."""
    for ended, none, foreign, zero in run_distributed(early):
        assert "exhausted" in ended
        assert "join()" in none
        assert "MLP" in foreign
        assert "zero_optimizer" in zero
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    with lite.join(model):
        lite.backward(model(torch.ones(1, 4)).sum())
