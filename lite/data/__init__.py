"""Loaders that give each rank its part, and batches on their device."""

from __future__ import annotations

from lite.data.describe import describe_dataloader
from lite.data.loader import release_dataloader, setup_dataloader
from lite.data.shares import BatchWeight, Shard
from lite.data.transfer import move_to_device

__all__ = ["BatchWeight", "Shard", "describe_dataloader", "move_to_device", "release_dataloader", "setup_dataloader"]
