"""Ranks that share one model get the same batches, whatever each of them has drawn before."""

from __future__ import annotations

from typing import Any

import torch
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
