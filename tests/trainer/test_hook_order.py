"""Hooks run in the recorded order, callbacks before the module, and only where somebody overrides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lite.errors import ConfigError
from lite.trainer import Callback, LightningModule
from lite.trainer.callbacks import ModelCheckpoint
from lite.trainer.hooks import CALLBACKS_ALONE, MODULE_ALONE, SHARED
from tests.trainer.modules import Tiny, TinyData, trainer

STEP = """module.training_step callback.on_before_zero_grad module.on_before_zero_grad module.optimizer_zero_grad
callback.on_before_backward module.on_before_backward module.backward callback.on_after_backward
module.on_after_backward"""
TRANSFER = "data.on_before_batch_transfer data.transfer_batch_to_device data.on_after_batch_transfer"
VALIDATION = f"""module.on_validation_model_zero_grad module.on_validation_model_eval callback.on_validation_start
module.on_validation_start callback.on_validation_epoch_start module.on_validation_epoch_start
{TRANSFER} callback.on_validation_batch_start module.on_validation_batch_start module.validation_step
callback.on_validation_batch_end module.on_validation_batch_end
callback.on_validation_epoch_end module.on_validation_epoch_end callback.on_validation_end module.on_validation_end
module.on_validation_model_train"""
FIT = f"""module.configure_callbacks data.prepare_data module.prepare_data data.setup callback.setup module.setup
module.configure_model module.configure_optimizers callback.on_fit_start module.on_fit_start
callback.on_sanity_check_start data.val_dataloader SANITY callback.on_sanity_check_end
data.train_dataloader callback.on_train_start module.on_train_start
callback.on_train_epoch_start module.on_train_epoch_start
{TRANSFER} callback.on_train_batch_start module.on_train_batch_start
{STEP}
callback.on_train_batch_end module.on_train_batch_end
{TRANSFER} callback.on_train_batch_start module.on_train_batch_start
module.optimizer_step module.training_step callback.on_before_backward module.on_before_backward module.backward
callback.on_after_backward module.on_after_backward
callback.on_before_optimizer_step module.on_before_optimizer_step
module.configure_gradient_clipping module.lr_scheduler_step
callback.on_train_batch_end module.on_train_batch_end
{VALIDATION}
callback.on_train_epoch_end module.on_train_epoch_end
callback.state_dict data.state_dict callback.on_save_checkpoint module.on_save_checkpoint
callback.on_train_end module.on_train_end callback.on_fit_end module.on_fit_end
data.teardown callback.teardown module.teardown""".replace(
    "SANITY", VALIDATION.replace("module.on_validation_model_zero_grad ", "")
)

_MODULE = [*SHARED, *MODULE_ALONE, "configure_callbacks", "prepare_data", "configure_model", "on_save_checkpoint"]
_CALLBACK = [*SHARED, *CALLBACKS_ALONE, "state_dict", "on_save_checkpoint"]
_DATA = ["prepare_data", "setup", "teardown", "state_dict", "train_dataloader", "val_dataloader", "test_dataloader"]
_DATA += ["predict_dataloader", *TRANSFER.replace("data.", "").split()]
_STEPS = ["training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "optimizer_step"]
_STEPS += ["optimizer_zero_grad", "backward", "configure_gradient_clipping", "lr_scheduler_step"]
_FORCED = {"on_predict_model_train", "on_train_model_train"}


def recording(base: type, who: str, names: list[str], calls: list[str]) -> type:
    """A subclass of which each named method is noted as it is called."""

    def noting(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(f"{who}.{name}")
            return getattr(base, name)(self, *args, **kwargs)

        return method

    def plain(name: str) -> Any:
        if name in ("training_step", "validation_step", "test_step", "predict_step"):

            def step(self: Any, batch: Any, batch_idx: int) -> Any:
                calls.append(f"{who}.{name}")
                return getattr(base, name)(self, batch, batch_idx)

            return step
        return noting(name)

    return type(base.__name__, (base,), {name: plain(name) for name in names})


class Evaluating(Tiny):
    """Modes are set by the recorded hooks themselves."""

    def on_validation_model_eval(self) -> None:
        self.eval()

    def on_validation_model_train(self) -> None:
        self.train()

    def configure_optimizers(self) -> Any:
        import torch

        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Stateful(Callback):
    """A callback with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"x": 1}


class One(TinyData):
    """One validation batch, two of training."""

    def train_dataloader(self) -> Any:
        from tests.trainer.modules import numbers

        return numbers(8)

    def val_dataloader(self) -> Any:
        from tests.trainer.modules import numbers

        return numbers(4)

    def state_dict(self) -> dict[str, Any]:
        return {"y": 2}


def recorded(**options: Any) -> tuple[list[str], Any, Any, Any]:
    calls: list[str] = []
    module = recording(Evaluating, "module", [n for n in _MODULE + _STEPS if n not in _FORCED], calls)()
    callback = recording(Stateful, "callback", _CALLBACK, calls)()
    data = recording(One, "data", _DATA, calls)()
    calls.clear()
    return calls, module, data, trainer(callbacks=[callback, *options.pop("more", [])], **options)


