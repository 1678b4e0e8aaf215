"""What an epoch has logged so far on several ranks, given to another number of them; nothing is communicated."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch

from lite.trainer.logging.entries import as_scalar
from lite.trainer.logging.metric_objects import empty, torchmetrics_of

_BLANK: dict[str, Any] = {"value": None, "fresh": False, "unwritten": False, "touched": False}
_NO_SUMS: dict[str, Any] = {"total": None, "weight": 0.0, "pending": []}


def regrouped(
    saved: list[dict[str, Any]], module: Any, rank: int, world_size: int
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """What one of `world_size` ranks goes on with, of what other ranks have saved.

    What is reduced over the ranks at the epoch's end becomes what it would have become: a logged key's sums are
    rank 0's, all in one, and a Metric's states are dealt out. What stays each rank's own is an equal share of all.

    Args:
        saved: By rank, `epoch_sums`.
        module: The module that has the Metric objects.
        rank: This rank.
        world_size: How many there are now.

    Returns:
        The states for `Metrics.load_state_dict` and `restore_torchmetrics`; and, for people, what has another value by
        that than either number of ranks would have given.
    """
    entries, told = _entries([one["metrics"]["entries"] for one in saved], rank, world_size)
    states, more = _torchmetrics([one["torchmetrics"] for one in saved], module, rank, world_size)
    return {**saved[0]["metrics"], "entries": entries}, states, told + more


# ---- logged keys


def _entries(ranks: list[list[dict[str, Any]]], rank: int, world_size: int) -> tuple[list[dict[str, Any]], list[str]]:
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in chain.from_iterable(ranks):
        places.setdefault((one["stage"], one["hook"], one["loader"], one["key"]), []).append(one)
    own, first_only = [], []
    for (*_, key), parts in places.items():
        options = parts[0]["options"]
        if "total" in parts[0] and not options["sync_dist"] and any(part["touched"] for part in parts):
            if options["rank_zero_only"]:
                first_only.append(key)
            elif world_size > 1:
                own.append(key)
    told = []
    if own:
        told.append(
            f"{_names(own)} is logged without sync_dist=True, so each rank's epoch value is made of an equal share of "
            "what all ranks have logged by now, and of its own from here on"
        )
    if first_only:
        told.append(
            f"{_names(first_only)} is logged with rank_zero_only=True, so its epoch value is of what rank 0 alone has "
            "logged, which was another part of the samples before"
        )
    return [_entry(parts, rank, world_size) for parts in places.values()], told


def _entry(parts: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """One key's state for this rank."""
    newest = next((part for part in parts if part["fresh"]), parts[0])
    options, kind = newest["options"], newest["options"]["reduce_fx"]
    entry = {**newest, **{flag: any(part[flag] for part in parts) for flag in ("fresh", "unwritten", "touched")}}
    if options["rank_zero_only"] and rank:
        entry |= _BLANK
    if "metric" in entry:
        return entry
    if options["sync_dist"] and kind != "custom" and newest["fresh"] and not newest["reduced"]:
        values = [as_scalar(part["value"]) for part in parts if part["fresh"]]
        reduced = getattr(torch.stack([value.double() for value in values]), kind)()
        entry |= {"value": reduced.to(values[0].dtype), "reduced": True}
    if "total" not in entry:
        return entry
    if not options["sync_dist"] and not options["rank_zero_only"]:
        sums = _share(_sum(parts, kind), kind, rank, world_size)
    else:
        sums = _NO_SUMS if rank else _sum(parts, kind)
    dtype = next((part["dtype"] for part in parts if part["dtype"] is not None), None)
    return {**entry, **sums, "dtype": dtype, "touched": sums["total"] is not None or bool(sums["pending"])}


def _sum(parts: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """All ranks' sums of one key."""
    totals = [part["total"] for part in parts if part["total"] is not None]
    total = None
    if totals:
        together = torch.stack(totals)
        total = together.min() if kind == "min" else together.max() if kind == "max" else together.sum()
    pending = list(chain.from_iterable(part["pending"] for part in parts))
    return {"total": total, "weight": sum(part["weight"] for part in parts), "pending": pending}


def _share(sums: dict[str, Any], kind: str, rank: int, world_size: int) -> dict[str, Any]:
    """One of so many equal shares, of which each makes the same mean and all together the same sum."""
    total = sums["total"]
    if total is not None and kind in ("mean", "sum"):
        total = total / world_size
    return {"total": total, "weight": sums["weight"] / world_size, "pending": sums["pending"][rank::world_size]}


# ---- torchmetrics


def _torchmetrics(
    ranks: list[dict[str, Any]], module: Any, rank: int, world_size: int
) -> tuple[dict[str, Any], list[str]]:
    found, own, lost = {}, [], []
    for name, metric in torchmetrics_of(module).items():
        parts = [states[name] for states in ranks if name in states]
        if not parts:
            continue
        counts = [part["count"] for part in parts]
        state = {}
        for attribute in parts[0]["state"]:
            values = [part["state"][attribute] for part in parts]
            if isinstance(metric._defaults[attribute], list):
                state[attribute] = _dealt(values, rank, world_size)
                continue
            state[attribute], whole = _reduced(values, metric, attribute, rank, world_size)
            if not whole and any(counts):
                lost.append(f"{name}.{attribute}")
        if any(counts) and world_size > 1 and not metric.sync_on_compute:
            own.append(name)
        # torchmetrics weighs means by the count, and asks otherwise only whether there is anything.
        found[name] = {**parts[0], "state": state, "count": -(-sum(counts) // len(counts))}
    told = []
    if own:
        told.append(
            f"{_names(own)} has sync_on_compute=False, so each rank's value is made of a part of what all ranks have "
            "counted by now, and of its own from here on"
        )
    if lost:
        told.append(
            f"{_names(lost)} has no dist_reduce_fx, by which several ranks' parts could be put together, so only every "
            f"{world_size}th rank's goes on"
            if world_size > 1
            else f"{_names(lost)} has no dist_reduce_fx, by which several ranks' parts could be put together, so rank "
            "0's alone goes on"
        )
    return found, told


def _dealt(values: list[Any], rank: int, world_size: int) -> list[Any]:
    """This rank's part of the ranks' lists. All ranks have as many, as torchmetrics gathers one after another."""
    items = list(chain.from_iterable(value if isinstance(value, list) else [value] for value in values))
    mine = items[rank::world_size]
    return mine if len(mine) == -(-len(items) // world_size) else mine + empty(items[:1])


def _reduced(values: list[Any], metric: Any, attribute: str, rank: int, world_size: int) -> tuple[Any, bool]:
    """This rank's part of a state that is one tensor; and whether nothing of it is lost."""
    from torchmetrics.utilities import dim_zero_cat, dim_zero_mean

    reduction = metric._reductions[attribute]
    if reduction is dim_zero_mean:  # ranks count alike in it, however much they have
        return reduction(torch.stack(values)), True
    mine = values[rank::world_size]
    if not mine:
        return metric._defaults[attribute].detach().clone(), True
    if len(mine) == 1:
        return mine[0], True
    if reduction is None:
        return mine[0], False
    return reduction(mine if reduction is dim_zero_cat else torch.stack(mine)), True


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, dict.fromkeys(names)))
