"""Saving and loading one file: plain, whole, and readable without lite."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from lite import CheckpointError, Lite
from tests.support.models import MLP
from tests.support.processes import run_distributed


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Config:
    lr: float
    where: Path


class Counter:
    """A Stateful object of the user's."""

    def __init__(self) -> None:
        self.n = 0

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n = state["n"]


def train_and_save(path: str) -> list[float]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lite.setup(model, optimizer, scheduler)
    counter = Counter()
    for _ in range(2):
        optimizer.zero_grad()
        lite.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        scheduler.step()
        counter.n += 1
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "counter": counter, "epoch": 3}
    lite.save(path, state)
    optimizer.zero_grad()
    lite.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return [p.sum().item() for p in model.parameters()]


def resume(path: str) -> list[float]:
    lite = Lite(accelerator="cpu")
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    lite.setup(model, optimizer, scheduler)
    counter = Counter()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "counter": counter, "epoch": 0}
    assert lite.load(path, state) == {}
    assert (state["epoch"], counter.n) == (3, 2)
    optimizer.zero_grad()
    lite.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    return [p.sum().item() for p in model.parameters()]


def test_what_two_processes_save_one_continues_and_back(tmp_path: Path) -> None:
    """The next step is the same, whoever takes it; the raw model loads its part with plain torch."""
    both, one = str(tmp_path / "two.ckpt"), str(tmp_path / "one.ckpt")
    expected = run_distributed(train_and_save, both)[0]
    assert resume(both) == expected
    assert train_and_save(one) == expected
    assert run_distributed(resume, one) == [expected, expected]
    content = torch.load(both, weights_only=True)
    MLP().load_state_dict(content["model"])


def test_everything_plain_is_stored_as_plain_values(tmp_path: Path) -> None:
    """numpy scalars and arrays, paths, enums, dataclasses: `weights_only=True` reads the file."""
    lite = Lite(accelerator="cpu")
    state = {
        "a": np.float64(1.5),
        "b": np.arange(3),
        "c": Path("x"),
        "d": Colour.RED,
        "e": Config(0.1, Path("y")),
        "f": {1, 2},
    }
    lite.save(tmp_path / "a.ckpt", state)
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["b"].tolist() == [0, 1, 2]
    del content["b"]
    assert content == {"a": 1.5, "c": "x", "d": "red", "e": {"lr": 0.1, "where": "y"}, "f": {1, 2}}


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full in the middle of writing."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    lite.save(path, {"n": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        lite.save(path, {"n": 2})
    monkeypatch.undo()
    assert lite.load(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


class Evil:
    """Would run code when a pickle is loaded carelessly."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("evil"),)  # type: ignore[return-value]


def test_damaged_or_malicious_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated, a pickle that would run code, a folder; the file is named and nothing runs."""
    monkeypatch.chdir(tmp_path)
    lite = Lite(accelerator="cpu")
    lite.save("whole.ckpt", {"m": MLP()})
    Path("cut.ckpt").write_bytes(Path("whole.ckpt").read_bytes()[:300])
    torch.save({"e": Evil()}, "evil.ckpt")
    for name in ("cut.ckpt", "evil.ckpt", "."):
        with pytest.raises(CheckpointError, match=name):
            lite.load(name)
    assert not Path("evil").exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    """A missing name, wrong keys, a filter, the rest that nobody asked for."""
    lite = Lite(accelerator="cpu")
    path = tmp_path / "a.ckpt"
    lite.save(path, {"model": MLP(), "epoch": 3}, filter={"model": lambda key, value: "body.0" in key})
    with pytest.raises(CheckpointError, match=r"'optimizer'.*'model', 'epoch'"):
        lite.load(path, {"optimizer": 0})
    with pytest.raises(CheckpointError, match=r"body\.2\.weight"):
        lite.load(path, {"model": MLP()})
    with pytest.warns(UserWarning, match="body.2.weight"):
        assert lite.load(path, {"model": MLP(), "other": 1}, strict=False) == {"epoch": 3}
