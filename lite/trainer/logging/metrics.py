"""`self.log`: who may log where, what is kept under which name, and what goes to loggers, bar and callbacks.

Values stay on their device; one synchronisation happens per logging interval and per epoch. The sums are in `entries`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lite import collectives
from lite.errors import ConfigError
from lite.trainer.data.stage import StageData
from lite.trainer.logging.batch_size import infer_batch_size
from lite.trainer.logging.entries import (
    Entry,
    MetricEntry,
    Options,
    finished,
    is_torchmetric,
    make_entry,
    merge,
)
from lite.trainer.logging.metric_objects import attribute_of, torchmetrics_of
from lite.trainer.logging.places import LOADER_SUFFIX, NOWHERE, Place, kept_of

Row = dict[str, Any]


class Metrics:
    """What was logged in one run.

    Args:
        world_size: Number of ranks.
        rank: This rank.
        part: Which part of the data this rank has (`Strategy.data_shards`); ranks with the same one count once.
        enabled: False lets `log` do nothing (barebones).

    Attributes:
        here: The place that runs now.
        kept: The newest value of every name, as callbacks see it; those of running steps come on top.
        has_validated: What a validation logs is among them, where this run has had one.
        logged: The newest values that are for loggers; those of running steps come on top.
        bar: The same for the progress bar.
    """

    def __init__(self, world_size: int = 1, rank: int = 0, part: int = 0, *, enabled: bool = True) -> None:
        self.here = NOWHERE
        self.kept: Row = {}
        self.logged: Row = {}
        self.bar: Row = {}
        self.loader_names: list[str] | None = None
        self.num_loaders = 1
        self.filler = False
        self.number = 0  # of batches begun
        self.enabled = enabled
        self._world_size, self._rank, self._part = world_size, rank, part
        self._places: dict[tuple[str, str, int | None], Place] = {}
        self._owners: dict[tuple[str, int | None, str], str] = {}
        self._batch: Any = None
        self._size: int | None = None
        self._restored: dict[tuple[Any, ...], Any] = {}
        self._told: set[str] = set()
        self.sanity = self.has_validated = False

    # ---- where

    def begin_run(self) -> None:
        """A call of fit, validate, test or predict begins, which shows what it logs itself."""
        self.kept, self.logged, self.bar = {}, {}, {}
        self.sanity = self.has_validated = False

    def place(self, stage: str, hook: str, loader: int | None = None) -> Place:
        """The place of that hook; stages are "train", "validate", "test", "predict"."""
        key = (stage, hook, loader)
        if key not in self._places:
            self._places[key] = Place(*key)
        return self._places[key]

    def at(self, place: Place) -> None:
        """That place runs from now on."""
        self.here = place

    def take_loaders(self, data: StageData) -> None:
        """Those loaders are evaluated next: with several, their numbers or names are part of what is logged."""
        self.num_loaders, self.loader_names = len(data.loaders), data.names

    def begin_batch(self, batch: Any, place: Place) -> None:
        """That place runs with this batch; its size, which weighs epoch values, is looked for when it is asked for."""
        self._batch, self._size, self.here = batch, None, place
        self.number += 1

    def end_batches(self) -> None:
        """No batch is under way any more."""
        self._batch, self._size, self.filler = None, 1, False

    def batch_size(self) -> int:
        """Samples of the current batch, 1 outside of batches."""
        if self._size is None:
            self._size = 1 if self._batch is None else infer_batch_size(self._batch, self._warn)
        return self._size

    # ---- logging

    def register(self, name: str, value: Any, options: Options, attribute: str | None, module: Any) -> Entry:
        """The entry for a key that is logged here for the first time, or with other settings.

        Raises:
            ConfigError: The key or its settings are wrong.
            UsageError: Nothing can be logged here.
        """
        place = self.here
        known = place.entries.get(name)
        if known is not None and options.amounts_to(known.options):
            known.options = options
            return known
        on_step, on_epoch = kept_of(place, name, value, options)
        if known is not None:
            raise ConfigError(
                f"log({name!r}) in {place.hook} came with other settings: {options.differing(known.options)}; "
                "use the same for one key, or another key."
            )
        owner = self._owners.setdefault((place.stage, place.loader, name), place.hook)
        if owner != place.hook:
            raise ConfigError(
                f"log({name!r}) was called in {owner} and in {place.hook}: the one would overwrite the other; use two "
                "names."
            )
        if is_torchmetric(value):
            attribute = attribute_of(name, value, attribute, module)
        if options.sync_dist and options.rank_zero_only:
            raise ConfigError(f"log({name!r}): sync_dist=True waits for ranks that rank_zero_only=True leaves out.")
        entry = make_entry(
            name, value, options, on_step, on_epoch, self, muted=options.rank_zero_only and self._rank > 0
        )
        if isinstance(entry, MetricEntry):
            entry.attribute = attribute
        entry.names(self._suffixed(place, name, options.add_dataloader_idx))
        place.entries[name] = entry
        saved = self._restored.pop((place.stage, place.hook, place.loader, name), None)
        if saved is not None:
            entry.load_state_dict(saved)
        alone = options.sync_dist or isinstance(entry, MetricEntry) or options.rank_zero_only
        if self._world_size > 1 and on_epoch and place.stage in ("validate", "test") and not alone and not self.sanity:
            self._warn(
                f"log({name!r}) in {place.hook} without sync_dist=True gives each of the {self._world_size} ranks the "
                "value of its own samples."
            )
        return entry

    def _suffixed(self, place: Place, name: str, add_index: bool) -> Callable[[str], str]:
        if place.loader is None or self.num_loaders < 2 or not add_index:
            return lambda fork: name + fork
        if self.loader_names is not None:
            prefix = self.loader_names[place.loader]
            return lambda fork: f"{prefix}/{name}{fork}"
        return lambda fork: f"{name}{fork}{LOADER_SUFFIX}{place.loader}"

    def _warn(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            warnings.warn(text, stacklevel=5)

    # ---- reading

    def _of(self, stage: str) -> Iterable[tuple[Place, Entry]]:
        for place in list(self._places.values()):
            if place.stage == stage:
                for entry in place.entries.values():
                    yield place, entry

    def callback_metrics(self) -> Row:
        """Every name's newest value, as 0-dim tensors; what is written into it counts as logged."""
        found = self.kept
        for _, entry in self._of("train"):
            if entry.on_step and entry.fresh:
                value = entry.step_value()
                found[entry.name] = value
                if entry.on_epoch:
                    found[entry.step_name] = value
        found.update({entry.name: value for entry, value in self._at_epoch_end()})
        return found

    def _at_epoch_end(self) -> Iterable[tuple[Entry, Tensor]]:
        """What this rank has logged in the end hooks of the epoch that is ending, which is computed after them."""
        for place, entry in self._of(self.here.stage):
            # A Metric of torchmetrics would ask the other ranks.
            alone = entry.shares or self._world_size == 1
            if place.hook.endswith("_epoch_end") and entry.on_epoch and entry.touched and alone:
                value = entry.compute()
                if value is not None:
                    yield entry, value

    def agreed(self, name: str, *, own: bool = False) -> Any:
        """A name's newest value, the same on all ranks; None where nobody has logged it. Collective.

        A step's value with sync_dist=True is reduced over the ranks that have one; of others rank 0's counts, with a
        warning where they differ. `own=True` leaves every rank that has one its own of these.
        """
        mine = self.callback_metrics().get(name)
        if mine is not None and not isinstance(mine, Tensor):  # somebody has written it into callback_metrics
            mine = torch.tensor(float(mine))
        if self._world_size == 1:
            return mine
        steps = [e for _, e in self._of("train") if e.on_step and e.fresh and e.is_own]
        entry = next((e for e in steps if name in (e.name, e.step_name)), None)
        kind = None if entry is None else entry.kind
        ending = next((e for e, _ in self._at_epoch_end() if e.name == name and e.options.sync_dist), None)
        partial = None if ending is None else ending.partial()
        everyone = self._of_each_part((None if mine is None else float(mine), kind, partial))
        there = [value for value, _, _ in everyone if value is not None]
        if not there:
            return None
        if partials := [part for _, _, part in everyone if part is not None]:
            return finished(merge(partials), ending)
        dtype = torch.float64 if mine is None else mine.dtype
        if any(kind is not None for _, kind, _ in everyone):
            values = torch.tensor([value for value, kind, _ in everyone if kind is not None], dtype=torch.float64)
            if entry is None:  # this rank has not logged it; the others' function is not known here
                kind = next(kind for _, kind, _ in everyone if kind is not None)
                return getattr(values, "mean" if kind == "custom" else kind)()
            return entry.take_step(entry.reduce(values).to(dtype))
        if own and mine is not None:
            return mine
        if any(value != there[0] and not (value != value and there[0] != there[0]) for value in there):
            self._warn(
                f"{name!r} differs between the ranks, and decides for all of them: rank 0's value counts; log it with "
                "sync_dist=True."
            )
        return torch.tensor(there[0], dtype=dtype)

    def bar_metrics(self) -> Row:
        """What the progress bar shows, as tensors."""
        found = dict(self.bar)
        for _, entry in self._of("train"):
            if entry.options.prog_bar and entry.on_step and entry.fresh:
                found[entry.step_name] = entry.step_value()
        return found

    def logged_metrics(self) -> Row:
        """The newest values that are for loggers, whether they were written or not."""
        found = dict(self.logged)
        for _, entry in self._of("train"):
            if entry.logger and entry.on_step and entry.fresh:
                found[entry.step_name] = entry.step_value()
        found.update({entry.epoch_name: value for entry, value in self._at_epoch_end() if entry.logger})
        return found

    def has_step_values(self, stage: str) -> bool:
        """Whether a step's value is still to be written."""
        return any(entry.on_step and entry.unwritten for _, entry in self._of(stage))

    def step_row(self, stage: str) -> Row:
        """What loggers get of the steps since the last row. Collective where a key has sync_dist=True."""
        row, together = {}, []
        for place, entry in self._of(stage):
            if entry.on_step and entry.unwritten and entry.logger:
                value = row[entry.step_name] = entry.step_value()
                entry.unwritten = False
                if entry.is_own:
                    together.append((place, entry, (float(value), value.dtype)))
        # In training a rank may lack a key; in evaluation it may even lack a batch, so there all ranks log it.
        if self._world_size > 1 and (collectives.any_rank(bool(together)) if stage == "train" else together):
            for _, entry, parts in self._gather(stage, together):
                values = torch.tensor([value for value, _ in parts], dtype=torch.float64)
                row[entry.step_name] = entry.take_step(entry.reduce(values).to(parts[0][1]))
        self.logged.update(row)
        return row

    def finish(self, stage: str, num_loaders: int = 0) -> tuple[Row, list[Row]]:
        """End an epoch: compute its values. Collective where a key has sync_dist=True.

        Returns:
            What loggers get, and for each evaluation loader what was logged for it.
        """
        row: Row = {}
        per_loader: list[Row] = [{} for _ in range(num_loaders)]
        for place, entry, value in self.show(stage):
            if entry.logger:
                row[entry.epoch_name] = value
            for index, results in enumerate(per_loader):
                if place.loader in (None, index):
                    results[entry.epoch_name] = value
        self.reset(stage)
        self._drop_restored(stage)
        self.has_validated = self.has_validated or (stage == "validate" and not self.sanity)
        return row, per_loader

    def reset(self, stage: str) -> None:
        """Let an epoch's sums begin anew."""
        for _, entry in self._of(stage):
            if entry.on_epoch:
                entry.reset()

    def _drop_restored(self, stage: str) -> None:
        """What was saved of keys that wait for their own function is not the next epoch's."""
        for where in [where for where in self._restored if where[0] == stage]:
            if self._restored.pop(where).get("pending"):
                self._warn(
                    f"log({where[3]!r}) has a reduce_fx of its own, not seen again in the epoch that goes on: "
                    "it has no value of that."
                )

    def show(self, stage: str) -> list[tuple[Place, Entry, Tensor]]:
        """Compute an epoch's values as they are by now, for callbacks to see. Collective as `finish` is."""
        values = self._epoch_values(stage)
        self._keep_steps(stage)
        for _, entry, value in values:
            self.kept[entry.name] = value
            if entry.on_step:
                self.kept[entry.epoch_name] = value
                if stage == "train" and entry.value is not None:
                    self.kept[entry.step_name] = entry.step_value()
                entry.fresh = False  # the epoch's value is newer
            if entry.logger:
                self.logged[entry.epoch_name] = value
            if entry.options.prog_bar:
                self.bar[entry.epoch_name] = value
        return values

    def _epoch_values(self, stage: str) -> list[tuple[Place, Entry, Tensor]]:
        totals: dict[Entry, Any] = {}
        if self._world_size > 1 and self._any_shared(stage):
            mine = [(p, e) for p, e in self._of(stage) if e.on_epoch and e.touched and e.options.sync_dist and e.shares]
            together = self._gather(stage, [(place, entry, entry.partial()) for place, entry in mine])
            totals = {entry: merge(parts) for _, entry, parts in together}
        values: list[tuple[Place, Entry, Tensor]] = []
        for place, entry in self._of(stage):
            total = totals.get(entry)
            value = entry.compute(total) if entry.on_epoch and (entry.touched or total is not None) else None
            if value is not None:
                values.append((place, entry, value))
        return values

    def _of_each_part(self, mine: tuple[Any, Any, Any]) -> list[tuple[Any, Any, Any]]:
        """Of the ranks that have the same samples, what one of them has: a value, and a sum."""
        found: dict[int, tuple[Any, Any, Any]] = {}
        for part, one in collectives.all_gather_objects((self._part, mine)):
            if one[0] is not None or one[2] is not None:
                found.setdefault(part, one)
        return list(found.values())

    def _gather(self, stage: str, mine: list[tuple[Place, Entry, Any]]) -> list[tuple[Place, Entry, list[Any]]]:
        """What the ranks have of entries, whoever has logged them: of those with the same samples, one.

        Collective: call on all ranks.
        """
        told = [((place.hook, place.loader, entry.key), entry.options.plain(), sums) for place, entry, sums in mine]
        found: dict[tuple[Place, Entry], dict[int, Any]] = {}
        for part, theirs in collectives.all_gather_objects((self._part, told)):
            for where, plain, sums in theirs:
                place = self.place(stage, *where[:2])
                entry = place.entries.get(where[2]) or self._learn(place, where[2], plain)
                if entry is not None:
                    found.setdefault((place, entry), {}).setdefault(part, sums)
        return [(place, entry, list(parts.values())) for (place, entry), parts in found.items()]

    def _learn(self, place: Place, key: str, plain: dict[str, Any]) -> Entry | None:
        """The entry for a key that other ranks alone have logged; None where this rank can't have one."""
        options = Options.from_plain(plain)
        if options is None or self._owners.get((place.stage, place.loader, key), place.hook) != place.hook:
            self._warn(f"log({key!r}) in {place.hook}: ranks that don't log it with its own reduce_fx don't have it.")
            return None
        before, self.here = self.here, place
        try:
            return self.register(key, 0.0, options, None, None)
        finally:
            self.here = before

    def _keep_steps(self, stage: str) -> None:
        """The newest steps' values stay where they are shown, when the epoch's sums are reset."""
        for _, entry in self._of(stage):
            if not entry.on_step or not entry.fresh:
                continue
            if entry.logger and stage == "train":
                self.logged[entry.step_name] = entry.step_value()
            if entry.options.prog_bar:
                self.bar[entry.step_name] = entry.step_value()

    def _any_shared(self, stage: str) -> bool:
        """Whether a rank has anything to share: one that had no batch doesn't know of the keys."""
        mine = any(entry.options.sync_dist and entry.shares and entry.on_epoch for _, entry in self._of(stage))
        return collectives.any_rank(mine)

    def discard(self, stage: str) -> None:
        """Forget what was logged in a stage, as after a sanity check or a failed epoch."""
        for _, entry in self._of(stage):
            entry.reset()

    def forget_places(self, stage: str) -> None:
        """Let a stage begin anew, with other loaders and names."""
        for key in [key for key in self._places if key[0] == stage]:
            del self._places[key]
        for owner in [owner for owner in self._owners if owner[0] == stage]:
            del self._owners[owner]
        self._restored = {where: saved for where, saved in self._restored.items() if where[0] != stage}

    # ---- state

    def state_dict(self, *, under_way: bool = False) -> dict[str, Any]:
        """Plain values of this rank; without the sums of the batch that is under way, which is given again."""
        undone = self.number if under_way else None
        saved = []
        for place in self._places.values():
            for entry in place.entries.values():
                if entry.is_stored:
                    at = {"stage": place.stage, "hook": place.hook, "loader": place.loader, "key": entry.key}
                    saved.append({**at, "options": entry.options.plain(), **entry.state_dict(undone)})
        return {**self.shown(), "has_validated": self.has_validated, "entries": saved}

    def shown(self) -> dict[str, Row]:
        """The newest values, as callbacks, loggers and the bar see them."""
        return {"kept": dict(self.kept), "logged": dict(self.logged), "bar": dict(self.bar)}

    def show_again(self, shown: dict[str, Any]) -> None:
        """Put those in the place of the present ones."""
        self.kept, self.logged, self.bar = dict(shown["kept"]), dict(shown["logged"]), dict(shown["bar"])

    def load_state_dict(self, state: dict[str, Any], module: Any) -> None:
        """Go on from there, with the Metric objects of that module."""
        self.show_again(state)
        self.has_validated = state["has_validated"]
        self._owners.clear()
        self._restored.clear()
        for place in self._places.values():  # of a fit before this one
            place.entries.clear()
        for one in state["entries"]:
            where = (one["stage"], one["hook"], one["loader"], one["key"])
            attribute = one.get("metric")
            value = 0.0 if attribute is None else torchmetrics_of(module).get(attribute)
            if value is None:  # the module holds no such Metric any more
                continue
            self._restored[where] = one
            options = Options.from_plain(one["options"])
            if options is None:  # a function of the user's; the first log after the resume brings it
                continue
            before, self.here = self.here, self.place(*where[:3])
            self.register(one["key"], value, options, attribute, module)
            self.here = before
