"""Callbacks that come with the Trainer."""

from __future__ import annotations

from lite.trainer.callbacks.accumulation import GradientAccumulationScheduler
from lite.trainer.callbacks.base import Callback, Checkpoint
from lite.trainer.callbacks.early_stopping import EarlyStopping
from lite.trainer.callbacks.lambda_callback import LambdaCallback
from lite.trainer.callbacks.lr_monitor import LearningRateMonitor
from lite.trainer.callbacks.model_checkpoint import ModelCheckpoint
from lite.trainer.callbacks.model_summary import ModelSummary
from lite.trainer.callbacks.prediction_writer import BasePredictionWriter
from lite.trainer.callbacks.progress_bar import ProgressBar, TQDMProgressBar
from lite.trainer.callbacks.timer import Timer

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "Checkpoint",
    "EarlyStopping",
    "GradientAccumulationScheduler",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "ProgressBar",
    "TQDMProgressBar",
    "Timer",
]
