"""Hooks of PyTorch Lightning 1.x that modules still have: run where they ran, with a word on their present form."""

from __future__ import annotations

import warnings
from typing import Any

_EPOCH_ENDS = {
    "training_epoch_end": ("train", "on_train_epoch_end"),
    "validation_epoch_end": ("validation", "on_validation_epoch_end"),
    "test_epoch_end": ("test", "on_test_epoch_end"),
}
_STEP_ENDS = ("training_step_end", "validation_step_end", "test_step_end")
GONE = {
    "tbptt_split_batch": "split the sequence in training_step and set self.automatic_optimization = False",
    "on_epoch_start": "on_train_epoch_start",
    "on_epoch_end": "on_train_epoch_end",
    "on_batch_start": "on_train_batch_start",
    "on_batch_end": "on_train_batch_end",
    "on_pretrain_routine_start": "on_fit_start",
    "on_pretrain_routine_end": "on_fit_start",
    "configure_sharded_model": "configure_model",
}
GONE_FROM_CALLBACKS = {
    **{name: new for name, new in GONE.items() if name.startswith("on_")},
    "on_init_start": "setup",
    "on_init_end": "setup",
    "on_configure_sharded_model": "setup",
    "on_before_accelerator_backend_setup": "setup",
    "on_keyboard_interrupt": "on_exception",
}


def check_old_hooks(module: Any) -> None:
    """Tell of old hooks that the module has."""
    for name in (*_EPOCH_ENDS, *_STEP_ENDS):
        if callable(getattr(module, name, None)):
            new = _EPOCH_ENDS[name][1] if name in _EPOCH_ENDS else name.removesuffix("_end")
            how = (
                f"keep what you need of the outputs in self and use {new}" if name in _EPOCH_ENDS else f"do it in {new}"
            )
            warnings.warn(f"{type(module).__name__}.{name} is deprecated: {how}.", DeprecationWarning, stacklevel=6)
    tell_of_gone(module, GONE)


def tell_of_gone(owner: Any, gone: dict[str, str]) -> None:
    """Tell of methods that nobody calls any more."""
    for name, new in gone.items():
        if callable(getattr(owner, name, None)):
            warnings.warn(f"{type(owner).__name__}.{name} is not called any more; use {new}.", stacklevel=7)


def find_old_hooks(module: Any, word: str) -> OldHooks | None:
    """The module's old hooks in that kind of stage, where it has any."""
    found = OldHooks(module, word)
    return found if found.epoch_end is not None or found.step_end is not None else None


class OldHooks:
    """The old hooks of one module in one kind of stage, and the outputs that they want.

    Args:
        module: The module.
        word: "train", "validation" or "test".
    """

    def __init__(self, module: Any, word: str) -> None:
        prefix = "training" if word == "train" else word
        self.epoch_end = getattr(module, f"{prefix}_epoch_end", None)
        self.step_end = getattr(module, f"{prefix}_step_end", None)
        self.outputs: list[list[Any]] = []

    def around(self, step: Any) -> Any:
        """The step with what followed it."""
        end = self.step_end
        return step if end is None else lambda *args: end(step(*args))

    def keep(self, output: Any, loader: int = 0) -> None:
        """Keep an output for the epoch's end."""
        if self.epoch_end is not None:
            while len(self.outputs) <= loader:
                self.outputs.append([])
            self.outputs[loader].append(output)

    def tell_of_outputs_before(self) -> None:
        """Outputs of an epoch's part before an interruption are in no checkpoint."""
        if self.epoch_end is not None:
            warnings.warn(
                f"{self.epoch_end.__name__} gets the outputs of the epoch's part since the resume alone; keep sums in "
                "buffers or by self.log instead, which are resumed.",
                stacklevel=6,
            )

    def end(self) -> None:
        """Call the epoch's hook with what was kept."""
        if self.epoch_end is not None:
            outputs: Any = self.outputs[0] if len(self.outputs) == 1 else self.outputs
            self.outputs = []
            self.epoch_end(outputs)
