"""Progress bars: a base for one's own, and the Trainer's, which looks at values some times a second only."""

from __future__ import annotations

import time
from typing import Any

from lite.errors import UsageError
from lite.loggers.base import Ignored
from lite.trainer.callbacks.bars import make_bar, show
from lite.trainer.callbacks.base import Callback
from lite.trainer.data.counting import INFINITE

_EVERY_S = 0.1
_NOTHING = Ignored()
_LONGEST_STRIDE = 64


class ProgressBar(Callback):
    """Base of progress bars: derive one of your own, and override the hooks after which it shows something.

    On other ranks than 0 it is disabled in `setup`.
    """

    sanity_check_description = "Sanity check"
    train_description = "Training"
    validation_description = "Validation"
    test_description = "Test"
    predict_description = "Predict"
    _trainer: Any = None

    @property
    def trainer(self) -> Any:
        """The Trainer whose run is shown.

        Raises:
            UsageError: There is none yet.
        """
        if self._trainer is None:
            raise UsageError(
                f"{type(self).__name__}.trainer is known from setup on; a setup of your own calls super().setup(...)."
            )
        return self._trainer

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    @property
    def total_train_batches(self) -> Any:
        """Training batches of an epoch; infinite where nobody knows."""
        return self.trainer.num_training_batches

    @property
    def total_val_batches(self) -> Any:
        """Validation batches of all loaders, or those of the sanity check."""
        trainer = self.trainer
        return sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    @property
    def total_val_batches_current_dataloader(self) -> Any:
        """Those of the loader that runs."""
        trainer = self.trainer
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return counts[trainer.fit_loop.val_loop.loader if trainer.fitting else trainer.validate_loop.loader]

    @property
    def total_test_batches_current_dataloader(self) -> Any:
        """Those of the loader that runs."""
        return self.trainer.num_test_batches[self.trainer.test_loop.loader]

    @property
    def total_predict_batches_current_dataloader(self) -> Any:
        """Those of the loader that runs."""
        return self.trainer.num_predict_batches[self.trainer.predict_loop.loader]

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print beside the bar."""
        print(*args, **kwargs)

    def disable(self) -> None:
        """Show nothing."""

    def enable(self) -> None:
        """Show again."""

    def next_look(self) -> float:
        """Training batches until it wants to look again, by `after_batch`; between two looks it costs nothing."""
        return INFINITE

    def after_batch(self, trainer: Any, count: int) -> None:
        """So many batches of the epoch are done."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """What is shown: the run's number, and what was logged with prog_bar=True."""
        found: dict[str, Any] = {}
        version = getattr(trainer.logger, "version", None)
        if version is not None:
            found["v_num"] = str(version).removeprefix("version_")
        return {**found, **trainer.progress_bar_metrics}


class TQDMProgressBar(ProgressBar):
    """Shows epoch, batches, rate and metrics on rank 0, by tqdm where it is installed, else in plain lines.

    Override `init_train_tqdm` and the like to change a bar, or make your own, which is asked for n, total,
    set_description, set_postfix, refresh and close.

    Args:
        refresh_rate: Batches between two looks; 0 switches off. It is refreshed ten times a second at most.
        leave: Whether an epoch's bar stays.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        self.refresh_rate, self.leave = refresh_rate, leave
        self._enabled = refresh_rate > 0
        self._bars: dict[str, Any] = {}
        self._next: tuple[str, int | None, bool] = ("", None, leave)
        self._due_s = 0.0
        self._done = 0
        self._stride = 1  # batches between two looks, which follows their rate

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = self.refresh_rate > 0

    # ---- the bars

    def init_sanity_tqdm(self) -> Any:
        """The bar of the sanity check."""
        return self._made()

    def init_train_tqdm(self) -> Any:
        """The bar of a training epoch."""
        return self._made()

    def init_validation_tqdm(self) -> Any:
        """The bar of a validation."""
        return self._made()

    def init_test_tqdm(self) -> Any:
        """The bar of a test."""
        return self._made()

    def init_predict_tqdm(self) -> Any:
        """The bar of a prediction."""
        return self._made()

    def _made(self) -> Any:
        text, total, leave = self._next
        return make_bar(text, total, leave=leave)

    @property
    def train_progress_bar(self) -> Any:
        """The bar of the training epoch that runs; what takes any call where none is shown."""
        return self._bars.get("train", _NOTHING)

    @property
    def val_progress_bar(self) -> Any:
        """The same of validation, or of the sanity check."""
        return self._bars.get("validation", self._bars.get("sanity", _NOTHING))

    @property
    def test_progress_bar(self) -> Any:
        """The same of a test."""
        return self._bars.get("test", _NOTHING)

    @property
    def predict_progress_bar(self) -> Any:
        """The same of a prediction."""
        return self._bars.get("predict", _NOTHING)

    # ---- training

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Any) -> None:
        self._begin("train", f"Epoch {trainer.current_epoch}", trainer.num_training_batches)

    def next_look(self) -> float:
        return self._stride if self._enabled else INFINITE

    def after_batch(self, trainer: Any, count: int) -> None:
        now = time.monotonic()
        if not self._enabled:
            return
        if "train" not in self._bars:  # a run that goes on in the middle of an epoch
            self._begin_epoch(trainer)
        if now < self._due_s:
            self._stride = min(2 * self._stride, _LONGEST_STRIDE)
            return
        if now > self._due_s + _EVERY_S:
            self._stride = max(self._stride // 2, 1)
        self._show(trainer, "train", count)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "train", trainer.fit_loop.progress.batch)

    # ---- evaluation

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.sanity_checking:
            self._begin("sanity", self.sanity_check_description, sum(trainer.num_sanity_val_batches))
        else:
            self._begin("validation", self.validation_description, sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "sanity" if trainer.sanity_checking else "validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "sanity" if trainer.sanity_checking else "validation", self._done)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin("test", self.test_description, sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "test")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "test", self._done)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin("predict", self.predict_description, sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "predict")

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "predict", self._done)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    # ---- drawing

    def _begin(self, name: str, text: str, total: float) -> None:
        if not self._enabled:
            return
        if name in self._bars:
            self._bars.pop(name).close()
        self._done = 0
        self._next = text, None if total == INFINITE else int(total), self.leave or name == "train"
        bar = self._bars[name] = getattr(self, f"init_{name}_tqdm")()
        bar.total = self._next[1]
        self._due_s = time.monotonic() + _EVERY_S

    def _count(self, trainer: Any, name: str) -> None:
        self._done += 1
        if self._enabled and time.monotonic() >= self._due_s:
            self._show(trainer, name, self._done)

    def _show(self, trainer: Any, name: str, done: int) -> None:
        bar = self._bars.get(name)
        self._due_s = time.monotonic() + _EVERY_S
        if bar is not None:
            metrics = self.get_metrics(trainer, trainer.module) if name == "train" and _cheap(trainer) else {}
            show(bar, done, metrics)

    def _end(self, trainer: Any, name: str, done: int) -> None:
        bar = self._bars.get(name)
        if bar is not None:
            show(bar, done, self.get_metrics(trainer, trainer.module) if name == "train" else {})
            bar.close()
            del self._bars[name]


def _cheap(trainer: Any) -> bool:
    """Whether values can be looked at without waiting for a device; else they are shown at the epoch's end."""
    return bool(trainer.lite.device.type == "cpu")
