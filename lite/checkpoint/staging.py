"""Copies of a state that training can't change any more, in CPU memory that is used again from save to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lite.state import like


class Staging:
    """Holds one copy of a state.

    Whole storages are copied, each once, so that views and tied weights stay shared in the copy. The memory is
    allocated at the first copy and again only where sizes have changed; from CUDA it is pinned, copied without waiting,
    and waited for once. Sparse, quantized and conjugated tensors are the exception: they are copied anew each time.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def stage(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of nested plain values and tensors. The one before it is overwritten."""
        copier = _Copier(self._buffers)
        copied: dict[str, Any] = copier.copy(content)
        copier.finish()
        return copied


class _Copier:
    """One walk over a state."""

    def __init__(self, buffers: list[Tensor]) -> None:
        self._buffers = buffers
        self._numbers: dict[tuple[torch.device, int, int], int] = {}
        self._kept: list[Tensor] = []
        self._devices: set[torch.device] = set()

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Mapping):
            return like(value, {key: self.copy(item) for key, item in value.items()})
        if isinstance(value, (list, tuple)):
            items = [self.copy(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        return value

    def finish(self) -> None:
        del self._buffers[len(self._numbers) :]
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

    def _tensor(self, value: Tensor) -> Tensor:
        if isinstance(value, nn.Parameter) and type(value.data) is Tensor:
            return nn.Parameter(self._tensor(value.data), requires_grad=value.requires_grad)
        source = value.detach()
        if hasattr(source, "__tensor_flatten__"):  # DTensor and other tensors made of tensors
            names, context = source.__tensor_flatten__()
            # In torch 2.13 a DTensor's parts are its own tensor and the mesh.
            inner = {name: self.copy(getattr(source, name)) for name in names}
            made: Any = type(source)
            rebuilt: Tensor = made.__tensor_unflatten__(inner, context, source.size(), source.stride())
            return rebuilt
        if source.layout != torch.strided or source.is_quantized or source.is_conj() or source.is_neg():
            return source.cpu().clone()
        buffer = self._storage(source)
        staged = torch.empty(0, dtype=source.dtype)
        return staged.set_(buffer, source.storage_offset(), source.size(), source.stride())

    def _storage(self, tensor: Tensor) -> torch.UntypedStorage:
        storage = tensor.untyped_storage()
        key = (storage.device, storage.data_ptr(), storage.nbytes())
        number = self._numbers.get(key) if storage.nbytes() else None
        if number is not None:
            return self._buffers[number].untyped_storage()
        if not storage.nbytes():
            key = (storage.device, -len(self._numbers) - 1, 0)
        number = self._numbers[key] = len(self._numbers)
        on_cuda = storage.device.type == "cuda"
        buffer = self._buffers[number] if number < len(self._buffers) else None
        if buffer is None or buffer.nbytes != storage.nbytes() or buffer.is_pinned() != on_cuda:
            buffer = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=on_cuda)
            self._buffers[number : number + 1] = [buffer]
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer.copy_(source, non_blocking=on_cuda)
        if on_cuda:
            self._devices.add(storage.device)
        # A storage that only this state holds must not be freed, and its address used again, during the walk.
        self._kept.append(source)
        return buffer.untyped_storage()
