"""Fully sharded data parallelism on torch's `fully_shard`: each rank holds a part of weights, gradients and state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from lite.errors import ConfigError, check_flag, choose
from lite.precision.base import Precision
from lite.strategies.blocks import describe_blocks
from lite.strategies.footprint import Footprint, parts
from lite.strategies.meshes import make_mesh, settle_sizes
from lite.strategies.sharded import ShardedStrategy

SHARDINGS = ("full", "grad", "hybrid")
_FLOAT32 = (_BatchNorm, ParametrizationList)


class FSDPStrategy(ShardedStrategy):
    """Parameters, gradients and optimizer state are sharded over the ranks; a block's weights are put together when it
    runs. With one process nothing is sharded.

    Weights and buffers become rank 0's. What `setup` returns is the user's model: `model.state_dict()` has the raw
    keys, with DTensors as values. An optimizer that was made before `setup` holds the sharded parameters afterwards.
    Call the model, and methods of it that compute, on all ranks, and its layers within them. There a number of a
    sharded weight (`weight.norm().item()`) is refused: compute it from `weight.full_tensor()` before.
    Change weights by operations in place (`lerp_`, `copy_`) between its runs, or in a method without tensors; what a
    forward writes into them, and `parameter.data = value`, would be lost and is refused. Between a forward and its
    backward a change is torch's error, as on one process, but for one by `torch._foreach_*`, which is not noticed.
    Gradients from before `setup` stay, as the ranks' mean.

    In a loop of your own such a number is that of this rank's part, as in torch, of weights and of gradients
    (`p.grad.norm().item()`). Use `weight.full_tensor()`, or `grad.norm().full_tensor().item()`, which gathers less, on
    all ranks; the norm of all gradients is what `lite.clip_gradients` returns.

    With precision "bf16-mixed" or "16-mixed" parameters, gradients and state stay float32, blocks compute in 16 bits,
    and gradients are reduced in float32 (torch's MixedPrecisionPolicy, under autocast; BatchNorms, whose statistics are
    float32, and parametrizations (torch.nn.utils.parametrize) by themselves in float32). With "bf16-true" and the like
    they are reduced in the parameters' own dtype.

    `parameter.register_hook` gets the gradient as this rank has computed it from its own part of the data, whole,
    before the ranks' mean: under a mixed precision in the 16 bits that the layer computes in, where on one process it
    is float32. `register_post_accumulate_grad_hook` is called when the ranks' mean, this rank's part of it, is in
    `grad`: once for the backwards of an accumulation window, where on one process it is called at each of them. Under
    "16-mixed" both see gradients times the loss scale, as on one process, and so is `grad` until `lite.clip_gradients`
    or the step; all may be inf at the first steps, while the scale is found.

    Args:
        auto_wrap: What is sharded by itself, besides the model: None or "transformer blocks found" finds the layers
            that repeat; a set of module classes; or a function of a module that says whether.
        sharding: "full"; "grad" (weights stay whole between forward and backward, for less communication; another
            forward in between puts them together anew); or "hybrid" (sharded over a group of ranks, and replicated over
            such groups).
        replicate_axis: With "hybrid", how many replicas there are; None is one per machine.
        reshard_after_forward: As for `fully_shard`: False keeps a block's weights whole until backward, a number shards
            them over so many ranks meanwhile. None chooses by `sharding`.
        cpu_offload: Whether weights, gradients and optimizer state are kept in the CPU's memory.
        activation_checkpointing: Which layers compute their activations again in backward: a set of classes, a function
            of a module, or "selective" (the blocks, keeping the results of matrix products).
        mixed_precision: A MixedPrecisionPolicy of your own for every block, instead of the precision's.
        state_dict_type: What `model.state_dict()` holds: "sharded" (DTensors), or "full" (whole tensors on every rank,
            on the CPU; collective).
        compile_blocks: Whether each block is compiled by itself.
        broadcast_buffers: Whether each forward that trains starts with rank 0's buffers, as under DDP.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".

    Raises:
        ConfigError: An argument is wrong, or contradicts another one.

    Source: https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html; "grad" and "hybrid":
        https://arxiv.org/abs/1910.02054 (ZeRO), https://arxiv.org/abs/2304.11277 (FSDP)
    """

    name = "fsdp"

    def __init__(
        self,
        *,
        auto_wrap: Any = None,
        sharding: str = "full",
        replicate_axis: int | None = None,
        reshard_after_forward: bool | int | None = None,
        cpu_offload: bool = False,
        activation_checkpointing: Any = None,
        mixed_precision: Any = None,
        state_dict_type: str = "sharded",
        compile_blocks: bool = False,
        broadcast_buffers: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: str = "spawn",
    ) -> None:
        super().__init__(
            auto_wrap=auto_wrap,
            mixed_precision=mixed_precision,
            activation_checkpointing=activation_checkpointing,
            compile_blocks=compile_blocks,
            broadcast_buffers=broadcast_buffers,
            state_dict_type=state_dict_type,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        check_flag("cpu_offload", cpu_offload)
        self._sharding = choose("sharding", sharding, list(SHARDINGS))
        if replicate_axis is not None and sharding != "hybrid":
            raise ConfigError(
                f"replicate_axis={replicate_axis!r} with sharding={sharding!r}, which has no replicas; use "
                "sharding='hybrid', or leave replicate_axis out."
            )
        if sharding == "grad" and reshard_after_forward not in (None, False):
            raise ConfigError(
                f"reshard_after_forward={reshard_after_forward!r} with sharding='grad', which keeps weights whole "
                "until backward; use sharding='full', or leave reshard_after_forward out."
            )
        if replicate_axis is not None:
            settle_sizes({"replicate_axis": replicate_axis}, replicate_axis)
        self._replicate_axis = replicate_axis
        self._reshard = False if sharding == "grad" else reshard_after_forward
        self._cpu_offload = cpu_offload
        self._mesh: Any = None

    def check_world_size(self, world_size: int) -> None:
        if self._replicate_axis is not None and world_size > 1:
            _hybrid_sizes(self._replicate_axis, world_size)

    def lay_out(self, device: torch.device, num_nodes: int) -> None:
        if self._sharding != "hybrid":
            self._mesh = make_mesh(device.type, {"shard": self._world_size})
            return
        replicas = self._replicate_axis if self._replicate_axis is not None else num_nodes
        self._mesh = make_mesh(device.type, _hybrid_sizes(replicas, self._world_size))

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        if world_size == 1:
            return Footprint()
        self.check_parameters(module, over_data=True)
        shard = world_size
        if self._sharding == "hybrid":
            if self._replicate_axis is None:
                raise ConfigError(
                    "sharding='hybrid' without replicate_axis= has a replica per machine, and how many machines there "
                    "are is not known here; pass replicate_axis."
                )
            shard = _hybrid_sizes(self._replicate_axis, world_size)["shard"]
        return Footprint(
            part=parts(shard),
            blocks=names_of_blocks(module, self.blocks(module)),
            keeps_whole=self._reshard is False,
            casts_weights=True,
        )

    def shard(self, module: nn.Module, device: torch.device, blocks: dict[str, nn.Module]) -> str:
        how = shard_over_data(
            module,
            device,
            blocks,
            self._mesh,
            policies(self._precision, self._mixed_precision),
            reshard=self._reshard,
            cpu_offload=self._cpu_offload,
        )
        return f"fully_shard ({self._sharding}) around {how}, over {self._world_size} ranks"


def _hybrid_sizes(replicas: int, world_size: int) -> dict[str, int]:
    """The mesh's axes with sharding="hybrid".

    Raises:
        ConfigError: They don't make up the job, or one of them is 1, so that nothing is replicated or nothing sharded.
    """
    if replicas == 1:
        raise ConfigError(
            "sharding='hybrid' with one replica (replicate_axis=1, or no replicate_axis on one machine) replicates "
            "nothing; pass the number of replicas as replicate_axis=, or use sharding='full'."
        )
    shard = settle_sizes({"replicate_axis": replicas, "ranks per replica": None}, world_size)["ranks per replica"]
    if shard == 1:
        raise ConfigError(
            f"replicate_axis={replicas} on {world_size} processes leaves one rank for each replica, so nothing would "
            "be sharded; use a smaller replicate_axis, or strategy='ddp'."
        )
    return {"replicate": replicas, "shard": shard}


def names_of_blocks(module: nn.Module, blocks: dict[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The names of the parameters of each block, those of blocks within it left out."""
    owned: dict[str, list[str]] = {name: [] for name in blocks}
    for key, _ in module.named_parameters():
        owner = next((b for b in sorted(blocks, key=len, reverse=True) if key.startswith(f"{b}.")), None)
        if owner is not None:
            owned[owner].append(key)
    return tuple(map(tuple, owned.values()))


