"""Loggers that write a run's numbers."""

from __future__ import annotations

from lite.loggers.base import Logger
from lite.loggers.csv import CSVLogger
from lite.loggers.tensorboard import TensorBoardLogger

__all__ = ["CSVLogger", "Logger", "TensorBoardLogger"]
