"""Whether ranks that must hold the same values do: digests of tensors, compared bit for bit. It changes nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lite import collectives
from lite.errors import DesyncError
from lite.precision.base import is_packed
from lite.state import parameters_of
from lite.strategies.base import Engine

_CHUNK = 1 << 18  # 2 MiB at a time: it stays in a cache, and needs next to no memory
_STRIDE = -7046029254386353131  # 2**64 / golden ratio, odd: products of it spread over all bits (Knuth, TAOCP 6.4)

_weights: dict[torch.device, Tensor] = {}


def check_sync(
    modules: Mapping[nn.Module, Engine | None], optimizers: Iterable[Optimizer], *, buffers: bool | None
) -> None:
    """Compare everything over the ranks. Collective: call on all ranks. See `Lite.check_sync`.

    Raises:
        DesyncError: (on all ranks alike) Something differs.
    """
    if collectives.world_size() == 1:
        return
    names, hashes = digest([*named_state(modules, optimizers, buffers=buffers)])
    rows = _layout(names) + _mix(hashes)
    if len(set(collectives.gather_numbers(rows))) == 1:
        return
    tables: list[Any] = [None] * collectives.world_size()
    dist.all_gather_object(tables, dict(zip(names, hashes.tolist(), strict=True)))
    raise DesyncError(explain(tables))


def named_state(
    modules: Mapping[nn.Module, Engine | None], optimizers: Iterable[Optimizer], *, buffers: bool | None = None
) -> Iterator[tuple[str, Any]]:
    """Names and values of all that ranks have in common: parameters, buffers, optimizer state and hyperparameters.

    Args:
        modules: Set-up models with their engines.
        optimizers: Set-up optimizers.
        buffers: Whether buffers are among them; None leaves out those that each forward takes from rank 0 anyway.
    """
    for index, (module, engine) in enumerate(modules.items()):
        if any(p.is_meta for p in module.parameters()):
            continue  # its layers lie on different ranks, once each
        model = "model" if len(modules) == 1 else f"model[{index}]"
        yield from _leaves(model, dict(module.named_parameters()))
        if buffers or (buffers is None and not (engine is not None and engine.syncs_buffers)):
            yield from _leaves(model, dict(module.named_buffers()))
    for index, optimizer in enumerate(optimizers):
        # An optimizer says so itself where each rank has state of its own.
        local = getattr(optimizer, "state_is_local", False)
        held = parameters_of(optimizer)
        held = [] if local or any(p.is_meta for p in held) else held
        for number, parameter in enumerate(held):
            # .get: state is a defaultdict, which reading would fill
            yield from _leaves(f"optimizer[{index}].state.{number}", optimizer.state.get(parameter, {}))
        for number, group in enumerate(optimizer.param_groups):
            settings = {key: value for key, value in group.items() if key != "params"}
            yield from _leaves(f"optimizer[{index}].param_groups.{number}", settings)


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif isinstance(value, Tensor):
        placements = getattr(value, "placements", None)  # a DTensor: only what is replicated must be equal
        if placements is None:
            yield name, value
        elif all(placement.is_replicate() for placement in placements):
            yield name, value.to_local()  # type: ignore[attr-defined]
    elif value is None or isinstance(value, (bool, int, float, complex, str)):
        yield name, value


def digest(state: list[tuple[str, Any]]) -> tuple[list[str], Tensor]:
    """Return the names, with shapes and dtypes, and an int64 hash for each, on the device of the first tensor."""
    names, hashes = [], []
    with torch.no_grad():
        for name, value in state:
            if isinstance(value, Tensor):
                names.append(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
                hashes.append(hash_tensor(value))
            else:
                names.append(name)
                hashes.append(torch.tensor(_hash_text(repr(value))))
        devices = {h.device for h in hashes}
        if len(devices) <= 1:
            return names, torch.stack(hashes) if hashes else torch.zeros(0, dtype=torch.int64)
        # Most lie on the device; the few on the CPU (step counts) are sent there, in one piece.
        device = next(d for d in devices if d.type != "cpu")
        here = torch.stack([h for h in hashes if h.device.type == "cpu"]).to(device)
        rest = iter(here.unbind())
        return names, torch.stack([next(rest) if h.device.type == "cpu" else h.to(device) for h in hashes])


def hash_tensor(value: Tensor) -> Tensor:
    """An int64 hash of the tensor's bits, 0-dim, on its device, without waiting for it.

    The bits are read as 64-bit words, mixed with their positions, and summed modulo 2**64: one flipped bit always
    changes it; several, or words that trade places, do but for rare chances. NaNs are equal when their bits are.
    """
    if is_packed(value):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        hashes = torch.stack([hash_tensor(getattr(value, name)) for name in names])
        return hash_tensor(hashes)
    value = value.detach()
    if value.layout != torch.strided:
        value = value.to_dense()
    value = value.resolve_conj().resolve_neg().reshape(-1)
    octets = collectives.as_bytes((torch.view_as_real(value) if value.is_complex() else value).contiguous())
    weights = _weights_on(value.device)
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    whole = octets.numel() // 8 * 8
    if whole and octets.storage_offset() % 8:
        octets = octets.clone()
    words = octets[:whole].view(torch.int64)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        total = total * _STRIDE + _scatter(part * weights[: part.numel()]).sum()
    rest = octets[whole:]
    if rest.numel():
        # Seven at most, each shifted to bits of its own.
        shifts = torch.arange(0, 8 * rest.numel(), 8, device=value.device)
        total = total * _STRIDE + (rest.to(torch.int64) << shifts).sum()
    return total


def _scatter(words: Tensor) -> Tensor:
    """Mix the bits of each word well, one to one, or flipped sign bits would cancel in pairs.

    Source: the finalizer of SplitMix64, https://doi.org/10.1145/2714064.2660195
    """
    words = (words ^ ((words >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    words = (words ^ ((words >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return words ^ ((words >> 31) & (2**33 - 1))


def explain(tables: list[dict[str, int]]) -> str:
    """The error for hashes that differ: the first tensor, and the ranks that are in the minority.

    Args:
        tables: Each rank's hashes by name.

    Example:
        >>> explain([{"model.w": 1}, {"model.w": 2}, {"model.w": 1}])
        'ranks are out of step: model.w on rank 1 differs from ranks 0, 2; 1 of 1 values differ.'
    """
    names = dict.fromkeys(name for table in tables for name in table)
    differing = [name for name in names if len({table.get(name) for table in tables}) > 1]
    if not differing:
        return "ranks are out of step: they hold the same values, but set up in a different order."
    first = differing[0]
    values = [table.get(first) for table in tables]
    counts = Counter(values)
    most = max(counts.values())
    # Among equally many, rank 0's side is the reference.
    reference = next(value for value in values if counts[value] == most)
    odd = [rank for rank, value in enumerate(values) if value != reference]
    even = [rank for rank, value in enumerate(values) if value == reference]
    missing = [rank for rank, value in enumerate(values) if value is None]
    text = f"ranks are out of step: {first} on {_ranks(odd)} differs from {_ranks(even)}"
    if missing:
        text += f" ({_ranks(missing)} has no such value)"
    return f"{text}; {len(differing)} of {len(names)} values differ."


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _weights_on(device: torch.device) -> Tensor:
    """Odd numbers that are all different."""
    if device not in _weights:
        _weights[device] = (torch.arange(1, _CHUNK + 1, device=device) * _STRIDE) | 1
    return _weights[device]


def _mix(hashes: Tensor) -> Tensor:
    """One number of them all, in which the position counts."""
    return hash_tensor(hashes)


def _layout(names: list[str]) -> int:
    return _hash_text("\n".join(names))


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
