"""Estimates of memory against the tensors of real training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite import ConfigError, DDPStrategy, Lite, LocalSGDStrategy
from lite.memory import memory_estimate
from tests.support.processes import ROOT, run_distributed


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


def measured(strategy: Any, optimizer_name: str, precision: str, instance: bool) -> tuple[list[int], Any]:
    """Bytes of a real step: parameters, gradients, optimizer state, buffers, DDP's buckets; and the estimate's."""
    lite = Lite(accelerator="cpu", strategy=strategy, precision=precision)
    torch.manual_seed(0)
    model = Net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    given = optimizer if instance else OPTIMIZERS[optimizer_name]
    kind = strategy if isinstance(strategy, DDPStrategy) and lite.world_size > 1 else "single"
    told = memory_estimate(model, kind, precision, given, world_size=lite.world_size)
    assert not optimizer.state
    lite.setup(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        lite.backward(model(tokens()).pow(2).mean())
        optimizer.step()
    engine = lite._modules[model]
    buckets = 0
    if engine is not None:
        logged = engine.ddp._get_ddp_logging_data()  # type: ignore[attr-defined]
        buckets = sum(map(int, (logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]).split(",")))
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    sizes = [model.parameters(), (p.grad for p in model.parameters()), state, model.buffers()]
    return [*map(bytes_of, sizes), buckets], told


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true", "bf16-mixed"])
def test_one_process_needs_what_is_told(precision: str) -> None:
    """To the byte, for optimizers with all kinds of state."""
    for name in OPTIMIZERS:
        if precision == "bf16-true" and name == "adafactor":
            continue
        (parameters, gradients, state, buffers, _), told = measured("single", name, precision, name == "adamw")
        assert [told.parameters, told.gradients, told.optimizer, told.buffers] == [
            parameters,
            gradients,
            state,
            buffers,
        ], name
        assert told.communication == 0


@pytest.mark.parametrize("zero", [False, True])
def test_ranks_under_ddp_need_what_is_told(zero: bool) -> None:
    """To the byte: the rank with the largest share, and the communication buffers; views need no gradients besides."""
    for instance, views in ((False, False), (True, True)):
        strategy = DDPStrategy(zero_optimizer=zero, gradient_as_bucket_view=views)
        results = run_distributed(measured, strategy, "amsgrad", "32-true", instance)
        told = results[0][1]
        most = [max(sizes) for sizes in zip(*(sizes for sizes, _ in results), strict=True)]
        if views:
            assert told.communication == 0
            assert told.gradients == most[4]
        else:
            assert told.gradients == most[1]
            assert told.communication == most[4]
        assert [told.parameters, told.optimizer, told.buffers] == [most[0], most[2], most[3]]


def sharded() -> Any:
    """torch's fully_shard over two ranks."""
    from torch.distributed.fsdp import fully_shard

    Lite(accelerator="cpu")
    torch.manual_seed(0)
    model = Net()
    told = [memory_estimate(model, k, "32-true", torch.optim.AdamW, world_size=2) for k in ("fsdp", "fsdp-grad")]
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(tokens()).pow(2).mean().backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    sizes = [model.parameters(), (p.grad for p in model.parameters()), state, model.buffers()]
    return [*map(bytes_of, sizes)], told


def test_shards_need_what_is_told() -> None:
    """Of fully_shard, to the byte, dimensions that don't divide evenly included."""
    results = run_distributed(sharded)
    most = [max(sizes) for sizes in zip(*(sizes for sizes, _ in results), strict=True)]
    full, grad = results[0][1]
    assert [full.parameters, full.gradients, full.optimizer, full.buffers] == most
    assert (grad.parameters, grad.gradients, grad.optimizer) == (full.parameters, full.gradients, full.optimizer)
    assert grad.communication == 4 * sum(p.numel() for p in Net().parameters())
    assert full.communication == 4 * sum(p.numel() for p in Net().blocks.parameters())
    hybrid = memory_estimate(Net(), "fsdp-hybrid", "32-true", torch.optim.AdamW, world_size=8, shard_size=2)
    assert hybrid == full


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

    class Picky(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise ValueError("not today")

    for call, words in (
        (lambda: memory_estimate(net, "fdsp"), "fsdp"),
        (lambda: memory_estimate(net, LocalSGDStrategy()), "its memory is not known"),
        (lambda: memory_estimate(net, precision="bf17-true"), "bf16-true"),
        (lambda: memory_estimate(net, world_size=2), "one process"),
        (lambda: memory_estimate(net, "ddp", world_size=0), "world_size=0"),
        (lambda: memory_estimate(net, "fsdp-hybrid", world_size=4, shard_size=3), "shard_size=3"),
        (lambda: memory_estimate(net, "fsdp", world_size=4, shard_size=2), "leave it out"),
        (lambda: memory_estimate(net, optimizer="adam"), "optimizer='adam'"),
        (lambda: memory_estimate(net, optimizer=list), "must return a torch optimizer"),
        (lambda: memory_estimate(net, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters())), "not of this model"),
        (lambda: memory_estimate(net, optimizer=lambda p: Picky(p, lr=0.1)), "not today"),
        (lambda: memory_estimate(net, batch=torch.ones(1, 3)), "activations of Linear"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "lite", "memory", *words]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_row_per_strategy() -> None:
    """The function's figures; exit code 2 and what to do for what can't be told."""
    done = command("tests.test_memory:Net", "--world-size", "4", "--shard-size", "2", "--batch", "2,9:int64")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["ddp", "ddp+zero1", "fsdp", "fsdp-grad", "fsdp-hybrid"]
    told = memory_estimate(Net(), "ddp", optimizer=torch.optim.AdamW, batch=tokens(), world_size=4)
    assert rows[0][7] == f"{told.total / 2**20:.2f}"
    for words in (("nowhere:Net",), ("tests.test_memory",), ("tests.test_memory:Net", "--optimizer", "Adamm")):
        done = command(*words)
        assert done.returncode == 2
        assert "python -m lite:" in done.stderr


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
