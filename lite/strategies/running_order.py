"""Which layers of a model run after one another, and where that row is cut into the stages of a pipeline.

It reads a model and changes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from lite.errors import ConfigError, choose

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b")


@dataclass(frozen=True)
class PipelinePlan:
    """How a model is split, and in which order its microbatches run.

    Args:
        layers: Names of layers in the order in which they run; None is an nn.Sequential's own.
        stages: How many parts, or the names of the layers with which the second and further ones begin; None is one
            for each rank, or two with "interleaved_1f1b".
        schedule: One of `SCHEDULES`.
        microbatches: How many parts a batch is split into.
    """

    layers: tuple[str, ...] | None
    stages: int | tuple[str, ...] | None
    schedule: str
    microbatches: int

    @classmethod
    def checked(cls, layers: Any, stages: Any, schedule: Any, microbatches: Any) -> PipelinePlan:
        """The user's arguments, refused where they can't be meant.

        Raises:
            ConfigError: One is.
        """
        schedule = choose("schedule", schedule, [*SCHEDULES])
        if not _is_count(microbatches):
            raise ConfigError(
                f"microbatches={microbatches!r} must be a whole number of at least 1: the parts that a batch is split "
                "into."
            )
        if layers is not None and not _are_names(layers):
            raise ConfigError(
                f"layers={layers!r} must be a list of the names of the model's layers, in the order in which they run."
            )
        if stages is not None and not _is_count(stages) and not _are_names(stages):
            raise ConfigError(
                f"stages={stages!r} must be a number of stages, or a list of names: the first layer of each stage but "
                "the first one."
            )
        names = tuple(layers) if layers is not None else None
        plan = cls(names, stages if stages is None or _is_count(stages) else tuple(stages), schedule, microbatches)
        if plan.stages is not None:
            plan._check_work(plan.stages if isinstance(plan.stages, int) else len(plan.stages) + 1)
        return plan

    def _check_work(self, count: int) -> None:
        """Refuse fewer microbatches than the schedule has stages, on any number of processes."""
        if self.schedule == "1f1b" and self.microbatches < count:
            raise ConfigError(
                f"microbatches={self.microbatches} with schedule='1f1b' and {count} stages leaves stages without work; "
                f"use microbatches={count} or more, or schedule='gpipe'."
            )

    def num_stages(self, world_size: int) -> int:
        """How many stages a job of so many ranks has.

        Raises:
            ConfigError: That number doesn't fit the ranks, or the schedule.
        """
        several = self.schedule == "interleaved_1f1b"
        count = world_size * (1 + several) if self.stages is None else self.stages
        count = count if isinstance(count, int) else len(count) + 1
        written = f"stages={list(self.stages) if isinstance(self.stages, tuple) else self.stages!r}"
        if count % world_size or (several and count == world_size):
            wanted = f"a multiple of it, {2 * world_size} or more;" if several else "as many;"
            raise ConfigError(
                f"{written} makes {count} stages, but the job has {world_size} processes; schedule={self.schedule!r} "
                f"needs {wanted} change stages, or start {count} processes."
            )
        if not several and count != world_size:
            raise ConfigError(
                f"{written} makes {count} stages, but the job has {world_size} processes; use "
                f"schedule='interleaved_1f1b', which puts several stages on each, or start {count} processes."
            )
        self._check_work(count)
        rounds = max(1, self.microbatches // world_size)
        if several and self.microbatches % rounds:
            raise ConfigError(
                f"microbatches={self.microbatches} with schedule='interleaved_1f1b' must be a multiple of the "
                f"{world_size} processes; use {rounds * world_size}."
            )
        return count


def running_order(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers that run after one another, by name; those within a Sequential or a ModuleList one by one.

    Args:
        model: The model.
        layers: Names in the order in which they run; None where the model is an nn.Sequential.

    Raises:
        ConfigError: A name is unknown, or a parameter or buffer is in none of the layers.

    Example:
        >>> list(running_order(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 1))), None))
        ['0', '1.0', '1.1']
    """
    name = type(model).__name__
    if layers is None:
        if type(model).forward is not nn.Sequential.forward:
            raise ConfigError(
                f"{name} is no nn.Sequential, so nobody knows in which order its layers run; name them: "
                f"layers={[key for key, _ in model.named_children()]!r}, say, where each one takes what the one before "
                "it returns."
            )
        layers = [key for key, _ in model.named_children()]
    known = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for key in layers:
        if key not in known or not key:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"layers: {name} has no layer {key!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
            )
        _expand(key, known[key], found)
    if not found:
        raise ConfigError(f"{name} has no layers to put on different ranks.")
    inside = {id(t) for layer in found.values() for t in (*layer.parameters(), *layer.buffers())}
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in inside:
            raise ConfigError(
                f"{key!r} of {name} is in none of the layers {', '.join(map(repr, found))}, so no stage would hold it; "
                "name its layer, or put it into one of them."
            )
    return found


def _expand(key: str, layer: nn.Module, found: dict[str, nn.Module]) -> None:
    if type(layer) in (nn.Sequential, nn.ModuleList):
        for child_key, child in layer.named_children():
            _expand(f"{key}.{child_key}", child, found)
    elif key in found:
        raise ConfigError(f"layers names {key!r} twice; a layer runs once.")
    else:
        found[key] = layer


def cut(order: dict[str, nn.Module], stages: Sequence[str] | None, count: int) -> list[list[str]]:
    """The names of each stage's layers.

    Args:
        order: What `running_order` returned.
        stages: The layers with which the second and further stages begin; None balances the numbers of parameters.
        count: How many stages there are.

    Raises:
        ConfigError: There are fewer layers than stages, or a name is unknown or in another order than they run.
    """
    names = list(order)
    if len(names) < count:
        raise ConfigError(
            f"the model has {len(names)} layers ({', '.join(map(repr, names))}), which make no {count} stages; start "
            "fewer processes, or name smaller layers."
        )
    if stages is None:
        return _balanced(names, [1 + sum(p.numel() for p in order[name].parameters()) for name in names], count)
    # A name of a Sequential or ModuleList stands for its first layer.
    places = [next((i for i, n in enumerate(names) if n == s or n.startswith(f"{s}.")), None) for s in stages]
    for stage, place in zip(stages, places, strict=True):
        if place is None:
            near = difflib.get_close_matches(stage, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"stages: there is no layer {stage!r}; choose from {', '.join(map(repr, names[1:]))}.{hint}"
            )
    starts = [0, *(place for place in places if place is not None), len(names)]
    if any(a >= b for a, b in pairwise(starts)):
        raise ConfigError(
            f"stages={list(stages)!r} must name layers after the first one, in the order in which they run: "
            f"{', '.join(map(repr, names))}."
        )
    return [names[a:b] for a, b in pairwise(starts)]


def _balanced(names: list[str], sizes: list[int], count: int) -> list[list[str]]:
    """Cut so that the largest stage is as small as it can be."""
    # best[n]: largest stage and cuts of the first n layers in as many stages as the loop has come to.
    best: list[tuple[int, list[int]]] = [(sum(sizes[:n]), [0]) for n in range(len(sizes) + 1)]
    for stage in range(1, count):
        ends: list[tuple[int, list[int]]] = []
        for n in range(len(sizes) + 1):
            tried = [(max(best[m][0], sum(sizes[m:n])), [*best[m][1], m]) for m in range(stage, n)]
            ends.append(min(tried, default=(0, [])))
        best = ends
    starts = [*best[-1][1], len(names)]
    return [names[a:b] for a, b in pairwise(starts)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
