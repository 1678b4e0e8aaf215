"""Where a run gets its data from: what was passed, the datamodule, the module; each stage once, or anew when due."""

from __future__ import annotations

import warnings
from typing import Any

from lite.errors import CheckpointError, ConfigError, shown
from lite.trainer.data.stage import StageData, eval_data, find_loaders, find_move, has_loaders, train_data
from lite.trainer.hooks import overrides
from lite.trainer.loops.calling import step_caller
from lite.trainer.loops.fit import FitLoop
from lite.trainer.module import LightningModule
from lite.trainer.view import View


class Sources(View):
    """The side of `Trainer` that gets the loaders."""

    datamodule: Any
    limit_train_batches: int | float
    limit_val_batches: int | float
    overfit_batches: int | float
    gradient_clip_val: float | None
    multiple_trainloader_mode: str
    use_distributed_sampler: bool | str
    _given: dict[str, Any]
    _is_endless: bool
    _loaded: set[str]

    def load_data(self, fit: FitLoop, which: str = "both", again: bool = False) -> None:
        """Get training's and validation's loaders, where that has not been done."""
        for name in ("train", "val") if which == "both" else (which,):
            if name in self._loaded and not again:
                continue
            self._loaded.add(name)
            if name == "train":
                fit.data = self._make_train_data(fit.data if again else None)
                if self.world_size > 1:
                    fit.data.agree()
            elif self._validates_in_fit():
                before = fit.val_data if again else None
                fit.val_data = self._make_eval_data("validate", self._given.get("val"), before)

    def resume_position(self, position: Any) -> None:
        """Let training's loader go on from a stored position."""
        loader = self.fit_loop.data.loaders[0]
        if position is not None and hasattr(loader, "load_state_dict"):
            try:
                loader.load_state_dict(position)
            except CheckpointError as error:
                if self.fit_loop.progress.within:
                    raise
                warnings.warn(f"the next epoch begins with the training data as they are now: {error}", stacklevel=5)
        elif self.fit_loop.progress.batch:
            warnings.warn(
                f"the training data are a {type(loader).__name__} without a position of its own: they are read again "
                "up to where the run was.",
                stacklevel=4,
            )

    def _check_fit(self, model: Any, datamodule: Any) -> None:
        name = type(model).__name__
        if self._is_endless and self.is_global_zero and self.fit_loop.max_epochs == 1000:
            warnings.warn(
                "no limit is given: training ends after 1000 epochs; set max_epochs=-1 for none.", stacklevel=4
            )
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

    def _make_train_data(self, before: StageData | None) -> Any:
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
            before=before,
        )
        self.fit_loop.schedule.check(data.num_batches)
        if self.fit_loop.progress.reloaded < 0:
            self.fit_loop.progress.reloaded = self.fit_loop.progress.epoch
        return data

    def _load_train_data(self) -> None:
        if self.module is not None:
            self.load_data(self.fit_loop, "train")

    def _make_eval_data(self, stage: str, given: Any, before: StageData | None = None) -> Any:
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
            before=before,
        )


def or_datamodule(loaders: Any, datamodule: Any) -> tuple[Any, Any]:
    """A datamodule that was passed in the loaders' place.

    Raises:
        ConfigError: Both were passed, or `datamodule` is something else.
    """
    if datamodule is not None and (isinstance(datamodule, type) or not hasattr(datamodule, "attach")):
        kind = getattr(datamodule, "__name__", "")
        remedy = f"an instance, {kind}(...)" if isinstance(datamodule, type) else "one, or loaders as loaders"
        raise ConfigError(f"datamodule={shown(datamodule)} is no LightningDataModule of lite.trainer; pass {remedy}.")
    if hasattr(loaders, "prepare_data") and hasattr(loaders, "setup"):
        if datamodule is not None:
            raise ConfigError("two datamodules were passed; pass one.")
        return None, loaders
    if loaders is not None and datamodule is not None:
        raise ConfigError("loaders and a datamodule were passed; pass one of them.")
    return loaders, datamodule
