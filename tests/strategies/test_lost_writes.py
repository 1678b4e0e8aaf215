"""What is changed in sharded weights reaches every rank's part, or is refused by the parameter's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lite import FSDPStrategy, Lite, ModelParallelStrategy, UsageError
from tests.support.processes import run_distributed


class Contrast(nn.Module):
    """A query and a key encoder, which follows it by a moving average: https://arxiv.org/abs/1911.05722."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))  # 3: a part is padded
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    @torch.no_grad()
    def follow(self, how: str) -> None:
        for a, b in zip(self.query.parameters(), self.key.parameters(), strict=True):
            if how == "in place":
                b.mul_(0.9).add_(a, alpha=0.1)
            else:
                b.data = b.data * 0.9 + a.data * 0.1

    def forward(self, x: Tensor, how: str = "") -> Tensor:
        query = self.query(x)
        with torch.no_grad():
            if how:
                self.follow(how)
            key = self.key(x + 0.1)
        return (query - key).pow(2).sum(-1).mean()


def train(where: str, how: str, strategy: Any = None) -> Any:
    """The weights after three steps, or what was raised."""
    torch.manual_seed(3)
    lite = Lite(accelerator="cpu", strategy=strategy or "fsdp", precision="64-true")
    model = lite.setup(Contrast().double())
    optimizer = lite.setup_optimizers(torch.optim.SGD(model.query.parameters(), lr=0.1))
    try:
        for _ in range(3):
            optimizer.zero_grad()
            lite.backward(model(torch.ones(2, 4, dtype=torch.float64), how if where == "forward" else ""))
            optimizer.step()
            if where == "method":
                model.follow(how)
            if where == "loop":
                Contrast.follow(model, how)
    except UsageError as error:
        return str(error)
    finally:
        lite.teardown()
    return [p.tolist() for p in model.parameters()]


def everywhere() -> dict[str, Any]:
    blocks = FSDPStrategy(auto_wrap={nn.Linear})
    plan = {"*.0": ColwiseParallel(), "*.2": RowwiseParallel()}  # the copies are DTensors, too
    replicas = ModelParallelStrategy(plan, tensor_parallel=1, sharded=False)
    facts = {f"{how} in the {where}": train(where, how) for where in ("forward", "method", "loop") for how in HOW}
    facts["data in the forward of blocks"] = train("forward", "data", blocks)
    facts["in place in the forward of replicas"] = train("forward", "in place", replicas)
    return facts


HOW = ("in place", "data")


def test_a_moving_average_of_weights_works_on_the_parts_and_is_refused_elsewhere() -> None:
    """By operations in place in the loop, and in methods without tensors; else the error names parameter and remedy."""
    expected = train("method", "in place", "auto")
    for facts in run_distributed(everywhere):
        for where in ("method", "loop"):
            for mine, one in zip(facts.pop(f"in place in the {where}"), expected, strict=True):
                torch.testing.assert_close(torch.tensor(mine), torch.tensor(one), rtol=0, atol=1e-12)
        for where, text in facts.items():
            assert "Contrast's parameter 'key.0.weight' was" in text, where
            assert "b.lerp_(a, 1 - momentum)" in text
            together = where.endswith(("forward", "replicas"))  # blocks' weights are parts until they run
            told = "put it together" if together else "which leaves a sharded parameter as it was"
            assert told in text, where


def conversions() -> list[Any]:
    """What exchanges a parameter's tensors by torch's own ways is no lost write."""
    lite = Lite(accelerator="cpu", strategy="fsdp")
    model, x = lite.setup(Contrast()), torch.ones(2, 4)
    found = []
    for change in (model.cpu, model.float, lambda: model.load_state_dict(model.state_dict())):
        model(x)
        model._apply(torch.clone)  # new tensors in all parameters, as by a conversion
        change()
        found.append(model(x).item())
    lite.teardown()
    return found


def test_converted_and_loaded_weights_are_no_lost_writes() -> None:
    """The model computes what it did."""
    for found in run_distributed(conversions):
        assert found == pytest.approx([found[0]] * 3, abs=0)
