"""What a Trainer's checkpoint holds, and how a run takes it up again; Lite writes and reads the file.

Keys are those that Lightning's files have, so that scripts that look into them go on working; what only an exact resume
needs is under "lite".
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch

from lite import collectives
from lite.checkpoint.per_rank import (
    counterpart,
    gather_buffers,
    parts_of_ranks,
    restore_buffers,
    restore_random_state,
)
from lite.errors import CheckpointError, ConfigError, choose, shown
from lite.loading import restore_object
from lite.seed import Moment, RandomState
from lite.sharded import is_sharded
from lite.state import is_stateful, module_state
from lite.trainer.callbacks.base import Checkpoint
from lite.trainer.checkpoints.foreign import progress_of_foreign
from lite.trainer.data.combined import where_to_go_on
from lite.trainer.hparams import storable
from lite.trainer.logging.metric_objects import epoch_sums, restore_torchmetrics
from lite.trainer.logging.regrouping import regrouped
from lite.trainer.loops.train_epoch import discard

PARTS = {
    "model": "state_dict",
    "optimizer": "optimizer_states",
    "lr_scheduler": "lr_schedulers",
    "loops": "loops",
    "data": "data",
    "metrics": "metrics",
    "windows": "windows",
    "random": "random",
    "callbacks": "callbacks",
    "datamodule": "datamodule",
    "precision": "precision",
}
EVERYTHING = frozenset(PARTS.values())
_EXACT = ("data", "metrics", "random")  # what the file has under "lite"
_OF_LOOPS = {"data", "metrics", "windows"}  # they belong to a place in an epoch


def chosen_parts(restore: Iterable[str] | None, restore_except: Iterable[str] | None) -> frozenset[str]:
    """The parts of a checkpoint that are restored, by the file's keys; those under "lite" by their own names.

    Raises:
        ConfigError: A name is unknown, or has no meaning without another.
    """
    names = {**{name: (key,) for name, key in PARTS.items()}, **{key: (key,) for key in EVERYTHING}, "lite": _EXACT}

    def keys(argument: str, given: Iterable[str]) -> set[str]:
        given = [given] if isinstance(given, str) else list(given)
        return {key for name in given for key in names[choose(argument, name, names)]}

    chosen = set(EVERYTHING) if restore is None else keys("restore", restore)
    alone = sorted(chosen & _OF_LOOPS)
    if alone and "loops" not in chosen:
        raise ConfigError(
            f"restore={shown(restore)}: {alone[0]!r} belongs to a place in an epoch, which 'loops' has; add 'loops', "
            f"or leave {alone[0]!r} out."
        )
    if restore_except is not None:
        chosen -= keys("restore_except", restore_except)
    return frozenset(chosen if "loops" in chosen else chosen - _OF_LOOPS)


# ---- saving


def dump(trainer: Any, weights_only: bool = False) -> dict[str, Any]:
    """The checkpoint's content. Collective: call on all ranks."""
    module, fit = trainer.module, trainer.fit_loop
    checkpoint: dict[str, Any] = {
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "lite_version": sys.modules["lite"].__version__,
        "state_dict": module_state(module),
        "loops": {"fit_loop": fit.state_dict()},
    }
    if not weights_only:
        checkpoint["callbacks"] = {c.state_key: s for c in trainer.callbacks if (s := c.state_dict())}
        checkpoint["optimizer_states"] = [optimizer.state_dict() for optimizer in trainer.optimizers]
        checkpoint["lr_schedulers"] = [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]
        checkpoint["precision"] = trainer.lite.precision.state_dict()
        checkpoint["lite"] = _exact_state(trainer, checkpoint)
        if fit.epoch_loop.has_stepped(fit.progress.updates):
            warnings.warn(
                "saved within a training batch in which an optimizer has stepped already: a resumed run begins with "
                "that batch once more, and repeats the step. Save before it, or in on_train_batch_end.",
                stacklevel=5,
            )
        if fit.epoch_loop.has_mixed_gradients:
            warnings.warn(
                "saved within the step of a batch whose gradients have entered a window of accumulation: they can't be "
                "taken out again, so a resumed run begins the window anew with that batch.",
                stacklevel=5,
            )
        elif fit.epoch_loop.window_is_open and not any(map(is_sharded, module.parameters())):
            checkpoint["windows"] = fit.epoch_loop.windows  # with its gradients; Lite warns where it can't be kept
    if module.hparams:
        checkpoint["hparams_name"] = module._hparams_name or "kwargs"
        checkpoint["hyper_parameters"] = storable(module.hparams, type(module).__name__)
    datamodule = trainer.datamodule
    if datamodule is not None:
        if datamodule.hparams:
            checkpoint["datamodule_hparams_name"] = datamodule._hparams_name or "kwargs"
            checkpoint["datamodule_hyper_parameters"] = storable(datamodule.hparams, type(datamodule).__name__)
        if not weights_only and (state := datamodule.state_dict()):
            checkpoint["datamodule"] = state
        datamodule.on_save_checkpoint(checkpoint)
    if not weights_only:
        for callback in trainer.callbacks:
            callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def _exact_state(trainer: Any, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What only an exact resume needs: positions in the data, and of every rank its random states, sums and buffers."""
    fit = trainer.fit_loop
    loader = fit.data.loaders[0] if fit.data.loaders else None
    where = where_to_go_on(loader, fit.epoch_loop.under_way) if is_stateful(loader) else None
    per_rank, val = _is_per_rank(loader), fit.val_loop
    under_way = fit.epoch_loop.under_way or fit.val_loop.under_way
    mine: dict[str, Any] = {
        "part": trainer.lite.strategy.data_shards(trainer.world_size, trainer.global_rank)[1],
        "random": RandomState.capture(cuda=True).state_dict(),
        "strategy": trainer.lite.strategy.own_state(*_trained(trainer, checkpoint)),
        **(fit.sums_before or epoch_sums(trainer, under_way=under_way)),
        "position": where if per_rank else None,
        "validation": val.state_dict()["position"],
        "validation_is_own": val.running and not val.through and _is_per_rank(fit.val_data.loaders[val.loader]),
        "val_loaders": [loader.state_dict() if is_stateful(loader) else None for loader in fit.val_data.loaders],
    }
    ranks = collectives.all_gather_objects(mine)
    buffers = gather_buffers({"module": dict(checkpoint["state_dict"])}, {"module": trainer.module}).get("module", {})
    return {"ranks": ranks, "position": None if per_rank else where, "buffers": buffers}


def _is_per_rank(loader: Any) -> bool:
    return bool(getattr(loader, "state_is_per_rank", False))


def _trained(trainer: Any, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The module and its optimizers by name, and what the checkpoint has for each."""
    states = checkpoint.get("optimizer_states") or ()
    objects = {"state_dict": trainer.module, **{f"optimizer {i}": one for i, one in enumerate(trainer.optimizers)}}
    content = {"state_dict": checkpoint["state_dict"], **{f"optimizer {i}": one for i, one in enumerate(states)}}
    return objects, content


# ---- restoring


def restore_weights(trainer: Any, checkpoint: dict[str, Any], path: str) -> None:
    """Give the weights to the module."""
    if "state_dict" not in checkpoint:
        raise CheckpointError(
            f"ckpt_path={path!r} has no 'state_dict'; it has {', '.join(map(repr, checkpoint)):.200}. Weights alone "
            "are loaded by module.load_state_dict(torch.load(path, weights_only=True))."
        )
    if trainer.lite.precision.param_dtype is not None:  # as `setup` will: 64 bits would not fit into 32
        trainer.module.to(trainer.lite.precision.param_dtype)
    strict = trainer.module.strict_loading
    report = restore_object(trainer.module, checkpoint["state_dict"], "state_dict", strict=strict)
    if report.missing or report.unexpected:
        warnings.warn(f"not everything in ckpt_path={path!r} was loaded: {report}", stacklevel=4)


def restore_callbacks(
    trainer: Any, checkpoint: dict[str, Any], *, parts: frozenset[str] = EVERYTHING, fitting: bool
) -> None:
    """Tell everyone of the checkpoint, and give the callbacks their states.

    Args:
        trainer: Whose callbacks they are.
        checkpoint: The checkpoint.
        parts: What is restored.
        fitting: Whether a fit goes on from it; callbacks that save go on from no other run's files.
    """
    module, datamodule = trainer.module, trainer.datamodule
    if datamodule is not None:
        datamodule.on_load_checkpoint(checkpoint)
        saved = checkpoint.get("datamodule", checkpoint.get(type(datamodule).__qualname__))
        if saved is not None and "datamodule" in parts:
            datamodule.load_state_dict(saved)
    module.on_load_checkpoint(checkpoint)
    for callback in trainer.callbacks:
        callback.on_load_checkpoint(trainer, module, checkpoint)
    if "callbacks" not in parts:
        return
    known = {callback.state_key: callback for callback in trainer.callbacks}
    for key, state in checkpoint.get("callbacks", {}).items():
        if key in known and (fitting or not isinstance(known[key], Checkpoint)):
            known[key].load_state_dict(state)
    if not fitting:
        return
    left = [key for key in checkpoint.get("callbacks", {}) if key not in known]
    if left:
        warnings.warn(f"the checkpoint has states of callbacks that this Trainer doesn't have: {left}.", stacklevel=4)


def epoch_of_loaders(checkpoint: dict[str, Any], parts: frozenset[str]) -> int:
    """The epoch for which the loaders were asked that were in use."""
    loops = checkpoint.get("loops", {}).get("fit_loop") or {}
    progress = loops.get("progress", {}) if "loops" in parts else {}
    return max(int(progress.get("reloaded", 0)), 0)


def restore_training(trainer: Any, checkpoint: dict[str, Any], parts: frozenset[str], path: str) -> None:
    """Give the rest back: optimizers, schedulers, loops, random states, positions."""
    fit = trainer.fit_loop
    if "optimizer_states" in parts and trainer.optimizers:
        _restore_list("optimizer_states", checkpoint, trainer.optimizers, path)
    if "lr_schedulers" in parts and trainer.lr_scheduler_configs:
        _restore_list("lr_schedulers", checkpoint, [c.scheduler for c in trainer.lr_scheduler_configs], path)
    if "precision" in parts and checkpoint.get("precision"):
        trainer.lite.precision.load_state_dict(checkpoint["precision"])
    exact = checkpoint.get("lite")
    begun_anew = "loops" in parts and _restore_loops(fit, checkpoint, exact is not None and "data" in parts)
    if parts != EVERYTHING:  # another run's files are not to be made up for
        fit.forget_saves()
    if exact is None:
        return
    ranks = exact["ranks"]
    saved_parts = [one.get("part", rank) for rank, one in enumerate(ranks)]
    parts_now = trainer.lite.strategy.data_parts(trainer.world_size)
    source = counterpart(saved_parts, parts_now, trainer.global_rank)
    if "state_dict" in parts:
        restore_buffers({"module": exact.get("buffers", {})}, {"module": trainer.module}, source)
    if {"state_dict", "optimizer_states"} <= parts:  # the weights have been loaded before
        own = [one["strategy"] for one in ranks if one.get("strategy") is not None]
        trainer.lite.strategy.loading(own, *_trained(trainer, checkpoint))()
    same = saved_parts == parts_now
    mine = ranks[trainer.global_rank] if same else ranks[0]
    if "random" in parts:
        fit.moment = _moment(ranks, source, parts_now[trainer.global_rank])
    elif "data" in parts:  # a pass that is gone on with has states of its own, which end with it
        fit.moment = RandomState.capture(cuda=True)
    if "metrics" in parts:
        if not same and not begun_anew:
            mine = {**mine, **_regrouped(trainer, ranks, saved_parts)}
        _restore_metrics(trainer, mine, sums=not begun_anew)
    if "windows" in parts and "windows" in checkpoint and not begun_anew:
        parts_of_windows = parts_of_ranks(checkpoint["windows"])
        windows = parts_of_windows[trainer.global_rank] if same else _regrouped_windows(parts_of_windows, parts_now)
        fit.epoch_loop.windows.load_state_dict(windows)
    if "data" in parts:
        if not same:
            _check_positions(fit, mine, path, len(ranks), trainer.world_size)
        fit.val_loop.loader_state = mine["validation"]
        _restore_val_loaders(fit, mine["val_loaders"])
        trainer.resume_position(mine["position"] if mine["position"] is not None else exact["position"])


def _restore_loops(fit: Any, checkpoint: dict[str, Any], positions: bool) -> bool:
    """Give the loops their state; whether an epoch that was under way begins anew, as nobody knows its data."""
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if loops is None or "progress" not in loops:
        progress_of_foreign(checkpoint, fit.progress)
        return True
    fit.load_state_dict(loops)
    if positions:
        return False
    within = fit.progress.within
    if within:
        warnings.warn(
            f"epoch {fit.progress.epoch} was under way and begins anew: where it was in the data is not restored "
            "('data').",
            stacklevel=5,
        )
    fit.begin_epoch_anew()
    return bool(within)


def _restore_metrics(trainer: Any, mine: dict[str, Any], *, sums: bool) -> None:
    """The newest values, and an epoch's sums so far."""
    trainer.metrics.take_loaders(trainer.fit_loop.val_data)
    state = mine["metrics"] if sums else {**mine["metrics"], "entries": []}
    trainer.metrics.load_state_dict(state, trainer.module)
    if sums:
        restore_torchmetrics(trainer.module, mine["torchmetrics"])
        trainer.fit_loop.shown_after = mine.get("shown")


def _regrouped(trainer: Any, ranks: list[Any], saved_parts: list[int]) -> dict[str, Any]:
    """This rank's part of the epoch's sums that other ranks have saved; those with the same data count once."""
    first = dict(zip(reversed(saved_parts), reversed(ranks), strict=True))
    parts, part = trainer.lite.strategy.data_shards(trainer.world_size, trainer.global_rank)
    metrics, torchmetrics, told = regrouped([first[i] for i in sorted(first)], trainer.module, part, parts)
    if told:
        warnings.warn(
            f"the checkpoint was saved by {len(ranks)} processes, and this job has {trainer.world_size}: "
            f"{'; '.join(told)}.",
            stacklevel=5,
        )
    return {"metrics": metrics, "torchmetrics": torchmetrics}


def _restore_list(key: str, checkpoint: dict[str, Any], objects: list[Any], path: str) -> None:
    saved = checkpoint.get(key)
    if saved is None:
        raise CheckpointError(
            f"ckpt_path={path!r} has no {key!r} to resume from (it was saved with weights_only); begin from its "
            "weights with restore=('model',)."
        )
    if len(saved) != len(objects):
        raise CheckpointError(
            f"ckpt_path={path!r} has {len(saved)} {key}, but configure_optimizers returned {len(objects)}; leave them "
            f"as they are with restore_except=({key!r},)."
        )
    for target, state in zip(objects, saved, strict=True):
        restore_object(target, state, key, strict=True)


def _check_positions(fit: Any, mine: dict[str, Any], path: str, before: int, now: int) -> None:
    """Refuse to go on within data in which each of another number of ranks had a position of its own."""
    within_training = fit.progress.within and not fit.epoch_loop.complete and mine["position"] is not None
    within_validation = fit.val_loop.restoring and mine.get("validation_is_own", False)
    if within_training or within_validation:
        kind = "training" if within_training else "validation"
        raise CheckpointError(
            f"ckpt_path={path!r} was saved by {before} processes within {kind} data in which each has a position of "
            f"its own, and this job has {now}: resume with as many, or begin the epoch anew with "
            "restore_except=('data',). Data that lite splits (a map-style dataset, or a loader from "
            "lite.setup_dataloaders(loader, shard='stride')) are gone on with by any number."
        )


def _restore_val_loaders(fit: Any, states: list[Any]) -> None:
    """Passes over validation's loaders are counted: random numbers in their workers follow from that."""
    val = fit.val_loop
    running = val.loader if val.restoring and val.batch and not val.through else None
    for index, (loader, state) in enumerate(zip(fit.val_data.loaders, states, strict=False)):
        if state is not None and is_stateful(loader) and index != running:
            try:
                loader.load_state_dict(state)
            except CheckpointError:  # validation on other data than before is nobody's mistake
                continue
            discard(loader)  # one that was left before its end, by a limit


def _regrouped_windows(ranks: list[dict[str, Any]], parts: list[int]) -> dict[str, Any]:
    """What a rank has of the open windows that other ranks have saved, given which part of the data each has now."""
    shares = len(set(parts))
    return {name: _share([states[name] for states in ranks if name in states], shares) for name in ranks[0]}


def _share(states: list[dict[str, Any]], shares: int) -> dict[str, Any]:
    """One share of a window: of weighed gradients and their weights the sum counts, of others the ranks' mean."""
    share = dict(states[0])
    if not share["weighted"]:
        shares = len(states)
    share["total"] = sum(state["total"] for state in states) / shares
    columns = zip(*[state["gradients"] for state in states], strict=True)
    share["gradients"] = [_sum(column, shares) for column in columns]
    return share


def _sum(gradients: Iterable[torch.Tensor | None], shares: int) -> torch.Tensor | None:
    """One share of the ranks' sum; a rank that has no gradient counts as zeros."""
    there = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(there).sum(0) / shares if there else None


def _moment(ranks: list[Any], source: int | None, part: int) -> Moment:
    """What the run goes on under when it has come to where the state was taken; until then nothing changes."""
    now = RandomState.capture(cuda=True)
    moment = restore_random_state([mine["random"] for mine in ranks], source, part)
    now.restore()
    return moment
