"""Estimates of memory against the tensors of real training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from lite import (
    ConfigError,
    DDPStrategy,
    FSDPStrategy,
    Lite,
    LocalSGDStrategy,
    ModelParallelStrategy,
    Strategy,
    memory_estimate,
)
from lite.cli.main import main
from lite.strategies.ddp_engine import DDPEngine
from tests.contracts.test_numbers import PLAN, split
from tests.support.models import TinyGPT
from tests.support.processes import run_distributed


class Net(nn.Module):
    """Blocks, a tied weight, a buffer, a frozen part, sizes that don't divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 12)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, 25, batch_first=True) for _ in range(2))
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 37, bias=False)
        self.head.weight = self.embed.weight
        self.extra = nn.Linear(7, 5).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x.transpose(1, 2)).transpose(1, 2))
        return logits


class Scaled(nn.Linear):
    """Has a parameter that can't be sharded."""

    def __init__(self, width: int = 3) -> None:
        super().__init__(width, width)
        self.scale = nn.Parameter(torch.ones(()))


number = 3


def failing() -> nn.Module:
    raise ValueError("its own")


def tokens() -> Tensor:
    return torch.arange(2 * 9).reshape(2, 9) % 37


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    storages = {}
    for t in tensors:
        if t is not None:
            t = t.to_local() if hasattr(t, "to_local") else t
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.1, amsgrad=True),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adafactor": torch.optim.Adafactor,
}


def measured(make: Callable[[], nn.Module], strategy: Any, optimizer_name: str, precision: str, instance: bool) -> Any:
    """Bytes of a real step: parameters, gradients, optimizer state, buffers, DDP's buckets; and the estimate."""
    lite = Lite(accelerator="cpu", strategy=strategy, precision=precision)
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    given = optimizer if instance else OPTIMIZERS[optimizer_name]
    told = memory_estimate(model, strategy, precision, given, world_size=lite.world_size)
    assert not optimizer.state
    lite.setup(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        lite.backward(model(tokens()).pow(2).mean())
        optimizer.step()
    buckets = 0
    if isinstance(lite._modules[model], DDPEngine):
        logged = lite._modules[model].ddp._get_ddp_logging_data()  # type: ignore[union-attr]
        buckets = sum(map(int, (logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]).split(",")))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    if isinstance(lite.strategy, LocalSGDStrategy):
        (part,) = lite.strategy._rounds
        assert part._outer is not None
        state += [*part._start, *(t for s in part._outer.state.values() for t in s.values() if isinstance(t, Tensor))]
    held = [model.parameters(), (p.grad for p in model.parameters()), state, model.buffers()]
    sizes = [*map(bytes_of, held), buckets]
    lite.teardown()
    return sizes, told


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_one_process_needs_what_is_told(precision: str) -> None:
    """To the byte, for optimizers with all kinds of state."""
    for name in OPTIMIZERS:
        if precision == "bf16-true" and name == "adafactor":
            continue
        (*sizes, _), told = measured(Net, "single", name, precision, name == "adamw")
        assert [told.parameters, told.gradients, told.optimizer, told.buffers] == sizes, name
        assert told.communication == 0


# Name: the model, the strategy, the optimizer.
RANKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "ddp": (Net, DDPStrategy, "amsgrad"),
    "ddp views": (Net, lambda: DDPStrategy(gradient_as_bucket_view=True), "adamw"),
    "zero": (Net, lambda: DDPStrategy(zero_optimizer=True), "amsgrad"),
    "fsdp": (Net, FSDPStrategy, "adamw"),
    "fsdp by name": (Net, lambda: "fsdp", "momentum"),
    "fsdp grad": (Net, lambda: FSDPStrategy(sharding="grad"), "amsgrad"),
    "tp": (lambda: TinyGPT(tied=True), lambda: ModelParallelStrategy(PLAN), "adamw"),
    "diloco": (Net, lambda: LocalSGDStrategy(sync_every=2, outer_optimizer="diloco"), "momentum"),
}


def measured_on_ranks(names: list[str]) -> list[Any]:
    return [measured(RANKS[n][0], RANKS[n][1](), RANKS[n][2], "32-true", n == "ddp views") for n in names]


def test_ranks_need_what_is_told() -> None:
    """To the byte, on the rank that has most, for dimensions that don't divide evenly too; and DDP's buckets."""
    results = run_distributed(measured_on_ranks, list(RANKS))
    for name, *ranks in zip(RANKS, *results, strict=True):
        told = ranks[0][1]
        *most, buckets = map(max, zip(*(sizes for sizes, _ in ranks), strict=True))
        assert [told.parameters, told.gradients, told.optimizer, told.buffers] == most, name
        if name == "ddp views":
            assert (told.communication, told.gradients) == (0, buckets)
        elif name in ("ddp", "zero"):
            assert told.communication == told.gradients == buckets


