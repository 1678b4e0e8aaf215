"""Law 6: what any strategy has saved, in either form, any other goes on from, on any number of processes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lite import Lite
from lite.elsewhere import fetch
from lite.sharded import is_sharded, whole
from tests.contracts.test_numbers import STRATEGIES, dtype_of, prepare, row, tolerance, whole_state
from tests.support.models import TinyGPT, sentences
from tests.support.processes import run_distributed

LEFT_OUT = (
    "fsdp on one",
    "fsdp grad",
    "tp sequence and loss",
    "local sgd",
    "pipeline on one",
    "deepspeed 0",
    "deepspeed 1",
)
ALL = [name for name in STRATEGIES if name not in LEFT_OUT]
NAMES = [name for name in ALL if find_spec("deepspeed") or not name.startswith("deepspeed")]


def step(optimizer: Any, forward_backward: Any, part: tuple[int, int], number: int) -> None:
    """One step on this part of global batch `number`, of 4 sequences."""
    size = 4 // part[0]
    start = 4 * number + part[1] * size
    (tokens,) = sentences(16)[start : start + size]
    optimizer.zero_grad()
    forward_backward(tokens)
    optimizer.step()


def make(seed: int, name: str = "single") -> tuple[TinyGPT, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = TinyGPT(torch.float64).to(dtype_of(name))
    first = [p for n, p in model.named_parameters() if n.startswith("blocks.0")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("blocks.0")]
    return model, torch.optim.AdamW([{"params": first, "lr": 0.01}, {"params": rest}], lr=0.02)


def start(name: str) -> tuple[Lite, tuple[int, int]]:
    precision = "64-true" if dtype_of(name) == torch.float64 else "32-true"
    lite = Lite(accelerator="cpu", strategy=STRATEGIES[name][2](), precision=precision)
    return lite, lite.strategy.data_shards(lite.world_size, lite.global_rank)


def forms(name: str, other: str) -> tuple[str, ...]:
    """Every pair has a file or a directory; what a strategy has saved itself, it loads in every form."""
    if name == other:
        return ("file.ckpt", "folder", "fresh.ckpt", "async")
    return ("file.ckpt",) if (NAMES.index(name) + NAMES.index(other)) % 2 else ("folder",)


def save(name: str, folder: Path) -> None:
    lite, part = start(name)
    model, optimizer = make(3, name)
    forward_backward = prepare(lite, model, optimizer)
    lite.save(folder / name / "fresh.ckpt", {"model": model, "optimizer": optimizer})
    for number in range(2):
        step(optimizer, forward_backward, part, number)
    state = {"model": model, "optimizer": optimizer, "epoch": 7}
    lite.save(folder / name / "file.ckpt", state)
    lite.save(folder / name / "folder", state)
    lite.save(folder / name / "async", state, async_save=True)
    step(optimizer, forward_backward, part, 2)  # must not reach what is being saved
    lite.wait_for_save()


def load(name: str, folder: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    lite, part = start(name)
    for other in NAMES:
        for form in forms(name, other):
            model, optimizer = make(4, name)
            forward_backward = prepare(lite, model, optimizer)
            if form != "fresh.ckpt":
                step(optimizer, forward_backward, part, 3)  # state that is to be replaced
            state: dict[str, Any] = {"model": model, "optimizer": optimizer}
            rest = lite.load(folder / other / form, state)
            assert rest == ({} if form == "fresh.ckpt" else {"epoch": 7})
            moments = [s["exp_avg"] for s in optimizer.state_dict()["state"].values()]  # under ZeRO-1 every rank's
            held = [p for group in optimizer.param_groups for p in group["params"]]
            if not lite.strategy.distributes_layers:
                assert not moments or [is_sharded(m) for m in moments] == [is_sharded(p) for p in held]
            loaded = whole_state(lite, model), whole_moments(lite, optimizer)
            for number in range(0 if form == "fresh.ckpt" else 2, 3):
                step(optimizer, forward_backward, part, number)
            seen[f"{other}/{form}"] = (*loaded, whole_state(lite, model))
            lite.teardown()
    return seen


def weights(model: TinyGPT) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def whole_moments(lite: Lite, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the optimizer's parameters, whoever holds what."""
    moments = [s["exp_avg"] for s in optimizer.state_dict()["state"].values()]
    if lite.strategy.distributes_layers:
        moments = fetch(moments, lite.device, to_all=True)
    return [whole(moment).clone() for moment in moments]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name in NAMES:
        world_size = STRATEGIES[name][0]
        save(name, folder) if world_size == 1 else run_distributed(save, name, folder, world_size=world_size)
    return folder


@pytest.mark.parametrize("name", [row(name) for name in ALL])
def test_any_goes_on_from_any(name: str, saved: Path) -> None:
    """Weights and optimizer state are those that were saved, and the next step is the uninterrupted run's.

    To 1e-10, as the strategies' own numbers are, or to float32's tolerance where DeepSpeed has a part in it.
    """
    model, optimizer = make(3)
    expected: dict[str, Any] = {"fresh": weights(model)}
    for number in range(3):
        if number == 2:
            expected["weights"] = weights(model)
            expected["moments"] = [s["exp_avg"].clone() for s in optimizer.state.values()]
        step(optimizer, lambda tokens: model.loss(tokens).backward(), (1, 0), number)
    world_size = STRATEGIES[name][0]
    results = [load(name, saved)] if world_size == 1 else run_distributed(load, name, saved, world_size=world_size)
    for result in results:
        assert len(result) == len(NAMES) + 3
        for where, (loaded, moments, after) in result.items():
            fresh = where.endswith("fresh.ckpt")
            close = {"rtol": 0, "atol": max(tolerance(name), tolerance(where)), "check_dtype": False}
            for key, wanted in expected["fresh" if fresh else "weights"].items():
                torch.testing.assert_close(loaded[key], wanted, **close, msg=f"{where} {key}")
            assert len(moments) == (0 if fresh else len(expected["moments"]))
            for mine, wanted in zip(moments, expected["moments"], strict=not fresh):
                torch.testing.assert_close(mine, wanted, **close)
            for key, wanted in weights(model).items():
                torch.testing.assert_close(after[key], wanted, **close, msg=f"{where} {key}")


def test_files_hold_plain_tensors_with_the_raw_keys(saved: Path) -> None:
    """torch.load alone reads them, whoever has saved them."""
    model, _ = make(3)
    for name in NAMES:
        content = torch.load(saved / name / "file.ckpt", weights_only=True)
        assert list(content["model"]) == list(model.state_dict())
        model.load_state_dict(content["model"])
        assert all(type(t) is Tensor for s in content["optimizer"]["state"].values() for t in s.values())
