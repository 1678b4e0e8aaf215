"""Modules that were made on the meta device, without memory, and how their values come into being afterwards.

What a constructor does to meta tensors is recorded, operation by operation. Playing it back on a real device, with the
random numbers of the moment of recording, makes the very values that the constructor would have made, one tensor after
the other, so that each can be cut to this rank's part before the next one is there.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from lite.errors import ConfigError
from lite.precision.base import default_dtype
from lite.sharded import cut, is_sharded, local

Moment = list[Tensor]
Deliver = Callable[[int, Tensor], None]

_recordings = WeakIdKeyDictionary()  # of each parameter and buffer that was made in one


@dataclass(frozen=True)
class _Meta:
    """A meta tensor as it was at one moment; a parameter's `data` may be exchanged later."""

    storage: Any  # kept alive, so that no other storage gets its number
    key: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, leaf: Any) -> Any:
        """What stands for a leaf in a recording: itself, unless it is a meta tensor."""
        if not isinstance(leaf, Tensor) or not leaf.is_meta:
            return leaf
        storage = leaf.untyped_storage()
        return cls(storage, storage._cdata, leaf.dtype, leaf.size(), leaf.stride(), int(leaf.storage_offset()))


@dataclass(frozen=True)
class _Operation:
    call: Any
    args: list[Any]
    spec: Any
    outputs: list[Any]


