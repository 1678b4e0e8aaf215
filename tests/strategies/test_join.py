"""Ranks that run out of batches at different steps, and still end with one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from lite import ConfigError, DDPStrategy, Lite, ModelParallelStrategy, Strategy, UsageError
from lite.environments import Environment
from lite.strategies.process_group import ProcessGroup
from tests.support.models import MLP
from tests.support.processes import run_distributed

BATCHES = (2, 5)  # of rank 0 and of rank 1


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64)


def uneven(initial: bool) -> Any:
    lite = Lite(accelerator="cpu", precision="64-true", strategy="ddp")
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), MLP(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    lite.setup(model, optimizer)
    with lite.join(model, divide_by_initial_world_size=initial):
        for step in range(BATCHES[lite.global_rank]):
            optimizer.zero_grad()
            x = batch(lite.global_rank, step)
            lite.backward((model(x) - x[:, :3]).pow(2).mean())
            optimizer.step()
    lite.check_sync(buffers=True)
    return [p.detach().tolist() for p in model.parameters()]


def single(initial: bool) -> Any:
    """The same in one process: sums over those that still have batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4, dtype=torch.float64), MLP(torch.float64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(max(BATCHES)):
        optimizer.zero_grad()
        ranks = [rank for rank in range(2) if step < BATCHES[rank]]
        for rank in ranks:
            loss = (model(batch(rank, step)) - batch(rank, step)[:, :3]).pow(2).mean()
            (loss / (2 if initial else len(ranks))).backward()
        optimizer.step()
    return [p.detach().tolist() for p in model.parameters()]


@pytest.mark.parametrize("initial", [True, False])
def test_gradients_are_means_over_the_ranks_that_train(initial: bool) -> None:
    """Of all ranks, with zeros for those that are done, or of those that still train; AdamW, float64, 1e-12."""
    first, second = run_distributed(uneven, initial)
    assert first == second
    for mine, wanted in zip(first, single(initial), strict=True):
        pair = (torch.tensor(values, dtype=torch.float64) for values in (mine, wanted))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def early() -> list[str]:
    messages = []
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    window = lite.accumulate(model, steps=max(BATCHES) + 1)
    try:
        with lite.join(model, throw_on_early_termination=True):
            for _ in range(BATCHES[lite.global_rank]):
                with window():
                    lite.backward(model(torch.ones(1, 4)).sum())
    except RuntimeError as error:
        messages.append(f"{error} {'open' if window.is_open else 'no window'}")
    for models, kind in (((), ConfigError), ((MLP(),), UsageError)):
        with pytest.raises(kind) as caught:
            lite.join(*models)
        messages.append(str(caught.value))
    lite = Lite(accelerator="cpu", strategy=DDPStrategy(zero_optimizer=True))
    model = lite.setup(MLP())
    with pytest.raises(UsageError) as caught:
        lite.join(model)
    messages.append(str(caught.value))
    return messages


def test_the_first_end_can_end_all() -> None:
    """throw_on_early_termination raises on every rank; a foreign model or ZeRO is refused; one process needs none."""
    for ended, none, foreign, zero in run_distributed(early):
        assert "exhausted" in ended and "no window" in ended  # what was open is dropped
        assert "join()" in none
        assert "MLP" in foreign
        assert "zero_optimizer" in zero
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    with lite.join(model):
        lite.backward(model(torch.ones(1, 4)).sum())


class Own(Strategy):
    """Another package's, which doesn't override `join`."""

    name = "own"
    distributed = True

    def connect(self, environment: Environment, device: torch.device) -> Any:
        self._group = ProcessGroup(None, None)
        return self._group.join(environment, device)

    def close(self) -> None:
        self._group.leave()


STRATEGIES = ("fsdp", "model_parallel", "pipeline", "local_sgd", "own")


def joined(name: str) -> None:
    """Enter `join` under a strategy."""
    plan = {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()}
    own = {"model_parallel": lambda: ModelParallelStrategy(plan), "own": Own}.get(name)
    lite = Lite(accelerator="cpu", strategy=own() if own is not None else name)
    model: Any = MLP()
    if name == "pipeline":
        lite.setup_pipeline(model := nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), loss=nn.MSELoss(), microbatches=2)
    else:
        lite.setup(model)
    with lite.join(model):
        pass
    lite.teardown()


