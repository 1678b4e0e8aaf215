"""The parts that DeepSpeed has made of a model's parameters and of its optimizer's state, put together and taken apart.

Relies on where deepspeed 0.19 keeps them: `p._hp_mapping` and `single_partition_of_fp32_groups` in stages 1 and 2,
`p.ds_tensor`, `grad_position` and `fp32_partitioned_groups_flat` in stage 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lite.errors import CheckpointError
from lite.sharded import Elsewhere


class Parts:
    """Of one model whose optimizer is set up, from stage 1 on.

    Args:
        engine: DeepSpeed's.
        stage: ZeRO's.
        view: The optimizer that DeepSpeed has been given.
        names: The parameters, id to name.
        is_saving: Whether a checkpoint is being written, for which rank 0 alone needs whole tensors.

    Attributes:
        closed: The model is whole again.
    """

    def __init__(
        self, engine: Any, stage: int, view: Any, names: dict[int, str], is_saving: Callable[[], bool]
    ) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = stage
        self._view = view
        self._names = names
        self._is_saving = is_saving
        self.closed = False

    # ---- the optimizer's state

    def _flats(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What the optimizer trains, with the flat tensor that this rank keeps a part of it in."""
        zero = self._zero
        if self._stage == 3:
            for group in zero.fp16_groups:
                for p in group:
                    yield p, zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(p)][0]]
            return
        for i, group in enumerate(zero.bit16_groups):
            for p in group:
                yield p, zero.single_partition_of_fp32_groups[i]

    def whole_state(self) -> dict[Tensor, dict[str, Any]]:
        """The raw optimizer's state, on the CPU. Collective: call on all ranks.

        While a checkpoint is saved only rank 0 has values.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        elsewhere = self._is_saving() and dist.get_rank() > 0
        state = self._view.state
        whole: dict[Tensor, dict[str, Any]] = {}
        self._link_state()
        for parameter, flat in self._flats():
            if not state.get(flat):
                continue
            whole[parameter] = mine = {}
            for key, value in state[flat].items():
                if not isinstance(value, Tensor) or value.shape != flat.shape:
                    mine[key] = value.clone() if isinstance(value, Tensor) else value
                    continue
                full = safe_get_full_optimizer_state(parameter, key)
                mine[key] = Elsewhere.like(full.shape, full.dtype) if elsewhere else full.cpu().clone()
        return whole

    def take_state(self, whole: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Let DeepSpeed's optimizer go on from a raw optimizer's state.

        Raises:
            CheckpointError: Parameters that DeepSpeed keeps together have taken different numbers of steps.
        """
        state = self._view.state
        state.clear()
        for parameter, flat in self._flats():
            if parameter not in whole or not whole[parameter]:
                continue
            for key, value in whole[parameter].items():
                if key == "step" or not isinstance(value, Tensor) or tuple(value.shape) != self._shape(parameter):
                    value = value.clone() if isinstance(value, Tensor) else value
                    if not _alike(state[flat].setdefault(key, value), value):
                        raise CheckpointError(
                            f"{key!r} is {state[flat][key]} for some parameters and {value} for "
                            f"{self._names[id(parameter)]!r}, and DeepSpeed keeps one for all of a param_group; load "
                            "with strategy='ddp' or 'fsdp', or give these parameters a group of their own."
                        )
                    continue
                if key not in state[flat]:
                    state[flat][key] = torch.zeros_like(flat)
                to, part = self._part(parameter, flat, state[flat][key]), self._cut(parameter, value)
                to[: part.numel()].copy_(part)
        given = [flat for p, flat in self._flats() if whole.get(p)]
        lacking = [p for p, flat in self._flats() if not whole.get(p) and any(flat is other for other in given)]
        if lacking:
            raise CheckpointError(
                f"{self._names[id(lacking[0])]!r} has no optimizer state, but others of its param_group have, and "
                "DeepSpeed keeps them together; load with strategy='ddp' or 'fsdp'."
            )
        self._link_state()

    def _link_state(self) -> None:
        """Stages 1 and 2: let parameters know their parts of the optimizer's state.

        deepspeed 0.19.8 does so when the first param_group has stepped, and the others' state is not there yet.
        """
        if self._stage < 3:
            self._zero._hp_optimizer_states_linked = False
            if self._view.state:
                self._zero._lazy_init_hp_params_optimizer_state()

    def _part(self, parameter: Any, flat: Tensor, kept: Tensor) -> Tensor:
        """Where in a flat tensor this rank's part of a parameter lies."""
        if self._stage == 3:
            _, start, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            return kept.detach().narrow(0, start, size)
        mapping = parameter._hp_mapping
        if mapping is None:
            return kept.detach()[:0]
        place = mapping.hp_fragment_address
        return kept.detach().narrow(0, place.start, place.numel)

    def _cut(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, flat."""
        flat = value.detach().reshape(-1)
        if self._stage == 3:
            start = min(parameter.ds_zero_partition_rank * parameter.partition_numel(), flat.numel())
            return flat[start : start + parameter.partition_numel()]
        mapping = parameter._hp_mapping
        if mapping is None:
            return flat[:0]
        place = mapping.lp_fragment_address
        return flat.narrow(0, place.start, place.numel)

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape if self._stage == 3 else parameter.shape)

    # ---- the model's state in stage 3

    def gathered(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which the module's own parameters are whole. Collective: call on all ranks."""
        import deepspeed

        held = [p for p in module._parameters.values() if p is not None]
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(held, enabled=bool(held))
        return context

    def put_together(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
        """A hook of each part's `state_dict`: whole tensors on the CPU, for those that hold empty ones."""
        elsewhere = self._is_saving() and dist.get_rank() > 0
        with self.gathered(module):
            for name, parameter in module._parameters.items():
                key = f"{prefix}{name}"
                if parameter is not None and key in state_dict:
                    value = parameter.detach()
                    state_dict[key] = Elsewhere.like(value.shape, value.dtype) if elsewhere else value.cpu().clone()

    def cut_for_loading(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """A hook of each part's `load_state_dict`: this rank's part of each whole tensor goes where it belongs."""
        for name, parameter in module._parameters.items():
            key = f"{prefix}{name}"
            if parameter is None or key not in state_dict:
                continue
            value = state_dict[key]
            if tuple(value.shape) == self._shape(parameter):
                self.write(parameter, self._cut(parameter, value))
            else:
                errors.append(
                    f"size mismatch for {key}: copying a param with shape {tuple(value.shape)} from checkpoint, the "
                    f"shape in current model is {self._shape(parameter)}."
                )
            state_dict[key] = parameter.detach()  # which torch copies onto itself
        if any(p is not None and p.numel() for p in module._parameters.values()):
            self.rewritten()

    # ---- this rank's parts of parameters

    def part(self, parameter: Any) -> Tensor:
        """What this rank has of a parameter: flat in stage 3, where its end may be padding."""
        local: Tensor = parameter.ds_tensor if self._stage == 3 else parameter
        return local.detach()

    def write(self, parameter: Any, part: Tensor) -> None:
        """Change it; call `rewritten` after the last one."""
        local = self.part(parameter)
        local.reshape(-1)[: part.numel()].copy_(part.reshape(-1))

    def rewritten(self) -> None:
        """Parts were changed: what was put together of the old ones is dropped."""
        if self._stage == 3:
            self._engine.empty_partition_cache()

    def whole(self, parameter: Any, part: Tensor) -> Tensor:
        """A tensor of the parameter's shape of which all ranks have such parts. Collective: call on all ranks."""
        if self._stage < 3:
            return part
        together = torch.empty(part.numel() * dist.get_world_size(), dtype=part.dtype, device=part.device)
        dist.all_gather(list(together.chunk(dist.get_world_size())), part.contiguous())
        return together[: parameter.ds_numel].view(parameter.ds_shape)

    def cut(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, laid out as `part` is."""
        if self._stage < 3:
            return value
        mine = self._cut(parameter, value)
        return torch.cat([mine, mine.new_zeros(parameter.partition_numel() - mine.numel())])

    def shape(self, parameter: Any) -> tuple[int, ...]:
        """A parameter's own shape."""
        return self._shape(parameter)


def _alike(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
