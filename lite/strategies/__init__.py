"""The strategies by name, those of other packages included (entry-point group `lite.strategies`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from lite.strategies.base import Engine, SingleStrategy, Strategy
from lite.strategies.comm_hooks import PowerSGD
from lite.strategies.ddp import DDPStrategy

if TYPE_CHECKING:
    from lite.strategies.deepspeed import DeepSpeedStrategy
    from lite.strategies.fsdp import FSDPStrategy
    from lite.strategies.local_sgd import LocalSGDStrategy
    from lite.strategies.model_parallel import ModelParallelStrategy
    from lite.strategies.pipeline import PipelineStrategy

__all__ = [
    "STRATEGIES",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "Engine",
    "FSDPStrategy",
    "LocalSGDStrategy",
    "ModelParallelStrategy",
    "PipelineStrategy",
    "PowerSGD",
    "SingleStrategy",
    "Strategy",
    "strategy_factories",
]


def _fsdp() -> Strategy:
    from lite.strategies.fsdp import FSDPStrategy

    return FSDPStrategy()


def _local_sgd() -> Strategy:
    from lite.strategies.local_sgd import LocalSGDStrategy

    return LocalSGDStrategy()


def _deepspeed(stage: int) -> Callable[[], Strategy]:
    def make() -> Strategy:
        from lite.strategies.deepspeed import DeepSpeedStrategy

        return DeepSpeedStrategy(stage)

    return make


def _pipeline() -> Strategy:
    from lite.strategies.pipeline import PipelineStrategy

    return PipelineStrategy()


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "single": SingleStrategy,
    "ddp": DDPStrategy,
    "ddp_find_unused_parameters_true": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp_spawn": lambda: DDPStrategy(start_method="spawn"),
    "ddp_fork": lambda: DDPStrategy(start_method="fork"),
    "ddp_notebook": lambda: DDPStrategy(start_method="fork"),
    "deepspeed": _deepspeed(2),
    "deepspeed_stage_1": _deepspeed(1),
    "deepspeed_stage_2": _deepspeed(2),
    "deepspeed_stage_3": _deepspeed(3),
    "fsdp": _fsdp,
    "local_sgd": _local_sgd,
    "pipeline": _pipeline,
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
    elif name == "DeepSpeedStrategy":
        from lite.strategies.deepspeed import DeepSpeedStrategy as found  # type: ignore[assignment]
    elif name == "LocalSGDStrategy":
        from lite.strategies.local_sgd import LocalSGDStrategy as found  # type: ignore[assignment]
    elif name == "ModelParallelStrategy":
        from lite.strategies.model_parallel import ModelParallelStrategy as found  # type: ignore[assignment]
    elif name == "PipelineStrategy":
        from lite.strategies.pipeline import PipelineStrategy as found  # type: ignore[assignment]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
