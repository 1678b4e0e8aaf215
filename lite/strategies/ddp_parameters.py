"""The parameters of one model under DDP: which ones are averaged, and whether the model still has those that it had."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lite import collectives
from lite.errors import UsageError, some
from lite.precision.base import is_packed
from lite.strategies.comm_hooks import Register

_requires_grad, _dtype = attrgetter("requires_grad"), attrgetter("dtype")


class Averaged:
    """Keeps a DDP for the parameters that are trained: a new one when some are frozen or unfrozen, or a backward fails.

    Args:
        module: The model.
        register: Gives a new DDP what sends gradients instead of itself.
        options: DDP's.

    Attributes:
        ddp: The newest one; None for a model of which nothing was ever trained.
        names: The model's parameters at setup, id to name.
        ignored: Names of parameters and buffers that DDP leaves alone, as torch's users know how to ask for.
        packed: Names of those that it can't send, nor needs to.
        reduced: Names of the parameters that the newest DDP averages, in its own order.
        generation: How many DDPs there were.
    """

    def __init__(self, module: nn.Module, register: Register | None, options: dict[str, Any]) -> None:
        self._module = weakref.ref(module)
        self._register = register
        self._options = options
        self.ignored: set[str] = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        packed = {name: p for name, p in module.named_parameters() if is_packed(p)}
        _check_alike(packed)
        self.packed = set(packed)
        self.names = {id(p): name for name, p in module.named_parameters()}
        self._parameters = self._first = list(module.parameters())  # kept, so that no id is given to another one
        self._tables = Tables(module)
        self._dtypes = list(map(_dtype, self._parameters))
        self._trained: list[bool] = []
        self.ddp: nn.parallel.DistributedDataParallel | None = None
        self.reduced: list[str] = []
        self.generation = 0
        self.synchronise = True
        trained = list(map(_requires_grad, self._parameters))
        if any(trained):
            self._build(trained, first=True)
        else:
            self._broadcast(module)

    @property
    def module(self) -> nn.Module:
        """The model."""
        module = self._module()
        assert module is not None
        return module

    def current(self) -> nn.parallel.DistributedDataParallel | None:
        """The DDP for the parameters that are trained now; None where none is.

        Raises:
            UsageError: The model has parameters that it didn't have at setup, or some were converted.
        """
        if not self._tables.unchanged():
            self._look_again()
        if list(map(_dtype, self._parameters)) != self._dtypes:
            self._refuse_conversion()
        trained = list(map(_requires_grad, self._parameters))
        if trained == self._trained:
            return self.ddp
        if not any(trained):
            return None
        if not (self._options.get("find_unused_parameters") and _within(trained, self._trained)):
            self._build(trained)
        return self.ddp

    def set_synchronise(self, value: bool) -> None:
        """Whether backwards average from now on."""
        self.synchronise = value
        if self.ddp is not None:
            self.ddp.require_backward_grad_sync = value

    def renew(self) -> None:
        """Let the next forward have a new DDP: a backward has failed, and the present one would wait for its rest."""
        if self.ddp is not None and not self.ddp._join_config.enable:
            self._trained = []

    def close(self) -> None:
        """Let go of the parameters: the reducer's hooks on them go with it."""
        self.ddp = None

    def _look_again(self) -> None:
        module = self.module
        new = [name for name, p in module.named_parameters() if id(p) not in self.names]
        if new:
            raise UsageError(
                f"{type(module).__name__} has parameters that were added or replaced after lite.setup ({some(new)}), "
                "and their gradients would stay different on each rank; change the model before lite.setup, or call "
                "lite.teardown() and set it up again (torch.func.functional_call needs a raw copy of the model)."
            )
        left = {id(p): dtype for p, dtype in zip(self._parameters, self._dtypes, strict=True)}
        self._parameters = list(module.parameters())
        self._dtypes = [left.get(id(p), p.dtype) for p in self._parameters]
        self._trained = []
        self._tables = Tables(module)

    def _refuse_conversion(self) -> None:
        # torch drops the hooks of a parameter that changes its dtype, and DDP's with them.
        name, before, now = next(
            (self.names[id(p)], dtype, p.dtype)
            for p, dtype in zip(self._parameters, self._dtypes, strict=True)
            if p.dtype != dtype
        )
        raise UsageError(
            f"parameter {name!r} was converted from {before} to {now} after lite.setup, and DDP no longer averages its "
            "gradient; convert before lite.setup, or call lite.teardown() and set the model up again."
        )

    def _build(self, trained: list[bool], *, first: bool = False) -> None:
        """Make a DDP for the parameters that are to be trained; the first one broadcasts rank 0's weights."""
        self.ddp = None
        adapter = _Adapter(self.module)
        if left_alone := self.ignored | self.packed:
            adapter._ddp_params_and_buffers_to_ignore = [f"module.{name}" for name in left_alone]  # type: ignore[assignment]
        self.ddp = nn.parallel.DistributedDataParallel(adapter, init_sync=first, **self._options)
        if self._register is not None:
            self._register(self.ddp)
        self.ddp.require_backward_grad_sync = self.synchronise
        self._trained = trained
        names = [self.names[id(p)] for p, is_trained in zip(self._parameters, trained, strict=True) if is_trained]
        self.reduced = [name for name in names if name not in self.ignored]
        self.generation += 1

    def _broadcast(self, module: nn.Module) -> None:
        """Rank 0's weights for a model without a parameter to train, for which there is no DDP."""
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if name not in self.ignored and tensor.numel() and not is_packed(tensor):
                collectives.take_from_rank_0(tensor)


def _check_alike(packed: dict[str, Any]) -> None:
    """Refuse packed parameters that differ between ranks. Collective where there are some.

    Raises:
        UsageError: (on all ranks) One does.
    """
    if not packed:
        return
    sums = {}
    for name, parameter in packed.items():
        parts = [getattr(parameter, part) for part in parameter.__tensor_flatten__()[0]]
        sums[name] = [zlib.crc32(collectives.as_bytes(part.detach().cpu().contiguous()).numpy().data) for part in parts]
    for rank, theirs in enumerate(collectives.all_gather_objects(sums)):
        differs = [name for name in sums if theirs.get(name) != sums[name]]
        if differs:
            raise UsageError(
                f"{some(differs)} of rank {rank} differs from this rank's, and weights that are packed already can't "
                "be sent from rank 0; make or load them alike on all ranks, or let lite pack them: "
                "precision='int8-frozen'."
            )


class _Adapter(nn.Module):
    """What DDP holds: the user's model as a submodule, and a forward that runs whatever it is given."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)


class Tables:
    """A module's tables of parameters and submodules as they are now.

    Dicts are compared entry by entry, by identity first: equal entries are identical ones, but for tensors of one
    element, which are looked at one by one.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = [table for m in module.modules() for table in (m._parameters, m._modules)]
        self._then = [dict(table) for table in self._live]
        self._single = [
            (table, key, value)
            for table in self._live
            for key, value in table.items()
            if isinstance(value, Tensor) and value.numel() <= 1
        ]

    def unchanged(self) -> bool:
        """Whether nothing was added, replaced or removed since."""
        try:
            same = self._live == self._then
        except (RuntimeError, TypeError):  # another tensor where one was: the truth of their comparison is ambiguous
            return False
        return same and all(table[key] is value for table, key, value in self._single)


def _within(now: list[bool], then: list[bool]) -> bool:
    return len(now) == len(then) and all(was or not is_now for was, is_now in zip(then, now, strict=True))
