"""The parts that DeepSpeed has made of a model's parameters and of its optimizer's state, put together and taken apart.

Relies on where deepspeed 0.19 keeps them: `p._hp_mapping` and `single_partition_of_fp32_groups` in stages 1 and 2,
`p.ds_tensor`, `grad_position` and `fp32_partitioned_groups_flat` in stage 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lite.errors import CheckpointError, UsageError, some
from lite.sharded import Elsewhere, whole_shape
from lite.strategies.deepspeed_wiring import gathered


class Parts:
    """Of one model whose optimizer is set up, from stage 1 on.

    Args:
        engine: DeepSpeed's.
        stage: ZeRO's.
        view: The optimizer that DeepSpeed has been given.
        groups: The parameters of each of the user's param_groups.
        names: The parameters, id to name.
        is_saving: Whether a checkpoint is being written, for which rank 0 alone needs whole tensors.

    Attributes:
        closed: The model is whole again.
    """

    def __init__(
        self,
        engine: Any,
        stage: int,
        view: Any,
        groups: list[list[Tensor]],
        names: dict[int, str],
        is_saving: Callable[[], bool],
    ) -> None:
        self._engine = engine
        self._zero = engine.optimizer
        self._stage = stage
        self._view = view
        self._groups = groups
        self._names = names
        self._is_saving = is_saving
        self.closed = False
        # Those of which this rank has a part, in stages 1 and 2.
        self._mine = {id(p) for p, _ in self._flats() if getattr(p, "_hp_mapping", None) is not None}

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

        Raises:
            UsageError: Something has taken the places of parts off the parameters.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        self._check_places()
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
            CheckpointError: Parameters that DeepSpeed keeps together differ in their state; nothing was changed.
            UsageError: Something has taken the places of parts off the parameters.
        """
        self.check_state(whole)
        self._check_places()
        state = self._view.state
        state.clear()
        for parameter, flat in self._flats():
            if parameter not in whole or not whole[parameter]:
                continue
            for key, value in whole[parameter].items():
                if is_shared(key, value, self._shape(parameter)):
                    state[flat].setdefault(key, value.clone() if isinstance(value, Tensor) else value)
                    continue
                if key not in state[flat]:
                    state[flat][key] = torch.zeros_like(flat)
                to, part = self._part(parameter, flat, state[flat][key]), self._cut(parameter, value)
                to[: part.numel()].copy_(part)
        self._link_state()

    def check_state(self, whole: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Refuse a raw optimizer's state that `take_state` can't take.

        Raises:
            CheckpointError: Parameters that DeepSpeed keeps together differ in their state.
        """
        problem = misfit(whole, self._groups, self._names)
        if problem is not None:
            raise CheckpointError(
                f"{problem}; load with strategy='ddp' or 'fsdp', or give these parameters a group of their own."
            )

    def _check_places(self) -> None:
        lost = [p for p, _ in self._flats() if id(p) in self._mine and getattr(p, "_hp_mapping", None) is None]
        if lost:
            raise UsageError(
                f"DeepSpeed has lost where this rank's part of {some([self._names[id(p)] for p in lost])} lies, so the "
                "optimizer's state can't be put together: another DeepSpeed engine of the same parameters was "
                "destroyed since lite.setup; make none beside lite's, and go on from the last checkpoint in new "
                "processes."
            )

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
        if id(parameter) not in self._mine:
            return kept.detach()[:0]
        place = parameter._hp_mapping.hp_fragment_address
        return kept.detach().narrow(0, place.start, place.numel)

    def _cut(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor, flat."""
        flat = value.detach().reshape(-1)
        if self._stage == 3:
            start = min(parameter.ds_zero_partition_rank * parameter.partition_numel(), flat.numel())
            return flat[start : start + parameter.partition_numel()]
        if id(parameter) not in self._mine:
            return flat[:0]
        place = parameter._hp_mapping.lp_fragment_address
        return flat.narrow(0, place.start, place.numel)

    def _shape(self, parameter: Any) -> tuple[int, ...]:
        return whole_shape(parameter)

    # ---- the model's state in stage 3

    def gathered(self, module: nn.Module) -> AbstractContextManager[Any]:
        """A context in which the module's own parameters are whole. Collective: call on all ranks."""
        return gathered([p for p in module._parameters.values() if p is not None])

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
        if any(p is not None and p.numel() for p in module._parameters.values()):
            self.rewritten()  # a small one is whole between steps, and empty from here on
        for name, parameter in module._parameters.items():
            if parameter is not None and f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = parameter.detach()  # which torch copies onto itself

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


def is_shared(key: str, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether an entry of a parameter's state is no tensor of its shape: DeepSpeed keeps one for a whole group."""
    return key == "step" or tuple(getattr(value, "shape", ("none",))) != shape


def misfit(
    whole: Mapping[Tensor, Mapping[str, Any]], groups: Iterable[Sequence[Tensor]], names: Mapping[int, str]
) -> str | None:
    """Why DeepSpeed can't go on from a raw optimizer's state; None where it can.

    Args:
        whole: The state, by parameter.
        groups: The parameters of each param_group; what is frozen doesn't count.
        names: The parameters' names, by id.
    """
    for group in groups:
        trained = [p for p in group if p.requires_grad]
        given = [p for p in trained if whole.get(p)]
        lacking = [p for p in trained if not whole.get(p)]
        if given and lacking:
            return (
                f"{names[id(lacking[0])]!r} has no optimizer state, but others of its param_group have, and DeepSpeed "
                "keeps them together"
            )
        kept: dict[str, Any] = {}
        for parameter in given:
            for key, value in whole[parameter].items():
                if is_shared(key, value, whole_shape(parameter)) and not _alike(kept.setdefault(key, value), value):
                    return (
                        f"{key!r} is {kept[key]} for some parameters and {value} for {names[id(parameter)]!r}, and "
                        "DeepSpeed keeps one for all of a param_group"
                    )
    return None


def _alike(one: Any, other: Any) -> bool:
    one, other = (value.read() if hasattr(value, "read_part") else value for value in (one, other))
    return bool(torch.equal(one, other)) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