def test_fit_runs_the_hooks_in_their_order(tmp_path: Path) -> None:
    """Two training batches accumulated by 2, clipping on, a sanity check, one validation batch, one checkpoint."""
    saves = ModelCheckpoint(tmp_path)
    options = {"enable_checkpointing": True, "more": [saves], "num_sanity_val_steps": 1}
    calls, module, data, run = recorded(accumulate_grad_batches=2, gradient_clip_val=1.0, **options)
    run.fit(module, datamodule=data)
    assert calls == FIT.split()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_alone_runs_its_hooks_in_their_order(stage: str) -> None:
    """validate, test and predict by themselves."""
    calls, module, data, run = recorded(limit_test_batches=1, limit_predict_batches=1)
    getattr(run, stage)(module, datamodule=data)
    word = {"validate": "validation"}.get(stage, stage)
    both = [f"callback.on_{word}", f"module.on_{word}"]
    expected = ["module.configure_callbacks", "data.prepare_data", "module.prepare_data", "data.setup"]
    expected += ["callback.setup", "module.setup", "module.configure_model"]
    expected += [f"data.{'val' if stage == 'validate' else stage}_dataloader", f"module.on_{word}_model_eval"]
    expected += [f"{who}_{moment}" for moment in ("start", "epoch_start") for who in both]
    expected += [*TRANSFER.split(), *[f"{who}_batch_start" for who in both], f"module.{word}_step"]
    expected += [f"{who}_{moment}" for moment in ("batch_end", "epoch_end", "end") for who in both]
    expected += [f"module.on_{word}_model_train"] if stage != "predict" else []
    assert calls == [*expected, "data.teardown", "callback.teardown", "module.teardown"]


def test_behaviour_50_hooks_that_nobody_overrides_are_in_no_table() -> None:
    """The table holds overriding methods only."""

    class Plain(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            pass

    run = trainer(callbacks=[Plain()])
    run.fit(Tiny(), datamodule=TinyData())
    filled = {name for name in SHARED if getattr(run.hooks, name)}
    assert filled == {"on_train_batch_end"}


def test_a_misspelt_hook_is_refused_with_the_nearest_name() -> None:
    """Of modules and of callbacks."""

    class Typo(Callback):
        def on_train_epoch_ended(self, *args: Any) -> None:
            pass

    with pytest.raises(ConfigError, match=r"Typo\.on_train_epoch_ended is no hook.*'on_train_epoch_end'"):
        trainer(callbacks=Typo()).fit(Tiny(), datamodule=TinyData())

    class Module(Tiny):
        def on_validation_epoch_ends(self) -> None:
            pass

    with pytest.raises(ConfigError, match="'on_validation_epoch_end'"):
        trainer().fit(Module(), datamodule=TinyData())


def test_what_only_begins_like_a_hook_and_hooks_of_1_x_are_told() -> None:
    """With the nearest name, or the present one."""

    class Module(Tiny):
        def on_train_epoch_finish(self) -> None:
            pass

        def on_my_own_occasion(self) -> None:
            pass

    with pytest.warns(UserWarning, match=r"on_train_epoch_finish begins like a hook.*'on_train_epoch_end'"):
        trainer().fit(Module(), datamodule=TinyData())

    class Old(Callback):
        def on_init_end(self, *args: Any) -> None:
            pass

        def on_batch_end(self, *args: Any) -> None:
            pass

    with pytest.warns(UserWarning) as caught:
        trainer(callbacks=Old()).fit(Tiny(), datamodule=TinyData())
    assert [str(warning.message) for warning in caught] == [
        "Old.on_batch_end is not called any more; use on_train_batch_end.",
        "Old.on_init_end is not called any more; use setup.",
    ]


def test_minus_one_at_a_batchs_start_skips_the_rest_of_the_epoch() -> None:
    """The epoch then ends as any."""

    class Skips(Tiny):
        epochs = 0

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self) -> None:
            self.epochs += 1

    module, run = Skips(), trainer(max_epochs=2)
    run.fit(module, datamodule=TinyData())
    assert (run.global_step, module.epochs) == (2, 2)


def test_hooks_of_older_signatures_get_what_they_ask_for() -> None:
    """An optimizer_idx or dataloader_idx more is 0; one argument less is left out."""
    seen: list[Any] = []

    class Old(Tiny):
        def on_before_optimizer_step(self, optimizer: Any, optimizer_idx: int) -> None:  # type: ignore[override]
            seen.append(optimizer_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int, unused: int) -> None:  # type: ignore[override]
            seen.append(unused)

        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            seen.append("val")

    trainer(limit_train_batches=1, limit_val_batches=1).fit(Old(), datamodule=TinyData())
    assert seen == [0, 0, "val"]
    assert issubclass(Old, LightningModule)
