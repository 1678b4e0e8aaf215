"""`Tuner`: finds a learning rate and a batch size before a fit, and leaves nothing of the search behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lite.errors import ConfigError, choose
from lite.seed import RandomState
from lite.trainer.tuner.attributes import Tuned
from lite.trainer.tuner.batch_size import fits_into_memory, search
from lite.trainer.tuner.lr_finder import LRFinder, Ramp

__all__ = ["LRFinder", "Tuner", "tune"]


class Tuner:
    """Searches for a Trainer by short fits on its devices, in its precision, without accumulation.

    Args:
        trainer: The Trainer, which stays as it is.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: Any,
        train_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> LRFinder:
        """Let the learning rate rise over a short training. Collective: call on all ranks.

        Args:
            model: A LightningModule; its weights are put back afterwards.
            train_dataloaders: As for `fit`.
            datamodule: As for `fit`.
            min_lr: The first rate.
            max_lr: The last one.
            num_training: Batches.
            mode: "exponential" or "linear".
            early_stop_threshold: How many times the best loss ends the search; None never.
            update_attr: Whether the suggestion is put into the attribute.
            attr_name: The attribute or hyperparameter; "" finds `lr` or `learning_rate`.

        Raises:
            ConfigError: Nobody has such an attribute, or a setting is wrong.
        """
        mode = choose("lr_find's mode", mode, ["exponential", "linear"])
        if not 0 < min_lr < max_lr:
            raise ConfigError(f"lr_find(min_lr={min_lr!r}, max_lr={max_lr!r}): 0 < min_lr < max_lr is needed.")
        names = [attr_name] if attr_name else ["lr", "learning_rate"]
        tuned = Tuned("learning rate", [model, datamodule], names) if update_attr else None
        ramp = Ramp(min_lr, max_lr, num_training, mode, early_stop_threshold)
        with _unchanged(model):
            trial = _trial(self._trainer, max_steps=num_training, callbacks=[ramp], accumulate_grad_batches=1)
            trial.fit(model, train_dataloaders, datamodule=datamodule)
        finder = LRFinder(ramp.lr[: len(ramp.loss)], ramp.loss)
        suggestion = finder.suggestion() if tuned is not None else None
        if tuned is not None and suggestion is not None:
            tuned.value = suggestion
        return finder

    def scale_batch_size(
        self,
        model: Any,
        train_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
    ) -> int:
        """The largest batch size with which some steps fit into memory; it is put into the attribute. Collective.

        Args:
            model: A LightningModule, whose train_dataloader (or the datamodule's) reads the attribute.
            train_dataloaders: Refused: a ready loader has its batch size.
            datamodule: As for `fit`.
            mode: "power" doubles until it fails, "binsearch" then halves what lies between.
            steps_per_trial: Optimizer steps per try.
            init_val: The first size.
            max_trials: Tries at most.
            batch_arg_name: The attribute or hyperparameter.

        Raises:
            ConfigError: Nobody has such an attribute, a loader was passed, or not even one sample fits.
        """
        mode = choose("scale_batch_size's mode", mode, ["power", "binsearch"])
        if train_dataloaders is not None:
            raise ConfigError(
                "scale_batch_size can't change a loader that is passed; let train_dataloader of the module or the "
                f"datamodule make one with self.{batch_arg_name}."
            )
        tuned = Tuned("batch size", [model, datamodule], [batch_arg_name])
        before, samples = tuned.value, [0]

        def fits(size: int) -> bool:
            tuned.value = size
            with _unchanged(model):
                trial = _trial(self._trainer, max_steps=steps_per_trial, accumulate_grad_batches=1)
                good = fits_into_memory(lambda: trial.fit(model, datamodule=datamodule))
            samples[0] = _num_samples(trial)
            return good

        try:
            found = search(fits, init_val, mode=mode, max_trials=max_trials, limit=lambda: samples[0] or None)
        except BaseException:
            tuned.value = before
            raise
        if not found:
            tuned.value = before
            raise ConfigError(f"scale_batch_size: a batch of one sample does not fit into memory ({batch_arg_name}=1).")
        tuned.value = found
        return found


def _num_samples(trial: Any) -> int:
    """Each rank's samples of an epoch; 0 where the loader doesn't know."""
    dataset: Any = getattr(trial.train_dataloader, "dataset", None)
    try:
        total = len(dataset)
    except TypeError:
        return 0
    return -(-total // int(trial.world_size))


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """The block leaves weights and random states as they were."""
    weights, moment = copy.deepcopy(model.state_dict()), RandomState.capture(cuda=True)
    try:
        yield
    finally:
        model.attach(None, None)
        model.load_state_dict(weights)
        moment.restore()


def _trial(trainer: Any, **options: Any) -> Any:
    """A Trainer for a short fit with that one's Lite, clipping and settings, of which nothing is written or shown."""
    alike = (
        "limit_train_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "use_distributed_sampler",
        "multiple_trainloader_mode",
        "deterministic",
        "benchmark",
        "detect_anomaly",
        "sync_batchnorm",
    )
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings = {**{name: getattr(trainer, name) for name in alike}, **dict.fromkeys(shown, False)}
    off = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    trial = type(trainer)(lite=trainer.lite, max_epochs=-1, **{**settings, **off, **options})
    trial.fit_loop.follows_metrics = False
    return trial


def tune(
    trainer: Any,
    model: Any,
    train_dataloaders: Any,
    datamodule: Any,
    scale_batch_size_kwargs: Mapping[str, Any],
    lr_find_kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """See `Trainer.tune`.

    Raises:
        ConfigError: Nothing is to be found.
    """
    size, rate = trainer.auto_scale_batch_size, trainer.auto_lr_find
    if not size and not rate:
        raise ConfigError(
            "tune has nothing to look for; set Trainer(auto_lr_find=True) or Trainer(auto_scale_batch_size=True)."
        )
    if trainer.fast_dev_run:
        warnings.warn("tune looks for nothing under fast_dev_run, whose batches would not tell.", stacklevel=3)
        return {}
    tuner = Tuner(trainer)
    found: dict[str, Any] = {}
    if size:
        options = {**({"mode": size} if isinstance(size, str) else {}), **scale_batch_size_kwargs}
        found["scale_batch_size"] = tuner.scale_batch_size(model, train_dataloaders, datamodule, **options)
    if rate:
        options = {**({"attr_name": rate} if isinstance(rate, str) else {}), **lr_find_kwargs}
        found["lr_find"] = tuner.lr_find(model, train_dataloaders, datamodule, **options)
    return found