def refused_under_others() -> list[str]:
    messages = []
    for name in STRATEGIES:
        with pytest.raises(UsageError) as caught:
            joined(name)
        messages.append(str(caught.value))
    return messages


def test_a_strategy_that_has_nothing_of_the_kind_refuses() -> None:
    """On several ranks, with what to use instead; with one process the same script runs."""
    for messages in run_distributed(refused_under_others):
        for name, message in zip(STRATEGIES, messages, strict=True):
            told = "LocalSGDStrategy" if name == "local_sgd" else f"strategy={name!r}"
            assert message.startswith("lite.join is for DDP"), name
            assert told in message
            assert "all ranks equally many" in message
    for name in STRATEGIES:
        joined(name)


def windows(counts: tuple[int, int]) -> Any:
    """Windows of two in `join`, and one more after it, of which every rank has both micro-batches."""
    lite = Lite(accelerator="cpu", precision="64-true", strategy="ddp")
    model = MLP(torch.float64)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    window = lite.accumulate(model, steps=2)

    def micro_batch(step: int) -> None:
        x = batch(lite.global_rank, step)
        with window():
            lite.backward((model(x) - x[:, :3]).pow(2).mean())
        if window.ready:
            optimizer.step()
            optimizer.zero_grad()

    before = [p.detach().tolist() for p in model.parameters()]
    with lite.join(model):
        for step in range(counts[lite.global_rank]):
            micro_batch(step)
    lite.check_sync()
    joined = [p.detach().tolist() for p in model.parameters()]
    for step in (10, 11):
        micro_batch(step)
    lite.check_sync()
    return before, joined, [p.detach().tolist() for p in model.parameters()]


