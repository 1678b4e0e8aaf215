"""The life of one run, whatever it does: everyone is told who they work for, and is let go again, come what may."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lite.errors import UsageError
from lite.launchers import in_notebook
from lite.trainer.callbacks.base import Callback
from lite.trainer.datamodule import LightningDataModule
from lite.trainer.hooks import Hooks, overrides
from lite.trainer.module import LightningModule
from lite.trainer.module_hooks import DataHooks
from lite.trainer.old import GONE_FROM_CALLBACKS, check_old_hooks, tell_of_gone
from lite.trainer.state import TrainerFn, TrainerStatus
from lite.trainer.together import report_position

INTERRUPTED = 130


@contextmanager
def running(
    trainer: Any,
    fn: TrainerFn,
    module: Any,
    datamodule: Any,
    find: Callable[[], None] = lambda: None,
    *,
    planning: bool = False,
) -> Iterator[None]:
    """The block is a run of `module`: set up before, torn down after, and told of an exception.

    Loggers are told how it ended, in Lightning's words, unless it is only planned. Ctrl-C ends it with exit code 130 in
    a script, and quietly in a notebook; a signal's end is no exception that anyone is told of. `find` is called when
    its callbacks are known and nothing is set up: where it goes on from.
    """
    stage = str(fn.value)
    report_position(trainer)
    try:
        trainer.begin(fn, module, datamodule)
    except BaseException:
        trainer.state.status = TrainerStatus.INTERRUPTED
        module.attach(None, None)
        raise
    hooked, ready, outcome = False, False, "failed"
    try:
        with _torch_settings(trainer):
            trainer.hooks = Hooks(trainer, module, trainer.callbacks, (Callback, LightningModule), trainer.wrap_hook)
            hooked = True
            check_old_hooks(module)
            for callback in trainer.callbacks:
                tell_of_gone(callback, GONE_FROM_CALLBACKS)
            find()
            _prepare_data(trainer, module, datamodule)
            ready = True
            if datamodule is not None:
                datamodule.setup(stage)
            trainer.metrics.at(trainer.metrics.place("", "setup"))
            trainer.hooks.call("setup", stage)
            trainer.heed_signal(now=True)
            trainer.agree_on_log_dir()
            with trainer.lite.init_module():
                module.configure_model()
            yield
        trainer.state.status = TrainerStatus.FINISHED
        outcome = "finished" if trainer.fit_loop.stopped_by_signal else "success"
    except BaseException as error:
        if isinstance(error, GeneratorExit):  # whoever drives the run by hand has left it
            trainer.state.status = TrainerStatus.INTERRUPTED
            outcome = "interrupted"
            raise
        trainer.state.status = TrainerStatus.INTERRUPTED
        if isinstance(error, SystemExit) and trainer.fit_loop.stopped_by_signal:
            outcome = "finished"
            raise
        told = [partial(method, error) for method in trainer.hooks.on_exception] if hooked else []
        if isinstance(datamodule, LightningDataModule):
            told.append(partial(datamodule.on_exception, error))
        _call_all(told)
        if not isinstance(error, KeyboardInterrupt):
            raise
        if not in_notebook():
            raise SystemExit(INTERRUPTED) from error
        warnings.warn(
            "the run was interrupted; trainer.save_checkpoint(path) keeps where it is, and fit(ckpt_path=path) goes on "
            "from there; another fit without it begins the epoch anew.",
            stacklevel=2,
        )
    finally:
        try:
            if ready:
                trainer.metrics.at(trainer.metrics.place("", "teardown"))
                first = [] if datamodule is None else [datamodule.teardown]
                _call_all([partial(method, stage) for method in (*first, *trainer.hooks.teardown)])
        finally:
            trainer.end(module, datamodule, None if planning else outcome)


def _call_all(calls: Iterable[Callable[[], Any]]) -> None:
    """Call all of them, whatever one raises; the first error is raised in the end."""
    errors: list[BaseException] = []
    for call in calls:
        try:
            call()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def check_module(trainer: Any, module: Any, call: str) -> None:
    """Refuse what is no LightningModule, and a run within another run, which it would take the model from.

    Raises:
        TypeError: It is something else.
        UsageError: This Trainer, or the one that has the module, has not ended what it is doing.
    """
    if isinstance(module, LightningModule):
        for one, whose in ((trainer, "this Trainer"), (module.__dict__.get("_trainer"), "the module's Trainer")):
            if one is not None and one.state.status is TrainerStatus.RUNNING:
                raise UsageError(
                    f"trainer.{call}() was called while {whose} is in the middle of {one.state.fn.value}; wait for its "
                    "end, or leave `trainer.steps` first. What a fit evaluates as it goes are its validation loaders "
                    "(val_check_interval, check_val_every_n_epoch); for more, give copy.deepcopy(module) to another "
                    "Trainer."
                )
        return
    hint = ""
    if isinstance(module, type):
        hint = f"; pass an instance, {module.__name__}(...)"
    elif hasattr(module, "_orig_mod"):
        hint = "; compile it inside, by self.compile() in configure_model, or pass the module itself"
    elif isinstance(module, nn.Module):
        hint = "; a LightningModule has training_step and configure_optimizers"
        if any(base.__name__ == "LightningModule" for base in type(module).__mro__):
            hint = "; its class is another package's: from lite.trainer import LightningModule"
    raise TypeError(f"trainer.{call}() got a {type(module).__name__} as the model, not a LightningModule{hint}.")


def _prepare_data(trainer: Any, module: Any, datamodule: Any) -> None:
    """On one process per machine, or of the job; what it raises is raised on all."""
    lite = trainer.lite
    owners = [(datamodule, LightningDataModule), (module, DataHooks)]
    for owner, base in owners:
        if owner is None or not overrides(owner, "prepare_data", base):
            continue
        local = bool(owner.prepare_data_per_node)
        with lite.rank_zero_first(local=local):
            if (lite.local_rank if local else lite.global_rank) == 0:
                owner.prepare_data()
        lite.barrier()


@contextmanager
def _torch_settings(trainer: Any) -> Iterator[None]:
    """torch's global settings that the Trainer was given, for the run."""
    deterministic, benchmark = trainer.deterministic, trainer.benchmark
    was_deterministic = _determinism()
    before = (torch.backends.cudnn.benchmark, torch.is_anomaly_enabled())
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
    if benchmark is not None or deterministic:
        torch.backends.cudnn.benchmark = bool(benchmark) and not deterministic
    if trainer.detect_anomaly:
        torch.autograd.set_detect_anomaly(True)
    try:
        yield
    finally:
        if _determinism() != was_deterministic:  # setting it imports torch's compiler, which takes more than a second
            torch.use_deterministic_algorithms(was_deterministic[0], warn_only=was_deterministic[1])
        torch.backends.cudnn.benchmark = before[0]
        torch.autograd.set_detect_anomaly(before[1])


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