Policies = Callable[[nn.Module, bool], Any]


def policies(precision: Precision, own: Any) -> Policies:
    """For a part, and whether it is the whole model: torch's MixedPrecisionPolicy.

    Args:
        precision: The job's.
        own: The user's policy, which outranks it, or None.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if own is not None and not isinstance(own, MixedPrecisionPolicy):
        raise ConfigError(f"mixed_precision={own!r} must be a torch.distributed.fsdp.MixedPrecisionPolicy.")

    def policy(part: nn.Module, root: bool) -> Any:
        if isinstance(part, _FLOAT32) and not root:
            # A policy of the user's is without autocast, which else casts the weight that a parametrization gives.
            output = None if own is None else own.param_dtype
            chosen = policy(part, True)
            return replace(chosen, param_dtype=None, output_dtype=output, cast_forward_inputs=False)
        if own is not None:
            return own
        if precision.compute_dtype is None:
            return MixedPrecisionPolicy()
        # torch 2.13: outputs of an inner block that are cast to float32 don't fit the next one's weights.
        output = precision.output_dtype if root else None
        return MixedPrecisionPolicy(precision.compute_dtype, torch.float32, output)

    return policy


def shard_over_data(
    module: nn.Module,
    device: torch.device,
    blocks: dict[str, nn.Module],
    mesh: Any,
    policy: Policies,
    *,
    reshard: bool | int | None,
    cpu_offload: bool = False,
    placed: bool = False,
    replicated: bool = False,
) -> str:
    """Apply fully_shard to blocks, inner ones first, and to the whole. Collective: call on all ranks.

    Only one block at a time lies whole on the device.

    Args:
        module: The model.
        device: Where it computes.
        blocks: Its blocks by name.
        mesh: The axes over which data are split.
        policy: The dtypes.
        reshard: `reshard_after_forward`.
        cpu_offload: Whether parameters live on the CPU.
        placed: Whether the model is on the device, with rank 0's values.
        replicated: Whether each part of `mesh` holds all of the weights instead, as under DDP.

    Returns:
        What was wrapped.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if cpu_offload else OffloadPolicy()
    described = describe_blocks(blocks)
    name = type(module).__name__
    for part in [*_in_float32(module, policy, blocks), *reversed(blocks.values()), module]:
        if not placed:
            place(part, device)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy(part, part is module), "offload_policy": offload}
        if replicated:
            _replicate()(part, **options)
        else:
            fully_shard(part, reshard_after_forward=reshard, **options)
    return f"{described} and {name} itself" if blocks else f"{name} as a whole, in which no layers repeat"


