"""Who is compared by `python -m benchmarks.strategies`: raw torch, lite, and the peers where they are installed.

Every contender is made in each of the job's processes, trains its own copy of the same model by the same loop, and says
what it made: the function of a step, the model and the optimizer, whose tensors are counted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY = 128, 4, 4, 64, 256
TENSOR_PARALLEL = 2
PLAN = {
    **{f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{f"blocks.*.{name}": RowwiseParallel() for name in ("out", "down")},
}


class Block(nn.Module):
    """Causal attention and an MLP, with layers that can be split over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        heads = (layer(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A GPT of 0.9 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Contender(NamedTuple):
    """What takes part."""

    step: Callable[[Tensor], Any]
    model: nn.Module
    optimizer: Any


def make_model(device: torch.device) -> GPT:
    torch.manual_seed(0)
    return GPT().to(device)


def _contender(model: Any, optimizer: Any, backward: Callable[[Tensor], Any]) -> Contender:
    def step(tokens: Tensor) -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        backward(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        optimizer.step()

    return Contender(step, model, getattr(optimizer, "optimizer", optimizer))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def _meshes(device: torch.device, world_size: int) -> Any:
    return init_device_mesh(
        device.type, (world_size // TENSOR_PARALLEL, TENSOR_PARALLEL), mesh_dim_names=("data", "tensor")
    )


def _shard(model: nn.Module, mesh: Any = None) -> nn.Module:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def raw(row: str, device: torch.device, world_size: int) -> Contender:
    """torch's own parts, wired by hand."""
    model: nn.Module = make_model(device)
    if row.startswith("ddp"):
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    elif row == "fsdp":
        _shard(model)
    else:
        meshes = _meshes(device, world_size)
        parallelize_module(model, meshes["tensor"], PLAN)
        if row == "fsdp x tp":
            _shard(model, meshes["data"])
    if row == "ddp zero":
        divided = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=1e-3)
        return _contender(model, divided, lambda loss: loss.backward())._replace(optimizer=divided.optim)
    return _contender(model, _adamw(model), lambda loss: loss.backward())


def lite(row: str, device: torch.device, world_size: int) -> Contender:
    """lite."""
    from lite import DDPStrategy, Lite, ModelParallelStrategy

    strategies: dict[str, Callable[[], Any]] = {
        "ddp": lambda: "ddp",
        "ddp zero": lambda: DDPStrategy(zero_optimizer=True),
        "fsdp": lambda: "fsdp",
        "tp": lambda: ModelParallelStrategy(PLAN),
        "fsdp x tp": lambda: ModelParallelStrategy(PLAN, tensor_parallel=TENSOR_PARALLEL),
    }
    lite = Lite(accelerator=device.type, strategy=strategies[row]())
    model = make_model(device)
    model, optimizer = lite.setup(model, _adamw(model))
    return _contender(model, optimizer, lite.backward)


def fabric(row: str, device: torch.device, world_size: int) -> Contender | None:
    """Lightning Fabric."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    def parallelize(model: Any, meshes: Any) -> Any:
        if row != "fsdp":
            parallelize_module(model, meshes["tensor_parallel"], PLAN)
        return model if row == "tp" else _shard(model, meshes["data_parallel"])

    strategies: dict[str, Callable[[], Any]] = {
        "ddp": lambda: "ddp",
        "fsdp": lambda: ModelParallelStrategy(parallelize, world_size, 1),
        "tp": lambda: ModelParallelStrategy(parallelize, 1, world_size),
        "fsdp x tp": lambda: ModelParallelStrategy(parallelize, world_size // TENSOR_PARALLEL, TENSOR_PARALLEL),
    }
    if row not in strategies:
        return None
    fabric = Fabric(accelerator=device.type, devices=world_size, strategy=strategies[row]())
    fabric.launch()
    model = fabric.setup(make_model(device))
    optimizer = fabric.setup_optimizers(_adamw(model))
    return _contender(model, optimizer, fabric.backward)


def accelerate(row: str, device: torch.device, world_size: int) -> Contender | None:
    """Hugging Face Accelerate."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState

    if row not in ("ddp", "fsdp"):
        return None
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    plugin = None
    if row == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=device.type == "cpu", fsdp_plugin=plugin)
    if row == "fsdp" and accelerator.distributed_type.name != "FSDP":
        raise RuntimeError(f"its FSDP plugin is left out on {device.type}")
    model = make_model(device)
    model, optimizer = accelerator.prepare(model, _adamw(model))
    return _contender(model, optimizer, accelerator.backward)


def contenders() -> dict[str, Callable[[str, torch.device, int], Contender | None]]:
    """Every one that can run here; "raw again" shows the noise."""
    found: dict[str, Callable[[str, torch.device, int], Contender | None]] = {"raw": raw, "raw again": raw}
    found["lite"] = lite
    if importlib.util.find_spec("lightning") is not None:
        found["fabric"] = fabric
    if importlib.util.find_spec("accelerate") is not None:
        found["accelerate"] = accelerate
    return found
