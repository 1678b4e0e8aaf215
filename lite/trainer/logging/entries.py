"""The value of one logged key: the newest one, and what an epoch makes of them all. It knows no names of others."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lite.errors import ConfigError
from lite.sharded import whole

_FOLD_AT = 256
_REDUCE = {"mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max"}
_FUNCTIONS: dict[Any, str] = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max"}
_FUNCTIONS |= {min: "min", max: "max", sum: "sum"}


class Options(NamedTuple):
    """How a key is logged; the arguments of `log` that must not change for one key."""

    prog_bar: bool = False
    logger: bool | None = None
    on_step: bool | None = None
    on_epoch: bool | None = None
    reduce_fx: Any = "mean"
    sync_dist: bool = False
    add_dataloader_idx: bool = True
    rank_zero_only: bool = False

    def differing(self, before: Options) -> str:
        """What is not as it was, for people."""
        pairs = zip(self._fields, self, before, strict=True)
        return ", ".join(f"{name}={new!r} instead of {old!r}" for name, new, old in pairs if new != old)

    def amounts_to(self, before: Options) -> bool:
        """Whether it is the same, with a function that was only made anew: a lambda within the call, or a partial."""
        return self._replace(reduce_fx=None) == before._replace(reduce_fx=None) and _same_function(
            self.reduce_fx, before.reduce_fx
        )

    def plain(self) -> dict[str, Any]:
        """Plain values; a function of the user's is left out."""
        kind = reduce_kind(self.reduce_fx)
        return {**self._asdict(), "reduce_fx": kind}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Options | None:
        """What `plain` returned; None where a function is missing."""
        return None if values["reduce_fx"] == "custom" else cls(**values)


class Sizes(Protocol):
    """What an entry asks for: how large the current batch is, whether it only keeps this rank in step, its number."""

    filler: bool
    number: int

    def batch_size(self) -> int: ...


def reduce_kind(reduce_fx: Any) -> str:
    """ "mean", "sum", "min", "max", or "custom" for a function of the user's."""
    if isinstance(reduce_fx, str) and reduce_fx.lower() in _REDUCE:
        return _REDUCE[reduce_fx.lower()]
    if callable(reduce_fx):
        return _FUNCTIONS.get(reduce_fx, "custom")
    raise ConfigError(f"log: reduce_fx={reduce_fx!r} is not known; use 'mean', 'sum', 'min', 'max' or a function.")


def _same_function(one: Any, other: Any) -> bool:
    """Whether two reductions are one by name, or two functions from the same place in the source."""
    kinds = {reduce_kind(one), reduce_kind(other)}
    if "custom" not in kinds:
        return len(kinds) == 1
    if isinstance(one, partial) and isinstance(other, partial):
        return _same_function(one.func, other.func) and (one.args, one.keywords) == (other.args, other.keywords)
    code = getattr(one, "__code__", None)
    return bool(one == other) or (code is not None and code is getattr(other, "__code__", None))


def is_torchmetric(value: Any) -> bool:
    """Whether it is a Metric of torchmetrics, which nobody has where that was not imported."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def make_entry(
    key: str, value: Any, options: Options, on_step: bool, on_epoch: bool, sizes: Sizes, *, muted: bool
) -> Entry:
    """The entry that fits a key's first value and settings."""
    kind = reduce_kind(options.reduce_fx)
    if is_torchmetric(value):
        entry = MetricEntry(key, options, on_step, on_epoch, sizes, kind, muted)
        entry.value = value
        return entry
    return (EpochEntry if on_epoch else Entry)(key, options, on_step, on_epoch, sizes, kind, muted)


