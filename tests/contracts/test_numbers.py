"""Law 1 as a table: every strategy, by all that a training loop does, equals a raw loop with the global batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lite import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    Lite,
    LocalSGDStrategy,
    ModelParallelStrategy,
    PipelineStrategy,
    Strategy,
    UsageError,
)
from lite.elsewhere import fetch
from lite.sharded import whole
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

GLOBAL_BATCH = 4
PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate()),
    **{f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{f"blocks.*.{name}": RowwiseParallel() for name in ("out", "down")},
    "head": ColwiseParallel(output_layouts=Replicate()),
}
# Sequences are split between the layers.
SEQUENCE_PLAN = {
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "blocks.*.norm1": SequenceParallel(),
    "blocks.*.norm2": SequenceParallel(),
    **{f"blocks.*.{name}": ColwiseParallel(input_layouts=Shard(1)) for name in ("q", "k", "v", "up")},
    **{f"blocks.*.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ("out", "down")},
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
}


def split(model: nn.Module, mesh: Any) -> None:
    parallelize_module(model, mesh["tensor"], PLAN)


def deepspeed(stage: int) -> Strategy:
    """With every parameter of stage 3 divided, the small ones too, and buckets smaller than the model."""
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 500} if stage == 3 else {}
    return DeepSpeedStrategy(stage, {"zero_optimization": zero})


# Name: processes, parts that data are split into, what makes the strategy.
STRATEGIES: dict[str, tuple[int, int, Callable[[], Strategy | str]]] = {
    "single": (1, 1, lambda: "single"),
    "ddp": (2, 2, DDPStrategy),
    "ddp zero": (2, 2, lambda: DDPStrategy(zero_optimizer=True)),
    "fsdp": (2, 2, lambda: "fsdp"),
    "fsdp on one": (1, 1, lambda: "fsdp"),
    "fsdp grad": (2, 2, lambda: FSDPStrategy(sharding="grad", activation_checkpointing="selective")),
    "fsdp on four": (4, 4, FSDPStrategy),
    "tp": (2, 1, lambda: ModelParallelStrategy(PLAN)),
    "tp sequence and loss": (2, 1, lambda: ModelParallelStrategy(SEQUENCE_PLAN, loss_parallel=True)),
    "fsdp x tp": (4, 2, lambda: ModelParallelStrategy(split, tensor_parallel=2)),
    "ddp x tp": (4, 2, lambda: ModelParallelStrategy(PLAN, data_parallel=2, sharded=False)),
    "fsdp hybrid": (4, 4, lambda: FSDPStrategy(sharding="hybrid", replicate_axis=2)),
    "local sgd": (2, 2, lambda: LocalSGDStrategy(sync_every=1)),
    "pipeline": (2, 1, PipelineStrategy),
    "pipeline on one": (1, 1, lambda: "pipeline"),
    **{f"deepspeed {stage}": (2, 2, functools.partial(deepspeed, stage)) for stage in range(4)},
}
WITH_DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
# DeepSpeed's optimizers keep float32. A sum over two ranks rounds otherwise than one over a batch, by some 1e-7 of
# gradients of about 0.1; AdamW divides by them, so where one is near 0 a step of lr=0.02 differs by more than it does:
# over the 8 steps here by 8e-7 at most, as measured.
FLOAT32_TOLERANCE = 5e-6
LOOPS = (
    "plain",
    "ragged",
    "accumulate",
    "no sync",
    "norm",
    "value",
    "scheduler",
    "frozen",
    "tied",
    "method",
    "ema",
    "head",
)
# Averaged weights are those of the averaged gradient where a step is linear in it: without clipping, and not by AdamW.
NOT_IN_LOCAL_SGD = ("norm", "value", "head")
# A pipeline's forward and backward are one call, and its microbatches divide every batch.
NOT_IN_PIPELINES = ("ragged", "no sync", "method")


def loops(name: str) -> list[str]:
    left_out = NOT_IN_LOCAL_SGD if name == "local sgd" else NOT_IN_PIPELINES if name.startswith("pipeline") else ()
    return [loop for loop in LOOPS if loop not in left_out]


def tolerance(name: str) -> float:
    return FLOAT32_TOLERANCE if name.startswith("deepspeed") else 1e-10


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name.startswith("deepspeed") else torch.float64


def row(name: str, *others: Any) -> Any:
    """A strategy's parameters of a test, skipped where what it needs is not installed."""
    return pytest.param(name, *others, marks=[WITH_DEEPSPEED] if name.startswith("deepspeed") else [])


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.5) if name == "local sgd" else torch.optim.AdamW(trained, lr=0.02)


