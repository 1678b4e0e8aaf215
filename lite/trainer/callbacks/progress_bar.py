"""The progress bar: tqdm where it is installed, plain lines otherwise. It looks at values some times a second only."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import Any

from lite.trainer.callbacks.base import Callback
from lite.trainer.data.counting import INFINITE

_EVERY_S = 0.1
_LINE_EVERY_S = 10.0
_LONGEST_STRIDE = 64


class ProgressBar(Callback):
    """Base of progress bars."""

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
    """Shows epoch, batches, rate and metrics on rank 0.

    Args:
        refresh_rate: Batches between two looks; 0 switches off. It is refreshed ten times a second at most.
        leave: Whether an epoch's bar stays.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        self.refresh_rate, self.leave = refresh_rate, leave
        self._enabled = refresh_rate > 0
        self._bars: dict[str, Any] = {}
        self._due_s = 0.0
        self._done = 0
        self._stride = 1  # batches between two looks, which follows their rate

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = self.refresh_rate > 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not trainer.is_global_zero:
            self.disable()

    # ---- training

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, "train", f"Epoch {trainer.current_epoch}", trainer.num_training_batches)

    def next_look(self) -> float:
        return self._stride if self._enabled else INFINITE

    def after_batch(self, trainer: Any, count: int) -> None:
        now = time.monotonic()
        if not self._enabled:
            return
        if "train" not in self._bars:  # a run that goes on in the middle of an epoch
            self._begin(trainer, "train", f"Epoch {trainer.current_epoch}", trainer.num_training_batches)
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
            self._begin(trainer, "validation", "Sanity check", sum(trainer.num_sanity_val_batches))
        else:
            self._begin(trainer, "validation", "Validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "validation")

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "validation", self._done)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, "test", "Test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "test")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "test", self._done)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer, "predict", "Predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._count(trainer, "predict")

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(trainer, "predict", self._done)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for bar in self._bars.values():
            bar.close()
        self._bars.clear()

    # ---- the bars

    def _begin(self, trainer: Any, name: str, text: str, total: float) -> None:
        if not self._enabled:
            return
        if name in self._bars:
            self._bars.pop(name).close()
        self._done = 0
        known = None if total == INFINITE else int(total)
        self._bars[name] = make_bar(text, known, leave=self.leave or name == "train")
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
            bar.show(done, metrics)

    def _end(self, trainer: Any, name: str, done: int) -> None:
        bar = self._bars.get(name)
        if bar is not None:
            bar.show(done, self.get_metrics(trainer, trainer.module) if name == "train" else {})
            bar.close()
            del self._bars[name]


def _cheap(trainer: Any) -> bool:
    """Whether values can be looked at without waiting for a device; else they are shown at the epoch's end."""
    return bool(trainer.lite.device.type == "cpu")


def make_bar(text: str, total: int | None, *, leave: bool) -> Any:
    """A bar of tqdm's, or plain lines."""
    if importlib.util.find_spec("tqdm") is not None:
        return _TQDMBar(text, total, leave)
    return PlainLines(text, total)


class _TQDMBar:
    def __init__(self, text: str, total: int | None, leave: bool) -> None:
        from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

        self._bar = tqdm(desc=text, total=total, leave=leave, dynamic_ncols=True, file=sys.stdout)

    def show(self, done: int, metrics: dict[str, Any]) -> None:
        self._bar.n = done
        self._bar.set_postfix({k: _short(v) for k, v in metrics.items()}, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class PlainLines:
    """Progress in lines of their own, one in some seconds, and one at the end.

    Args:
        text: What they begin with.
        total: Batches, or None.
    """

    def __init__(self, text: str, total: int | None) -> None:
        self._text, self._total = text, total
        self._begun_s = self._shown_s = time.monotonic()
        self._line = ""

    def show(self, done: int, metrics: dict[str, Any]) -> None:
        """Print the line, if the last one is old enough."""
        now = time.monotonic()
        rate = done / max(now - self._begun_s, 1e-9)
        of = f"/{self._total}" if self._total is not None else ""
        shown = "".join(f", {name}={_short(value)}" for name, value in metrics.items())
        self._line = f"{self._text}: {done}{of} batches, {rate:.1f} batches/s{shown}"
        if now - self._shown_s >= _LINE_EVERY_S:
            self._print()

    def _print(self) -> None:
        print(self._line, flush=True)
        self._shown_s, self._line = time.monotonic(), ""

    def close(self) -> None:
        """Print what has not been."""
        if self._line:
            self._print()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
