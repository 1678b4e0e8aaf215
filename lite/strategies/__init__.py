"""The strategies by name, those of other packages included (entry-point group `lite.strategies`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from lite.strategies.base import Engine, SingleStrategy, Strategy
from lite.strategies.comm_hooks import PowerSGD
from lite.strategies.ddp import DDPStrategy
from lite.strategies.local_sgd import LocalSGDStrategy

__all__ = [
    "STRATEGIES",
    "DDPStrategy",
    "Engine",
    "LocalSGDStrategy",
    "PowerSGD",
    "SingleStrategy",
    "Strategy",
    "strategy_factories",
]

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": SingleStrategy,
    "ddp": DDPStrategy,
    "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp_spawn": lambda: DDPStrategy(start_method="spawn"),
    "ddp_fork": lambda: DDPStrategy(start_method="fork"),
    "ddp_notebook": lambda: DDPStrategy(start_method="fork"),
    "local_sgd": LocalSGDStrategy,
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
