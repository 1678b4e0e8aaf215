"""An exponential moving average of a model's weights, kept beside it.

Made by `Lite.ema`. It works on each rank's own part of the weights, so nothing communicates, and parameters that are
sharded (DTensor) are averaged shard by shard. Of a pipeline's model a rank averages its own layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from lite import collectives
from lite.errors import ConfigError, UsageError, some
from lite.precision.base import is_packed
from lite.sharded import Elsewhere
from lite.state import plain_key
from lite.swapped import swapped

_HALF = (torch.float16, torch.bfloat16)
_APART = 1 << 30  # no training comes to as many versions


class EMA:
    """The averaged weights of one model; `average = decay * average + (1 - decay) * weights` at each update.

    It begins with the weights at its making. 16-bit weights are averaged in float32, in which small changes count.

    Args:
        model: The set-up model.
        decay: From 0 to below 1; about 1 / (1 - decay) updates count.
        buffers: Whether floating-point buffers (BatchNorm's statistics) are averaged as well. If not, evaluation within
            `swap` takes the model's present ones, as torch's AveragedModel does unless it is told otherwise.
        skipped: Says whether the last optimizer step was left out.
        in_sync: Says whether all ranks have the same weights of it (`Strategy.is_in_sync`).
        partition: What reads and writes this rank's parts of parameters that are no tensors of their own
            (`Strategy.partition`); with it, `state_dict` puts averages together, and is collective.

    Raises:
        UsageError: The ranks train apart (LocalSGDStrategy), and have stepped since they came together.

    Attributes:
        num_updates: How many updates were made.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.optim.swa_utils.AveragedModel.html
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        decay: float,
        buffers: bool = False,
        skipped: Callable[[], bool] = lambda: False,
        in_sync: Callable[[], bool] = lambda: True,
        partition: Any = None,
    ) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise ConfigError(f"decay={decay!r} must be a number from 0 to below 1, e.g. 0.999.")
        _check_in_sync("lite.ema()", in_sync)
        self.decay = float(decay)
        self.num_updates = 0
        self._model = model
        self._skipped = skipped
        self._in_sync = in_sync
        self._partition = partition
        self._kept: list[tuple[Tensor, Tensor]] | None = None  # the model's own values, within `swap`
        self._versions: list[int] = []
        self._swaps = 0
        self._with_buffers = buffers
        self._sharded = _sharded_modules(model)
        self._reshard()
        self._tensors = self._find()
        self._places = self._find_places()
        self._averages = {
            name: _start(partition.part(tensor) if self._divided(tensor) else tensor)
            for name, tensor in self._tensors.items()
        }
        self._average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        kinds: dict[Any, list[str]] = {}
        for name, average in self._averages.items():
            kinds.setdefault((average.dtype, average.device), []).append(name)
        self._groups = [
            ([self._tensors[name] for name in names], [_local(self._averages[name]) for name in names])
            for names in kinds.values()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in; call it after each optimizer step.

        Nothing happens after a step that a loss scale left out. Under LocalSGDStrategy it is for when all ranks have
        the same weights, `lite.strategy.is_in_sync(model)`.

        Raises:
            UsageError: The averages stand in the model's place (`swap`), the model's parameters were replaced, or the
                ranks train apart and have stepped since they came together.
        """
        if self._kept is not None:
            raise UsageError("ema.update() within ema.swap() would average the averages; call it outside of the block.")
        _check_in_sync("ema.update()", self._in_sync)
        if self._skipped():
            return
        self._check_same()
        for tensors, averages in self._groups:
            present = [self._own(tensor).to(average.dtype) for tensor, average in zip(tensors, averages, strict=True)]
            self._average(averages, present, self.num_updates)
        self.num_updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """A block in which the model has the averaged weights, for evaluation, or for saving or exporting them.

        The model's own come back at its end, bit for bit, and are kept aside meanwhile. So nothing within it may train
        or load the model: `lite.load` and `lite.teardown` are refused there, and under LocalSGDStrategy so are its
        optimizers' steps and the end of a period. A `lite.teardown` while an error is handled puts them back itself.

        Raises:
            UsageError: The block is open already, or the model's parameters were replaced. At the block's end, with the
                model's own weights in place: its parameters were changed within it, as by an optimizer's step.
        """
        if self._kept is not None:
            raise UsageError("ema.swap() is open already; leave the first block before you enter another.")
        self._check_same(added=True)
        self._kept = [(tensor, self._own(tensor).detach().clone()) for tensor in self._tensors.values()]
        self._versions = [self._own(tensor)._version for tensor in self._tensors.values()]
        with swapped(self._model, self._tensors.values(), self._put_back):
            try:
                self._put((tensor, _local(self._averages[name])) for name, tensor in self._tensors.items())
                self._swaps += 1
                self._set_versions([_APART + self._swaps] * len(self._versions))
                yield
                changed = self._changed()
            finally:
                self._put_back()
        if changed:
            raise UsageError(
                f"the model's parameters were changed within ema.swap() ({some(changed)}), as by an optimizer's step "
                "or load_state_dict, while the averages stood in their place. The model has the weights again that it "
                "had before the block, and the change is lost, but for what an optimizer has noted of its step: train "
                "and load outside of the block."
            )

    def state_dict(self) -> dict[str, Any]:
        """The averages by the model's names, and how many updates they hold.

        Raises:
            UsageError: Within `swap`, where a checkpoint would hold the averages as the model.
        """
        if self._kept is not None:
            raise UsageError(
                "a checkpoint with the ema within ema.swap() would hold averages in the model's place; save outside "
                "of it, or leave the ema out of state to save the averaged model alone."
            )
        averages = {name: _marked(average) for name, average in self._averages.items()}
        if self._partition is not None:
            averages = {name: self._whole(name, average) for name, average in averages.items()}
        return {"decay": self.decay, "num_updates": self.num_updates, "averages": averages}

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse averages while the present ones stand in the model's place; a load asks before it changes anything.

        Raises:
            UsageError: It is within `swap`.
        """
        if self._kept is not None:
            raise UsageError(
                "averages can't be loaded within ema.swap(), where the present ones stand in the model's place; leave "
                "the block first, on all ranks."
            )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from saved averages; the decay stays this object's.

        Raises:
            ValueError: They are of another model.
            UsageError: It is within `swap`.
        """
        self.check_state_dict(state_dict)
        saved: Mapping[str, Tensor] = state_dict["averages"]
        if saved.keys() != self._averages.keys():
            differing = sorted(saved.keys() ^ self._averages.keys())
            raise ValueError(f"the averages are of other names: {', '.join(differing[:8])} on one side alone")
        for name, average in self._averages.items():
            shape = self._shape(name, average)
            if tuple(saved[name].shape) != shape:
                raise ValueError(f"{name} is {list(saved[name].shape)} there and {list(shape)} here")
        for name, average in self._averages.items():
            if not average.is_meta:  # else another rank's, of a pipeline
                _local(average).copy_(self._cut(name, saved[name], average))
        self.num_updates = int(state_dict["num_updates"])

    def _find(self) -> dict[str, Tensor]:
        # Frozen weights that are kept in 8 or 4 bits don't change, and can't be averaged.
        named: dict[str, Tensor] = {n: p for n, p in self._model.named_parameters() if not is_packed(p)}
        if self._with_buffers:
            named.update((name, b) for name, b in self._model.named_buffers() if b.is_floating_point())
        return {plain_key(name): tensor for name, tensor in named.items()}

    def _find_places(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where modules keep the tensors: a look there each step costs less than to find them by name again."""
        held = {id(tensor) for tensor in self._tensors.values()}
        tables: list[dict[str, Any]] = [t for m in self._model.modules() for t in (m._parameters, m._buffers)]
        return [(table, key, tensor) for table in tables for key, tensor in table.items() if id(tensor) in held]

    def _check_same(self, *, added: bool = False) -> None:
        """Refuse a model whose tensors are others now, or with `added` also one that has more of them."""
        self._reshard()
        if self._partition is not None and self._partition.closed:
            raise UsageError("the model is divided no more; make the average anew, and use it before lite.teardown.")
        if not added and all(table.get(key) is tensor for table, key, tensor in self._places):
            return
        now = self._find()
        replaced = [n for n in {**now, **self._tensors} if now.get(n) is not self._tensors.get(n)]
        if replaced:
            raise UsageError(
                f"the model's parameters were added or replaced since lite.ema ({', '.join(replaced[:8])}); make the "
                "average after the last change of the model, and use it before lite.teardown."
            )

    @torch.no_grad()
    def _put(self, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        self._reshard()
        for tensor, value in pairs:
            self._own(tensor).copy_(value)
        if self._partition is not None:
            self._partition.rewritten()

    def _put_back(self) -> None:
        """Give the model its own values; a teardown may have done so before the block's end."""
        if self._kept is not None:
            self._put(iter(self._kept))
            self._set_versions(self._versions)
            self._kept = None

    def _set_versions(self, versions: list[int]) -> None:
        """Let autograd take the model's tensors for what they were at these versions: a backward of a forward before
        the block finds the same values after it, and of one within it others."""
        own = tuple(map(self._own, self._tensors.values()))
        torch._C._autograd._unsafe_set_version_counter(own, tuple(versions))

    @torch.no_grad()
    def _changed(self) -> list[str]:
        """The parameters that are no averages any more within `swap`."""
        if self._kept is None:
            return []
        self._reshard()
        parameters = [(name, tensor) for name, tensor in self._tensors.items() if isinstance(tensor, nn.Parameter)]
        return [name for name, tensor in parameters if not _same(self._own(tensor), _local(self._averages[name]))]

    # ---- this rank's parts

    def _divided(self, tensor: Tensor) -> bool:
        return self._partition is not None and isinstance(tensor, nn.Parameter)

    def _own(self, tensor: Tensor) -> Tensor:
        """This rank's part, sharing memory."""
        part: Tensor = self._partition.part(tensor) if self._divided(tensor) else _local(tensor)
        return part

    def _whole(self, name: str, average: Tensor) -> Tensor:
        tensor = self._tensors[name]
        whole: Tensor = self._partition.whole(tensor, average).cpu() if self._divided(tensor) else average
        return whole

    def _shape(self, name: str, average: Tensor) -> tuple[int, ...]:
        tensor = self._tensors[name]
        return tuple(self._partition.shape(tensor) if self._divided(tensor) else average.shape)

    def _cut(self, name: str, value: Tensor, average: Tensor) -> Tensor:
        tensor = self._tensors[name]
        part: Tensor = self._partition.cut(tensor, value) if self._divided(tensor) else _local(_as(value, average))
        return part

    def _reshard(self) -> None:
        """Drop the gathered copies that fully_shard may have kept: they would not see a change of the shards."""
        for module in self._sharded:
            if hasattr(module, "reshard"):  # not after teardown
                module.reshard()


def _check_in_sync(call: str, in_sync: Callable[[], bool]) -> None:
    if not in_sync():
        raise UsageError(
            f"{call} between two syncs of ranks that train apart would average other weights on each of them; do it "
            "when all have the same ones, `if lite.strategy.is_in_sync(model): ema.update()`, or call "
            "lite.strategy.end_period() before it, on all ranks."
        )


def _sharded_modules(model: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded where nobody has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    return [module for module in model.modules() if kind is not None and isinstance(module, kind)]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _same(own: Tensor, average: Tensor) -> bool:
    """Whether a part is the average as it was put there, NaN included."""
    if own.is_meta:  # another rank's, of a pipeline
        return True
    ours, theirs = (collectives.as_bytes(t.contiguous()) for t in (own, average.to(own)))
    return torch.equal(ours, theirs)


def _start(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        copy = tensor.detach().clone()
        return copy.float() if copy.dtype in _HALF else copy


def _marked(average: Tensor) -> Tensor:
    return Elsewhere.like(average.shape, average.dtype) if average.is_meta else average


def _as(value: Tensor, average: Tensor) -> Tensor:
    """The value laid out as the average is."""
    if not hasattr(average, "to_local"):
        return value.full_tensor() if hasattr(value, "full_tensor") else value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = average.device_mesh, average.placements  # type: ignore[attr-defined]
    if hasattr(value, "redistribute"):
        moved: Tensor = value.redistribute(mesh, placements)
        return moved
    # Every rank has read the whole value.
    whole: Tensor = distribute_tensor(value.to(average.device), mesh, placements, src_data_rank=None)
    return whole