def prepare(lite: Lite, model: TinyGPT, *others: Any, loss: Any = next_token_loss) -> Callable[..., torch.Tensor]:
    """Set up under any strategy; what comes back does forward and backward for a batch of tokens."""
    if lite.strategy.name == "pipeline":
        layers = ["tokens", "blocks", "norm", "head"]
        pipeline, *_ = lite.setup_pipeline(model, *others, loss=loss, microbatches=2, layers=layers)
        return lambda tokens: pipeline.forward_backward(tokens[:, :-1], target=tokens)
    lite.setup(model, *others)

    def forward_backward(tokens: torch.Tensor, weight: float = 1.0, method: bool = False) -> torch.Tensor:
        value = model.loss(tokens) if method else loss(model(tokens[:, :-1]), tokens)
        lite.backward(value * weight)
        return value.detach()

    return forward_backward


def whole_state(lite: Lite, model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole model's on every rank, whoever holds what."""
    state = model.state_dict()
    if lite.strategy.distributes_layers:
        state = fetch(state, lite.device, to_all=True)
    return {key: whole(value).clone() for key, value in state.items()}


def make_model(loop: str, dtype: torch.dtype) -> TinyGPT:
    torch.manual_seed(3)
    model = TinyGPT(dtype, tied=loop == "tied")
    if loop == "frozen":
        model.tokens.requires_grad_(False)
        model.blocks[0].norm1.requires_grad_(False)
        model.blocks[1].requires_grad_(False)
    if loop == "head":  # clipped by value as well, where a pipeline's first rank trains nothing
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    return model


def data(loop: str) -> Any:
    return sentences(13 if loop == "ragged" else 16)


def train_raw(loop: str, name: str = "single") -> tuple[list[float], dict[str, torch.Tensor]]:
    """What the strategies are compared with: no lite in it."""
    model = make_model(loop, dtype_of(name))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8)) if loop == "ema" else None
    if average is not None:
        average.update_parameters(model)  # torch's begins with its first update, lite's with the weights at its making
    optimizer = make_optimizer(name, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) if loop == "scheduler" else None
    window = 2 if loop in ("accumulate", "no sync") else 1
    losses = []
    for _ in range(2):
        for i, (tokens,) in enumerate(DataLoader(data(loop), batch_size=GLOBAL_BATCH)):
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
            (loss / window).backward()
            losses.append(loss.item())
            if (i + 1) % window:
                continue
            if loop == "norm":
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if loop in ("value", "head"):
                nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if average is not None:
                average.update_parameters(model)
    trained = model if average is None else average.module
    return losses, {k: v.clone() for k, v in trained.state_dict().items()}


