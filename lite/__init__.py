"""Take a PyTorch training loop from one CPU to many GPUs with a few changed lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lite.errors import (
    CheckpointError,
    ConfigError,
    DesyncError,
    LaunchError,
    LiteError,
    MissingExtraError,
    NonFiniteError,
    PeerError,
    UsageError,
)
from lite.lite import Lite
from lite.seed import seed_everything
from lite.state import Stateful
from lite.strategies import DDPStrategy, PowerSGD, SingleStrategy, Strategy

if TYPE_CHECKING:
    from lite.memory import memory_estimate
    from lite.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        LocalSGDStrategy,
        ModelParallelStrategy,
        PipelineStrategy,
    )

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "DesyncError",
    "FSDPStrategy",
    "LaunchError",
    "Lite",
    "LiteError",
    "LocalSGDStrategy",
    "MissingExtraError",
    "ModelParallelStrategy",
    "NonFiniteError",
    "PeerError",
    "PipelineStrategy",
    "PowerSGD",
    "SingleStrategy",
    "Stateful",
    "Strategy",
    "UsageError",
    "__version__",
    "memory_estimate",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    """What not every script uses is imported when it is."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "memory_estimate":
        from lite.memory import memory_estimate

        return memory_estimate
    from lite import strategies

    return getattr(strategies, name)
