"""The Trainer: keeps its arguments, owns a Lite, and hands on to its loops."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch import nn

from lite import collectives
from lite.errors import ConfigError, UsageError, choose
from lite.lite import Lite
from lite.loggers import Logger
from lite.seed import RandomState
from lite.trainer import arguments, checkpointing, evaluation
from lite.trainer.arguments import share, whole
from lite.trainer.data import eval_data, find_loaders, find_move, has_loaders, train_data
from lite.trainer.declared import Declared, read_declared
from lite.trainer.defaults import assemble_callbacks, assemble_loggers
from lite.trainer.events import Event
from lite.trainer.foreign import foreign_globals
from lite.trainer.hooks import Hooks, overrides
from lite.trainer.loops import EvaluationLoop, FitLoop, PredictLoop
from lite.trainer.loops.calling import step_caller
from lite.trainer.loops.evaluate import no_gradients
from lite.trainer.loops.manual_step import manual_optimizers
from lite.trainer.manual import ManualOptimizer
from lite.trainer.metrics import Metrics
from lite.trainer.module import LightningModule
from lite.trainer.optimizers import SchedulerConfig, as_lr_schedulers, as_plain, read_optimizers
from lite.trainer.planning import Planned, check_reachable, plan
from lite.trainer.profiling import make_profiler
from lite.trainer.run import check_module, in_order, merge_callbacks, newest_checkpoint, running
from lite.trainer.state import RunningStage, TrainerFn, TrainerState, TrainerStatus
from lite.trainer.validation import ValidationSchedule
from lite.trainer.view import View

_NO_LOGGERS: tuple[Logger, ...] = ()


class Trainer(View):
    """Trains, validates, tests and predicts with a LightningModule, on what Lite runs on.

    All arguments have names. LITE_TRAINER_<ARGUMENT> (or PL_TRAINER_<ARGUMENT>) is a default from the environment: an
    argument outranks it, and it outranks what stands here.

    Args:
        accelerator: As for `Lite`; so are `strategy`, `devices`, `num_nodes`, `precision` and `plugins`.
        strategy: See above.
        devices: See above.
        num_nodes: See above.
        precision: See above.
        plugins: See above.
        lite: A ready Lite object instead of these, with its loggers.
        logger: True or None: TensorBoard where it is installed, else CSV, in `default_root_dir`; False: none; one or
            several Loggers.
        callbacks: One or several; those of entry-point group `lite.callbacks` and `configure_callbacks` come too.
        default_root_dir: Where logs and checkpoints go; the current directory.
        max_epochs: Epochs in all; -1 for no limit; 1000 when no limit is given.
        min_epochs: Epochs before which `should_stop` does not count.
        max_steps: Optimizer steps in all; -1 for no limit.
        min_steps: As `min_epochs`.
        max_time: "DD:HH:MM:SS", a timedelta or a dict of its arguments.
        limit_train_batches: A number of batches (int) or a share of each loader (float); 0 switches off.
        limit_val_batches: See above.
        limit_test_batches: See above.
        limit_predict_batches: See above.
        fast_dev_run: True or n: n batches of everything, without loggers, checkpoints and early stopping.
        overfit_batches: As a limit: the same training batches in each epoch, and as many for validation.
        val_check_interval: A share of an epoch (float), every n batches (int), or a time ("DD:HH:MM:SS", ...).
        check_val_every_n_epoch: In every n-th epoch; None counts batches across epochs.
        num_sanity_val_steps: Validation batches before training; -1 for all.
        log_every_n_steps: Optimizer steps between two rows for loggers; 0 for none.
        enable_checkpointing: Whether there is a ModelCheckpoint where none is passed.
        enable_progress_bar: The same for the progress bar.
        enable_model_summary: The same for the table of layers.
        accumulate_grad_batches: Batches per optimizer step.
        accumulation: "exact": the gradient is that of one big batch, however its parts are sized; "reference": each
            loss is divided by `accumulate_grad_batches`, as Lightning does.
        gradient_clip_val: Largest norm, or largest absolute value.
        gradient_clip_algorithm: "norm" or "value".
        track_grad_norm: The p of the gradient norms that are logged, "inf", or -1 for none.
        deterministic: True, "warn" or None; as in torch.
        benchmark: cuDNN's benchmark mode; None leaves it.
        detect_anomaly: torch's anomaly detection.
        inference_mode: Whether evaluation runs in torch.inference_mode, or else no_grad.
        sync_batchnorm: Whether batch norms use all ranks' statistics.
        use_distributed_sampler: As for `Lite.setup_dataloaders`.
        multiple_trainloader_mode: How several training loaders are drawn from; see CombinedLoader.
        profiler: "simple", or an object with `profile(name)`.
        reload_dataloaders_every_n_epochs: Ask for the loaders anew every n epochs; 0 for never.
        barebones: Switch off whatever costs time besides training.
    """

    @arguments.settled
    def __init__(
        self,
        *,
        accelerator: Any = "auto",
        strategy: Any = "auto",
        devices: Any = "auto",
        num_nodes: int = 1,
        precision: Any = "32-true",
        plugins: Any = None,
        lite: Lite | None = None,
        logger: Any = None,
        callbacks: Any = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: str | timedelta | Mapping[str, int] | None = None,
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        fast_dev_run: int | bool = False,
        overfit_batches: int | float = 0.0,
        val_check_interval: Any = None,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int | None = None,
        log_every_n_steps: int | None = None,
        enable_checkpointing: bool | None = None,
        enable_progress_bar: bool | None = None,
        enable_model_summary: bool | None = None,
        accumulate_grad_batches: Any = 1,
        accumulation: str = "exact",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        track_grad_norm: float | str = -1,
        deterministic: bool | str | None = None,
        benchmark: bool | None = None,
        detect_anomaly: bool = False,
        inference_mode: bool = True,
        sync_batchnorm: bool = False,
        use_distributed_sampler: bool | str = True,
        multiple_trainloader_mode: str = "max_size_cycle",
        profiler: Any = None,
        reload_dataloaders_every_n_epochs: int = 0,
        barebones: bool = False,
    ) -> None:
        if barebones:
            costs = {
                "logger": logger,
                "enable_checkpointing": enable_checkpointing,
                "enable_progress_bar": enable_progress_bar,
                "enable_model_summary": enable_model_summary,
                "log_every_n_steps": log_every_n_steps,
                "num_sanity_val_steps": num_sanity_val_steps,
                "fast_dev_run": fast_dev_run,
                "detect_anomaly": detect_anomaly,
                "profiler": profiler,
            }
            for name, value in costs.items():
                if value not in (None, False, 0):
                    raise ConfigError(
                        f"Trainer(barebones=True, {name}={value!r}) contradict each other; leave one out."
                    )
            logger = enable_checkpointing = enable_progress_bar = enable_model_summary = False
            log_every_n_steps = num_sanity_val_steps = 0
        self.barebones = barebones
        self.fast_dev_run = whole("fast_dev_run", int(fast_dev_run), 0)
        if self.fast_dev_run:
            n = self.fast_dev_run
            limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = n
            max_epochs, max_steps, num_sanity_val_steps = 1, n, 0
            val_check_interval, check_val_every_n_epoch = 1.0, 1
            logger = enable_checkpointing = False
        timed = max_time is not None or arguments_have_timer(callbacks)
        limits = arguments.epochs_and_steps(max_epochs, min_epochs, max_steps, min_steps, timed=timed)
        arguments.clipping(gradient_clip_val, gradient_clip_algorithm)
        self.default_root_dir = os.fspath(default_root_dir if default_root_dir is not None else os.getcwd())
        self.overfit_batches = share("overfit_batches", overfit_batches)
        self.limit_train_batches = share("limit_train_batches", limit_train_batches)
        self.limit_val_batches = share("limit_val_batches", limit_val_batches)
        self.limit_test_batches = share("limit_test_batches", limit_test_batches)
        self.limit_predict_batches = share("limit_predict_batches", limit_predict_batches)
        steps = 2 if num_sanity_val_steps is None else whole("num_sanity_val_steps", num_sanity_val_steps, -1)
        self.num_sanity_val_steps: float = float("inf") if steps == -1 else steps
        self.log_every_n_steps = whole("log_every_n_steps", 50 if log_every_n_steps is None else log_every_n_steps, 0)
        by_epoch = accumulate_grad_batches if isinstance(accumulate_grad_batches, dict) else None
        self.accumulate_grad_batches = whole("accumulate_grad_batches", 1 if by_epoch else accumulate_grad_batches, 1)
        if accumulation not in ("exact", "reference"):
            raise ConfigError(f"accumulation={accumulation!r} is not known; use 'exact' or 'reference'.")
        self.accumulation = accumulation
        self.gradient_clip_val, self.gradient_clip_algorithm = gradient_clip_val, gradient_clip_algorithm
        self.track_grad_norm = None if track_grad_norm in (-1, -1.0) else float(track_grad_norm)
        self.deterministic, self.benchmark, self.detect_anomaly = deterministic, benchmark, detect_anomaly
        self.inference_mode, self.sync_batchnorm = inference_mode, sync_batchnorm
        self.use_distributed_sampler = use_distributed_sampler
        self.multiple_trainloader_mode = multiple_trainloader_mode
        self.reload_dataloaders_every_n_epochs = whole(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, 0
        )
        self.num_nodes = num_nodes
        self.profiler = make_profiler(profiler)
        self.fit_loop = FitLoop(*_reordered(limits), schedule=_schedule(val_check_interval, check_val_every_n_epoch))
        self.validate_loop, self.test_loop = EvaluationLoop("validate"), EvaluationLoop("test")
        self.predict_loop = PredictLoop()
        if lite is not None:
            if logger not in (None, True):
                raise ConfigError("Trainer(lite=..., logger=...): the Lite object has the loggers; pass them to Lite.")
            self.loggers = list(lite.loggers)
        else:
            self.loggers = assemble_loggers(logger, self.default_root_dir)
        settings = {"accelerator": accelerator, "strategy": strategy, "devices": devices, "num_nodes": num_nodes}
        self.lite = lite or Lite(**settings, precision=precision, plugins=plugins, loggers=self.loggers)
        self.callbacks = in_order(
            assemble_callbacks(
                callbacks,
                checkpointing=enable_checkpointing,
                progress_bar=enable_progress_bar,
                summary=enable_model_summary,
                max_time=max_time,
                accumulate=by_epoch,
                fast_dev_run=bool(self.fast_dev_run),
                barebones=barebones,
            )
        )
        self.state = TrainerState()
        self.module: Any = None
        self.datamodule: Any = None
        self.hooks: Hooks
        self.metrics = Metrics(self.lite.world_size, self.lite.global_rank, enabled=not barebones)
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.declared: list[Declared] = []
        self.ckpt_path: str | None = None
        self._in_hands: list[Any] = []
        self._given: dict[str, Any] = {}
        self._eval_data: dict[str, Any] = {}
        self._move: Any = None
        self._train_raw: Any = None
        self._loaded: set[str] = set()
        self._log_dir: str | None = None
        self._told_hparams = False
        self._own_callbacks: list[Any] = self.callbacks
        self._results: Any = None

    # ---- what users call

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        *,
        restore: Iterable[str] | None = None,
        restore_except: Iterable[str] | None = None,
    ) -> None:
        """Train, and validate meanwhile. Collective: call on all ranks.

        Args:
            model: A LightningModule.
            train_dataloaders: A loader or a nesting of several; None asks datamodule or module.
            val_dataloaders: A loader, a list, or a dict whose keys prefix the metrics' names.
            datamodule: Where the loaders come from instead.
            ckpt_path: What to go on from: a path or URL, "best", "last", or "auto": the newest whole checkpoint of this
                Trainer's folders, if there is one.
            restore: The checkpoint's parts that are restored ("model", "optimizer", ...); None is all.
            restore_except: Those that are not.

        Raises:
            TypeError: `model` is no LightningModule.
            ConfigError: A method, a loader or a setting is missing or wrong.
        """
        for _ in self.steps(
            model,
            train_dataloaders,
            val_dataloaders,
            datamodule,
            ckpt_path,
            events=(),
            restore=restore,
            restore_except=restore_except,
        ):
            pass

    def steps(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        *,
        events: Iterable[str] = ("batch", "epoch"),
        restore: Iterable[str] | None = None,
        restore_except: Iterable[str] | None = None,
    ) -> Iterator[Event]:
        """`fit` as an iterator of events, to be driven by hand; arguments as for `fit`.

        Between two events the run stands still: look at it, save a checkpoint, go on, or break off. `events` chooses
        among those after each "batch" and after each "epoch".

        Example:
            for event in trainer.steps(model, loader):
                if event.kind == "batch" and event.global_step == 100:
                    trainer.save_checkpoint("hundred.ckpt")
        """
        train_dataloaders, datamodule = _or_datamodule(train_dataloaders, datamodule)
        check_module(model, "fit")
        parts = checkpointing.chosen_parts(restore, restore_except)
        self._launch()
        self._given = {"train": train_dataloaders, "val": val_dataloaders}
        self.fit_loop.begin()
        self.fit_loop.events = {choose("events", kind, ["batch", "epoch"]) for kind in events}
        self._check_fit(model, datamodule)
        with running(self, TrainerFn.FITTING, model, datamodule), self._stop_signals():
            checkpoint = self._read_for_fit(ckpt_path)
            if checkpoint is not None:
                checkpointing.restore_callbacks(self, checkpoint, states="callbacks" in parts)
                if "state_dict" in parts:
                    checkpointing.restore_weights(self, checkpoint, str(self.ckpt_path))
            self._set_up(train=True)
            self.metrics.at(self.metrics.place("", "on_fit_start"))
            self.hooks.call("on_fit_start")
            self._log_hyperparameters()
            resumed = False
            if checkpoint is not None:
                self.load_data(self.fit_loop, "train")
                self.load_data(self.fit_loop, "val")
                checkpointing.restore_training(self, checkpoint, parts, str(self.ckpt_path))
                resumed = self.fit_loop.progress.batches > 0
            if not resumed:
                self._check_sanity()
            self.load_data(self.fit_loop, "train")
            self.load_data(self.fit_loop, "val")
            self._warn_of_nothing_to_do()
            check_reachable(self)
            self.state.stage = RunningStage.TRAINING
            with self._interrupts():
                yield from self.fit_loop.run(self)
            if self.fit_loop.stopped_by_signal:
                self._save_for_signal()
            else:
                self.metrics.at(self.metrics.place("", "on_fit_end"))
                self.hooks.call("on_fit_end")
        if self.fit_loop.stopped_by_signal:
            self._exit_for_signal()

    def plan(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        limit: int = 10_000,
    ) -> list[Planned]:
        """What `fit` with these arguments is going to do, without training. Collective: call on all ranks.

        Data are prepared and set up as for `fit`, and `configure_optimizers` is asked; no step of the module runs. What
        depends on metrics and time (early stopping, max_time, saves by time, schedulers that follow a metric) is not
        foreseen.

        Args:
            model: As for `fit`; so are the loaders.
            train_dataloaders: See above.
            val_dataloaders: See above.
            datamodule: See above.
            limit: Events at most.

        Raises:
            ConfigError: A setting is wrong, or can never come true.
            UsageError: The module's optimizers step by its own hand.
        """
        train_dataloaders, datamodule = _or_datamodule(train_dataloaders, datamodule)
        check_module(model, "plan")
        self._launch()
        self._given = {"train": train_dataloaders, "val": val_dataloaders}
        self._check_fit(model, datamodule)
        with running(self, TrainerFn.FITTING, model, datamodule):
            self._set_up(train=True)
            self.load_data(self.fit_loop, "train")
            self.load_data(self.fit_loop, "val")
            check_reachable(self)
            return plan(self, limit)

    def validate(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> list[dict[str, float]]:
        """Validate, and return what was logged: a dict for each loader. Collective: call on all ranks.

        Args:
            model: A LightningModule; None takes the last one, with its best checkpoint.
            dataloaders: A loader, a list, or a dict with names; None asks datamodule or module.
            ckpt_path: Weights to load: a path, "best" or "last"; None keeps the model's own.
            verbose: Whether to print a table.
            datamodule: Where the loaders come from instead.
        """
        return self._evaluate(
            self.validate_loop, TrainerFn.VALIDATING, model, dataloaders, ckpt_path, verbose, datamodule
        )

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
    ) -> list[dict[str, float]]:
        """As `validate`, with `test_step` and the test loaders."""
        return self._evaluate(self.test_loop, TrainerFn.TESTING, model, dataloaders, ckpt_path, verbose, datamodule)

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        *,
        gather: bool = False,
    ) -> list[Any] | None:
        """What `predict_step` gives for each batch of this rank, in order; with several loaders a list of such lists.

        Args:
            model: As for `validate`.
            dataloaders: As for `validate`.
            datamodule: As for `validate`.
            return_predictions: False keeps nothing and returns None.
            ckpt_path: As for `validate`.
            gather: Give every rank the outputs of all, put together batch by batch in the dataset's order, as one
                process with the global batch has them. They must be tensors with a row per sample, lists of as many
                objects, or dicts and tuples of these.
        """
        keep = return_predictions is not False
        self.predict_loop.gather = gather
        self.predict_loop.keep = keep or any(getattr(c, "wants_predictions", False) for c in self.callbacks)
        self._evaluate(self.predict_loop, TrainerFn.PREDICTING, model, dataloaders, ckpt_path, False, datamodule)
        found: list[Any] = self.predict_loop.predictions
        if not keep:
            self.predict_loop.predictions = []
            return None
        return found[0] if len(found) == 1 else found

    def save_checkpoint(self, path: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Write a checkpoint, whole or not at all. Collective: call on all ranks, also where rank 0 alone writes.

        Args:
            path: A file ("x.ckpt"); without a suffix a directory that every rank writes its part of. URLs too.
            weights_only: Leave out what only a resumed training needs.
        """
        if self.module is None:
            raise UsageError("save_checkpoint: there is no model yet; call fit, validate, test or predict first.")
        self.lite.save(path, checkpointing.dump(self, weights_only), rng=False)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0."""
        self.lite.print(*args, **kwargs)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Create modules on the device and in the precision's dtype at once."""
        with self.lite.init_module():
            yield

    # ---- what the life of a run consists of; `running` calls these

    def begin(self, fn: TrainerFn, module: Any, datamodule: Any) -> None:
        """A run of this module begins."""
        self.state.fn, self.state.status = fn, TrainerStatus.RUNNING
        self.module, self.datamodule = module, datamodule
        self._loaded.clear()
        self._eval_data.clear()
        self._train_raw = None
        module.attach(self, self.metrics)
        if datamodule is not None:
            attach = getattr(datamodule, "attach", None)
            if attach is None:
                raise ConfigError(f"datamodule={type(datamodule).__name__} is no LightningDataModule of lite.trainer.")
            attach(self)
        self.callbacks = merge_callbacks(self._own_callbacks, module)
        for callback in self.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(module)

    def end(self, module: Any, datamodule: Any) -> None:
        """It is over: everyone is let go."""
        self.state.stage = None
        self.metrics.end_batches()
        self.metrics.at(self.metrics.place("", "the time after a run"))
        for callback in self.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(None)
        if self.profiler is not None and hasattr(self.profiler, "describe"):
            self.profiler.describe(self)
        self.lite.teardown()

    def agree_on_log_dir(self) -> None:
        """Every rank writes beside rank 0's logs."""
        self._log_dir = None
        self._log_dir = collectives.broadcast(self.log_dir if self.is_global_zero else None)

    @property
    def wrap_hook(self) -> Any:
        """What a profiler puts around each hook."""
        return None if self.profiler is None else self.profiler.wrap_hook

    @contextmanager
    def in_stage(self, stage: str) -> Iterator[None]:
        """The block is validation within training."""
        before = self.state.stage
        if before is not RunningStage.SANITY_CHECKING:
            self.state.stage = RunningStage(stage)
        place = self.metrics.here
        try:
            yield
        finally:
            self.state.stage = before
            self.metrics.at(place)

    # ---- what loops and modules ask for

    def load_data(self, fit: FitLoop, which: str = "both", again: bool = False) -> None:
        """Get training's and validation's loaders, where that has not been done."""
        for name in ("train", "val") if which == "both" else (which,):
            if name in self._loaded and not again:
                continue
            self._loaded.add(name)
            if name == "train":
                fit.data = self._make_train_data()
            elif self._validates_in_fit():
                fit.val_data = self._make_eval_data("validate", self._given.get("val"))

    def set_accumulation(self, batches: int) -> None:
        """From the next epoch on (or this one, as it begins), so many batches make an optimizer step."""
        self.accumulate_grad_batches = whole("accumulate_grad_batches", batches, 1)

    def optimizers_for_module(self, counting: bool) -> list[Any]:
        """The optimizers for the module's own hand."""
        if not counting or self.module.automatic_optimization:
            return self.optimizers
        if not self._in_hands:
            self._in_hands = manual_optimizers(self)
        return self._in_hands

    def manual_backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        """Backward with its hooks."""
        metrics = self.metrics
        here = metrics.here
        if self.hooks.on_before_backward:
            metrics.at(metrics.place("train", "on_before_backward"))
            self.hooks.call("on_before_backward", loss)
        self.module.backward(loss, *args, **kwargs)
        if self.hooks.on_after_backward:
            metrics.at(metrics.place("train", "on_after_backward"))
            self.hooks.call("on_after_backward")
        metrics.at(here)

    def write_row(self, row: Mapping[str, Any], stage: str = "train") -> None:
        """Give loggers a row, with the epoch and the clocks in it."""
        if not row or self.sanity_checking or not self.loggers:
            return
        step = max(self.fit_loop.progress.stepped - 1, 0)
        values = dict(row)
        if "step" in values:
            step = int(values.pop("step"))
        self.lite.log_dict({"epoch": self.current_epoch, **self.clocks(), **values}, step)

    def logs_eval_steps(self, stage: str) -> bool:
        """Whether evaluation may have values of single batches to write."""
        return bool(self.loggers) and not self.sanity_checking and not self.barebones

    def write_eval_step(self, stage: str) -> None:
        """Write the values of one evaluation batch, where any were logged with on_step=True."""
        if self.metrics.has_step_values(stage):
            self.write_row(self.metrics.step_row(stage), stage)

    def resume_position(self, position: Any) -> None:
        """Let training's loader go on from a stored position."""
        loader = self.fit_loop.data.loaders[0]
        if position is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(position)
        elif self.fit_loop.progress.batch:
            warnings.warn(
                f"the training data are a {type(loader).__name__} without a position of its own: they are read again "
                "up to where the run was.",
                stacklevel=4,
            )

    # ---- pieces of fit

    def _launch(self) -> None:
        """Start the processes, where they don't run yet: each runs the script anew, and this one waits for them."""
        self.lite.launch()

    def _check_fit(self, model: Any, datamodule: Any) -> None:
        name = type(model).__name__
        if overrides(model, "training_step", LightningModule):
            step_caller(model.training_step)
        elif not (model.automatic_optimization and overrides(model, "configure_optimizers", LightningModule)):
            raise ConfigError(f"{name} has no training_step; define training_step(self, batch, batch_idx) to fit.")
        if not overrides(model, "configure_optimizers", LightningModule):
            raise ConfigError(f"{name} has no configure_optimizers; define it, and return an optimizer (or None).")
        if not has_loaders("train_dataloader", self._given["train"], model, datamodule):
            raise ConfigError(
                f"there is no training data: pass train_dataloaders or a datamodule to fit, or define "
                f"{name}.train_dataloader."
            )
        has_val = has_loaders("val_dataloader", self._given["val"], model, datamodule)
        has_step = overrides(model, "validation_step", LightningModule)
        if has_val and not has_step:
            warnings.warn(f"{name} has validation data but no validation_step: it is not validated.", stacklevel=4)
        if has_step and not has_val and self.limit_val_batches:
            warnings.warn(f"{name} has a validation_step but no validation data: it is not validated.", stacklevel=4)
        if not model.automatic_optimization:
            for argument, value in (
                ("gradient_clip_val", self.gradient_clip_val),
                ("accumulate_grad_batches", self.accumulate_grad_batches if self.accumulate_grad_batches > 1 else None),
            ):
                if value:
                    raise ConfigError(
                        f"Trainer({argument}={value!r}) is for automatic optimisation, and {name} has "
                        "automatic_optimization = False; call self.clip_gradients and step when you want in "
                        "training_step."
                    )

    def _validates_in_fit(self) -> bool:
        limit = self.overfit_batches or self.limit_val_batches
        return (
            bool(limit)
            and overrides(self.module, "validation_step", LightningModule)
            and has_loaders("val_dataloader", self._given.get("val"), self.module, self.datamodule)
        )

    def _make_train_data(self) -> Any:
        raw = find_loaders("train_dataloader", self._given["train"], self.module, self.datamodule)
        if raw is None:
            raise ConfigError(f"{type(self.module).__name__}.train_dataloader returned None; return a loader.")
        data = train_data(
            self.lite,
            raw,
            self.limit_train_batches,
            move=find_move(self.lite, self.module, self.datamodule),
            mode=self.multiple_trainloader_mode,
            overfit=self.overfit_batches,
            use_distributed_sampler=self.use_distributed_sampler,
        )
        self.fit_loop.schedule.check(data.num_batches)
        if self.fit_loop.progress.reloaded < 0:
            self.fit_loop.progress.reloaded = self.fit_loop.progress.epoch
        return data

    def _load_train_data(self) -> None:
        if self.module is not None:
            self.load_data(self.fit_loop, "train")

    def _make_eval_data(self, stage: str, given: Any) -> Any:
        short = "val" if stage == "validate" else stage
        raw = find_loaders(f"{short}_dataloader", given, self.module, self.datamodule)
        if raw is None:
            raise ConfigError(
                f"there is no data to {stage}: pass dataloaders or a datamodule, or define "
                f"{type(self.module).__name__}.{short}_dataloader."
            )
        self.metrics.forget_places(stage)
        return eval_data(
            self.lite,
            raw,
            getattr(self, f"limit_{short}_batches"),
            stage=stage,
            move=find_move(self.lite, self.module, self.datamodule),
            overfit=self.overfit_batches if stage == "validate" else 0.0,
            use_distributed_sampler=self.use_distributed_sampler,
        )

    def _set_up(self, *, train: bool) -> None:
        """Let Lite prepare module, optimizers and schedulers."""
        if self.sync_batchnorm and self.world_size > 1:
            nn.SyncBatchNorm.convert_sync_batchnorm(self.module)  # type: ignore[no-untyped-call]
        self.optimizers, self.lr_scheduler_configs, self.declared, self._in_hands = [], [], [], []
        if not train:
            self.lite.setup(self.module)
            return
        returned = as_plain(self.module.configure_optimizers())
        self.optimizers, self.lr_scheduler_configs = read_optimizers(returned)
        if self.module.automatic_optimization:
            self.declared = read_declared(returned, self.module)
            self._check_steps()
        schedulers = as_lr_schedulers(self.lr_scheduler_configs)
        self.lite.setup(self.module, *self.optimizers, schedulers=schedulers)

    def _check_steps(self) -> None:
        """Every optimizer must have a step function, or the one optimizer has `training_step`."""
        name = type(self.module).__name__
        if not self.declared and not overrides(self.module, "training_step", LightningModule):
            raise ConfigError(f"{name} has no training_step; define training_step(self, batch, batch_idx) to fit.")
        if len(self.optimizers) > 1 and not self.declared:
            raise ConfigError(
                f"configure_optimizers returned {len(self.optimizers)} optimizers, and training_step has one loss; "
                "give each a step function of its own, [{'optimizer': ..., 'step': self.critic_step}, ...], or set "
                "self.automatic_optimization = False, and for each optimizer of self.optimizers() call "
                "zero_grad(), self.manual_backward(loss) and step() in training_step."
            )

    def _check_sanity(self) -> None:
        """Run some validation batches before training, so that a mistake in it shows at once; nothing remains of it."""
        if not self.num_sanity_val_steps or not self._validates_in_fit() or self.fit_loop.is_over(self):
            return
        before, kept = RandomState.capture(cuda=True), dict(self.metrics.kept)
        self.state.stage = RunningStage.SANITY_CHECKING
        self.metrics.sanity = True
        self.metrics.at(self.metrics.place("", "on_sanity_check_start"))
        self.hooks.call("on_sanity_check_start")
        self.load_data(self.fit_loop, "val")
        data = self.fit_loop.val_data
        limited = type(data)(
            data.loaders, [min(n, self.num_sanity_val_steps) for n in data.limits], data.names, data.move
        )
        if limited.num_batches:
            EvaluationLoop("validate").run(self, limited, no_grad=no_gradients(False))
        self.metrics.at(self.metrics.place("", "on_sanity_check_end"))
        self.hooks.call("on_sanity_check_end")
        self.metrics.discard("validate")
        self.metrics.kept, self.metrics.sanity = kept, False
        self.metrics.bar.clear()
        self.metrics.logged.clear()
        self.state.stage = None
        before.restore()

    def _warn_of_nothing_to_do(self) -> None:
        fit = self.fit_loop
        if fit.data.num_batches == 0:
            warnings.warn("there are no training batches; nothing is trained.", stacklevel=4)
            fit.max_epochs = 0 if fit.max_epochs < 0 else min(fit.max_epochs, fit.progress.epoch)
        elif fit.is_over(self) and (fit.progress.epoch or fit.progress.updates):
            warnings.warn(
                f"nothing is left to train: {fit.progress.epoch} epochs and {fit.progress.updates} steps are done, and "
                f"max_epochs={fit.max_epochs}, max_steps={fit.max_steps}; raise trainer.fit_loop.max_epochs.",
                stacklevel=4,
            )

    def _log_hyperparameters(self) -> None:
        if not self.loggers or self._told_hparams:
            return
        found: dict[str, Any] = {}
        for owner in (self.datamodule, self.module):
            if owner is not None and owner._log_hyperparams and owner.hparams:
                found.update(dict(owner.hparams_initial))
        if found:
            self._told_hparams = True
            self.lite.log_hyperparameters(found)

    def _read_for_fit(self, ckpt_path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
        self.ckpt_path = self._find_checkpoint(ckpt_path, fitting=True)
        if self.ckpt_path is None:
            return None
        with foreign_globals():
            content: dict[str, Any] = self.lite.load(self.ckpt_path)
        return content

    def _find_checkpoint(self, given: Any, *, fitting: bool) -> str | None:
        """The path that "best", "last", "auto" and the like stand for."""
        if given is None:
            if fitting and "SLURM_JOB_ID" in os.environ:
                return newest_checkpoint([self.default_root_dir], named="hpc_ckpt")
            return None
        if given in ("auto", "hpc"):
            return newest_checkpoint(self.checkpoint_folders(), named="hpc_ckpt" if given == "hpc" else None)
        if given == "last":
            found = newest_checkpoint(self.checkpoint_folders(), named="last")
            if found is None:
                warnings.warn("ckpt_path='last': there is no last checkpoint yet; the run begins anew.", stacklevel=4)
            return found
        if given == "best":
            callbacks = self.checkpoint_callbacks
            if not callbacks or not callbacks[0].best_model_path:
                raise ConfigError("ckpt_path='best': this Trainer has saved no checkpoint; give the path of one.")
            return str(callbacks[0].best_model_path)
        return str(os.fspath(given))

    # ---- signals

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """SIGTERM and SIGUSR1 end the fit at a step that all ranks agree on, after a save."""
        if self.barebones or threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = [getattr(signal, n) for n in ("SIGTERM", "SIGUSR1") if hasattr(signal, n)]
        ours = [n for n in handlers if signal.getsignal(n) is signal.SIG_DFL]
        if not ours:
            yield
            return
        poll: Callable[[], bool] = self.lite.should_stop
        self.fit_loop.stop_poll = lambda: poll() and self.lite.stop_signal is not None
        try:
            with self.lite.stop_on_signals(*ours):
                for number in ours:
                    signal.signal(number, _waking(signal.getsignal(number), self.fit_loop.epoch_loop.look_now))
                yield
        finally:
            self.fit_loop.stop_poll = None

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """The first Ctrl-C ends the fit when the batch is done, to be gone on with; a second one at once."""
        here = threading.current_thread() is threading.main_thread()
        if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def asked(number: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.fit_loop.interrupt()

        signal.signal(signal.SIGINT, asked)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _save_for_signal(self) -> None:
        if "SLURM_JOB_ID" in os.environ:
            there = [e for e in _names(self.default_root_dir) if e.startswith("hpc_ckpt_") and e.endswith(".ckpt")]
            numbers = [int(e[9:-5]) for e in there if e[9:-5].isdigit()]
            path = os.path.join(self.default_root_dir, f"hpc_ckpt_{max(numbers, default=0) + 1}.ckpt")
        else:
            path = os.path.join(self.checkpoint_folders()[0], "interrupted.ckpt")
        self.save_checkpoint(collectives.broadcast(path))
        self.lite.print(f"{self.lite.stop_reason}: saved {path}, step {self.global_step}; stopped", file=sys.stderr)
        self.state.status = TrainerStatus.INTERRUPTED

    def _exit_for_signal(self) -> None:
        from lite.guards.signals import exit_code

        self.state.status = TrainerStatus.INTERRUPTED
        self.lite.requeue_job()
        self.lite.barrier()
        raise SystemExit(exit_code(self.lite.stop_signal or 0))

    # ---- evaluation

    def _evaluate(
        self,
        loop: EvaluationLoop,
        fn: TrainerFn,
        model: Any,
        dataloaders: Any,
        ckpt_path: Any,
        verbose: bool,
        datamodule: Any,
    ) -> list[dict[str, float]]:
        dataloaders, datamodule = _or_datamodule(dataloaders, datamodule)
        if model is None:
            if self.module is None:
                raise ConfigError(f"trainer.{fn.value}() got no model, and there is none of a fit before it; pass one.")
            model, datamodule = self.module, datamodule if datamodule is not None else self.datamodule
            if ckpt_path is None and any(c.best_model_path for c in self.checkpoint_callbacks):
                ckpt_path = "best"
        check_module(model, fn.value)
        self._launch()
        path = self._find_checkpoint(ckpt_path, fitting=False)
        with running(self, fn, model, datamodule):
            if path is not None:
                self.ckpt_path = path
                with foreign_globals():
                    checkpoint = self.lite.load(path)
                checkpointing.restore_callbacks(self, checkpoint, states=False)
                checkpointing.restore_weights(self, checkpoint, path)
            self._set_up(train=False)
            self._log_hyperparameters()
            data = self._eval_data[fn.value] = self._make_eval_data(fn.value, dataloaders)
            self.state.stage = RunningStage(fn.value)
            results = loop.run(self, data, no_grad=no_gradients(self.inference_mode))
        if fn is TrainerFn.PREDICTING:
            return []
        found = [{name: float(value) for name, value in one.items()} for one in results]
        if verbose and self.is_global_zero:
            evaluation.print_results(found, fn.value, data.names)
        return found


def arguments_have_timer(callbacks: Any) -> bool:
    """Whether a Timer is among the callbacks."""
    several = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
    return any(type(callback).__name__ == "Timer" for callback in several)


def _reordered(limits: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    max_epochs, min_epochs, max_steps, min_steps = limits
    return min_epochs, max_epochs, min_steps, max_steps


def _schedule(interval: Any, every_n_epochs: int | None) -> ValidationSchedule:
    if every_n_epochs is not None:
        whole("check_val_every_n_epoch", every_n_epochs, 1)
    if isinstance(interval, (str, timedelta, Mapping)):
        return ValidationSchedule(1.0, every_n_epochs, arguments.seconds("val_check_interval", interval))
    value = share("val_check_interval", interval)
    if every_n_epochs is None and isinstance(value, float):
        raise ConfigError(
            f"val_check_interval={value!r} with check_val_every_n_epoch=None must be a number of batches, or a time."
        )
    return ValidationSchedule(value, every_n_epochs)


def _or_datamodule(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """A datamodule that was passed in the loaders' place."""
    if hasattr(loaders, "prepare_data") and hasattr(loaders, "setup"):
        if datamodule is not None:
            raise ConfigError("two datamodules were passed; pass one.")
        return None, loaders
    if loaders is not None and datamodule is not None:
        raise ConfigError("loaders and a datamodule were passed; pass one of them.")
    return loaders, datamodule


def _waking(handler: Any, look_now: Callable[[], None]) -> Callable[[int, Any], None]:
    def handle(number: int, frame: Any) -> None:
        handler(number, frame)
        look_now()

    return handle


def _names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


__all__ = ["ManualOptimizer", "Trainer"]