class Entry:
    """A key of which the newest value counts.

    Attributes:
        key: As it was logged.
        name: With the loader's name.
        step_name, epoch_name: The names that loggers get.
        fresh: A step has logged it since the epoch's value was made.
        unwritten: A step has logged it since loggers were given a row.
        touched: There is something for the epoch's value.
    """

    shares = True  # its sums can be added up over ranks

    def __init__(
        self, key: str, options: Options, on_step: bool, on_epoch: bool, sizes: Sizes, kind: str, muted: bool
    ) -> None:
        self.key = self.name = self.step_name = self.epoch_name = key
        self.options, self.on_step, self.on_epoch = options, on_step, on_epoch
        self.logger = options.logger is not False
        self.value: Any = None
        self.fresh = self.unwritten = self.touched = False
        self.kind = kind
        self._sizes = sizes
        self._muted = muted
        self._reduced: Any = None
        if muted:
            self.add = _ignore  # type: ignore[method-assign]

    def names(self, named: Callable[[str], str]) -> None:
        """Take the names, with a suffix where a step's and the epoch's value differ."""
        fork = self.on_step and self.on_epoch
        self.name = named("")
        self.step_name, self.epoch_name = (named("_step"), named("_epoch")) if fork else (self.name, self.name)

    def add(self, value: Any, batch_size: Any) -> None:
        """Take a value; it is not waited for."""
        if value.__class__ is Tensor and value.requires_grad and value.numel() == 1:  # the commonest case, written out
            self.value = value.detach()
        else:
            self.value = self._taken(value)
        self.fresh = self.unwritten = True

    def _taken(self, value: Any) -> Any:
        if type(value) is Tensor:
            if value.numel() != 1:
                raise self._wrong(f"a tensor of shape {tuple(value.shape)}")
            # What is computed from parameters belongs to nobody else; another tensor the loop may go on adding to.
            return value.detach() if value.requires_grad else value.clone()
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise self._wrong(f"a tensor of shape {tuple(value.shape)}")
            return whole(value.detach()).as_subclass(Tensor).clone()
        if isinstance(value, (bool, int, float)):
            return value
        if hasattr(value, "__float__") and not isinstance(value, str):
            return float(value)
        raise self._wrong(f"a {type(value).__name__}")

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"log({self.key!r}) got {what}; log a number, or a tensor with one element.")

    def step_value(self) -> Tensor:
        """The newest value as a 0-dim tensor."""
        return as_scalar(self.value)

    @property
    def is_own(self) -> bool:
        """Whether the newest value is this rank's, and is to be reduced over all of them."""
        return self.options.sync_dist and self.shares and (self._reduced is None or self.value is not self._reduced)

    def take_step(self, value: Tensor) -> Tensor:
        """Take all ranks' newest value in the place of this one's own."""
        self.value = self._reduced = value
        self.fresh = True
        return value

    def reduce(self, values: Tensor) -> Tensor:
        """The key's reduction of several values."""
        if self.kind == "custom":
            reduced: Tensor = self.options.reduce_fx(values)
            return reduced
        found: Tensor = getattr(values, self.kind)()
        return found

    def partial(self) -> Any:
        return None

    def compute(self, total: Any = None) -> Tensor | None:
        """The epoch's value: of this rank's sums, or of all ranks' together."""
        return None

    def reset(self) -> None:
        """Begin another epoch."""
        self.fresh = self.unwritten = self.touched = False

    @property
    def is_stored(self) -> bool:
        """Whether `state_dict` has what a resumed run needs."""
        return True

    def state_dict(self, undone: int | None = None) -> dict[str, Any]:
        """Plain values, without what the batch with the number `undone` has added to an epoch's."""
        reduced = self.value is not None and self.value is self._reduced
        flags = {"fresh": self.fresh, "unwritten": self.unwritten, "touched": self.touched, "reduced": reduced}
        return {"value": self.value, **flags}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.value, self.fresh = state["value"], state["fresh"]
        self.unwritten, self.touched = state["unwritten"], state["touched"]
        self._reduced = self.value if state.get("reduced") else None


