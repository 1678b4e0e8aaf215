"""What a checkpoint says of itself, under the reserved name "__lite__": who wrote it, when, and in which format."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch

from lite.errors import CheckpointError, ConfigError

KEY = "__lite__"
FORMAT = 1


def compose(world_size: int, entries: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A manifest of plain values: who writes, and further entries that belong to the run and not to the user's state.

    Args:
        world_size: Number of processes that save.
        entries: Plain values that `torch.load(weights_only=True)` reads.
    """
    version = sys.modules["lite"].__version__  # the facade stands above this module, which can't import it
    about = {"format": FORMAT, "lite": version, "torch": str(torch.__version__), "world_size": world_size}
    return {**about, "time": time.time(), **(entries or {})}


def check_names(state: Mapping[str, Any]) -> None:
    """Refuse the reserved name in a user's state.

    Raises:
        ConfigError: It is there.
    """
    if KEY in state:
        raise ConfigError(f"state has the name {KEY!r}, which is lite's own in a checkpoint; choose another one.")


def check_format(manifest: Any, where: str) -> dict[str, Any]:
    """The manifest, if this version can read what it describes.

    Raises:
        CheckpointError: It is no manifest, or from a later version of lite.
    """
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"path={where!r} has a damaged manifest.")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"path={where!r} has format {manifest['format']}, written by lite {manifest.get('lite')}; this version "
            f"reads up to format {FORMAT}. Update lite."
        )
    return manifest
