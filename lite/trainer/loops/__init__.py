"""The loops of a run; each opens with what it does, and can be replaced: `trainer.fit_loop = MyLoop()`."""

from __future__ import annotations

from lite.trainer.loops.evaluate import EvaluationLoop
from lite.trainer.loops.fit import FitLoop
from lite.trainer.loops.predict import PredictLoop
from lite.trainer.loops.train_epoch import TrainEpochLoop

__all__ = ["EvaluationLoop", "FitLoop", "PredictLoop", "TrainEpochLoop"]
