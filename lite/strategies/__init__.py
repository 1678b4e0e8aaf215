"""The strategies by name, those of other packages included (entry-point group `lite.strategies`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from lite.strategies.base import Engine, SingleStrategy, Strategy
from lite.strategies.comm_hooks import PowerSGD
from lite.strategies.ddp import DDPStrategy

if TYPE_CHECKING:
    from lite.strategies.fsdp import FSDPStrategy
    from lite.strategies.model_parallel import ModelParallelStrategy

__all__ = [
    "STRATEGIES",
    "DDPStrategy",
    "Engine",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "PowerSGD",
    "SingleStrategy",
    "Strategy",
    "strategy_factories",
]


def _fsdp() -> Strategy:
    from lite.strategies.fsdp import FSDPStrategy

    return FSDPStrategy()


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": SingleStrategy,
    "ddp": DDPStrategy,
    "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp_spawn": lambda: DDPStrategy(start_method="spawn"),
    "ddp_fork": lambda: DDPStrategy(start_method="fork"),
    "ddp_notebook": lambda: DDPStrategy(start_method="fork"),
    "fsdp": _fsdp,
}


def strategy_factories() -> dict[str, Callable[[], Strategy]]:
    """Every known strategy: those of `lite`, then those that installed packages register."""
    others = {point.name: _Installed(point) for point in entry_points(group="lite.strategies")}
    return {**others, **STRATEGIES}


class _Installed:
    """Loads another package's strategy when it is asked for."""

    def __init__(self, point: EntryPoint) -> None:
        self._point = point

    def __call__(self) -> Strategy:
        strategy: Strategy = self._point.load()()
        return strategy


def __getattr__(name: str) -> Any:
    """What not every script uses is imported when it is."""
    if name == "FSDPStrategy":
        from lite.strategies.fsdp import FSDPStrategy as found
    elif name == "ModelParallelStrategy":
        from lite.strategies.model_parallel import ModelParallelStrategy as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
