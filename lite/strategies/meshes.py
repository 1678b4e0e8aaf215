"""How the ranks of a job are laid out in rows and columns: sizes are checked, and torch's DeviceMesh is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lite.errors import ConfigError


def settle_sizes(sizes: Mapping[str, int | None], world_size: int) -> dict[str, int]:
    """Fill in the one size that is None, and refuse sizes that don't make up the job.

    Args:
        sizes: The arguments' names and sizes, outermost first.
        world_size: Number of ranks.

    Raises:
        ConfigError: A size is no whole number of at least 1, or the product isn't the number of ranks.

    Example:
        >>> settle_sizes({"data_parallel": None, "tensor_parallel": 2}, 8)
        {'data_parallel': 4, 'tensor_parallel': 2}
    """
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ConfigError(f"{name}={size!r} must be a whole number of ranks, of at least 1.")
    given = {name: size for name, size in sizes.items() if size is not None}
    product = math.prod(given.values())
    written = " * ".join(f"{name}={size}" for name, size in given.items())
    missing = [name for name in sizes if name not in given]
    fits = world_size % product == 0 if missing else product == world_size
    if not fits:
        divisors = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        verb = "divides" if missing else "makes up"
        raise ConfigError(
            f"{written} but the job has {world_size} processes, and {product} {verb} that number in no way; choose "
            f"sizes whose product is {world_size} (its divisors: {divisors}), or start another number of processes."
        )
    filled = {name: world_size // product if index == 0 else 1 for index, name in enumerate(missing)}
    return {name: size if size is not None else filled[name] for name, size in sizes.items()}


def make_mesh(device_type: str, sizes: Mapping[str, int]) -> Any:
    """torch's DeviceMesh of these axes, the last one between neighbouring ranks. Collective: call on all ranks."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