def test_axes_divide_what_they_should() -> None:
    """Replicas hold what one does; a tensor axis divides the layers of the plan, a data axis the rest as well."""
    adamw = torch.optim.AdamW
    net = Net()
    hybrid = FSDPStrategy(sharding="hybrid", replicate_axis=4)
    assert memory_estimate(net, hybrid, "32-true", adamw, world_size=8) == memory_estimate(
        net, "fsdp", "32-true", adamw, world_size=2
    )
    gpt = TinyGPT()
    tp = memory_estimate(gpt, ModelParallelStrategy(PLAN), "32-true", adamw, world_size=2)
    both = ModelParallelStrategy(PLAN, tensor_parallel=2)
    assert 2 * memory_estimate(gpt, both, "32-true", adamw, world_size=4).parameters == tp.parameters
    replicas = ModelParallelStrategy(PLAN, tensor_parallel=2, sharded=False)
    replicated = memory_estimate(gpt, replicas, "32-true", adamw, world_size=4)
    assert (replicated.state, replicated.communication) == (tp.state, tp.gradients)
    # Weights outside of blocks, two blocks', and one block's gradients; with "grad" all weights.
    whole, blocks = sum(p.numel() for p in net.parameters()), sum(p.numel() for p in net.blocks.parameters())
    block = sum(p.numel() for p in net.blocks[0].parameters())
    three = nn.Sequential(*(nn.TransformerEncoderLayer(12, 2, 25, batch_first=True) for _ in range(3)))
    assert memory_estimate(net, "fsdp", world_size=2).communication == 4 * (whole + block)
    assert memory_estimate(three, "fsdp", world_size=2).communication == 4 * (blocks + block)
    grad = FSDPStrategy(sharding="grad")
    assert memory_estimate(three, grad, world_size=2).communication == 4 * (3 * block + block)
    assert memory_estimate(three, "fsdp", "bf16-mixed", world_size=2).communication == 2 * blocks + 4 * block


def saved(model: nn.Module, batch: Tensor, context: Any) -> int:
    """Bytes of the storages that a real forward keeps."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), context:
        out = model(batch)
    for t in (out, batch):
        keep(t)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_activations_are_what_a_forward_keeps(precision: str) -> None:
    """The same storages as in a real forward, autocast's copies of weights included; nothing is drawn or changed."""
    lite = Lite(accelerator="cpu", precision=precision)
    for model, batch in ((Net(), tokens()), (nn.Sequential(nn.Linear(4, 9), nn.ReLU(True)), torch.randn(3, 4))):
        before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
        told = memory_estimate(model, "single", precision, None, batch)
        assert torch.equal(before, torch.get_rng_state())
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        lite.precision.convert_module(model)
        assert told.activations == saved(model, lite.precision.convert_input(batch), lite.autocast())
        assert told.total == told.state + told.activations
    meta = torch.nn.Linear(4, 2, device="meta")
    assert memory_estimate(meta, batch={"input": torch.empty(3, 4)}).activations == 4 * (12 + 6)


