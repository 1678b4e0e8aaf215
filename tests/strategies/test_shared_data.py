"""Ranks that share one model get the same batches, whatever each of them has drawn before."""

from __future__ import annotations

import os
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lite import Lite, ModelParallelStrategy, UsageError
from tests.support.processes import run_distributed


class Drawing(Dataset[Tensor]):
    """Numbers with noise on them."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(1)


class Streams(IterableDataset[Tensor]):
    """A stream of a rank's own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Any:
        return iter([torch.tensor([float(self.rank)])])


@dataclass
class Sample:
    x: Any


# What a collate function makes of a number, of which no rank's others are equal.
COLLATED: dict[str, Any] = {
    "array": lambda number: np.array([number]),
    "number": lambda number: number,
    "text": lambda number: (str(number), "ab"),
    "bytes": lambda number: bytes([number]),
    "mapping": lambda number: UserDict(x=torch.tensor(number), other=np.nan),
    "dataclass": lambda number: Sample({"x": number}),
    "object": lambda number: SimpleNamespace(x=[number], words={"a", "b", "c"}, other=object()),
}
WITH_ARRAYS = ("array", "mapping")  # what else there is may be a rank's own


def compared() -> dict[str, tuple[int, str | None]]:
    """Batches that are equal, that differ from the first one on, or from the second: how many come, and the error."""
    lite = Lite(accelerator="cpu", strategy="pipeline")
    found: dict[str, tuple[int, str | None]] = {}
    for kind, make in COLLATED.items():
        for differing in (0, 1, 9):

            def collate(batch: list[int], differing: int = differing, make: Any = make) -> Any:
                return make(batch[0] + 10 * lite.global_rank * (batch[0] >= differing))

            loader = lite.setup_dataloaders(DataLoader(range(3), collate_fn=collate))
            count, text = 0, None
            try:
                for _ in loader:
                    count += 1
            except UsageError as error:
                text = str(error)
            found[f"{kind} {differing}"] = count, text
    return found


def compared_under_debug() -> Any:
    os.environ["LITE_DEBUG"] = "1"
    try:
        return compared(), uneven()
    finally:
        del os.environ["LITE_DEBUG"]
        dist.set_debug_level(dist.DebugLevel.OFF)


class Uneven(Streams):
    """One more sample on rank 1."""

    def __iter__(self) -> Any:
        return iter(range(2 + self.rank))


def uneven() -> tuple[int, bool]:
    lite = Lite(accelerator="cpu", strategy="pipeline")
    count = 0
    try:
        for _ in lite.setup_dataloaders(DataLoader(Uneven(lite.global_rank))):
            count += 1
    except UsageError:
        return count, True
    return count, False


def batches(strategy: str) -> dict[str, Any]:
    """What each rank gets, epoch by epoch; their generators have parted, as dropout on some of them parts them."""
    plan: Any = ModelParallelStrategy({"0": ColwiseParallel()}, tensor_parallel=2) if strategy == "tensor" else strategy
    lite = Lite(accelerator="cpu", strategy=plan)
    lite.seed_everything(0)
    plain, drawing, reading = lite.setup_dataloaders(
        DataLoader(range(10), batch_size=3, shuffle=True),
        DataLoader(Drawing(), batch_size=3),
        DataLoader(Streams(lite.global_rank)),
    )
    torch.manual_seed(lite.global_rank)
    found: dict[str, Any] = {"plain": []}
    for _ in range(2):
        found["plain"].append([batch.tolist() for batch in plain])
        torch.rand(lite.global_rank)
    found["state"] = plain.state_dict()["epoch"]
    for name, loader in {"drawing": drawing, "reading": reading}.items():
        try:
            next(iter(loader))
        except UsageError as error:
            found[name] = str(error)
    return found


def test_ranks_of_a_pipeline_and_of_a_tensor_parallel_group_get_the_same_batches() -> None:
    """Shuffled ones too; what a rank draws by itself, or reads otherwise, is refused."""
    for strategy in ("pipeline", "tensor"):
        first, second = run_distributed(batches, strategy)
        assert first == second
        assert sorted(number for batch in first["plain"][0] for number in batch) == list(range(10))
        assert first["plain"][0] != first["plain"][1]
        for name in ("drawing", "reading"):
            assert "got different batches" in first[name]


def test_arrays_of_a_first_batch_are_compared() -> None:
    """In mappings too; equal ones, NaN, and what is no array raise no alarm."""
    for found in run_distributed(compared):
        for kind in COLLATED:
            count, text = found[f"{kind} 0"]
            if kind in WITH_ARRAYS:
                assert count == 0
                assert text is not None and "got different batches" in text
            else:
                assert (count, text) == (3, None)
            assert found[f"{kind} 1"] == found[f"{kind} 9"] == (3, None)


def test_lite_debug_compares_every_batch_of_ranks_that_share_a_model() -> None:
    """The second too, and how many there are; numbers, text, dataclasses and objects; no alarm by sets."""
    for found, ended in run_distributed(compared_under_debug):
        for kind in COLLATED:
            for differing in (0, 1):
                count, text = found[f"{kind} {differing}"]
                assert count == differing
                assert text is not None and "got different batches" in text
            assert found[f"{kind} 9"] == (3, None)
        assert ended == (2, True)
