"""The Trainer: keeps its arguments, owns a Lite, and hands on to its loops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lite.errors import ConfigError, choose, shown
from lite.lite import Lite
from lite.trainer import arguments
from lite.trainer.arguments import share, whole
from lite.trainer.callbacks.merging import in_order
from lite.trainer.checkpoints import contents
from lite.trainer.data.combined import MODES
from lite.trainer.data.sources import or_datamodule
from lite.trainer.defaults import LoggerList, assemble_callbacks, assemble_loggers
from lite.trainer.evaluation import Evaluating
from lite.trainer.events import Event
from lite.trainer.hooks import Hooks
from lite.trainer.logging.metrics import Metrics
from lite.trainer.loops import EvaluationLoop, FitLoop, PredictLoop
from lite.trainer.optimization.declared import Declared
from lite.trainer.optimization.manual import ManualOptimizer
from lite.trainer.optimization.optimizers import SchedulerConfig
from lite.trainer.planning import Planned, check_reachable, plan
from lite.trainer.profilers import make_profiler
from lite.trainer.run import check_module, running
from lite.trainer.serving import Serving
from lite.trainer.state import RunningStage, TrainerFn, TrainerState


class Trainer(Evaluating, Serving):
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
        lite: A ready Lite object instead of these, with its loggers. A run ends with its `teardown`, so it gives back
            what a loop of your own has set up on it, too: set that up again, or give the Trainer a Lite of its own.
        logger: True or None: TensorBoard where it is installed, else CSV, in `default_root_dir`; False: none; one or
            several Loggers, of `lite.trainer.loggers`, say.
        callbacks: One or several; those of entry-point group `lite.callbacks` and `configure_callbacks` come too.
        default_root_dir: Where logs and checkpoints go; the current directory.
        max_epochs: Epochs in all; -1 for no limit; 1000 when no limit is given.
        min_epochs: Epochs before which `should_stop` does not count.
        max_steps: Optimizer steps in all; -1 for no limit.
        min_steps: As `min_epochs`.
        max_time: "DD:HH:MM:SS", a timedelta or a dict of its arguments; by rank 0's clock, which on several processes
            counts every `log_every_n_steps` steps.
        limit_train_batches: A number of batches (int) or a share of each loader (float); 0 switches off. A number is of
            each rank's batches, as `batch_size` is each rank's: n of them on 2 ranks have twice the samples that they
            have on one.
        limit_val_batches: See above.
        limit_test_batches: See above.
        limit_predict_batches: See above.
        fast_dev_run: True or n: n batches of everything, without checkpoints and early stopping, and with loggers that
            write nothing.
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
        profiler: "simple", "advanced", "pytorch", or an object with `profile(name)`.
        reload_dataloaders_every_n_epochs: Ask for the loaders anew every n epochs; 0 for never.
        barebones: Switch off whatever costs time besides training.
        auto_lr_find: Whether `tune` looks for a learning rate; or the attribute that it is put into.
        auto_scale_batch_size: Whether `tune` looks for a batch size; or how, "power" or "binsearch".
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
        auto_lr_find: bool | str = False,
        auto_scale_batch_size: bool | str = False,
    ) -> None:
        arguments.flags(barebones=barebones)
        if barebones:
            arguments.barebones(
                logger=logger,
                enable_checkpointing=enable_checkpointing,
                enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary,
                log_every_n_steps=log_every_n_steps,
                num_sanity_val_steps=num_sanity_val_steps,
                fast_dev_run=fast_dev_run,
                detect_anomaly=detect_anomaly,
                profiler=profiler,
            )
            logger = enable_checkpointing = enable_progress_bar = enable_model_summary = False
            log_every_n_steps = num_sanity_val_steps = 0
        self.barebones = barebones
        self.fast_dev_run = whole("fast_dev_run", 1 if fast_dev_run is True else fast_dev_run or 0, 0)
        if self.fast_dev_run:
            n = self.fast_dev_run
            limit_train_batches = limit_val_batches = limit_test_batches = limit_predict_batches = n
            max_epochs, max_steps, num_sanity_val_steps = 1, n, 0
            val_check_interval, check_val_every_n_epoch = 1.0, 1
            enable_checkpointing = False
        timed = max_time is not None or arguments.has_timer(callbacks)
        self._is_endless = max_epochs is None and max_steps == -1 and not timed
        limits = arguments.epochs_and_steps(max_epochs, min_epochs, max_steps, min_steps, timed=timed)
        arguments.clipping(gradient_clip_val, gradient_clip_algorithm)
        arguments.flags(
            enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar,
            enable_model_summary=enable_model_summary,
            benchmark=benchmark,
            detect_anomaly=detect_anomaly,
            inference_mode=inference_mode,
            sync_batchnorm=sync_batchnorm,
        )
        self.default_root_dir = arguments.folder("default_root_dir", default_root_dir)
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
        self.track_grad_norm = arguments.norm_type(track_grad_norm)
        self.deterministic = arguments.flag_or("deterministic", deterministic, "warn")
        self.benchmark, self.detect_anomaly = benchmark, detect_anomaly
        self.inference_mode, self.sync_batchnorm = inference_mode, sync_batchnorm
        self.use_distributed_sampler = arguments.flag_or(
            "use_distributed_sampler", use_distributed_sampler, "interleaved"
        )
        self.multiple_trainloader_mode = choose(
            "multiple_trainloader_mode", multiple_trainloader_mode, [mode for mode in MODES if mode != "sequential"]
        )
        self.reload_dataloaders_every_n_epochs = whole(
            "reload_dataloaders_every_n_epochs", reload_dataloaders_every_n_epochs, 0
        )
        self.num_nodes = num_nodes
        self.profiler = make_profiler(profiler)
        self.auto_lr_find = auto_lr_find
        self.auto_scale_batch_size = arguments.flag_or(
            "auto_scale_batch_size", auto_scale_batch_size, "power", "binsearch"
        )
        self.fit_loop = FitLoop(
            *limits, schedule=arguments.validation_schedule(val_check_interval, check_val_every_n_epoch)
        )
        self.validate_loop, self.test_loop = EvaluationLoop("validate"), EvaluationLoop("test")
        self.predict_loop = PredictLoop()
        if lite is not None:
            if not isinstance(lite, Lite):
                raise ConfigError(f"lite={shown(lite)} must be a Lite object, such as Lite(strategy='ddp').")
            if logger not in (None, True, False):
                raise ConfigError("Trainer(lite=..., logger=...): the Lite object has the loggers; pass them to Lite.")
            arguments.beside_lite(
                accelerator=(accelerator, "auto", lite.accelerator.name),
                strategy=(strategy, "auto", lite.strategy.name),
                devices=(devices, "auto"),
                num_nodes=(num_nodes, 1),
                precision=(precision, "32-true", lite.precision.name),
                plugins=(plugins, None),
            )
            logger = False if logger is False else list(lite.loggers)
        loggers = assemble_loggers(logger, self.default_root_dir, fast_dev_run=bool(self.fast_dev_run))
        settings = {"accelerator": accelerator, "strategy": strategy, "devices": devices, "num_nodes": num_nodes}
        self.lite = lite or Lite(**settings, precision=precision, plugins=plugins, loggers=loggers)
        self._loggers = LoggerList(loggers, self._use_loggers)
        self.callbacks = in_order(
            assemble_callbacks(
                callbacks,
                checkpointing=enable_checkpointing,
                progress_bar=enable_progress_bar,
                summary=enable_model_summary,
                max_time=max_time,
                accumulate=by_epoch,
                every=self.accumulate_grad_batches,
                fast_dev_run=bool(self.fast_dev_run),
                barebones=barebones,
            )
        )
        self.state = TrainerState()
        self.module: Any = None
        self.datamodule: Any = None
        self.hooks: Hooks
        _, part = self.lite.strategy.data_shards(self.lite.world_size, self.lite.global_rank)
        self.metrics = Metrics(self.lite.world_size, self.lite.global_rank, part, enabled=not barebones)
        self.optimizers: list[Any] = []
        self.lr_scheduler_configs: list[SchedulerConfig] = []
        self.declared: list[Declared] = []
        self.ckpt_path: str | None = None
        self._in_hands: list[Any] = []
        self._put_back: list[Callable[[], None]] = []
        self._manual_backward = None
        self._given: dict[str, Any] = {}
        self._eval_data: dict[str, Any] = {}
        self._move: Any = None
        self._loaded: set[str] = set()
        self._log_dir: str | None = None
        self._told_hparams = self._told_graph = False
        self._trained: Any = None
        self._own_callbacks: list[Any] = list(self.callbacks)
        self._merged: list[Any] = list(self.callbacks)

    # ---- what users call

    def fit(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        restore: Iterable[str] | None = None,
        restore_except: Iterable[str] | None = None,
    ) -> None:
        """Train, and validate meanwhile. Collective: call on all ranks.

        Args:
            model: A LightningModule.
            train_dataloaders: A loader or a nesting of several; None asks datamodule or module.
            val_dataloaders: A loader, or several, one after another: lists and dicts of them, in any nesting. The keys
                that lead to a loader prefix its metrics' names.
            datamodule: Where the loaders come from instead.
            ckpt_path: What to go on from: a path or URL, "best", "last", or "auto": the newest whole checkpoint, if
                there is one, of this Trainer's folders, or of its logger's other versions; rank 0 says which.
            weights_only: False lets the checkpoint's file run code, so do it only with one that you trust.
            restore: The checkpoint's parts that are restored; None is all: "model", "optimizer", "lr_scheduler",
                "precision", "callbacks", "datamodule", "loops" (epoch, batch and steps), "data" (positions in the
                loaders; without it an epoch that was under way begins anew), "metrics" (what was logged, and the
                epoch's sums), "windows" (gradients of an open window of accumulation), "random" (random states of all
                ranks).
            restore_except: Those that are not. Without "loops" there is no "data", "metrics" and "windows".

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
            weights_only,
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
        weights_only: bool | None = None,
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
        train_dataloaders, datamodule = or_datamodule(train_dataloaders, datamodule)
        check_module(self, model, "fit")
        parts = contents.chosen_parts(restore, restore_except)
        self._launch()
        self._given = {"train": train_dataloaders, "val": val_dataloaders}
        left = self.fit_loop.begin()
        self.metrics.discard("train")
        self.metrics.discard("validate")
        self.fit_loop.events = {choose("events", kind, ["batch", "epoch"]) for kind in events}
        self.fit_loop.data_parts, _ = self.lite.strategy.data_shards(self.world_size, self.global_rank)
        self._check_fit(model, datamodule)

        def find() -> None:
            self._begin_from(ckpt_path, fitting=True, goes_on="loops" in parts)

        with self._stop_signals(), running(self, TrainerFn.FITTING, model, datamodule, find):
            checkpoint = self._read_checkpoint(weights_only)
            if checkpoint is None:
                self._warn_of_epoch_begun_anew(left)
            else:
                contents.restore_callbacks(self, checkpoint, parts=parts, fitting=True)
            self._log_graph()
            if checkpoint is not None and "state_dict" in parts:
                contents.restore_weights(self, checkpoint, str(self.ckpt_path))
            self._set_up(train=True)
            self.metrics.at(self.metrics.place("", "on_fit_start"))
            self.hooks.call("on_fit_start")
            self._log_hyperparameters()
            if checkpoint is not None:
                # Those that were in use: whoever makes them may ask for the epoch.
                self.fit_loop.progress.epoch = contents.epoch_of_loaders(checkpoint, parts)
                self.load_data(self.fit_loop, "train")
                self.load_data(self.fit_loop, "val")
                contents.restore_training(self, checkpoint, parts, str(self.ckpt_path))
            if checkpoint is None or "loops" not in parts:
                self._check_sanity(self.heed_signal)
            self.load_data(self.fit_loop, "train")
            self.load_data(self.fit_loop, "val")
            self._warn_of_nothing_to_do()
            check_reachable(self)
            self.state.stage = RunningStage.TRAINING
            with self._interrupts():
                yield from self.fit_loop.run(self)
            if not self.fit_loop.stopped_by_signal:
                self.metrics.at(self.metrics.place("", "on_fit_end"))
                self.hooks.call("on_fit_end")
            if self.fit_loop.stopped_by_signal or self.stops_for_signal(now=True):
                self._save_for_signal()

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
        train_dataloaders, datamodule = or_datamodule(train_dataloaders, datamodule)
        check_module(self, model, "plan")
        self._launch()
        self._given = {"train": train_dataloaders, "val": val_dataloaders}
        self._check_fit(model, datamodule)
        with running(self, TrainerFn.FITTING, model, datamodule, planning=True):
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
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """Validate, and return what was logged: a dict for each loader. Collective: call on all ranks.

        Args:
            model: A LightningModule; None takes the last one, with its best checkpoint.
            dataloaders: As `val_dataloaders` of `fit`; None asks datamodule or module.
            ckpt_path: Weights to load: a path, "best" or "last"; None keeps the model's own.
            verbose: Whether to print a table.
            datamodule: Where the loaders come from instead.
            weights_only: As for `fit`.
        """
        return self._evaluate(
            self.validate_loop, TrainerFn.VALIDATING, model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def test(
        self,
        model: Any = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: Any = None,
        weights_only: bool | None = None,
    ) -> list[dict[str, float]]:
        """As `validate`, with `test_step` and the test loaders."""
        return self._evaluate(
            self.test_loop, TrainerFn.TESTING, model, dataloaders, ckpt_path, verbose, datamodule, weights_only
        )

    def predict(
        self,
        model: Any = None,
        dataloaders: Any = None,
        datamodule: Any = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
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
            weights_only: As for `fit`.
            gather: Give every rank the outputs of all, put together batch by batch in the dataset's order, as one
                process with the global batch has them. They must be tensors with a row per sample, lists of as many
                objects, or dicts and tuples of these.
        """
        keep = return_predictions is not False
        self.predict_loop.gather = gather
        self.predict_loop.keep = keep
        self._evaluate(
            self.predict_loop, TrainerFn.PREDICTING, model, dataloaders, ckpt_path, False, datamodule, weights_only
        )
        found: list[Any] = self.predict_loop.predictions
        if not keep:
            self.predict_loop.predictions = []
            return None
        return found[0] if len(found) == 1 else found

    def tune(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        scale_batch_size_kwargs: Mapping[str, Any] | None = None,
        lr_find_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Find what `auto_scale_batch_size` and `auto_lr_find` ask for, in this order. Collective: call on all ranks.

        Args:
            model: As for `fit`; its weights stay.
            train_dataloaders: As for `fit`.
            val_dataloaders: Not used.
            datamodule: As for `fit`.
            scale_batch_size_kwargs: Further arguments of `Tuner.scale_batch_size`.
            lr_find_kwargs: Further arguments of `Tuner.lr_find`.

        Returns:
            {"scale_batch_size": the size, "lr_find": an LRFinder}, as far as asked for.
        """
        from lite.trainer.tuner import tune

        train_dataloaders, datamodule = or_datamodule(train_dataloaders, datamodule)
        check_module(self, model, "tune")
        self._launch()
        return tune(self, model, train_dataloaders, datamodule, scale_batch_size_kwargs or {}, lr_find_kwargs or {})

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0."""
        self.lite.print(*args, **kwargs)

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Create modules on the device and in the precision's dtype at once."""
        with self.lite.init_module():
            yield


__all__ = ["ManualOptimizer", "Trainer"]
