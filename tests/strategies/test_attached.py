"""Hooks on parameters, and gradients that they have before `setup`, under the strategies that exchange parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lite import Lite
from lite.sharded import whole
from tests.contracts.test_numbers import STRATEGIES
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

DIVIDED = ["fsdp", "fsdp grad", "tp", "ddp x tp", "fsdp x tp"]


def train(strategy: str, early: bool) -> dict[str, Any]:
    """Two steps with a hook that halves the head's gradient and one that counts, registered before or after `setup`;
    before it the model has the gradient of one batch."""
    lite = Lite(accelerator="cpu", strategy=STRATEGIES[strategy][2](), precision="64-true")
    torch.manual_seed(3)
    model = TinyGPT(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = sentences(24)[:][0].view(3, 8, -1)
    next_token_loss(model(batches[2][:, :-1]), batches[2]).backward()
    counted: list[str] = []

    def halve(gradient: Tensor) -> Tensor:
        return gradient * 0.5

    def register() -> list[Any]:
        weight = model.head.weight
        return [weight.register_hook(halve), weight.register_post_accumulate_grad_hook(lambda p: counted.append("."))]

    handles = register() if early else []
    model, optimizer = lite.setup(model, optimizer)
    handles = handles or register()
    shards, shard = lite.strategy.data_shards(lite.world_size, lite.global_rank) if lite.world_size > 1 else (1, 0)
    for number, batch in enumerate(batches[:2]):
        mine = batch.view(shards, -1, batch.shape[1])[shard]
        lite.backward(next_token_loss(model(mine[:, :-1]), mine))
        if number == 0:
            optimizer.step()
            optimizer.zero_grad()
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    for handle in handles:
        handle.remove()
    lite.teardown()
    kept = model.head.weight._backward_hooks
    return {**model.state_dict(), **{f"{k}.grad": g for k, g in gradients.items()}, "calls": len(counted), "left": kept}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("strategy", DIVIDED)
def test_gradients_before_setup_count_and_hooks_run(strategy: str, early: bool) -> None:
    wanted = train("single", early)
    for got in run_distributed(train, strategy, early, world_size=STRATEGIES[strategy][0]):
        assert (got.pop("calls"), wanted["calls"]) == (2, 2)
        assert not got.pop("left")
        for name, value in got.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-10, msg=name)


def different_gradients() -> tuple[float, bool]:
    """Ranks that had computed gradients by themselves, rank 1 of a part of the model alone."""
    lite = Lite(accelerator="cpu", strategy="fsdp", precision="64-true")
    model = TinyGPT(torch.float64)
    for name, parameter in model.named_parameters():
        if lite.global_rank == 0 or name == "head.weight":
            parameter.grad = torch.full_like(parameter, 1.0 + lite.global_rank)
    model = lite.setup(model)
    return float(whole(model.head.weight.grad).mean()), bool((whole(model.norm.weight.grad) == 0.5).all())


def test_gradients_before_setup_become_the_ranks_mean() -> None:
    assert run_distributed(different_gradients) == [(1.5, True)] * 2


def seen_by_hooks(strategy: str) -> dict[str, list[Any]]:
    """Dtypes and classes of what hooks on the head's weight get in a window of two backwards, in a mixed precision."""
    lite = Lite(accelerator="cpu", strategy=STRATEGIES[strategy][2](), precision="bf16-mixed")
    torch.manual_seed(3)
    model = lite.setup(TinyGPT())
    seen: dict[str, list[Any]] = {"hook": [], "post": []}
    weight = model.head.weight
    weight.register_hook(lambda gradient: seen["hook"].append((gradient.dtype, type(gradient).__name__)))
    weight.register_post_accumulate_grad_hook(lambda p: seen["post"].append((p.grad.dtype, type(p.grad).__name__)))
    batch, window = sentences(4)[:][0], lite.accumulate(model, steps=2)
    for _ in range(2):
        with window():
            lite.backward(next_token_loss(model(batch[:, :-1]), batch))
    return seen


@pytest.mark.parametrize("strategy", ["single", *DIVIDED])
def test_hooks_see_what_is_documented(strategy: str) -> None:
    """Between groups with different data each rank's own gradient in 16 bits, and the mean once per window."""
    size = STRATEGIES[strategy][0]
    kind = "Tensor" if strategy == "single" else "DTensor"
    for seen in run_distributed(seen_by_hooks, strategy, world_size=size) if size > 1 else [seen_by_hooks(strategy)]:
        if strategy in ("single", "tp"):
            assert seen == {"hook": [(torch.float32, kind)] * 2, "post": [(torch.float32, kind)] * 2}
        else:
            own = "DTensor" if "tp" in strategy else "Tensor"
            assert seen == {"hook": [(torch.bfloat16, own)] * 2, "post": [(torch.float32, kind)]}