def windows_of_one_process(before: Any, counts: tuple[int, int]) -> Any:
    model = MLP(torch.float64)
    with torch.no_grad():
        for p, values in zip(model.parameters(), before, strict=True):
            p.copy_(torch.tensor(values, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(steps: tuple[int, int], ranks: list[int]) -> list[Any]:
        optimizer.zero_grad()
        for rank in ranks:
            for step in steps:
                x = batch(rank, step)
                ((model(x) - x[:, :3]).pow(2).mean() / 4).backward()
        optimizer.step()
        return [p.detach().tolist() for p in model.parameters()]

    for first in range(0, max(counts) - 1, 2):
        joined = train((first, first + 1), [rank for rank in range(2) if first + 2 <= counts[rank]])
    return joined, train((10, 11), [0, 1])


@pytest.mark.parametrize("counts", [(5, 6), (6, 5), (4, 3), (5, 3)])
def test_windows_complete_by_their_count(counts: tuple[int, int]) -> None:
    """What a rank has in one that is not full counts nothing, and the next one is whole; float64, 1e-12."""
    (before, *mine), others = run_distributed(windows, counts)
    assert [before, *mine] == list(others)
    for values, wanted in zip(mine, windows_of_one_process(before, counts), strict=True):
        for a, b in zip(values, wanted, strict=True):
            pair = (torch.tensor(one, dtype=torch.float64) for one in (a, b))
            torch.testing.assert_close(*pair, rtol=0, atol=1e-12)


def told_of_windows() -> list[str]:
    lite = Lite(accelerator="cpu", strategy="ddp")
    model = lite.setup(MLP())
    window = lite.accumulate(model, steps=2)
    messages = []
    for given in ({"last": False}, {"last": True}, {"weight": 3}):
        with pytest.raises(UsageError) as caught, lite.join(model), window(**given):
            raise AssertionError
        messages.append(str(caught.value))
    with pytest.raises(UsageError) as caught, lite.join(model), window():
        window.weigh(3)
    messages.append(str(caught.value))
    with window(last=True, weight=3):  # outside of the block they mean what they did
        lite.backward(model(torch.ones(1, 4)).sum())
    assert window.ready and window.count == 1
    return messages


def test_what_would_make_ranks_wait_in_a_window_is_refused_on_all() -> None:
    """`last=` and weights, at their first use and before anything is counted; on one process too."""
    for ended, last, weight, weighed in (told_of_windows(), *run_distributed(told_of_windows)):
        assert ended.startswith("window(last=False) within lite.join")
        assert last.startswith("window(last=True) within lite.join") and "leave last out" in last
        assert weight == weighed and weight.startswith("weight=3 of a window within lite.join")


def turns() -> Any:
    """Two models, in their order and in others; then one step of both at once, after the block."""
    lite = Lite(accelerator="cpu", precision="64-true", strategy="ddp")
    first, one = lite.setup(model := MLP(torch.float64), torch.optim.SGD(model.parameters(), lr=0.1))
    second, two = lite.setup(model := nn.Linear(4, 1), torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.ones(2, 4, dtype=torch.float64)

    def train(*models: nn.Module) -> None:
        lite.backward(sum(model(x * (lite.global_rank + 1)).pow(2).mean() for model in models))
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()

    def told(*batches: tuple[nn.Module, ...], of: tuple[nn.Module, ...] = (first, second)) -> str:
        with pytest.raises(UsageError) as caught, lite.join(*of):
            for models in batches:
                train(*models)
        lite.check_sync()
        return str(caught.value)

    facts: dict[str, Any] = {"joint": told((first, second)), "twice": told((first, first), of=(first,))}
    facts["order"] = told((second,), (first,))
    facts["left out"] = told((first,), (first,))
    facts["incomplete"] = told((first,))
    with pytest.raises(UsageError) as caught, lite.join(first):
        first(x)
    facts["no backward"] = str(caught.value)
    with pytest.raises(ValueError, match="mine"), lite.join(first):
        train(first)
        raise ValueError("mine")
    with lite.join(first, second, divide_by_initial_world_size=False):
        for _ in range(BATCHES[lite.global_rank]):
            train(first)
            train(second)
            with torch.no_grad():
                first(x)
    lite.check_sync()
    assert not any(lite._modules[model].ddp._join_config.enable for model in (first, second))
    before = [p.detach().clone() for p in first.parameters()]
    train(first, second)  # any way, and averaged over all ranks
    lite.check_sync()
    alone = MLP(torch.float64)
    for p, value in zip(alone.parameters(), before, strict=True):
        p.data.copy_(value)
    (sum(alone(x * (rank + 1)).pow(2).mean() for rank in range(2)) / 2).backward()
    for p, now in zip(alone.parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(now, p - 0.1 * p.grad, rtol=0, atol=1e-12)
    return facts


def test_what_the_others_would_not_answer_is_refused_on_all() -> None:
    """Two forwards in one loss, another order, a model left out; errors come out, and nothing of a block is left."""
    pending = "came before the lite.backward of the forward of"
    parts = {
        "joint": f"lite.join: a forward of Linear (model 2 of 2) {pending} MLP (model 1 of 2)",
        "twice": f"lite.join: a forward of MLP {pending} MLP, and ranks",
        "order": "lite.join: a forward of Linear (model 2 of 2) came where one of MLP (model 1 of 2) was due",
        "left out": "lite.join: a forward of MLP (model 1 of 2) came where one of Linear (model 2 of 2) was due",
        "incomplete": "lite.join: the block ended where a forward of Linear (model 2 of 2) was due",
        "no backward": "lite.join: the block ended before the lite.backward of the last forward of MLP, for which",
    }
    for facts in run_distributed(turns):
        assert {key: text for key, text in facts.items() if not text.startswith(parts[key])} == {}
        assert facts.keys() == parts.keys()


def some_unused() -> list[Any]:
    lite = Lite(accelerator="cpu", precision="64-true", strategy=DDPStrategy(find_unused_parameters=True))
    model = nn.ModuleDict({"used": nn.Linear(4, 1), "unused": nn.Linear(4, 1)}).double()
    model.forward = lambda x: (model["used"](x), model["unused"](x))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with lite.join(model):
        for step in range(BATCHES[lite.global_rank]):
            optimizer.zero_grad()
            lite.backward(model(batch(lite.global_rank, step))[0].pow(2).mean())
            optimizer.step()
    lite.check_sync()
    return model["used"].weight.tolist()


def test_unused_parameters_are_looked_for_in_a_block() -> None:
    """By the loss, once its forward has been answered."""
    first, second = run_distributed(some_unused)
    assert first == second
