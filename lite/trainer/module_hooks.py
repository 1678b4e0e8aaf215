"""The hooks that a LightningModule may override, as methods that do nothing: those nobody overrides cost nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lite.data.transfer import move_to_device


class DataHooks:
    """What prepares, gives and moves data: of a LightningModule and of a LightningDataModule."""

    prepare_data_per_node: bool = True
    allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Download and the like: on one process per machine, or of the job (`prepare_data_per_node = False`)."""

    def setup(self, stage: str) -> None:
        """On every process, as a run begins; `stage` is "fit", "validate", "test" or "predict"."""

    def teardown(self, stage: str) -> None:
        """As a run ends, also by an exception."""

    def train_dataloader(self) -> Any:
        """Training data: an iterable, or a nesting of several."""
        raise NotImplementedError

    def val_dataloader(self) -> Any:
        """Validation data: one iterable, a list, or a dict with names."""
        raise NotImplementedError

    def test_dataloader(self) -> Any:
        """Test data, as for validation."""
        raise NotImplementedError

    def predict_dataloader(self) -> Any:
        """Data to predict, as for validation."""
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch before it is moved to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Move a batch."""
        return move_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Change a batch that lies on the device."""
        return batch


class ModuleHooks(DataHooks):
    """What happens in a run besides the steps."""

    def configure_model(self) -> None:
        """Create layers that are too large for one process; runs once per run, so leave alone what exists."""

    def configure_callbacks(self) -> Any:
        """Callbacks that belong to the module; they replace the Trainer's of the same type."""
        return []

    def on_fit_start(self) -> None: ...
    def on_fit_end(self) -> None: ...
    def on_train_start(self) -> None: ...
    def on_train_end(self) -> None: ...
    def on_train_epoch_start(self) -> None: ...
    def on_train_epoch_end(self) -> None: ...
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Return -1 to skip the rest of the epoch."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_end(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_validation_model_zero_grad(self) -> None:
        """Drop gradients before a validation within training, unless a window of accumulation is open."""

    def on_validation_model_eval(self) -> None:
        """Bring the model into evaluation mode; overridden, this does it alone."""

    def on_validation_model_train(self) -> None:
        """Bring the model back; overridden, this does it alone. Without, every submodule gets its own mode back."""

    def on_test_start(self) -> None: ...
    def on_test_end(self) -> None: ...
    def on_test_epoch_start(self) -> None: ...
    def on_test_epoch_end(self) -> None: ...
    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_test_model_eval(self) -> None: ...
    def on_test_model_train(self) -> None: ...
    def on_predict_start(self) -> None: ...
    def on_predict_end(self) -> None: ...
    def on_predict_epoch_start(self) -> None: ...
    def on_predict_epoch_end(self) -> None: ...
    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None: ...
    def on_predict_model_eval(self) -> None: ...
    def on_predict_model_train(self) -> None: ...
    def on_before_zero_grad(self, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, loss: Tensor) -> None: ...
    def on_after_backward(self) -> None: ...
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Gradients are ready, at their true size, and not yet clipped."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to what is saved."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take out what was added, or change what is loaded."""
