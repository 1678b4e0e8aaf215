"""Random states are part of a checkpoint, and so is what each rank has for itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.utils.data import DataLoader, IterableDataset

from lite import CheckpointError, Lite, ModelParallelStrategy, UsageError
from tests.support.processes import run_distributed


def draw() -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand())]


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def save_and_draw(folder: str, suffix: str) -> list[float]:
    lite = Lite(accelerator="cpu")
    seed(lite.global_rank)
    draw()
    lite.save(f"{folder}/a{suffix}", {"n": 1})
    return draw()


def load_and_draw(folder: str, suffix: str, rng: bool = True) -> list[float]:
    lite = Lite(accelerator="cpu")
    seed(50)
    assert lite.load(f"{folder}/a{suffix}", {}, rng=rng) == {"n": 1}
    return draw()


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_every_rank_goes_on_from_its_random_state(tmp_path: Path, suffix: str) -> None:
    """Of all generators; another number of processes begins with rank 0's, the rest from numbers of their own."""
    folder = str(tmp_path)
    two = run_distributed(save_and_draw, folder, suffix)
    assert two[0] != two[1]
    assert run_distributed(load_and_draw, folder, suffix) == two
    assert load_and_draw(folder, suffix) == two[0]
    assert load_and_draw(folder, suffix, rng=False) not in two
    one = save_and_draw(folder, suffix)
    first, second = run_distributed(load_and_draw, folder, suffix)
    assert first == one != second
    assert run_distributed(load_and_draw, folder, suffix)[1] == second


class Shard(IterableDataset):
    """A dataset that splits itself by rank, unevenly, and knows its position."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.next = 0

    def __iter__(self) -> Any:
        while self.next < 6:
            self.next += 1 + self.rank
            yield self.next

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def loaders(lite: Lite) -> dict[str, Any]:
    whole = DataLoader(range(8), shuffle=True)
    return {
        "whole": lite.setup_dataloaders(whole, use_distributed_sampler=False),
        "stream": lite.setup_dataloaders(DataLoader(Shard(lite.global_rank), batch_size=None)),
    }


def interrupt(path: str) -> tuple[list[int], list[int]]:
    lite = Lite(accelerator="cpu")
    seed(lite.global_rank)
    state = loaders(lite)
    running = {name: iter(loader) for name, loader in state.items()}
    for batches in running.values():
        next(batches)
    lite.save(path, state)
    return [int(b) for b in running["whole"]], [int(b) for b in running["stream"]]


def go_on(path: str) -> tuple[list[int], list[int]]:
    lite = Lite(accelerator="cpu")
    seed(9)
    state = loaders(lite)
    lite.load(path, state)
    torch.rand(3)  # what is drawn before the loop begins does not matter
    return [int(b) for b in state["whole"]], [int(b) for b in state["stream"]]


def test_loaders_that_differ_between_ranks_keep_each_ranks_position(tmp_path: Path) -> None:
    """A loader that is not split, shuffled by each rank for itself; a dataset that splits itself."""
    path = str(tmp_path / "a.ckpt")
    rest = run_distributed(interrupt, path)
    assert rest[0] != rest[1]
    assert run_distributed(go_on, path) == rest
    with pytest.raises(CheckpointError, match="'whole' was saved by 2 processes"):
        go_on(path)


def normalised(lite: Lite) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[no-any-return]


def evaluate(model: nn.Module) -> list[float]:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(8.0).view(4, 2)).flatten().tolist()  # type: ignore[no-any-return]


def train_and_evaluate(folder: str, suffix: str) -> list[float]:
    lite = Lite(accelerator="cpu")
    model, optimizer = normalised(lite)
    for number in range(3):
        torch.manual_seed(10 * lite.global_rank + number)
        lite.backward(model(torch.randn(4, 2)).square().mean())
        optimizer.step()
    mine = torch.full((2,), float(lite.global_rank))
    lite.save(f"{folder}/bn{suffix}", {"model": model, "optimizer": optimizer, "mine": [mine, {"too": mine.clone()}]})
    return evaluate(model)


def load_and_evaluate(folder: str, suffix: str) -> list[float]:
    lite = Lite(accelerator="cpu")
    model, optimizer = normalised(lite)
    rest = lite.load(f"{folder}/bn{suffix}", {"model": model, "optimizer": optimizer})
    assert rest["mine"][0].tolist() == rest["mine"][1]["too"].tolist() == [0, 0]  # what is the user's is rank 0's
    return evaluate(model)


def odd_buffers(folder: str) -> list[Any]:
    lite = Lite(accelerator="cpu")
    model = nn.Linear(1, 1)
    model.register_buffer("small", torch.full((2,), float(lite.global_rank + 1)).to(torch.float8_e4m3fn))
    model.register_buffer("twin", model.small)
    model.register_buffer("lazy", None if lite.global_rank else torch.ones(1))
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    lite.save(f"{folder}/odd.ckpt", {"model": model})
    with pytest.raises(UsageError, match=r"lite\.save needs all ranks"), lite.rank_zero_first():
        lite.save(f"{folder}/odd.ckpt", {"model": model})
    if lite.global_rank == 0:
        model.lazy = None
    model.small, model.twin = (torch.zeros(2).to(torch.float8_e4m3fn) for _ in range(2))
    with pytest.warns(UserWarning, match=r"unexpected: model\.lazy"):
        lite.load(f"{folder}/odd.ckpt", {"model": model}, strict=False)
    return (model.small.float() + model.twin.float()).tolist()  # type: ignore[no-any-return]


def test_buffers_of_every_kind_and_missing_ones_are_no_trouble(tmp_path: Path) -> None:
    """Of 8 bits, sparse, or there on one rank alone."""
    assert run_distributed(odd_buffers, str(tmp_path)) == [[2, 2], [4, 4]]


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_every_rank_evaluates_with_its_buffers_after_a_resume(tmp_path: Path, suffix: str) -> None:
    """A BatchNorm's statistics are the rank's own until the next forward that trains; one process gets rank 0's."""
    two = run_distributed(train_and_evaluate, str(tmp_path), suffix)
    assert two[0] != two[1]
    assert run_distributed(load_and_evaluate, str(tmp_path), suffix) == two
    assert load_and_evaluate(str(tmp_path), suffix) == two[0]
    keys = torch.load(tmp_path / "bn.ckpt", weights_only=True)["model"].keys() if suffix else ()
    assert list(keys) == (list(normalised(Lite(accelerator="cpu"))[0].state_dict()) if suffix else [])


