"""What comes between the start of a run and its first batch: optimizers, the sanity check, words on what is to come."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from lite.errors import ConfigError
from lite.seed import RandomState
from lite.trainer.data.sources import Sources
from lite.trainer.hooks import Hooks, overrides
from lite.trainer.logging.metric_objects import count_samples_once
from lite.trainer.loops import EvaluationLoop
from lite.trainer.loops.evaluate import no_gradients
from lite.trainer.module import LightningModule
from lite.trainer.optimization.declared import Declared, read_declared
from lite.trainer.optimization.optimizers import SchedulerConfig, as_lr_schedulers, as_plain, read_optimizers
from lite.trainer.state import RunningStage


def synchronised_batch_norms(module: nn.Module) -> Callable[[], None]:
    """Let batch norms within a module use all ranks' statistics.

    Returns:
        What puts the module's own layers back, with the values that they have by then.
    """
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.SyncBatchNorm)
    ]
    nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]

    def put_back() -> None:
        for parent, name, own in places:
            now = getattr(parent, name)
            if now is not own:
                own._parameters, own._buffers, own.training = now._parameters, now._buffers, now.training
                setattr(parent, name, own)

    return put_back


class Preparing(Sources):
    """The side of `Trainer` that makes a run ready."""

    hooks: Hooks
    fast_dev_run: int
    sync_batchnorm: bool
    optimizers: list[Any]
    lr_scheduler_configs: list[SchedulerConfig]
    declared: list[Declared]
    _in_hands: list[Any]
    _put_back: list[Callable[[], None]]
    _manual_backward: Any
    _told_hparams: bool
    _trained: Any
    _told_graph: bool

    def _launch(self) -> None:
        """Start the processes, where they don't run yet: each runs the script anew, and this one waits for them."""
        self.lite.launch()

    def _set_up(self, *, train: bool) -> None:
        """Let Lite prepare module, optimizers and schedulers."""
        if self.sync_batchnorm and self.world_size > 1:
            if self.lite.device.type == "cpu":
                raise ConfigError(
                    "sync_batchnorm=True: torch's SyncBatchNorm doesn't run on the CPU; leave it out, and each rank's "
                    "BatchNorm takes the mean over its own samples."
                )
            self._put_back.append(synchronised_batch_norms(self.module))
        self._put_back.append(count_samples_once(self.module, self.lite.strategy.data_group()))
        self._in_hands, self._manual_backward = [], None
        if not train:
            if self.module is not self._trained:  # otherwise they belong to what is saved after it, too
                self.optimizers, self.lr_scheduler_configs, self.declared = [], [], []
            self.lite.setup(self.module)
            return
        self._trained = self.module
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

    def _check_sanity(self, look: Callable[..., bool] | None = None) -> None:
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
            EvaluationLoop("validate").run(self, limited, no_grad=no_gradients(False), look=look)
        self.metrics.at(self.metrics.place("", "on_sanity_check_end"))
        self.hooks.call("on_sanity_check_end")
        self.metrics.discard("validate")
        self.metrics.forget_places("validate")
        self.metrics.kept, self.metrics.sanity = kept, False
        self.metrics.bar.clear()
        self.metrics.logged.clear()
        self.state.stage = None
        before.restore()

    def _warn_of_epoch_begun_anew(self, left: int) -> None:
        if left:
            warnings.warn(
                f"the fit before this one ended in epoch {self.current_epoch}, after {left} of its batches: that epoch "
                "begins anew, with the weights as they are. To go on exactly where a fit ended, save it by "
                "trainer.save_checkpoint(path) and pass ckpt_path=path.",
                stacklevel=4,
            )

    def _warn_of_nothing_to_do(self) -> None:
        fit = self.fit_loop
        if fit.data.num_batches == 0:
            warnings.warn("there are no training batches; nothing is trained.", stacklevel=4)
            fit.empty = True
        elif fit.is_over(self) and not fit.is_unfinished and (fit.progress.epoch or fit.progress.updates):
            warnings.warn(
                f"nothing is left to train: {fit.progress.epoch} epochs and {fit.progress.updates} steps are done, and "
                f"max_epochs={fit.max_epochs}, max_steps={fit.max_steps}; raise trainer.fit_loop.max_epochs.",
                stacklevel=4,
            )

    def _log_hyperparameters(self) -> None:
        if not self.loggers or self._told_hparams or self.fast_dev_run:
            return
        found: dict[str, Any] = {}
        for owner in (self.datamodule, self.module):
            if owner is not None and owner._log_hyperparams and owner.hparams:
                found.update(dict(owner.hparams_initial))
        if found:
            self._told_hparams = True
            self.lite.log_hyperparameters(found)
            if self.is_global_zero:
                for logger in self.loggers:
                    logger.save()

    def _log_graph(self) -> None:
        """Offer loggers the model's graph, before it is set up: rank 0 runs its forward alone to trace it."""
        if self._told_graph:
            return
        self._told_graph = True
        if self.is_global_zero and self.loggers:
            before = RandomState.capture(cuda=True)
            for logger in self.loggers:
                logger.log_graph(self.module)
            before.restore()
