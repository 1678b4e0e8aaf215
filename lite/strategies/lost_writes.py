"""What is written into a sharded model's weights where it would be lost without a word: refused, by the parameter.

FSDP computes with copies that it puts together from all ranks' parts and frees again, and nothing that is written into
them reaches the parts. Nor does `parameter.data = value` reach a DTensor's part. And what is written into the parts
between a forward and its backward would be in the weights that the latter puts together; it is passed on to the copies'
`_version`, so that autograd says by itself, where a backward needs what it was, as on one process.

Relies on facts of torch 2.13: FSDP fills the copies without a change of their `_version`, an assigned `data` brings a
storage of its own, and a DTensor that is written into has another `_version`, but for `torch._foreach_*` and fused
steps (of steps the optimizer tells). What is written through `parameter.data` (`.data.mul_()`) has a version of its
own, and is not seen.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from lite.errors import UsageError
from lite.sharded import is_sharded
from lite.strategies import remedies

_storage = Tensor.untyped_storage  # the same object while somebody holds it
_version = operator.attrgetter("_version")


class LostWrites:
    """Looks at a model's weights after its runs.

    Args:
        module: Gives the model.
        held: What fully_shard keeps for each of its parameters, by name.
    """

    def __init__(self, module: Callable[[], nn.Module], held: Mapping[str, Any]) -> None:
        self._module = module
        self._names = list(held)
        self._held = list(held.values())
        self._parts: list[Tensor] = [one.sharded_param for one in self._held]
        self._to_come = dict(held)
        self._copied: list[str] = []
        self._copies: list[Tensor] = []
        self._versions: list[int] = []
        self._homes: list[Any] = []
        self._part_versions = list(map(_version, self._parts))
        self._note_parts()

    def _note_parts(self) -> None:
        self._storages = [_storage(part) for part in self._parts]
        self._addresses = [one._sharded_param_data.data_ptr() for one in self._held]

    @property
    def lacks_copies(self) -> bool:
        """Whether FSDP had not put all weights together yet at the last look."""
        return bool(self._to_come)

    def check_written(self) -> None:
        """Refuse what was written, since the last look, into weights that FSDP had put together."""
        if self._to_come:
            self._find_copies()
        versions = list(map(_version, self._copies))
        if versions != self._versions:
            before, self._versions = self._versions, versions
            self._refuse_copy(operator.ne, versions, before)

    def pass_on(self, stepped: Iterable[Any] = ()) -> None:
        """Let a backward of a forward before now fail as on one process, where it needs what has changed since.

        Args:
            stepped: What fully_shard keeps for parameters that an optimizer has changed.
        """
        with torch._C.DisableTorchFunctionSubclass():
            versions = list(map(_version, self._parts))
        before, self._part_versions = self._part_versions, versions
        changed = list(stepped)
        if versions != before:
            looks = zip(self._held, versions, before, strict=True)
            changed += [held for held, version, former in looks if version != former]
        if changed:
            increment_version([held._unsharded_param for held in changed if hasattr(held, "_unsharded_param")])
            self._versions = list(map(_version, self._copies))

    def check_assigned(self) -> None:
        """Refuse `parameter.data = value`, since the last look, of parts and of weights that FSDP had put together."""
        with torch._C.DisableTorchFunctionSubclass():  # half of the time that DTensors take
            if not all(map(operator.is_, map(_storage, self._copies), self._homes)):
                self._refuse_copy(operator.is_not, map(_storage, self._copies), self._homes)
            if all(map(operator.is_, map(_storage, self._parts), self._storages)):
                return
            looks = zip(self._names, self._parts, self._storages, self._held, self._addresses, strict=True)
            found = [
                name
                for name, part, own, held, address in looks
                # A conversion exchanges the part, too.
                if _storage(part) is not own and held._sharded_param_data.data_ptr() == address
            ]
            self._note_parts()
        if found:
            raise UsageError(remedies.assigned_data(self._module(), found[0]))

    def _refuse_copy(self, differs: Callable[[Any, Any], bool], now: Any, before: Any) -> None:
        name = next(name for name, *values in zip(self._copied, now, before, strict=True) if differs(*values))
        raise UsageError(remedies.written_copy(self._module(), name))

    def _find_copies(self) -> None:
        """Take up the copies that FSDP has made since: it makes each once, when its layer first runs."""
        for name, held in list(self._to_come.items()):
            copy = getattr(held, "_unsharded_param", None)
            if copy is None:
                continue
            del self._to_come[name]
            gathered = held.all_gather_outputs
            # Not those that a subclass of tensors makes by itself, nor those of inference, which have no version.
            plain = len(gathered) == 1 and not hasattr(held._sharded_local_tensor, "fsdp_post_all_gather")
            if plain and not gathered[0].is_inference():
                self._copied.append(name)
                self._copies.append(copy)
                self._versions.append(0)
                self._homes.append(_storage(copy if is_sharded(copy) else gathered[0]))
