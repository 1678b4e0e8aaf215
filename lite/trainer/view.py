"""What a Trainer tells of its run: properties that users, modules and callbacks read, and some that they set."""

from __future__ import annotations

import math
import os
from typing import Any

from lite.loggers import Logger
from lite.trainer import arguments
from lite.trainer.callbacks.accumulation import GradientAccumulationScheduler
from lite.trainer.callbacks.base import Callback, Checkpoint
from lite.trainer.data.counting import INFINITE
from lite.trainer.defaults import LoggerList, assemble_loggers
from lite.trainer.logging.metrics import Metrics
from lite.trainer.state import RunningStage, TrainerFn, TrainerState, TrainerStatus


class View:
    """The reading side of `Trainer`."""

    lite: Any
    state: TrainerState
    callbacks: list[Callback]
    _fit_loop: Any
    validate_loop: Any
    test_loop: Any
    predict_loop: Any
    metrics: Metrics
    module: Any
    fast_dev_run: int
    barebones: bool
    default_root_dir: str
    accumulate_grad_batches: int
    log_every_n_steps: int
    _eval_data: dict[str, Any]
    _log_dir: str | None
    _loggers: list[Logger]
    _told_hparams: bool
    _told_graph: bool

    @property
    def fit_loop(self) -> Any:
        """Training's loop. One of your own may be put in its place; limits that it was not given are the old one's."""
        return self._fit_loop

    @fit_loop.setter
    def fit_loop(self, loop: Any) -> None:
        before = getattr(self, "_fit_loop", None)
        if before is not None and hasattr(loop, "replaces"):
            loop.replaces(before)
        self._fit_loop = loop

    # ---- settings

    @property
    def ranks_talk_every(self) -> int:
        """Steps after which ranks look together at what one alone may know: a wish to stop, rank 0's clock."""
        return self.log_every_n_steps or 50

    @property
    def check_val_every_n_epoch(self) -> int | None:
        """The argument."""
        found: int | None = self.fit_loop.schedule.every_n_epochs
        return found

    @property
    def val_check_interval(self) -> int | float:
        """The argument, a time as its seconds."""
        schedule = self.fit_loop.schedule
        found: int | float = schedule.interval if schedule.interval_s is None else schedule.interval_s
        return found

    @property
    def scaler(self) -> Any:
        """The gradients' scaler of 16-bit precision, or None."""
        return getattr(self.lite.precision, "scaler", None)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int] | None:
        """What a DistributedSampler of one's own takes; None on one process."""
        return {"num_replicas": self.world_size, "rank": self.global_rank} if self.world_size > 1 else None

    # ---- progress

    @property
    def current_epoch(self) -> int:
        """The epoch that is under way, or as many as are complete."""
        epoch: int = self.fit_loop.progress.epoch
        return epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, over all optimizers."""
        steps: int = self.fit_loop.progress.updates
        return steps

    @property
    def is_last_batch(self) -> bool:
        """Whether the training batch that is under way, or has just been, is the epoch's last."""
        done: int = self.fit_loop.progress.batch + self.fit_loop.epoch_loop.under_way
        return done >= self.num_training_batches

    @property
    def num_training_batches(self) -> float:
        """Training batches of an epoch; infinite where nobody knows."""
        found: float = self.fit_loop.data.num_batches
        return found

    @property
    def num_val_batches(self) -> list[float]:
        """Validation batches of each loader."""
        data = self._eval_data.get("validate")
        found: list[float] = self.fit_loop.val_data.limits if data is None else data.limits
        return found

    @property
    def num_test_batches(self) -> list[float]:
        """Test batches of each loader."""
        return list(self._eval_data["test"].limits) if "test" in self._eval_data else []

    @property
    def num_predict_batches(self) -> list[float]:
        """Batches to predict of each loader."""
        return list(self._eval_data["predict"].limits) if "predict" in self._eval_data else []

    @property
    def num_sanity_val_batches(self) -> list[float]:
        """Validation batches of the sanity check, of each loader."""
        return [min(self.num_sanity_val_steps, n) for n in self.num_val_batches]

    num_sanity_val_steps: float

    @property
    def max_epochs(self) -> int:
        """Epochs in all; -1 for no limit. `trainer.fit_loop.max_epochs` can be raised for another fit."""
        epochs: int = self.fit_loop.max_epochs
        return epochs

    @property
    def min_epochs(self) -> int:
        """Epochs before which no wish to stop counts."""
        epochs: int = self.fit_loop.min_epochs
        return epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps in all; -1 for no limit."""
        steps: int = self.fit_loop.max_steps
        return steps

    @property
    def min_steps(self) -> int:
        """Optimizer steps before which no wish to stop counts."""
        steps: int = self.fit_loop.min_steps
        return steps

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole fit, for schedulers that must know; infinite without a limit.

        Asked in `configure_optimizers`, it gets the training loader then.
        """
        self._load_train_data()
        batches, fit = self.num_training_batches, self.fit_loop
        limit = fit.max_steps if fit.max_steps >= 0 else INFINITE
        if batches == INFINITE or fit.max_epochs < 0:
            return limit
        scheduler = next((c for c in self.callbacks if isinstance(c, GradientAccumulationScheduler)), None)
        if scheduler is None:
            total: float = math.ceil(batches / self.accumulate_grad_batches) * fit.max_epochs
        else:
            total = sum(math.ceil(batches / scheduler.factor(epoch)) for epoch in range(fit.max_epochs))
        return min(total, limit)

    def _load_train_data(self) -> None:
        raise NotImplementedError

    # ---- state

    @property
    def should_stop(self) -> bool:
        """Whether training is to stop; set it to True on any rank, and all stop at the next logging interval."""
        wish: bool | None = self.fit_loop.wish
        return bool(self.fit_loop.wants_stop if wish is None else wish)

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        self.fit_loop.ask_to_stop(value, alone=self.world_size == 1)

    @property
    def interrupted(self) -> bool:
        """Whether the last run was interrupted."""
        return self.state.status is TrainerStatus.INTERRUPTED

    @property
    def received_sigterm(self) -> bool:
        """Whether a signal has asked this run to end."""
        return bool(self.fit_loop.stopped_by_signal)

    @property
    def training(self) -> bool:
        """Whether training batches run."""
        return self.state.stage is RunningStage.TRAINING

    @property
    def validating(self) -> bool:
        """Whether validation runs."""
        return self.state.stage is RunningStage.VALIDATING

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self.state.stage is RunningStage.TESTING

    @property
    def predicting(self) -> bool:
        """Whether a prediction runs."""
        return self.state.stage is RunningStage.PREDICTING

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation before training runs."""
        return self.state.stage is RunningStage.SANITY_CHECKING

    @property
    def evaluating(self) -> bool:
        """Whether validation or a test runs."""
        return self.validating or self.testing

    # ---- metrics

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """Every logged name's newest value."""
        return self.metrics.callback_metrics()

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The newest values that are for loggers, also those that `log_every_n_steps` leaves out."""
        return self.metrics.logged_metrics()

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """What the progress bar shows, as numbers."""
        return {name: float(value) for name, value in self.metrics.bar_metrics().items()}

    # ---- parts

    @property
    def model(self) -> Any:
        """The module."""
        return self.module

    @property
    def lightning_module(self) -> Any:
        """The module."""
        return self.module

    @property
    def logger(self) -> Logger | None:
        """The first logger. Set, it is the only one."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Any) -> None:
        self.loggers = logger

    @property
    def loggers(self) -> list[Logger]:
        """The loggers. Others may be put in their place, or added to the list, within a run, too."""
        return self._loggers

    @loggers.setter
    def loggers(self, loggers: Any) -> None:
        if self.barebones:
            arguments.barebones(logger=loggers or None)
        found = assemble_loggers(loggers or False, self.default_root_dir, fast_dev_run=bool(self.fast_dev_run))
        self._use_loggers(found)
        self._loggers = LoggerList(found, self._use_loggers)

    def _use_loggers(self, loggers: list[Logger]) -> None:
        self.lite.use_loggers(loggers)
        self._told_hparams = self._told_graph = False
        if self.world_size == 1:  # without loggers nobody looks for when a row is due; several ranks talk anyway
            self.fit_loop.epoch_loop.look_now()

    @property
    def log_dir(self) -> str:
        """The first logger's `log_dir` or `save_dir`, or `default_root_dir`; rank 0's word on every rank in a run."""
        if self._log_dir is None:
            folders = (getattr(self.logger, name, None) for name in ("log_dir", "save_dir"))
            return str(next(filter(None, folders), self.default_root_dir))
        return self._log_dir

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """Callbacks that save."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first of them, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[Any]:
        """Callbacks that stop early."""
        from lite.trainer.callbacks.early_stopping import EarlyStopping

        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Any:
        """The first of them, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Any:
        """The progress bar, or None."""
        from lite.trainer.callbacks.progress_bar import ProgressBar

        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def train_dataloader(self) -> Any:
        """Training's loader, as it runs."""
        return self.fit_loop.data.loaders[0] if self.fit_loop.data.loaders else None

    @property
    def val_dataloaders(self) -> Any:
        """Validation's loader, or a list of them."""
        return self._loaders_of("validate") or _one_or_all(self.fit_loop.val_data.loaders)

    @property
    def test_dataloaders(self) -> Any:
        """The test's loader, or a list of them."""
        return self._loaders_of("test")

    @property
    def predict_dataloaders(self) -> Any:
        """The prediction's loader, or a list of them."""
        return self._loaders_of("predict")

    def _loaders_of(self, stage: str) -> Any:
        return _one_or_all(self._eval_data[stage].loaders) if stage in self._eval_data else None

    @property
    def strategy(self) -> Any:
        """Lite's strategy."""
        return self.lite.strategy

    @property
    def accelerator(self) -> Any:
        """Lite's accelerator."""
        return self.lite.accelerator

    @property
    def precision(self) -> str:
        """The precision's name."""
        return str(self.lite.precision.name)

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return int(self.lite.world_size)

    @property
    def num_devices(self) -> int:
        """Devices per machine."""
        return max(1, self.world_size // self.num_nodes)

    num_nodes: int

    @property
    def global_rank(self) -> int:
        """This process's number."""
        return int(self.lite.global_rank)

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return int(self.lite.local_rank)

    @property
    def node_rank(self) -> int:
        """This machine's number."""
        return int(self.lite.node_rank)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return bool(self.lite.is_global_zero)

    @property
    def enable_validation(self) -> bool:
        """Whether training validates."""
        return bool(self.fit_loop.val_data.num_batches)

    @property
    def fitting(self) -> bool:
        """Whether `fit` runs."""
        return self.state.fn is TrainerFn.FITTING and self.state.status is TrainerStatus.RUNNING

    def clocks(self) -> dict[str, float]:
        """The clocks: training batches, optimizer steps, samples over all ranks, seconds of training."""
        progress = self.fit_loop.progress
        samples = progress.samples + self.fit_loop.epoch_samples() if progress.within else progress.samples
        clocks = {"batches": progress.batches, "updates": progress.updates, "samples": samples}
        return {**clocks, "seconds": progress.elapsed_s()}

    def checkpoint_folders(self) -> list[str]:
        """Where checkpoints of this Trainer may lie."""
        found = [str(folder) for c in self.checkpoint_callbacks if (folder := getattr(c, "dirpath", None))]
        return [*found, os.path.join(self.default_root_dir, "checkpoints"), self.default_root_dir]


def _one_or_all(loaders: list[Any]) -> Any:
    return None if not loaders else loaders[0] if len(loaders) == 1 else loaders