class Recording(TorchDispatchMode):
    """Records what happens to meta tensors within its `with` block.

    Args:
        device: Where the values will be made, and whose random numbers they are drawn from.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._dtype = torch.get_default_dtype()
        self.start = random_state(device)
        self._operations: list[_Operation] = []
        self._hooks: list[Any] = []
        self._calls = _Calls(self)
        self._versions = WeakIdKeyDictionary()  # of the parameters and buffers of modules, at the block's end

    def __enter__(self) -> Recording:
        self._dtype = torch.get_default_dtype()
        super().__enter__()  # type: ignore[no-untyped-call]
        for register in (register_module_parameter_registration_hook, register_module_buffer_registration_hook):
            self._hooks.append(register(self._note))
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        return self

    def _note(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.is_meta:
            self._versions[tensor] = 0
            _recordings[tensor] = self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        for tensor in list(self._versions):
            self._versions[tensor] = tensor._version

    def draw(self) -> None:
        """Let random numbers go on as after a constructor that makes values: call it after the block.

        How many it draws is not to be known but by playing it, for nothing.
        """
        _set_random_state(self.play(self.start, lambda number, value: None, []), self._device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        outputs = tree_flatten(result)[0]
        tensors = [leaf for leaf in (*leaves, *outputs) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            before, after = [_Meta.of(leaf) for leaf in leaves], [_Meta.of(output) for output in outputs]
            known = {leaf.key for leaf in before if isinstance(leaf, _Meta)}
            made = any(isinstance(output, _Meta) and output.key not in known for output in after)
            if func._schema.is_mutable or made:  # a view needs no memory of its own
                self._operations.append(_Operation(func, before, spec, after))
        return result

    def add_call(self, call: Callable[[Tensor], Any], tensor: Tensor) -> None:
        """Record a function of torch.nn.init that does nothing to a meta tensor."""
        leaves, spec = tree_flatten(((tensor,), {}))
        self._operations.append(_Operation(call, [_Meta.of(leaf) for leaf in leaves], spec, [_Meta.of(tensor)]))

    def changed_since(self, tensor: Tensor) -> bool:
        """Whether the tensor was written to after the block, which is not recorded."""
        version = self._versions.get(tensor)  # type: ignore[no-untyped-call]
        return version is not None and tensor._version != version

    def play(self, start: Moment, deliver: Deliver, wanted: list[_Meta]) -> Moment:
        """Do again what was recorded, on the device.

        Args:
            start: The random state to begin with.
            deliver: Called with the number of a wanted tensor and its values, as soon as they are final.
            wanted: Meta tensors as they were.

        Returns:
            The random state at the end; the present one is left as it is.
        """
        with torch.no_grad(), _random_from(start, self._device), default_dtype(self._dtype):
            self._play(deliver, wanted)
            return random_state(self._device)

    def _play(self, deliver: Deliver, wanted: list[_Meta]) -> None:
        last: dict[int, int] = {}
        for number, operation in enumerate(self._operations):
            for leaf in (*operation.args, *operation.outputs):
                if isinstance(leaf, _Meta):
                    last[leaf.key] = number
        ending: dict[int, list[int]] = {}
        for key, number in last.items():
            ending.setdefault(number, []).append(key)
        by_key: dict[int, list[int]] = {}
        for index, meta in enumerate(wanted):
            by_key.setdefault(meta.key, []).append(index)
        real: dict[int, torch.UntypedStorage] = {}

        def realised(leaf: Any) -> Any:
            if isinstance(leaf, torch.device) and leaf.type == "meta":
                return self._device
            if not isinstance(leaf, _Meta):
                return leaf
            made = torch.empty(0, dtype=leaf.dtype, device=self._device)
            return made.set_(real[leaf.key], leaf.offset, leaf.size, leaf.stride)

        for number, operation in enumerate(self._operations):
            args, kwargs = tree_unflatten([realised(leaf) for leaf in operation.args], operation.spec)
            outputs = tree_flatten(operation.call(*args, **kwargs))[0]
            for meta, value in zip(operation.outputs, outputs, strict=True):
                if isinstance(meta, _Meta):
                    real.setdefault(meta.key, value.untyped_storage())
            for key in ending.get(number, ()):
                for index in by_key.get(key, ()):
                    deliver(index, realised(wanted[index]))
                del real[key]


class _Calls(TorchFunctionMode):
    """Sees what never becomes an operation on a meta tensor: Python's values, and functions that look before they act.

    torch 2.13: `trunc_normal_`, `orthogonal_` and others of torch.nn.init return at once where `tensor.is_meta`.
    """

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = weakref.ref(recording)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FROM_VALUES and kwargs.get("device") is None and not isinstance(args[0], Tensor):
            grad = kwargs.pop("requires_grad", False)
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta").requires_grad_(grad)
        result = func(*args, **kwargs)
        if func == _IS_META and result:
            frame = sys._getframe(1)
            if frame.f_globals.get("__name__") == "torch.nn.init":
                self._note_call(frame, args[0])
        return result

    def _note_call(self, frame: types.FrameType, tensor: Tensor) -> None:
        function, arguments = getattr(nn.init, frame.f_code.co_name), frame.f_code.co_varnames
        given = {name: frame.f_locals[name] for name in arguments[: frame.f_code.co_argcount]}
        recording = self._recording()
        first = next(iter(given))
        if recording is not None and given.pop(first) is tensor:
            recording.add_call(functools.partial(function, **given), tensor)


_IS_META: Any = Tensor.is_meta.__get__  # type: ignore[attr-defined]
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


def random_state(device: torch.device) -> Moment:
    """torch's random states that new tensors on the device may be drawn from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: Moment, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _random_from(start: Moment, device: torch.device) -> Iterator[None]:
    before = random_state(device)
    _set_random_state(start, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


# ---- whole modules


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
        recording = _recording(tensor)
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


def _recording(tensor: Tensor) -> Recording | None:
    recording: Recording | None = _recordings.get(tensor)  # type: ignore[no-untyped-call]
    return recording


class Deferred:
    """Where the values of a module's meta tensors will come from; taken before the module is converted or sharded.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._recorded: dict[Recording, list[tuple[_Meta, dict[str, Any], str]]] = {}
        self._to_reset: dict[nn.Module, None] = {}
        seen: dict[int, Tensor] = {}
        for part, table, name, tensor in _tensors(module):
            if not tensor.is_meta:
                continue
            recording = _recording(tensor)
            if recording is None:
                self._to_reset[part] = None
                continue
            if id(tensor) not in seen:  # tied ones are one tensor
                seen[id(tensor)] = tensor
                self._recorded.setdefault(recording, []).append((_Meta.of(tensor), table, name))

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
            with _random_from(agree(random_state(device)), device):
                for part in self._to_reset:
                    _reset(part, device)
                after = random_state(device)
            _set_random_state(after, device)


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
