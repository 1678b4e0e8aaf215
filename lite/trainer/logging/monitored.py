"""What schedulers, EarlyStopping and ModelCheckpoint follow: one metric by its name, agreed on by all ranks."""

from __future__ import annotations

from typing import Any


def monitored(trainer: Any, name: str, *, own: bool = False) -> Any:
    """The newest value of a metric as a 0-dim tensor; None where nobody has logged it, on all ranks. Collective.

    Every decision begins here, so that none lies behind what one rank alone has seen. See `Metrics.agreed`, which has
    `own` too.
    """
    return trainer.metrics.agreed(name, own=own)


def may_still_come(trainer: Any) -> bool:
    """Whether this fit's first validation, which may log it, is still to come."""
    return bool(trainer.enable_validation and not trainer.metrics.has_validated)


def looks_at_epoch_ends(trainer: Any, asked: bool | None) -> bool:
    """Whether who follows a metric looks at it as epochs end, not after validations; None: where one goes with each."""
    return not trainer.enable_validation or trainer.fit_loop.schedule.is_once_per_epoch if asked is None else asked


def nobody_logged(trainer: Any, who: str) -> str:
    """What there is to say of a metric that is missing: who follows it, and what there is."""
    found = ", ".join(map(repr, trainer.callback_metrics)) or "no metrics"
    return f"{who}: nobody has logged it; logged were {found}."
