"""Ranks that have drifted apart are found, down to one bit, and nothing is changed by looking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lite import DesyncError, Lite, UsageError
from lite.guards.sync import explain, hash_tensor
from tests.support.models import MLP
from tests.support.processes import run_distributed

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (64, 33)])
def test_every_bit_counts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Any single flipped bit of any byte changes the hash; equal bits give equal hashes."""
    value = torch.randn(shape).to(dtype) if dtype != torch.complex64 else torch.randn(shape, dtype=dtype)
    before = hash_tensor(value).item()
    assert hash_tensor(value.clone()).item() == before
    octets = value.reshape(-1).view(torch.uint8) if dtype != torch.bool else None
    if octets is None:
        assert hash_tensor(~value).item() != before
        return
    for position in {0, len(octets) // 2, len(octets) - 1}:
        for bit in range(8):
            octets[position] ^= 1 << bit
            assert hash_tensor(value).item() != before
            octets[position] ^= 1 << bit
    assert hash_tensor(value).item() == before


def test_equal_values_hash_alike_however_they_lie() -> None:
    """NaNs equal themselves, strides and offsets don't count, zero and minus zero differ, order counts, chunks too."""
    value = torch.tensor([float("nan"), 1.0, 0.0])
    assert hash_tensor(value).item() == hash_tensor(value.clone()).item()
    assert hash_tensor(torch.tensor([0.0])).item() != hash_tensor(torch.tensor([-0.0])).item()
    assert hash_tensor(torch.tensor([1.0, 2.0])).item() != hash_tensor(torch.tensor([2.0, 1.0])).item()
    image = torch.randn(2, 3, 4, 5)
    assert hash_tensor(image.contiguous(memory_format=torch.channels_last)).item() == hash_tensor(image).item()
    assert hash_tensor(torch.arange(9.0)[1:]).item() == hash_tensor(torch.arange(1.0, 9.0)).item()
    assert hash_tensor(torch.ones(1, 2)[:, 0]).item() == hash_tensor(torch.ones(1)).item()
    long = torch.randn(2**20 + 3, dtype=torch.float64)
    before = hash_tensor(long).item()
    long[2**18 :] = long[2**18 :].roll(2**18)
    assert hash_tensor(long).item() != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_flipped_signs_do_not_cancel(dtype: torch.dtype) -> None:
    """Two, all, or one in each of two tensors."""
    value = torch.randn(16).to(dtype)
    before = hash_tensor(value).item()
    for signs in ([1, 3], [0, 2], [4, 5, 6, 7], list(range(16))):
        other = value.clone()
        other[signs] *= -1
        assert hash_tensor(other).item() != before
    pair = [hash_tensor(v) for v in (value, value + 1)]
    flipped = []
    for v in (value, value + 1):
        v = v.clone()
        v[-1] *= -1
        flipped.append(hash_tensor(v))
    assert hash_tensor(torch.stack(pair)).item() != hash_tensor(torch.stack(flipped)).item()


class Normed(nn.Module):
    """A model with buffers that differ between forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def drift(what: str) -> list[str]:
    """What check_sync says after two good steps, and after one value on rank 1 was changed."""
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    model = Normed() if what in ("buffer", "statistics") else MLP()
    lite.setup(model, optimizer := torch.optim.AdamW(model.parameters(), lr=0.1))
    said = []
    for step in range(2):
        lite.backward(model(torch.randn(3, 4) + (lite.global_rank if what != "buffer" else 0)).pow(2).mean())
        optimizer.step()
        said.append(verdict(lite, what))
        if step == 1 and lite.global_rank == 1:
            spoil(what, model, optimizer)
    return [*said, verdict(lite, what)]


def spoil(what: str, model: Any, optimizer: torch.optim.Optimizer) -> None:
    if what == "parameter":
        model.body[2].weight.data.view(torch.int32)[1, 2] ^= 1
    elif what == "buffer":
        model.body[1].running_var[3] += 1e-6
    elif what == "state":
        optimizer.state[model.body[2].bias]["exp_avg"][0] += 1e-6
    elif what == "setting":
        optimizer.param_groups[0]["lr"] = 0.2
    elif what == "missing":
        del optimizer.state[model.body[0].bias]


def verdict(lite: Lite, what: str) -> str:
    try:
        lite.check_sync(buffers=True if what == "buffer" else None)
    except DesyncError as error:
        return str(error)
    return "in step"


FIRST = {
    "nothing": None,
    "statistics": None,  # DDP takes them from rank 0 at the next forward
    "parameter": "model.body.2.weight float32 [3, 8] on rank 1 differs from rank 0; 1 of ",
    "buffer": "model.body.1.running_var float32 [4] on rank 1 differs from rank 0; 1 of ",
    "state": "optimizer[0].state.3.exp_avg float32 [3] on rank 1 differs from rank 0; 1 of ",
    "setting": "optimizer[0].param_groups.0.lr on rank 1 differs from rank 0; 1 of ",
    "missing": "optimizer[0].state.1.step float32 [] on rank 1 differs from rank 0 (rank 1 has no such value); 3 of ",
}


@pytest.mark.parametrize("what", FIRST)
def test_the_first_value_that_differs_is_named(what: str) -> None:
    """On all ranks alike, with the rank; good steps are in step, statistics of a BatchNorm included."""
    first = FIRST[what]
    for said in run_distributed(drift, what):
        assert said[:2] == ["in step"] * 2
        assert said[2].startswith(f"ranks are out of step: {first}") if first else said[2] == "in step"


def test_the_minority_is_named() -> None:
    """Rank 0 is no better than others; of two halves it is the reference."""
    said = explain([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 3}])
    assert said == "ranks are out of step: b on rank 0 differs from ranks 1, 2; 1 of 2 values differ."
    assert "a on rank 1 differs from rank 0" in explain([{"a": 1}, {"a": 2}])


def untouched() -> bool:
    lite = Lite(accelerator="cpu")
    model = MLP()
    lite.setup(model, optimizer := torch.optim.Adam(model.parameters()))
    lite.check_sync()
    empty = len(optimizer.state) == 0
    for _ in range(2):
        lite.check_sync(every=3)  # no collective: rank 1 leaves these two out
        if lite.global_rank == 1:
            lite._sync_calls[3] = 0
            break
    lite.barrier()
    return empty


def test_looking_changes_nothing() -> None:
    """An optimizer that has not stepped stays empty; calls in between cost no collective."""
    assert run_distributed(untouched) == [True, True]


def test_there_must_be_something_to_compare() -> None:
    """Also on one process, where a check passes by itself."""
    lite = Lite(accelerator="cpu")
    with pytest.raises(UsageError, match=r"lite\.setup"):
        lite.check_sync()
    lite.setup(MLP())
    lite.check_sync()
    with pytest.raises(ValueError, match="every=0"):
        lite.check_sync(every=0)
