"""`LearningRateMonitor`: writes the optimizers' learning rates to the loggers."""

from __future__ import annotations

from typing import Any

import torch

from lite.errors import ConfigError, choose
from lite.trainer.callbacks.base import Callback


class LearningRateMonitor(Callback):
    """Logs learning rates under names such as lr-Adam, lr-Adam-1 (a second one), lr-Adam/pg1 (parameter groups).

    An optimizer with several schedulers has a name for each, which is the scheduler's own where it was given one.

    Args:
        logging_interval: "step" (with the loggers' interval), "epoch", or None for both schedulers' own pace.
        log_momentum: Whether momenta are logged too.
        log_weight_decay: Whether weight decays are.
        log_key_prefix: What the names begin with.

    The rate is the one of the step that begins; its x is that step's, as of the row that the loggers get after it.

    Attributes:
        lrs: What was logged, by name.
    """

    def __init__(
        self,
        logging_interval: str | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:
        if logging_interval is not None:
            choose("logging_interval", logging_interval, ["step", "epoch"])
        self.logging_interval = logging_interval
        self.log_momentum, self.log_weight_decay = log_momentum, log_weight_decay
        self.log_key_prefix = log_key_prefix or ""
        self.lrs: dict[str, list[float]] = {}
        self._written_at = -1
        self._progress: Any = None
        if logging_interval == "epoch":
            self.on_train_batch_start = None  # type: ignore[assignment, method-assign]  # costs nothing per step

    @property
    def state_key(self) -> str:
        """Names the settings, so that several live together."""
        settings = {
            "logging_interval": self.logging_interval,
            "log_momentum": self.log_momentum,
            "log_weight_decay": self.log_weight_decay,
            "log_key_prefix": self.log_key_prefix,
        }
        return f"{type(self).__qualname__}{settings!r}"

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._written_at, self._progress = -1, trainer.fit_loop.progress

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.loggers:
            raise ConfigError("LearningRateMonitor needs a logger; pass logger=True to the Trainer, or leave it out.")
        self.lrs = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        every, stepped = trainer.log_every_n_steps, trainer.fit_loop.progress.stepped
        if every and (stepped + 1) % every == 0 and stepped != self._written_at:
            self._written_at = stepped
            self._write(trainer, "step" if self.logging_interval is None else None)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.logging_interval != "step":
            self._write(trainer, "epoch" if self.logging_interval is None else None)

    def _write(self, trainer: Any, interval: str | None) -> None:
        row = self.rates(trainer, interval)
        for name, value in row.items():
            self.lrs.setdefault(name, []).append(value)
        trainer.metrics.logged.update(row)
        trainer.metrics.kept.update({name: torch.tensor(value) for name, value in row.items()})
        if row:
            trainer.write_row({"step": trainer.fit_loop.progress.stepped, **row})

    def state_dict(self) -> dict[str, Any]:
        """Only within an open window whose step's row has been written: a run that goes on doesn't write it again."""
        written = self._progress is not None and self._written_at == self._progress.stepped
        return {"written_at": self._written_at} if written else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._written_at = state_dict.get("written_at", -1)

    def rates(self, trainer: Any, interval: str | None = None) -> dict[str, float]:
        """The present rates by name; with an interval those whose scheduler has it."""
        seen: dict[str, int] = {}
        row: dict[str, float] = {}
        paces: list[tuple[Any, str | None, str | None]] = []
        for optimizer in trainer.optimizers:
            configs = [c for c in trainer.lr_scheduler_configs if c.optimizer is optimizer]
            paces += [(optimizer, c.interval, c.name) for c in configs] or [(optimizer, None, None)]
        for optimizer, paced, name in paces:
            kind = type(optimizer).__name__
            count = seen[kind] = seen.get(kind, 0) + 1
            name = name or (f"lr-{kind}" if count == 1 else f"lr-{kind}-{count - 1}")
            if interval is not None and paced is not None and paced != interval:
                continue
            groups = optimizer.param_groups
            for index, group in enumerate(groups):
                key = self.log_key_prefix + (
                    name if len(groups) == 1 else f"{name}/{group.get('name', f'pg{index + 1}')}"
                )
                row[key] = float(group["lr"])
                if self.log_momentum:
                    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0)
                    row[f"{key}-momentum"] = float(momentum)
                if self.log_weight_decay:
                    row[f"{key}-weight_decay"] = float(group.get("weight_decay", 0))
        return row