def divided(strategy: str) -> Lite:
    plan = ModelParallelStrategy({"2": ColwiseParallel(), "3": RowwiseParallel()}, tensor_parallel=2)
    return Lite(accelerator="cpu", strategy=plan if strategy == "tp" else strategy)


def in_layout(folder: str, strategy: str, load: bool) -> tuple[Any, ...]:
    """What a rank draws and evaluates after a save, or after a load of it."""
    lite = divided(strategy)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    _, part = lite.strategy.data_shards(lite.world_size, lite.global_rank)
    seed(7 + part)
    if load:
        lite.load(f"{folder}/x", {"model": model})
    else:
        lite.backward(model(torch.randn(4, 2)).square().mean())
        optimizer.step()
        lite.save(f"{folder}/x", {"model": model})
    return draw(), model[1].running_mean.tolist()


@pytest.mark.parametrize(
    ("saved", "loaded"), [("ddp", "tp"), ("tp", "ddp"), ("ddp", "fsdp"), ("tp", "tp"), ("fsdp", "tp")]
)
def test_what_ranks_have_for_themselves_goes_by_their_part_of_the_data(tmp_path: Path, saved: str, loaded: str) -> None:
    """Ranks of one model go on alike, and ranks with other data draw other numbers, whoever saved."""
    first = run_distributed(in_layout, str(tmp_path), saved, False)
    again = run_distributed(in_layout, str(tmp_path), loaded, True)
    assert again[0] == first[0]
    if saved == "tp" and loaded == "ddp":
        assert again[1][0] != again[0][0]
        assert again[1][1] == again[0][1] == first[0][1]
    elif loaded == "tp":
        assert again[1] == again[0]
    else:
        assert again == first
    if saved != "tp":
        assert first[0][0] != first[1][0] and first[0][1] != first[1][1]


def synced(strategy: str) -> tuple[list[float], list[float]]:
    lite = divided(strategy)
    model, optimizer = normalised(lite)
    seed(lite.global_rank)
    lite.backward(model(torch.randn(4, 2)).square().mean())
    optimizer.step()
    before = model[1].running_mean.tolist()
    lite.sync_buffers()
    return before, model[1].running_mean.tolist()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sync_buffers_gives_all_ranks_the_first_ones(strategy: str) -> None:
    """As a checkpoint has them."""
    (before, after), (others_before, others_after) = run_distributed(synced, strategy)
    assert before == after == others_after != others_before
