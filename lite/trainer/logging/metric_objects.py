"""The states of a module's torchmetrics, which `state_dict` leaves out, and an epoch's sums with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lite.data.transfer import move_to_device
from lite.errors import ConfigError
from lite.trainer.logging.entries import is_torchmetric


def torchmetrics_of(module: Any) -> dict[str, Any]:
    """The module's Metric objects, by their attributes' names."""
    return {name: part for name, part in module.named_modules() if is_torchmetric(part)}


def torchmetrics_state(module: Any) -> dict[str, Any]:
    """Their sums, and the newest batch's values."""
    return {
        name: {"state": _copied(metric.metric_state), "count": metric._update_count, "newest": metric._forward_cache}
        for name, metric in torchmetrics_of(module).items()
    }


def count_samples_once(module: Any, group: Any) -> Callable[[], None]:
    """Let Metric objects sync over the ranks that have different data, where not all have.

    Args:
        module: The module that has them.
        group: These ranks' process group; None is all ranks.

    Returns:
        What takes that back.
    """
    changed = [metric for metric in torchmetrics_of(module).values() if metric.process_group is None]

    def put_back() -> None:
        for metric in changed:
            metric.process_group = None

    for metric in changed:
        metric.process_group = group
    return put_back


def epoch_sums(trainer: Any, *, under_way: bool = False) -> dict[str, Any]:
    """What was logged so far, as checkpoints have it; without the sums of a batch that is under way."""
    logged = trainer.metrics.state_dict(under_way=under_way)
    return {"metrics": logged, "torchmetrics": torchmetrics_state(trainer.module)}


def restore_torchmetrics(module: Any, states: dict[str, Any]) -> None:
    """Go on from those sums."""
    for name, metric in torchmetrics_of(module).items():
        if name in states:
            saved = move_to_device(states[name], metric.device)
            for key, value in saved["state"].items():
                setattr(metric, key, value)
            metric._update_count, metric._forward_cache = saved["count"], saved.get("newest")
            metric._computed = None


def attribute_of(name: str, metric: Any, attribute: str | None, module: Any) -> str:
    """The module's attribute that holds a Metric.

    Raises:
        ConfigError: There is none.
    """
    parts = dict(module.named_modules())
    if attribute is not None and attribute not in parts:
        raise ConfigError(
            f"log({name!r}, metric_attribute={attribute!r}): the module has no such part; name the attribute that "
            "holds the metric."
        )
    found = next((path for path, part in parts.items() if part is metric), attribute)
    if found is None:
        raise ConfigError(
            f"log({name!r}) got a {type(metric).__name__} that is no attribute of the module, so it would neither move "
            "to the device nor be reset; set it as self.NAME in __init__, or pass metric_attribute='NAME'."
        )
    return found


@contextmanager
def unchanged_metrics(module: nn.Module) -> Iterator[None]:
    """Within the block the module's torchmetrics count nothing: the batch only keeps this rank in step.

    Lists grow by what is empty, as torchmetrics gathers their items one after another, of each rank as many.
    """
    found = list(torchmetrics_of(module).values())
    before = [(m, m._copy_state_dict(), m._update_count, m._computed) for m in found]
    yield
    for metric, state, count, computed in before:
        for name, value in state.items():
            if isinstance(value, list):
                value += empty(getattr(metric, name)[len(value) :])
            setattr(metric, name, value)
        metric._update_count, metric._computed = count, computed


def empty(items: list[Any]) -> list[Any]:
    """As many items of the same kinds without anything in them; what has no dimension can't be emptied."""
    return [item[:0] for item in items if item.ndim]


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """With lists of its own: `reset` empties a metric's."""
    return {key: list(value) if isinstance(value, list) else value for key, value in state.items()}
