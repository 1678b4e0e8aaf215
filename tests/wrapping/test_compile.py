"""torch.compile: whatever is set up, it makes the graphs of the raw model, no break and no compilation more."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite import Lite
from lite.sharded import whole
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

# By strategy: in which ways, and whether before setup.
WAYS = {
    "single": [("whole", True), ("whole", False), ("in place", False)],
    "ddp": [("whole", True), ("whole", False), ("in place", False)],
    "fsdp": [("whole", False), ("in place", True)],
}


def compiled(model: nn.Module, how: str) -> Callable[[Tensor], Tensor]:
    """What is called once the model was compiled in this way."""
    if how == "in place":
        model.compile(backend="eager")
    else:
        call: Callable[[Tensor], Tensor] = torch.compile(model, backend="eager")
        return call
    return model


def count(model: TinyGPT, call: Callable[[Tensor], Tensor], backward: Callable[[Tensor], None]) -> dict[str, Any]:
    """Two steps: what the compiler did, and the gradients."""
    from torch._dynamo.utils import counters

    for number, size in enumerate((4, 4)):
        (tokens,) = sentences(16)[4 * number : 4 * number + size]
        backward(next_token_loss(call(tokens[:, :-1]), tokens))
    seen = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    seen["operations"] = counters["stats"]["calls_captured"]
    assert seen["graphs"] > 0
    return {**seen, "gradients": gradients(model)}


def fresh() -> TinyGPT:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(3)
    return TinyGPT()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def raw(strategy: str, how: str) -> dict[str, Any]:
    """What the compiler does with the bare model, or with torch's own sharded one."""
    model = fresh()
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return count(model, compiled(model, how), lambda loss: loss.backward())


def eager() -> dict[str, Tensor]:
    """The gradients of the same steps, of which every rank has the same."""
    torch.manual_seed(3)
    model = TinyGPT()
    for number, size in enumerate((4, 4)):
        (tokens,) = sentences(16)[4 * number : 4 * number + size]
        model.loss(tokens).backward()
    return gradients(model)


def with_lite(strategy: str, how: str, *, before: bool, precision: str = "32-true") -> dict[str, Any]:
    lite = Lite(accelerator="cpu", strategy=strategy, precision=precision)
    model = fresh()
    call: Callable[[Tensor], Tensor] = model
    if before:
        call = compiled(model, how)
    if isinstance(call, nn.Module):
        lite.setup(call)
    else:
        lite.setup(model)
    if not before:
        call = compiled(model, how)
    seen = count(model, call, lite.backward)
    lite.teardown()
    return seen


def all_ways(strategy: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    if strategy != "single":
        Lite(accelerator="cpu", strategy=strategy)  # joins the job, for the raw model too
    ways = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        bars: dict[str, dict[str, Any]] = {}
        for how, before in WAYS[strategy]:
            bar = bars[how] if how in bars else bars.setdefault(how, raw(strategy, how))
            ways.append((f"{how}, {before=}", bar, with_lite(strategy, how, before=before)))
        if strategy == "single":
            mixed = with_lite(strategy, "whole", before=False, precision="bf16-mixed")
            ways.append(("bf16-mixed", bar, {**mixed, "gradients": eager(), "operations": bar["operations"]}))
    return ways


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_compiling_costs_no_graph_and_no_break(strategy: str) -> None:
    """Before or after setup, whole or in place. Gradients are the eager model's, exactly: a mean of equal
    numbers is that number."""
    ranks = [all_ways(strategy)] if strategy == "single" else run_distributed(all_ways, strategy)
    expected = eager()
    for ways in ranks:
        for name, bar, mine in ways:
            assert mine["breaks"] <= bar["breaks"], (name, bar, mine)
            assert mine["graphs"] <= bar["graphs"], (name, bar, mine)
            assert mine["operations"] == bar["operations"], (name, bar, mine)
            assert mine["gradients"].keys() == expected.keys()
            for key, wanted in expected.items():
                torch.testing.assert_close(mine["gradients"][key], wanted, rtol=0, atol=0, msg=f"{name} {key}")


def test_what_compile_returns_stands_for_the_model() -> None:
    """In every call that takes one."""
    lite = Lite(accelerator="cpu")
    model = nn.Linear(3, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    call = torch.compile(model, backend="eager")
    window, ema = lite.accumulate(call, steps=2), lite.ema(call)
    for _ in range(2):
        with window(), lite.no_backward_sync(call, enabled=False):
            lite.backward(call(torch.ones(2, 3)).sum(), model=call)
    lite.clip_gradients(call, optimizer, max_norm=1.0)
    optimizer.step()
    ema.update()
    assert window.ready and ema.num_updates == 1