def _in_float32(module: nn.Module, policy: Policies, blocks: dict[str, nn.Module]) -> list[nn.Module]:
    """The parts with weights that no 16-bit policy can be for.

    BatchNorms' statistics are float32. A parametrization (orthogonal, spectral_norm) computes a weight from its
    parameters outside of autocast's reach, with buffers in float32, or to NaN.
    """
    if policy(module, True).param_dtype is None:
        return []
    given = {id(block) for block in (module, *blocks.values())}
    found = [part for part in module.modules() if isinstance(part, _FLOAT32) and id(part) not in given]
    return [part for part in found if any(True for _ in part.parameters())]


def place(part: nn.Module, device: torch.device) -> None:
    """Bring plain parameters and buffers to the device, with rank 0's values. Collective: call on all ranks."""
    from lite.strategies.restoring import broadcast_from_rank_0

    for tensor in (*part.parameters(), *part.buffers()):
        if tensor.device != device and not hasattr(tensor, "device_mesh") and not tensor.is_meta:
            tensor.data = tensor.data.to(device)
    broadcast_from_rank_0(part)


def _replicate() -> Any:
    try:
        from torch.distributed._composable.replicate_with_fsdp import replicate
    except ImportError as error:
        raise ConfigError(
            f"sharded=False needs torch's replicate for meshes, which torch {torch.__version__} does not have; update "
            "torch, or use sharded=True."
        ) from error
    return replicate
