"""Modules that were made on the meta device, without memory: their values come into being in `setup`.

One tensor after the other is made whole, and cut to this rank's part before the next one is there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lite.errors import ConfigError
from lite.recording import MetaTensor, Moment, Recording, random_from, random_state, recording_of, set_random_state
from lite.sharded import cut, is_sharded, local


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield part, table, name, tensor


def check_deferred(module: nn.Module) -> None:
    """Refuse meta tensors that nobody knows the values of.

    Raises:
        ConfigError: They were neither recorded, nor made by a module with `reset_parameters`; or were written to since.
    """
    for part, _, name, tensor in _tensors(module):
        if not tensor.is_meta:
            continue
        kind = type(part).__name__
        recording = recording_of(tensor)
        if recording is None and not callable(getattr(part, "reset_parameters", None)):
            raise ConfigError(
                f"{type(module).__name__} has {name!r} of a {kind} on the meta device, without values; make the model "
                f"within `with lite.init_module(empty_init='meta'):`, or give {kind} a method reset_parameters() that "
                "fills all that it holds."
            )
        if recording is not None and recording.changed_since(tensor):
            raise ConfigError(
                f"{name!r} of a {kind} was written to on the meta device, where that has no effect, after the block of "
                "lite.init_module(empty_init='meta'); do it within the block, or after lite.setup."
            )


class Deferred:
    """Where the values of a module's meta tensors will come from; taken before the module is converted or sharded.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._recorded: dict[Recording, list[tuple[MetaTensor, dict[str, Any], str]]] = {}
        self._to_reset: dict[nn.Module, str] = {}  # and its class, before it is sharded
        seen: dict[int, Tensor] = {}
        for part, table, name, tensor in _tensors(module):
            if not tensor.is_meta:
                continue
            recording = recording_of(tensor)
            if recording is None:
                self._to_reset[part] = type(part).__name__
                continue
            if id(tensor) not in seen:  # tied ones are one tensor
                seen[id(tensor)] = tensor
                self._recorded.setdefault(recording, []).append((MetaTensor.of(tensor), table, name))

    def fill(self, device: torch.device, agree: Callable[[Moment], Moment]) -> None:
        """Give every tensor its values, one whole tensor at a time. `allocate` has given it memory before.

        Args:
            device: Where the values are made.
            agree: Makes random states rank 0's on all ranks.
        """
        for recording, wanted in self._recorded.items():

            def deliver(index: int, value: Tensor, wanted: Any = wanted) -> None:
                _, table, name = wanted[index]
                _put(table[name], value)

            recording.play(agree(recording.start), deliver, [meta for meta, _, _ in wanted])
        if self._to_reset:
            kinds = ", ".join(sorted(set(self._to_reset.values())))
            warnings.warn(
                f"parameters on the meta device get what reset_parameters() gives them ({kinds}): what constructors "
                "did to them besides is not known. Make the model within `with lite.init_module(empty_init='meta'):` "
                "for its constructor's values, or load a checkpoint.",
                stacklevel=5,
            )
            with random_from(agree(random_state(device)), device):
                for part in self._to_reset:
                    _reset(part, device)
                after = random_state(device)
            set_random_state(after, device)


def _put(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        if is_sharded(target):
            local(target).copy_(local(cut(value, target)))
        else:
            target.copy_(value)


def _reset(part: nn.Module, device: torch.device) -> None:
    """Let a module fill whole tensors, and keep this rank's parts."""
    tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
    held = [(table, name, t) for table in tables for name, t in table.items() if t is not None]
    for table, name, tensor in held:
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        table[name] = nn.Parameter(whole, requires_grad=tensor.requires_grad) if table is part._parameters else whole
    filled: list[Tensor] = []
    try:
        part.reset_parameters()  # type: ignore[operator]
        filled = [table[name] for table, name, _ in held]
    finally:
        for table, name, tensor in held:
            table[name] = tensor
    for (_, _, tensor), value in zip(held, filled, strict=True):
        _put(tensor, value.detach())


def allocate(module: nn.Module, device: torch.device) -> None:
    """Give every meta tensor memory, of this rank's part alone where it is sharded; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    kept = []
    for part, table, name, tensor in list(_tensors(module)):
        if not tensor.is_meta:
            continue
        if id(tensor) not in made:
            kept.append(tensor)
            made[id(tensor)] = _allocated(tensor, device, parameter=table is part._parameters)
        table[name] = made[id(tensor)]


def _allocated(tensor: Any, device: torch.device, *, parameter: bool) -> Tensor:
    if is_sharded(tensor):
        from torch.distributed.tensor import DTensor

        part = torch.empty_like(local(tensor), device=device)
        made: Tensor = DTensor.from_local(
            part,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    else:
        made = torch.empty_like(tensor, device=device)
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
