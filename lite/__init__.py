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
    from lite.strategies import FSDPStrategy, ModelParallelStrategy

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DDPStrategy",
    "DesyncError",
    "FSDPStrategy",
    "LaunchError",
    "Lite",
    "LiteError",
    "MissingExtraError",
    "ModelParallelStrategy",
    "NonFiniteError",
    "PeerError",
    "PowerSGD",
    "SingleStrategy",
    "Stateful",
    "Strategy",
    "UsageError",
    "__version__",
    "seed_everything",
]


def __getattr__(name: str) -> Any:
    """Strategies that not every script uses are imported when they are."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lite import strategies

    return getattr(strategies, name)