class EpochEntry(Entry):
    """A key whose values make one at the epoch's end. They are added up some hundred at a time, in double precision."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._pending: list[Tensor] = []
        self._weights: list[Any] = []
        self._total: Any = None
        self._weight: float = 0.0
        self._dtype: torch.dtype | None = None
        self._mean = self.kind == "mean"
        self._number, self._before = -1, 0  # the newest batch that has added something, and how much waited before it

    def add(self, value: Any, batch_size: Any) -> None:
        value = self.value = self._taken(value)
        self.fresh = self.unwritten = True
        if self._sizes.filler:  # this rank's batch repeats another's sample
            if isinstance(value, Tensor):
                self._dtype = self._dtype or _result_dtype(value)
            return
        number = self._sizes.number
        if number != self._number:
            if len(self._pending) >= _FOLD_AT:
                self._fold()
            self._number, self._before = number, len(self._pending)
        self.touched = True
        if self._mean:
            self._weights.append(self._sizes.batch_size() if batch_size is None else batch_size)
        self._pending.append(value)

    def _fold(self) -> None:
        if not self._pending or self.kind == "custom":
            return
        if not isinstance(self._pending[0], Tensor) and not any(isinstance(v, Tensor) for v in self._pending):
            values = torch.tensor([float(v) for v in self._pending], dtype=torch.float64)
        else:
            scalars = [as_scalar(v) for v in self._pending]
            device = next(v.device for v in self._pending if isinstance(v, Tensor))
            first = next(v for v in self._pending if isinstance(v, Tensor))
            self._dtype = _result_dtype(first)
            wide = torch.float64 if device.type != "mps" else torch.float32
            values = torch.stack([v.to(device, wide) for v in scalars])
        if self._mean:
            weights = torch.tensor([float(w) for w in self._weights], dtype=values.dtype)
            self._weight += float(weights.sum())
            values = values * weights.to(values.device)
        part = values.min() if self.kind == "min" else values.max() if self.kind == "max" else values.sum()
        if self._total is None:
            self._total = part
        elif self.kind in ("min", "max"):
            self._total = torch.minimum(self._total, part) if self.kind == "min" else torch.maximum(self._total, part)
        else:
            self._total = self._total + part
        self._pending, self._weights = [], []

    def partial(self) -> Any:
        """What this rank has, to be put together with the others'."""
        if self.kind == "custom":
            values = torch.stack([as_scalar(v) for v in self._pending])
            return self.kind, values.tolist(), 0.0, values.dtype
        self._fold()
        return self.kind, float(self._total), self._weight, self._dtype

    def compute(self, total: Any = None) -> Tensor | None:
        if self.kind == "custom":
            if total is not None:
                return self.reduce(torch.tensor(total[1], dtype=total[3]))
            return self.reduce(torch.stack([as_scalar(v) for v in self._pending]))
        self._fold()
        found, weight, dtype = self._total, self._weight, self._dtype
        if total is not None:
            _, number, weight, dtype = total
            found = torch.tensor(number, dtype=torch.float64)
        return None if found is None else _value(self.kind, found, weight, dtype)

    def reset(self) -> None:
        super().reset()
        self._pending, self._weights, self._total, self._weight = [], [], None, 0.0

    def state_dict(self, undone: int | None = None) -> dict[str, Any]:
        count = self._before if undone is not None and undone == self._number else len(self._pending)
        later, weights = self._pending[count:], self._weights[count:]
        self._pending, self._weights = self._pending[:count], self._weights[:count]
        self._fold()
        kept = [as_scalar(v) for v in self._pending]
        sums = {"total": self._total, "weight": self._weight, "pending": kept, "dtype": self._dtype}
        touched = bool(kept) or self._total is not None
        self._before = len(self._pending)
        self._pending, self._weights = self._pending + later, self._weights + weights
        return {**super().state_dict(), **sums, "touched": touched}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._total, self._weight, self._dtype = state["total"], state["weight"], state["dtype"]
        self._pending = list(state["pending"])


class MetricEntry(Entry):
    """A Metric of torchmetrics, which counts, synchronises and stores by itself."""

    shares = False
    attribute: str | None = None  # of the module, that holds it

    def add(self, value: Any, batch_size: Any) -> None:
        if not is_torchmetric(value):
            raise self._wrong(f"a {type(value).__name__} after a Metric")
        self.value = value
        self.fresh = self.unwritten = self.touched = True

    def step_value(self) -> Tensor:
        cached = self.value._forward_cache
        return as_scalar(self.value.compute() if cached is None else cached)

    def compute(self, total: Any = None) -> Tensor | None:
        return as_scalar(self.value.compute())

    def reset(self) -> None:
        if self.touched:
            self.value.reset()
        super().reset()

    @property
    def is_stored(self) -> bool:
        return self.attribute is not None

    def state_dict(self, undone: int | None = None) -> dict[str, Any]:
        return {**super().state_dict(), "value": None, "metric": self.attribute}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict({**state, "value": self.value})


def _result_dtype(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype is torch.float64 else torch.float32


def as_scalar(value: Any) -> Tensor:
    """A 0-dim tensor, on the device where the value is."""
    if isinstance(value, Tensor):
        scalar = value.detach().reshape(())
        return scalar if scalar.is_floating_point() else scalar.to(torch.get_default_dtype())
    return torch.tensor(float(value))


def merge(parts: list[Any]) -> Any:
    """The ranks' partial sums of one key put together."""
    kind, values = parts[0][0], [value for _, value, _, _ in parts]
    total: Any
    if kind == "custom":
        total = list(chain.from_iterable(values))
    else:
        total = min(values) if kind == "min" else max(values) if kind == "max" else sum(values)
    dtype = next((dtype for *_, dtype in parts if dtype is not None), None)
    return kind, total, sum(weight for _, _, weight, _ in parts), dtype


def finished(total: Any, entry: Entry | None) -> Tensor | None:
    """The value that merged sums make; `entry` knows the key's own function, if it has one."""
    if entry is not None:
        return entry.compute(total)
    kind, number, weight, dtype = total
    return None if kind == "custom" else _value(kind, torch.tensor(number, dtype=torch.float64), weight, dtype)


def _value(kind: str, total: Tensor, weight: float, dtype: torch.dtype | None) -> Tensor | None:
    """What an epoch's sum makes; None where nothing had a weight."""
    if kind == "mean" and weight == 0:
        return None
    return (total / weight if kind == "mean" else total).to(dtype or torch.get_default_dtype())


def _ignore(value: Any, batch_size: Any) -> None:
    """A value of a key that another rank alone logs."""