def test_wrong_arguments_are_refused() -> None:
    """With what was expected."""
    net = nn.Linear(2, 2)

    class Odd(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
            return module

    class Picky(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("not today")

    class Own(Strategy):
        distributed = True

    hybrid = FSDPStrategy(sharding="hybrid", replicate_axis=2)
    for call, words in (
        (lambda: memory_estimate(net, "fdsp"), "fsdp"),
        (lambda: memory_estimate(net, Own()), "does not tell"),
        (lambda: memory_estimate(net, precision="bf17-true"), "bf16-true"),
        (lambda: memory_estimate(net, world_size=2), "one process"),
        (lambda: memory_estimate(net, "ddp", world_size=0), "world_size=0"),
        (lambda: memory_estimate(net, FSDPStrategy(sharding="hybrid"), world_size=4), "pass replicate_axis"),
        (lambda: memory_estimate(net, FSDPStrategy(sharding="hybrid", replicate_axis=3), world_size=4), "divisors"),
        (lambda: memory_estimate(net, hybrid, world_size=2), "leaves one rank for each replica"),
        (lambda: memory_estimate(Scaled(), "fsdp", world_size=2), "'scale' of this Scaled is a scalar"),
        (lambda: memory_estimate(nn.Linear), "the class Linear as the model; pass a model that is made of it"),
        (lambda: memory_estimate(net.weight), "a Parameter as the model; pass a torch.nn.Module"),
        (lambda: memory_estimate(net, ModelParallelStrategy(split), world_size=2), "a dict of layer names"),
        (lambda: memory_estimate(net, ModelParallelStrategy({"haed": ColwiseParallel()}), world_size=2), "'haed'"),
        (lambda: memory_estimate(nn.LSTM(2, 2), ModelParallelStrategy({"x": Odd()}), world_size=2), "no layer"),
        (lambda: memory_estimate(nn.Sequential(net), ModelParallelStrategy({"0": Odd()}), world_size=2), "Odd"),
        (lambda: memory_estimate(net, optimizer="adam"), "optimizer='adam'"),
        (lambda: memory_estimate(net, optimizer=list), "must return a torch optimizer"),
        (lambda: memory_estimate(net, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters())), "not of this model"),
        (lambda: memory_estimate(net, optimizer=lambda p: Picky(p, lr=0.1)), "not today"),
        (lambda: memory_estimate(net, batch=torch.ones(1, 3)), "activations of Linear"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_the_command_prints_a_row_per_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    """The function's figures; exit code 2 and what to do for what can't be told."""
    options = ["--world-size", "4", "--replicate-axis", "2", "--batch", "2,9:int64"]
    split_options = ["--plan", "tests.contracts.test_numbers:PLAN", "--tensor-parallel", "2"]
    assert main(["memory", "tests.test_memory:Net", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddp", "ddp+zero1", "fsdp", "fsdp-grad", "fsdp-hybrid"]
    told = memory_estimate(Net(), "ddp", optimizer=torch.optim.AdamW, batch=tokens(), world_size=4)
    assert rows[0][7] == f"{told.total / 2**20:.2f}"
    assert main(["memory", "tests.support.models:TinyGPT", "--world-size", "4", *split_options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddp", "ddp+zero1", "fsdp", "fsdp-grad", "tp", "fsdp+tp", "ddp+tp"]
    mine, scaled = "tests.test_memory:Net", "tests.test_memory:Scaled"
    assert main(["memory", scaled, "--world-size", "2"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddp", "ddp+zero1", "fsdp", "fsdp-grad"]
    assert all(row[1] == "-" and "'scale' of this Scaled is a scalar" in row[2] for row in rows[2:])
    for words, told in (
        (("nowhere:Net",), "No module named 'nowhere'"),
        (("tests.test_memory",), "must be MODULE:NAME"),
        ((":Net",), "must be MODULE:NAME"),
        (("torch.nn:Linear",), "missing a required argument: 'in_features'. Write a function that makes the model"),
        (("tests.test_memory:number",), "is 3; it must be a function that makes the model, or a class"),
        ((mine, "--optimizer", "Adamm"), "AdamW"),
        ((mine, "--world-size", "2", "--strategy", "tp"), "--plan"),
        ((mine, "--world-size", "2", "--replicate-axis", "2"), "leaves one rank for each replica"),
        ((scaled, "--world-size", "2", "--strategy", "fsdp"), "is a scalar"),
        ((mine, "--batch=-1,9:int64"), "--batch -1,9:int64: no batch has such sizes; write"),
        ((mine, "--batch", f"{2**40},{2**40}"), "no batch has such sizes"),
        ((scaled, "--world-size", "2", "--batch", "4,5"), "does not run on this batch"),
    ):
        assert main(["memory", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("python -m lite: ") and told in error and error.count("\n") == 1
    with pytest.raises(ValueError, match="its own"):  # with its traceback
        main(["memory", "tests.test_memory:failing"])


def test_torch_logs_nothing_of_a_forward_that_does_not_run() -> None:
    """The error says it; afterwards torch logs as before."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    log.addHandler(handler)
    level = log.level
    try:
        with pytest.raises(ConfigError, match="activations of Linear"):
            memory_estimate(nn.Linear(2, 2), batch=torch.ones(1, 3))
    finally:
        log.removeHandler(handler)
    assert not heard
    assert log.level == level


@pytest.mark.gpu
def test_a_gpu_needs_what_is_told() -> None:
    """State to the allocator's 512 bytes per tensor; the peak within a fifth, which is left to workspaces."""
    width, rows = 4096, 2048
    lite = Lite(accelerator="cuda", devices=1)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    batch = torch.randn(rows, width, device=lite.device)
    optimizer = torch.optim.AdamW(model.parameters())
    told = memory_estimate(model, "single", "32-true", optimizer, batch.cpu())
    workspace = torch.ones(8, 8, device=lite.device) @ torch.ones(8, 8, device=lite.device)  # cuBLAS takes its own
    empty = torch.cuda.memory_allocated() - batch.nbytes
    torch.cuda.reset_peak_memory_stats()
    lite.setup(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(batch).pow(2).mean()
        lite.backward(loss)
        optimizer.step()
    del loss
    tensors = 5 * len(list(model.parameters()))
    state = torch.cuda.memory_allocated() - empty - batch.nbytes
    assert told.state <= state + 4 * tensors  # step counts lie on the CPU
    assert state <= told.state + 512 * (tensors + 8)
    peak = torch.cuda.max_memory_allocated() - empty
    assert 0.8 * told.total <= peak <= 1.2 * told.total, workspace.shape
