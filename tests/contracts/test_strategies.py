"""Laws that every strategy keeps, by whatever number of processes it is run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lite import DDPStrategy, Lite, Strategy
from tests.parity.test_one_and_two_processes import train_raw
from tests.support.models import MLP, VAE, regression
from tests.support.processes import run_distributed

STRATEGIES: dict[str, tuple[int, Any]] = {
    "single": (1, "single"),
    "ddp on one": (1, "ddp"),
    "ddp": (2, "ddp"),
    "ddp unused": (2, "ddp_find_unused_parameters_true"),
    "ddp view": (2, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    "ddp zero": (2, {"zero_optimizer": True}),
    "ddp zero on one": (1, {"zero_optimizer": True}),
    "ddp static": (2, {"static_graph": True}),
    "ddp on three": (3, "ddp"),
}


def make(strategy: Any) -> Strategy | str:
    return DDPStrategy(**strategy) if isinstance(strategy, dict) else strategy


def train(strategy: Any, batch_size: int) -> tuple[list[torch.Tensor], float]:
    torch.manual_seed(3)
    lite = Lite(accelerator="cpu", precision="64-true", strategy=make(strategy))
    loader = lite.setup_dataloaders(DataLoader(regression(13, torch.float64), batch_size=batch_size))
    model = MLP(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    lite.setup(model, optimizer, scheduler)
    norm = torch.zeros(())
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            lite.backward((model(x) - y).pow(2).mean())
            norm = lite.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            scheduler.step()
    weights = [p.detach().clone() for p in model.parameters()]
    lite.teardown()
    assert type(model) is MLP
    # Nothing is left on the parameters: a raw backward stays local.
    model.zero_grad()
    (model(torch.ones(1, 4, dtype=torch.float64)).sum() * (1 + lite.global_rank)).backward()
    local = model.body[2].bias.grad
    assert local is not None
    assert local.tolist() == [1.0 + lite.global_rank] * 3
    return weights, norm.item()


@pytest.mark.parametrize("name", STRATEGIES)
def test_numbers_are_those_of_one_process_with_the_global_batch(name: str) -> None:
    """Clipping, scheduler and a ragged batch included, to 1e-12 in float64; teardown leaves no hook."""
    world_size, strategy = STRATEGIES[name]
    results = (
        [train(strategy, 6)]
        if world_size == 1
        else run_distributed(train, strategy, 6 // world_size, world_size=world_size)
    )
    _, expected = train_raw(6, 13, torch.float64, False, 0.1)
    for weights, norm in results:
        for mine, wanted in zip(weights, expected.values(), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-12)
        assert norm == results[0][1]


def gan_step() -> list[float]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    maker, critic = nn.Linear(2, 4), nn.Linear(4, 1)
    lite.setup(maker, maker_optimizer := torch.optim.SGD(maker.parameters(), lr=0.1))
    lite.setup(critic, critic_optimizer := torch.optim.SGD(critic.parameters(), lr=0.1))
    for step in range(3):
        noise = torch.full((2, 2), float(step + lite.global_rank))
        critic_optimizer.zero_grad()
        lite.backward(critic(maker(noise).detach()).mean() - critic(noise.repeat(1, 2)).mean())
        critic_optimizer.step()
        maker_optimizer.zero_grad()
        lite.backward(-critic(maker(noise)).mean())
        maker_optimizer.step()
    return [p.sum().item() for m in (maker, critic) for p in m.parameters()]


def test_two_models_and_two_optimizers_stay_in_step() -> None:
    """A GAN's pattern: two forwards before one backward, a backward through both models."""
    first, second = run_distributed(gan_step)
    assert first == second


def saved_outputs() -> list[float]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    model = VAE()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for episode in range(2):
        outputs = [model(torch.full((1, 4), float(step + lite.global_rank + episode))) for step in range(3)]
        model.saved_actions.extend([1, 2, 3])
        optimizer.zero_grad()
        lite.backward(torch.stack(outputs).pow(2).mean())
        optimizer.step()
        del model.saved_actions[:]
    return [p.sum().item() for p in model.parameters()]


def test_many_forwards_before_one_backward_stay_in_step() -> None:
    """A policy-gradient episode."""
    first, second = run_distributed(saved_outputs)
    assert first == second


def unweighed() -> list[str]:
    lite = Lite(accelerator="cpu")
    model = MLP()
    model, _ = lite.setup(model, torch.optim.SGD(model.parameters()))
    caught = []
    for forget in ("raw backward", "two loaders", "two loaders, turned", "right"):
        sizes = (6, 5) if "turned" in forget else (5, 6)
        first, second = (lite.setup_dataloaders(DataLoader(regression(n), batch_size=2)) for n in sizes)
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            for (x, y), _ in zip(first, second, strict=True) if "two" in forget else ((b, 0) for b in first):
                loss = (model(x) - y).pow(2).mean()
                loss.backward() if forget == "raw backward" else lite.backward(loss)
        caught.append(" ".join(str(m.message) for m in messages))
    return caught


def test_a_weight_that_is_not_used_is_told() -> None:
    """loss.backward() on a ragged batch, or a second loader in the same step; silent where all is right."""
    for raw_backward, two_loaders, turned, right in run_distributed(unweighed):
        assert "without its weight" in raw_backward
        assert "without its weight" in two_loaders
        assert "goes to the loss of both" in turned
        assert right == ""


@pytest.mark.gpu
def test_ddp_on_a_gpu() -> None:
    """One process on one GPU behaves as single does."""
    lite = Lite(accelerator="cuda", strategy="ddp", devices=1)
    model = lite.setup(MLP())
    lite.backward(model(torch.ones(2, 4, device=lite.device)).sum())
    assert all(p.grad is not None for p in model.parameters())
