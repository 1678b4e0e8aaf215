"""Tensor parallelism by torch's DTensor, alone or together with sharded or replicated data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from glob import escape
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, check_flag
from lite.sharded import is_sharded
from lite.state import uncompiled
from lite.strategies import parallel_plan, remedies
from lite.strategies.footprint import Footprint, parts
from lite.strategies.fsdp import names_of_blocks, place, policies, shard_over_data
from lite.strategies.meshes import make_mesh, settle_sizes
from lite.strategies.second_order import refuse_second_order
from lite.strategies.sharded import ShardedStrategy
from lite.strategies.split_draws import FirstDraws
from lite.strategies.split_lengths import watch_lengths
from lite.strategies.split_loss import loss_parallel as within_loss_parallel
from lite.strategies.split_outputs import watch_first_outputs


class ModelParallelStrategy(ShardedStrategy):
    """Layers are split over `tensor_parallel` neighbouring ranks; such groups of ranks share the data between them.

    Loaders split batches over the data axis alone: all ranks of a group get the same samples. `lite.all_reduce` and
    `lite.gather_for_metrics` count each group once. Weights and buffers become rank 0's; tied weights stay tied.
    Call the model, and methods of it that compute, on all ranks.

    The ranks of a group must draw the same random numbers, from one seed for all of them: the first training run that
    draws is refused else, while seeds of their own that come later are not noticed. A dropout of whole tensors is one
    process's then. Where a layer's output is split, over features or, with SequenceParallel, over the sequence, each
    part gets the same mask, so it is another one than one process's; torch draws for DTensors alone, and on CUDA alone,
    as for the whole.

    A hook on a parameter that is split (`register_hook`) gets its gradient as a DTensor. With one group of ranks hooks
    on parameters are called as on one process. Between several groups, with `sharded=False` too, they are
    FSDPStrategy's: `register_hook` gets the gradient of the group's own part of the data, under a mixed precision in 16
    bits, and `register_post_accumulate_grad_hook` is called once for the backwards of an accumulation window, when the
    groups' mean is in `grad`. What is said of "16-mixed" there holds here.

    Outputs that stay split (`use_local_output=False`) are DTensors. `outputs.full_tensor()`, called on all ranks, is
    the whole, which a number (`item()`), an accuracy (`argmax` against plain targets), a generation step, and a loss
    with `label_smoothing=`, plain soft targets or a plain mask need; `F.cross_entropy` alone takes them as they are.

    Args:
        parallelize: What is split how: a dict of layer names (with `*`) and styles of
            `torch.distributed.tensor.parallel`, as `parallelize_module` takes it, but that of several keys for one
            layer the last one counts; or a function of (model, mesh) that splits the model in place, where
            `mesh["tensor"]` is what it splits over.
        tensor_parallel: Over how many ranks layers are split; None is all that `data_parallel` leaves.
        data_parallel: How many such groups there are; None is all that `tensor_parallel` leaves.
        sharded: Whether the groups hold parts of the weights, as FSDP does; False gives each a whole model, as DDP
            does.
        loss_parallel: Whether a loss may be computed from logits that stay split over the classes
            (`ColwiseParallel(use_local_output=False)`), as in torch's `loss_parallel`, but with right gradients also
            where a loss is made of `log_softmax` (an entropy, a divergence); until the job ends. A layer's
            part as a plain tensor, which a loss would take for the whole, is refused where the model's first forward
            returns nothing else, and warned about where there are whole tensors beside it. Evaluate split logits under
            `torch.no_grad()`: torch 2.13 can't within `torch.inference_mode()`.
        auto_wrap: What is sharded over data by itself, as for FSDPStrategy.
        reshard_after_forward: As for FSDPStrategy.
        mixed_precision: As for FSDPStrategy.
        activation_checkpointing: As for FSDPStrategy.
        state_dict_type: As for FSDPStrategy.
        compile_blocks: As for FSDPStrategy.
        broadcast_buffers: As for FSDPStrategy.
        process_group_backend: "gloo", "nccl", ...; None chooses by device.
        timeout: How long a collective may wait for the other ranks; None is torch's default.
        start_method: How `Lite.launch` starts processes: "spawn", "fork" or "forkserver".

    Raises:
        ConfigError: An argument is wrong, or contradicts another one.

    Source: https://pytorch.org/docs/stable/distributed.tensor.parallel.html, https://arxiv.org/abs/1909.08053
    """

    name = "model_parallel"

    def __init__(
        self,
        parallelize: Mapping[str, Any] | Callable[[nn.Module, Any], Any],
        *,
        tensor_parallel: int | None = None,
        data_parallel: int | None = None,
        sharded: bool = True,
        loss_parallel: bool = False,
        auto_wrap: Any = None,
        reshard_after_forward: bool | int | None = None,
        mixed_precision: Any = None,
        activation_checkpointing: Any = None,
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
        if isinstance(parallelize, Mapping):
            parallel_plan.check_plan(parallelize)
        elif not callable(parallelize):
            raise ConfigError(
                f"parallelize={parallelize!r} must be a dict of layer names and parallel styles, or a function of "
                "(model, mesh)."
            )
        check_flag("sharded", sharded)
        check_flag("loss_parallel", loss_parallel)
        for axis, size in {"tensor_parallel": tensor_parallel, "data_parallel": data_parallel}.items():
            settle_sizes({axis: size}, size if isinstance(size, int) else 1)
        self._plan = dict(parallelize) if isinstance(parallelize, Mapping) else None
        self._function = parallelize if callable(parallelize) else None
        self._asked = {"tensor_parallel": tensor_parallel, "data_parallel": data_parallel}
        self._sharded = sharded
        self._reshard = reshard_after_forward
        self._loss_parallel = loss_parallel
        self._contexts = ExitStack()
        self._mesh: Any = None
        self._tensor = self._data = 1

    @property
    def shards_over_data(self) -> bool:
        return self._data > 1

    def check_world_size(self, world_size: int) -> None:
        sizes = settle_sizes(self._asked, world_size)
        self._tensor, self._data = sizes["tensor_parallel"], sizes["data_parallel"]

    def data_shards(self, world_size: int, rank: int) -> tuple[int, int]:
        return self._data, rank // self._tensor

    def data_group(self) -> Any:
        return self._mesh["data"].get_group() if self._mesh is not None else None

    def footprint(self, module: nn.Module, world_size: int) -> Footprint | None:
        if world_size == 1:
            return Footprint()
        if self._plan is None:
            raise ConfigError(
                f"parallelize={self._function!r} is a function, which says what it splits when it has split it; pass a "
                "dict of layer names and styles for an estimate."
            )
        sizes = settle_sizes(self._asked, world_size)
        tensor, data = sizes["tensor_parallel"], sizes["data_parallel"]
        self.check_parameters(module, over_data=data > 1)
        split = parallel_plan.split_dims(module, self._plan)
        return Footprint(
            part=parts(data if self._sharded else 1, split, tensor),
            unsharded=parts(1, split, tensor),
            blocks=names_of_blocks(module, self.blocks(module)) if data > 1 and self._sharded else None,
            keeps_whole=self._reshard is False,
            gradient_copy=data > 1 and not self._sharded,
            casts_weights=data > 1,
        )

    def lay_out(self, device: torch.device, num_nodes: int) -> None:
        self.check_world_size(self._world_size)
        self._mesh = make_mesh(device.type, {"data": self._data, "tensor": self._tensor})
        if self._loss_parallel:
            self._contexts.enter_context(within_loss_parallel())

    def check_module(self, module: nn.Module) -> None:
        super().check_module(module)
        if self._compile_blocks and self._tensor > 1 and self._activation_checkpointing not in (None, "selective"):
            raise ConfigError(
                f"compile_blocks=True with activation_checkpointing={self._activation_checkpointing!r}: torch 2.13 "
                "can't compute compiled layers that are split over ranks again; use "
                "activation_checkpointing='selective', or leave one of them out."
            )
        if self._world_size > 1 and self._plan is not None:
            named = uncompiled(module)
            parallel_plan.check_styles(named, self._plan)
            parallel_plan.check_heads(named, parallel_plan.column_layers(named, self._plan), self._tensor)
            parallel_plan.check_division(named, self._plan, self._tensor)

    def explain_forward_error(self, module: nn.Module, error: RuntimeError) -> str | None:
        named = uncompiled(module)
        of_loss = "cross_entropy" in str(error) or "nll_loss" in str(error)
        if self._loss_parallel and of_loss and torch.is_inference_mode_enabled():
            return (
                f"{type(named).__name__.removeprefix('FSDP')} computed a loss within torch.inference_mode(), which "
                f"does not go with loss_parallel=True in torch 2.13 ({error}); use torch.no_grad(), or "
                "Trainer(inference_mode=False)."
            )
        if "functorch transforms" in str(error):
            return (
                f"{type(named).__name__.removeprefix('FSDP')} was called within a transform of torch.func (grad, vmap, "
                "...), which torch's DTensors don't go through; leave the layers that it needs out of parallelize, or "
                f"take gradients by torch.autograd.grad. torch says: {error}"
            )
        told = super().explain_forward_error(module, error)
        if told is not None or self._tensor == 1:
            return told
        return parallel_plan.explain_forward_error(named, error, self._plan, self._tensor)

    def explain_backward_error(self, error: RuntimeError) -> str | None:
        split = self._loss_parallel and self._tensor > 1 and remedies.MIXED in str(error)
        if split and remedies.hook_of_split(error) is None:
            return remedies.of_both_kinds(error)
        return super().explain_backward_error(error)

    def first_draws(self) -> FirstDraws | None:
        return FirstDraws(self._mesh["tensor"].get_group()) if self._tensor > 1 else None

    def check_new_optimizer(self, optimizer: Any) -> None:
        from lite.strategies.repointing import check_kernels

        super().check_new_optimizer(optimizer)
        if self._tensor > 1:
            check_kernels(optimizer, "ModelParallelStrategy")

    def shard(self, module: nn.Module, device: torch.device, blocks: dict[str, nn.Module]) -> str:
        from torch.distributed.tensor.parallel import parallelize_module

        place(module, device)
        tied = parallel_plan.shared_names(module)
        named = uncompiled(module)
        if self._plan is not None:
            # A style for each layer by its name, which is no pattern: torch would split twice what two keys match.
            styles = parallel_plan.matches(named, self._plan)
            parallelize_module(named, self._mesh["tensor"], {escape(name): style for name, style in styles.items()})
        else:
            assert self._function is not None
            if self._function(named, self._mesh) not in (None, named):
                raise ConfigError(
                    f"parallelize={self._function!r} returned another model; let it change the one that it is given."
                )
            if self._tensor > 1 and not any(map(is_sharded, module.parameters())):
                raise ConfigError(
                    f"parallelize={self._function!r} has split no parameter; let it call torch's parallelize_module("
                    "model, mesh['tensor'], plan), or use strategy='fsdp'."
                )
            parallel_plan.check_heads(named, parallel_plan.column_layers(named, None), self._tensor)
        parallel_plan.tie_again(module, tied)
        if self._tensor > 1:
            watch_first_outputs(named, self._plan)
            watch_lengths(named, self._plan, self._tensor)
            refuse_second_order(named)
        how = f"layers split over {self._tensor} ranks"
        if self._data == 1:
            return how
        policy = policies(self._precision, self._mixed_precision)
        wrapped = shard_over_data(
            module,
            device,
            blocks,
            self._mesh["data"],
            policy,
            reshard=self._reshard,
            placed=True,
            replicated=not self._sharded,
        )
        return f"{how}; {'fully_shard' if self._sharded else 'replicate'} around {wrapped}, over {self._data} groups"

    def close(self) -> None:
        self._contexts.close()
        super().close()
