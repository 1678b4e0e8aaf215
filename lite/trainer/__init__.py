"""A full training engine on top of Lite: modules that say how they are trained, and a Trainer that does it."""

from __future__ import annotations

from lite.trainer.callbacks.base import Callback
from lite.trainer.data.combined import CombinedLoader
from lite.trainer.datamodule import LightningDataModule
from lite.trainer.module import LightningModule
from lite.trainer.seeding import seed_everything
from lite.trainer.trainer import Trainer

__all__ = ["Callback", "CombinedLoader", "LightningDataModule", "LightningModule", "Trainer", "seed_everything"]
