"""A record of what a constructor does to tensors on the meta device, and its replay on a real one.

With the random numbers of the moment of recording, the replay makes the very values that the constructor would have
made, one tensor after the other.
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
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from lite.precision.base import default_dtype

Moment = list[Tensor]
Deliver = Callable[[int, Tensor], None]

_all: weakref.WeakSet[Recording] = weakref.WeakSet()
_recordings = WeakIdKeyDictionary()  # of each parameter and buffer that was made in one


@dataclass(frozen=True)
class MetaTensor:
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
        self._hooks.append(register_module_module_registration_hook(self._note_module))
        _all.add(self)
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        return self

    def _note(self, module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and tensor.is_meta:
            self._versions[tensor] = 0
            _recordings[tensor] = self

    def _note_module(self, module: nn.Module, name: str, part: nn.Module | None) -> None:
        for tensor in () if part is None else (*part.parameters(), *part.buffers()):  # those of a copied layer
            self._note(module, name, tensor)

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
        set_random_state(self.play(self.start, lambda number, value: None, []), self._device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        outputs = tree_flatten(result)[0]
        tensors = [leaf for leaf in (*leaves, *outputs) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            before, after = [MetaTensor.of(leaf) for leaf in leaves], [MetaTensor.of(output) for output in outputs]
            known = {leaf.key for leaf in before if isinstance(leaf, MetaTensor)}
            made = any(isinstance(output, MetaTensor) and output.key not in known for output in after)
            if func._schema.is_mutable or made:  # a view needs no memory of its own
                self._operations.append(_Operation(func, before, spec, after))
        return result

    def add_call(self, call: Callable[[Tensor], Any], tensor: Tensor) -> None:
        """Record a function of torch.nn.init that does nothing to a meta tensor."""
        leaves, spec = tree_flatten(((tensor,), {}))
        self._operations.append(
            _Operation(call, [MetaTensor.of(leaf) for leaf in leaves], spec, [MetaTensor.of(tensor)])
        )

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is of one that was made here: it may be a copy that no module has registered."""
        key = MetaTensor.of(tensor).key
        return any(isinstance(o, MetaTensor) and o.key == key for op in self._operations for o in op.outputs)

    def changed_since(self, tensor: Tensor) -> bool:
        """Whether the tensor was written to after the block, which is not recorded."""
        version = self._versions.get(tensor)  # type: ignore[no-untyped-call]
        return version is not None and tensor._version != version

    def play(self, start: Moment, deliver: Deliver, wanted: list[MetaTensor]) -> Moment:
        """Do again what was recorded, on the device.

        Args:
            start: The random state to begin with.
            deliver: Called with the number of a wanted tensor and its values, as soon as they are final.
            wanted: Meta tensors as they were.

        Returns:
            The random state at the end; the present one is left as it is.
        """
        with torch.no_grad(), random_from(start, self._device), default_dtype(self._dtype):
            self._play(deliver, wanted)
            return random_state(self._device)

    def _play(self, deliver: Deliver, wanted: list[MetaTensor]) -> None:
        last: dict[int, int] = {}
        for number, operation in enumerate(self._operations):
            for leaf in (*operation.args, *operation.outputs):
                if isinstance(leaf, MetaTensor):
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
            if not isinstance(leaf, MetaTensor):
                return leaf
            made = torch.empty(0, dtype=leaf.dtype, device=self._device)
            return made.set_(real[leaf.key], leaf.offset, leaf.size, leaf.stride)

        for number, operation in enumerate(self._operations):
            args, kwargs = tree_unflatten([realised(leaf) for leaf in operation.args], operation.spec)
            outputs = tree_flatten(operation.call(*args, **kwargs))[0]
            for meta, value in zip(operation.outputs, outputs, strict=True):
                if isinstance(meta, MetaTensor):
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


def set_random_state(states: Moment, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def random_from(start: Moment, device: torch.device) -> Iterator[None]:
    before = random_state(device)
    set_random_state(start, device)
    try:
        yield
    finally:
        set_random_state(before, device)


def recording_of(tensor: Tensor) -> Recording | None:
    """In which recording a parameter or buffer was made, if in any."""
    recording: Recording | None = _recordings.get(tensor)  # type: ignore[no-untyped-call]
    return recording or next((other for other in _all if other.knows(tensor)), None)
