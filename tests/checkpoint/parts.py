"""What the tests of checkpoints share: a small training state, and how to damage files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lite import Lite
from tests.support.models import MLP


class Counter:
    """A Stateful object of the user's."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


class Evil:
    """Would make a file when a pickle is loaded carelessly."""

    def __init__(self, file: Path) -> None:
        self.file = str(file)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.file, "w")


def training(lite: Lite, seed: int = 0) -> dict[str, Any]:
    """A model with optimizer, scheduler and a counter, set up."""
    torch.manual_seed(seed)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lite.setup(model, optimizer, scheduler)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "counter": Counter(), "epoch": 0}


def step(lite: Lite, state: dict[str, Any]) -> None:
    """One step of training."""
    state["optimizer"].zero_grad()
    lite.backward(state["model"](torch.ones(2, 4)).sum())
    state["optimizer"].step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state["scheduler"].step()
    state["counter"].n += 1
    state["epoch"] += 1


def weights(state: dict[str, Any]) -> list[list[float]]:
    """The model's weights as plain numbers, which compare exactly."""
    return [p.flatten().tolist() for p in state["model"].parameters()]


def train_and_save(path: str, async_save: bool = False) -> list[list[float]]:
    """Two steps, a save, and a third step; returns the weights."""
    lite = Lite(accelerator="cpu")
    state = training(lite)
    step(lite, state)
    step(lite, state)
    assert lite.save(path, state, async_save=async_save)
    step(lite, state)
    lite.wait_for_save()
    return weights(state)


def resume(path: str) -> list[list[float]]:
    """Another run: load and do the third step; returns the weights."""
    lite = Lite(accelerator="cpu")
    state = training(lite, seed=1)
    assert lite.load(path, state) == {}
    assert (state["epoch"], state["counter"].n) == (2, 2)
    step(lite, state)
    return weights(state)


def flip(path: Path, at: int) -> None:
    """Turn one bit of the file over."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def equal(a: Any, b: Any) -> bool:
    """Whether two nestings of plain values and tensors are the same, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
