"""Gradients that are sent smaller: still the mean, up to what the smaller form leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite import ConfigError, DDPStrategy, Lite, PowerSGD
from tests.support.models import MLP
from tests.support.processes import run_distributed


def compressed(hook: Any) -> tuple[list[Tensor], list[Tensor]]:
    lite = Lite(accelerator="cpu", strategy=DDPStrategy(comm_hook=hook))
    torch.manual_seed(0)
    model = lite.setup(MLP())
    lite.backward(model(torch.full((2, 4), 1.0 + lite.global_rank)).pow(2).sum())
    mine = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(0)
    raw = MLP()
    (sum(raw(torch.full((2, 4), 1.0 + r)).pow(2).sum() for r in range(2)) / 2).backward()
    return mine, [p.grad for p in raw.parameters()]


@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_compressed_gradients_are_the_mean(hook: str) -> None:
    """Up to 16 bits' rounding: bfloat16 has 8 significant bits, so 2 ** -7 relative."""
    for mine, wanted in run_distributed(compressed, hook):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * b.abs().max().item())


def low_rank(hook: Any, rank_of_gradient: int, steps: int) -> list[Any]:
    """Errors against the mean, per step, for a 16 x 12 weight whose mean gradient has the given rank."""
    lite = Lite(accelerator="cpu", precision="64-true", strategy=DDPStrategy(comm_hook=hook))
    torch.manual_seed(0)
    model = lite.setup(nn.Linear(16, 12, bias=False, dtype=torch.float64))
    errors, owed, sums = [], torch.zeros(12, 16, dtype=torch.float64), torch.zeros(12, 16, dtype=torch.float64)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, g = (torch.randn(2, rank_of_gradient, n, generator=generator, dtype=torch.float64) for n in (16, 12))
        r = lite.global_rank
        model.zero_grad()
        lite.backward((model(x[r]) * g[r]).sum())
        mean = sum(g[i].T @ x[i] for i in range(2)) / 2
        assert model.weight.grad is not None
        errors.append((model.weight.grad - mean).norm().item() / mean.norm().item())
        owed, sums = owed + mean, sums + model.weight.grad
    return [errors, (owed - sums).norm().item() / owed.norm().item(), model.weight.grad.tolist()]


def test_powersgd_sends_the_mean_of_low_rank_gradients() -> None:
    """Whole until start_step; exact where the mean's rank (2 + 2 at most) fits; else near, and equal on all ranks."""
    for options in ({"rank": 4, "start_step": 2}, PowerSGD(rank=4, start_step=2)):
        results = run_distributed(low_rank, options, 2, 5)
        assert results[0][2] == results[1][2]
        # One power iteration finds the whole range of a matrix of its rank: up to float64's rounding and torch's
        # orthogonalisation epsilon. 1e-6 leaves room for a badly conditioned draw.
        assert all(error < 1e-6 for error in results[0][0]), results[0][0]
    (errors, owed, grad), other = run_distributed(low_rank, PowerSGD(rank=1, start_step=3), 8, 40)
    assert grad == other[2]
    # Whole gradients are the mean up to rounding; rank 1 of rank 12 is not.
    assert all(error < 1e-12 for error in errors[:3])
    assert all(error > 0.05 for error in errors[3:])
    (plain_errors, plain_owed, _), _ = run_distributed(low_rank, PowerSGD(1, 3, error_feedback=False), 8, 40)
    assert len(plain_errors) == 40
    assert owed < plain_owed  # error feedback pays back what was left out


def test_wrong_hooks_are_refused() -> None:
    """Names and options, with what there is."""
    for hook, words in (
        ("power", "'fp16', 'bf16', 'powersgd'"),
        ({"rnk": 2}, "rank"),
        (PowerSGD, "PowerSGD"),
        ({"start_step": 1}, "start_step=1"),
        ({"rank": 0}, "rank=0"),
        ({"min_compression_rate": 0}, "min_compression_rate=0"),
    ):
        with pytest.raises(ConfigError, match=words):
            DDPStrategy(comm_hook=hook)
