"""Take a PyTorch training loop from one CPU to many GPUs with a few changed lines."""

from __future__ import annotations

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
from lite.strategies import DDPStrategy, LocalSGDStrategy, PowerSGD, SingleStrategy, Strategy

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DDPStrategy",
    "DesyncError",
    "LaunchError",
    "Lite",
    "LiteError",
    "LocalSGDStrategy",
    "MissingExtraError",
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
