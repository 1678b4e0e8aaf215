"""The Lite object's own part: explaining, callbacks, creating in place, devices and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lite import Lite
from tests.support.models import MLP
from tests.support.processes import run_distributed


def test_explain_says_where_each_setting_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, environment or default, before anything is started."""
    monkeypatch.setenv("LITE_PRECISION", "bf16")
    text = Lite(accelerator="cpu", devices=2).explain()
    for part in ("argument: 'cpu'", "argument: 2", "from LITE_PRECISION: 'bf16'", "default: 'auto'", "to be started"):
        assert part in text, text


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


def explained() -> str:
    lite = Lite(accelerator="cpu")
    lite.setup_dataloaders(DataLoader(range(11), batch_size=2), DataLoader(range(11), batch_size=2, drop_last=True))
    lite.setup_dataloaders(DataLoader(range(11), batch_size=2), use_distributed_sampler="interleaved")
    lite.setup_dataloaders(DataLoader(range(12), batch_size=2), use_distributed_sampler=False)
    own = DistributedSampler(range(11), 2, lite.global_rank, drop_last=True)
    lite.setup_dataloaders(DataLoader(range(11), batch_size=2, sampler=own))
    lite.setup_dataloaders(DataLoader(Stream(), batch_size=2), shard="stride")
    lite.setup_dataloaders(DataLoader(Stream(), batch_size=2))
    lite.setup(MLP())
    lite.setup(MLP().requires_grad_(False))
    return lite.explain()


def test_explain_says_what_was_done() -> None:
    """Global batch, steps, what happens to the last samples, what was wrapped and why."""
    for text in run_distributed(explained):
        for part in (
            "started by torchrun",
            "global batch 4 (2 on each of 2 ranks); 3 steps per epoch, the last 3 samples split evenly",
            "2 steps per epoch, the last 3 samples dropped",
            "in torch's DistributedSampler order over 2 ranks; 3 steps per epoch, 1 samples repeated",
            "not split, each of 2 ranks has all of it; 6 steps per epoch",
            "by its own DistributedSampler over 2 ranks; 3 steps per epoch, 1 samples dropped",
            "each global batch of its one stream is split over 2 ranks; length unknown",
            "split by nobody but the dataset itself, on 2 ranks",
            "MLP: DistributedDataParallel",
            "MLP: the module itself: it has no parameter to train",
        ):
            assert part in text, text


class Recorder:
    """A callback with some of the hooks."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.not_callable = 3

    def on_after_setup(self, lite: Lite, model: nn.Module) -> None:
        self.seen.append(("setup", type(model).__name__))

    def on_after_optimizer_step(self, strategy: Any, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append("step")

    def on_custom(self, value: int, *, more: int) -> None:
        self.seen.append((value, more))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_callbacks_are_called(precision: str) -> None:
    """The user's own hooks, setup, and each step that was really taken."""
    recorder = Recorder()
    lite = Lite(accelerator="cpu", precision=precision, callbacks=[recorder, object()])
    model = MLP()
    lite.setup(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(torch.ones(1, 4)).mean() * 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    lite.backward(model(torch.ones(1, 4)).mean() * (float("inf") if precision == "16-mixed" else 1.0))
    optimizer.step()
    lite.call("on_custom", 1, more=2)
    lite.call("on_nothing")
    steps = ["step"] if precision == "16-mixed" else ["step", "step"]  # the scaled one with inf gradients was skipped
    assert recorder.seen == [("setup", "MLP"), *steps, (1, 2)]
    with pytest.raises(ValueError, match="not callable"):
        lite.call("not_callable")


def test_modules_are_created_in_place() -> None:
    """On the device and in the dtype of the precision; the default dtype comes back after an error too."""
    lite = Lite(accelerator="cpu", precision="bf16-true")
    with lite.init_module():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    with pytest.raises(ZeroDivisionError), lite.init_module():
        1 / 0  # noqa: B018
    assert torch.get_default_dtype() == torch.float32


def test_settings_that_are_ignored_are_warned_about() -> None:
    """LightningLite's workers=False can't be had."""
    with pytest.warns(UserWarning, match="workers=False"):
        assert Lite.seed_everything(3, workers=False) == 3
    assert Lite.seed_everything(4) == 4


def who() -> tuple[Any, ...]:
    lite = Lite(accelerator="cpu")
    lite.print("printed on rank", lite.global_rank)
    return lite.global_rank, lite.local_rank, lite.node_rank, lite.world_size, lite.is_global_zero, str(lite.device)


def test_ranks_and_device() -> None:
    """Each process knows itself."""
    assert run_distributed(who) == [(0, 0, 0, 2, True, "cpu"), (1, 1, 0, 2, False, "cpu")]


def test_lite_in_a_subclass_runs() -> None:
    """run() is called here on one process, with arguments and its own super()."""

    class Base(Lite):
        def run(self, value: int) -> int:
            return value + self.world_size

    class Derived(Base):
        def run(self, value: int) -> int:
            return super().run(value) * 10

    assert Derived(accelerator="cpu").run(1) == 20