def train(name: str, loop: str) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    _, parts, make = STRATEGIES[name]
    precision = "64-true" if dtype_of(name) == torch.float64 else "32-true"
    lite = Lite(accelerator="cpu", strategy=make(), precision=precision)
    loader = lite.setup_dataloaders(DataLoader(data(loop), batch_size=GLOBAL_BATCH // parts))
    model = make_model(loop, dtype_of(name))
    # Made before setup, of the raw parameters.
    optimizer = make_optimizer(name, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    forward_backward = prepare(lite, model, optimizer, *([scheduler] if loop == "scheduler" else []))
    assert isinstance(model, TinyGPT)
    window = lite.accumulate(model, steps=2)
    ema = lite.ema(model, decay=0.8) if loop == "ema" else None
    losses = []
    for _ in range(2):
        for i, (tokens,) in enumerate(loader):
            ready = True
            sync = lite.no_backward_sync(model, enabled=i % 2 == 0) if loop == "no sync" else nullcontext()
            with window() if loop == "accumulate" else sync:
                options = {"no sync": {"weight": 0.5}, "method": {"method": True}}.get(loop, {})
                loss = forward_backward(tokens, **options)
            ready = window.ready if loop == "accumulate" else loop != "no sync" or i % 2 == 1
            mine = loss * lite._weight.value  # of a ragged batch, what the mean over ranks counts
            losses.append(lite.all_reduce(mine).item())
            if not ready:
                continue
            if loop == "norm":
                lite.clip_gradients(model, optimizer, max_norm=0.1)
            if loop in ("value", "head"):
                lite.clip_gradients(model, optimizer, clip_val=0.01)
            optimizer.step()
            optimizer.zero_grad()
            if loop == "scheduler":
                scheduler.step()
            if ema is not None:
                ema.update()
    with ema.swap() if ema is not None else nullcontext():
        sharded = whole_state(lite, model)
    replaced = lite.strategy.shards and name not in ("deepspeed 1", "deepspeed 2")
    lite.teardown()
    if ema is not None and replaced:
        with pytest.raises(UsageError, match=r"use it before lite\.teardown"):
            ema.update()
    assert type(model) is TinyGPT
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} <= {id(p) for p in model.parameters()}
    assert not any(table for m in model.modules() for name, table in vars(m).items() if name.endswith("_hooks"))
    return losses, sharded, {k: v.clone() for k, v in model.state_dict().items()}


def train_all(name: str) -> dict[str, Any]:
    return {loop: train(name, loop) for loop in loops(name)}


@functools.cache
def trained(name: str) -> list[dict[str, Any]]:
    """What each rank has of each loop, from one job: to start one takes longer than to train."""
    world_size = STRATEGIES[name][0]
    return [train_all(name)] if world_size == 1 else run_distributed(train_all, name, world_size=world_size)


@pytest.mark.parametrize(("name", "loop"), [row(name, loop) for name in STRATEGIES for loop in loops(name)])
def test_losses_and_weights_are_those_of_a_raw_loop(name: str, loop: str) -> None:
    """In float64, to 1e-10: sums over ranks round otherwise than sums over a batch, and AdamW divides by them.

    DeepSpeed computes in float32, to FLOAT32_TOLERANCE.
    """
    losses, weights = train_raw(loop, name)
    for mine, sharded, torn_down in [result[loop] for result in trained(name)]:
        assert mine == pytest.approx(losses, abs=tolerance(name))
        assert list(sharded) == list(torn_down) == list(weights)
        for key, wanted in weights.items():
            torch.testing.assert_close(sharded[key], wanted, rtol=0, atol=tolerance(name))
            assert torch.equal(sharded[key], torn_down[key]) or loop == "ema"


def overflow(name: str) -> list[Any]:
    """Three steps under a loss scale; in the second one rank's loss is infinite."""
    _, parts, make = STRATEGIES[name]
    lite = Lite(accelerator="cpu", strategy=make(), precision="16-mixed")
    torch.manual_seed(3)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    factor = 1.0
    forward_backward = prepare(lite, model, optimizer, loss=lambda *data: next_token_loss(*data) * factor)
    lite.precision.load_state_dict({**lite.precision.state_dict(), "scale": 1024.0})
    told: list[Any] = []
    for step in range(3):
        (tokens,) = sentences(4)[:]
        before = whole_state(lite, model)
        optimizer.zero_grad()
        last = lite.strategy.data_shards(lite.world_size, lite.global_rank)[1] == parts - 1
        factor = torch.inf if step == 1 and last else 1.0
        forward_backward(tokens)
        if step == 2:
            lite.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
        unchanged = all(torch.equal(value, before[key]) for key, value in whole_state(lite, model).items())
        told.append((lite.step_was_skipped(optimizer), unchanged, lite.precision.state_dict()["scale"]))
    return [*told, [value.tolist() for value in whole_state(lite, model).values()]]


def train_raw_with_a_gap() -> list[torch.Tensor]:
    """In float32 the first and the third of the steps."""
    torch.manual_seed(3)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    (tokens,) = sentences(4)[:]
    for max_norm in (torch.inf, 0.5):
        optimizer.zero_grad()
        next_token_loss(model(tokens[:, :-1]), tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return list(model.parameters())


@pytest.mark.parametrize("name", [row(name) for name in STRATEGIES if name != "local sgd"])
def test_an_inf_on_one_rank_skips_the_step_on_all(name: str) -> None:
    """Their scales stay equal, and so do their weights; the steps before and after are taken.

    Weights are those of float32 to 2e-3: float16 keeps 3 digits of gradients of up to 0.1, and a step is 0.5 of them.
    """
    world_size = STRATEGIES[name][0]
    results = [overflow(name)] if world_size == 1 else run_distributed(overflow, name, world_size=world_size)
    first, second, third, weights = results[0]
    for mine, wanted in zip(weights, train_raw_with_a_gap(), strict=True):
        torch.testing.assert_close(torch.tensor(mine), wanted.detach(), rtol=0, atol=2e-3)
    assert first == (False, False, 1024.0)
    assert second == (True, True, 512.0)
    assert third == (False, False, 512.0)
    assert all(result == results[0] for result in results)
