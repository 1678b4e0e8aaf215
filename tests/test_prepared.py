"""What is set up: refused before anything is changed, owned by one Lite, given back as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lite import ConfigError, Lite, UsageError
from tests.support.models import MLP
from tests.support.processes import run_distributed


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def step_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_a_refused_setup_changes_nothing() -> None:
    """Whatever is wrong with a later object, the model stays raw and can be set up afterwards."""
    lite = Lite(accelerator="cpu", precision="16-mixed")
    model = MLP()
    optimizer = sgd(model)
    wrong: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((torch.optim.LBFGS(model.parameters()),), ConfigError, "LBFGS"),
        ((optimizer, optimizer), UsageError, "same SGD was passed twice"),
        ((step_scheduler(optimizer),), ConfigError, "StepLR paces a SGD that is not set up"),
        ((optimizer, sgd(MLP())), ConfigError, "4 of 4 parameters"),
        ((optimizer, 3), ConfigError, "setup got 3 among"),
    ]
    for others, error, part in wrong:
        with pytest.raises(error, match=part):
            lite.setup(model, *others)
        assert type(model) is MLP
        assert type(optimizer) is torch.optim.SGD
    loaders = [DataLoader(range(4)), DataLoader(range(4), batch_sampler=[[0]])]
    with pytest.raises(UsageError, match="same DataLoader was passed twice"):
        lite.setup_dataloaders(loaders[0], loaders[0])
    with pytest.raises(ConfigError, match="got a list"):
        lite.setup_dataloaders(loaders[0], [1])
    lite.setup_dataloaders(*loaders)
    lite.setup(model, optimizer, step_scheduler(optimizer))
    assert isinstance(lite.setup(MLP()), MLP)


def share_parameters() -> list[str]:
    lite = Lite(accelerator="cpu")
    said = []
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    lite.setup(net[0])
    frozen = nn.Sequential(net[0], nn.Linear(2, 2))
    for model in (net, frozen):
        try:
            lite.setup(model)
        except UsageError as error:
            said.append(str(error))
    assert type(net) is nn.Sequential
    lite.teardown()
    lite.setup(net)
    tied = nn.Linear(2, 2)
    tied.weight = net[1].weight
    with pytest.raises(UsageError, match="'weight' of this Linear belongs to a Sequential"):
        lite.setup(tied)
    tied.requires_grad_(False)  # nothing to average
    net.requires_grad_(True)
    lite.teardown()
    net[1].requires_grad_(False)
    lite.setup(net)
    lite.setup(nn.Sequential(net[1], nn.Linear(2, 2)))
    return said


def test_a_parameter_is_in_one_model_only() -> None:
    """On two processes two engines would average it at different moments; frozen ones may be shared."""
    for said in run_distributed(share_parameters):
        assert len(said) == 2
        assert all("'0.weight' of this Sequential belongs to a Linear" in text for text in said)


def run_the_cell_again(precision: str) -> list[str]:
    model, loader = MLP(), DataLoader(range(4))
    optimizer = sgd(model)
    results = []
    for _ in range(3):
        lite = Lite(accelerator="cpu", precision=precision)
        lite.setup(model, optimizer)
        lite.setup_dataloaders(loader)
        lite.backward(model(torch.ones(1, 4)).sum())
        optimizer.step()
        results.append(type(model).__mro__[2].__name__ if type(model) is not MLP else "raw")
        with pytest.raises(UsageError, match="set up already"):
            Lite(accelerator="cpu").setup(model)
        del lite
    return results


def test_objects_outlive_the_lite_that_prepared_them() -> None:
    """As when a notebook's cell runs again: a Lite that is gone owns nothing, and nothing is wrapped twice."""
    assert run_the_cell_again("32-true") == ["raw"] * 3
    assert run_the_cell_again("bf16-mixed") == ["Module"] * 3
    assert run_distributed(run_the_cell_again, "32-true") == [["Module"] * 3] * 2


class Steps:
    """A callback that counts."""

    count = 0

    def on_after_optimizer_step(self, strategy: Any, optimizer: torch.optim.Optimizer) -> None:
        self.count += 1


def test_teardown_takes_callbacks_off_the_optimizer() -> None:
    """A step afterwards tells nobody."""
    callback = Steps()
    lite = Lite(accelerator="cpu", callbacks=callback)
    model = MLP()
    optimizer = sgd(model)
    lite.setup(model, optimizer)
    optimizer.step()
    lite.teardown()
    optimizer.step()
    assert callback.count == 1
    assert not optimizer._optimizer_step_post_hooks
