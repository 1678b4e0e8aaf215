"""ZeRO stage 1: the user's optimizer keeps the state of this rank's share of the parameters alone.

torch's ZeroRedundancyOptimizer decides the shares, steps this rank's, and sends the new parameters to the others. The
optimizer that it steps is the user's own object seen through its share, so its class, attributes, hooks and groups
stay the user's.

Source: Rajbhandari et al. 2019, https://arxiv.org/abs/1910.02054;
https://docs.pytorch.org/docs/stable/distributed.optim.html
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from lite import collectives
from lite.disguise import disguise
from lite.errors import ConfigError, UsageError
from lite.state import parameters_of

_SMALL_BYTES = 4096
_partial: weakref.WeakKeyDictionary[Optimizer, list[Callable[[], None]]] = weakref.WeakKeyDictionary()


def check(optimizer: Optimizer) -> None:
    """Refuse an optimizer that can't step a share of its parameters.

    Raises:
        ConfigError: It looks at all parameters together, or they are of several dtypes.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "DDPStrategy(zero_optimizer=True) with LBFGS: it steps along all parameters together, so its state can't "
            "be divided; leave zero_optimizer out."
        )
    dtypes = {p.dtype for p in parameters_of(optimizer)}
    if len(dtypes) > 1:
        raise ConfigError(
            f"DDPStrategy(zero_optimizer=True) with {name}: its parameters are of {len(dtypes)} dtypes "
            f"({', '.join(sorted(map(str, dtypes)))}), and torch's ZeroRedundancyOptimizer takes one; give each dtype "
            "an optimizer of its own, or leave zero_optimizer out."
        )


class Sharded:
    """One optimizer with a share of its state on each rank, changed in place.

    Args:
        optimizer: The user's. What it has of other ranks' state is dropped.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        _allow(optimizer)
        self._raw = type(optimizer)
        # A scheduler that was made before has put a counter there; schedulers see the step's flags below instead.
        self._patched = optimizer.__dict__.pop("step", None)
        self._divide(optimizer)
        disguise(optimizer, self._body())

    def undo(self, optimizer: Optimizer) -> None:
        """Give the optimizer its own class back."""
        optimizer.__class__ = self._raw
        if self._patched is not None:
            optimizer.__dict__["step"] = self._patched
        if optimizer.state:
            _refuse_partial(optimizer)

    def _divide(self, optimizer: Optimizer) -> None:
        """Decide the shares; parameters that were divided before keep theirs, since torch goes by their order."""
        self._zero = ZeroRedundancyOptimizer(
            optimizer.param_groups,
            optimizer_class=functools.partial(_view, optimizer, self._raw),  # type: ignore[arg-type]
        )
        groups = self._zero.optim.param_groups
        own = {id(p) for group in groups for p in group["params"]}
        self._foreign = {id(p) for p in parameters_of(optimizer) if id(p) not in own}
        for parameter in parameters_of(optimizer):
            if id(parameter) in self._foreign:
                optimizer.state.pop(parameter, None)

    def _body(self) -> dict[str, Any]:
        raw, sharded = self._raw, self

        def step(self: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            self._opt_called = True  # type: ignore[attr-defined]  # schedulers ask whether step was called at all
            sharded._zero.param_groups = self.param_groups
            return sharded._zero.step(closure, **kwargs)

        # Hooks run around all of it, so that one that runs after a step sees every rank's new parameters.
        hooked: Any = Optimizer.profile_hook_step(step)
        hooked.hooked = hooked._wrapped_by_lr_sched = True

        def state_dict(self: Optimizer) -> dict[str, Any]:
            """All of the state, the other ranks' on the CPU. Collective: call on all ranks."""
            mine: dict[str, Any] = raw.state_dict(self)
            return {**mine, "state": _everyones(mine["state"], next(iter(parameters_of(self))).device)}

        def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
            """Take this rank's share of a whole state."""
            saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
            foreign = {key for key, p in zip(saved, parameters_of(self), strict=False) if id(p) in sharded._foreign}
            own = {key: value for key, value in state_dict["state"].items() if key not in foreign}
            raw.load_state_dict(self, {**state_dict, "state": own})

        def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
            raw.add_param_group(self, param_group)
            check(self)
            sharded._divide(self)

        return {
            "step": hooked,
            "state_dict": state_dict,
            "load_state_dict": load_state_dict,
            "add_param_group": add_param_group,
            "state_is_local": True,
            **dict.fromkeys(("__reduce_ex__", "__deepcopy__"), _refuse_copy),
        }


def _refuse_copy(optimizer: Optimizer, *unused: Any) -> Any:
    raise UsageError(
        f"this {type(optimizer).__name__} is set up with zero_optimizer=True: a pickle or a copy would have the state "
        "of this rank's share of the parameters alone. Store its state, the other ranks' included, by lite.save, or as "
        "optimizer.state_dict(), called on all ranks; where the object itself has to be pickled or copied, load that "
        "into it after lite.teardown()."
    )


def _refuse_partial(optimizer: Optimizer) -> None:
    """Let an optimizer that was given back with a share of its state do nothing before it has been given a whole one.

    Gathering it at teardown would need all ranks, one of which may just have failed, and the memory that it saved.
    """
    name = type(optimizer).__name__

    def refuse(*args: Any) -> None:
        raise UsageError(
            f"this {name} was set up with zero_optimizer=True and given back by lite.teardown(): it has the state of "
            "this rank's share of the parameters alone. Call lite.save or optimizer.state_dict() before teardown, and "
            "load that into it first."
        )

    # What pickle and copy ask an object for. An attribute, since the class is the user's own again.
    optimizer.__dict__["__getstate__"] = refuse
    _partial[optimizer] = [
        optimizer.register_step_pre_hook(refuse).remove,
        optimizer.register_state_dict_pre_hook(refuse).remove,
        optimizer.register_load_state_dict_post_hook(_allow).remove,
    ]


def _allow(optimizer: Optimizer) -> None:
    """Take back what `_refuse_partial` did, where it did."""
    undoing = _partial.pop(optimizer, None)
    if undoing is not None:
        del optimizer.__dict__["__getstate__"]
        for undo in undoing:
            undo()


def _view(optimizer: Optimizer, raw: type[Optimizer], groups: list[dict[str, Any]]) -> Optimizer:
    """The same optimizer with this rank's share of the parameters: every attribute but the groups is shared."""
    unhooked: Any = raw.step
    if getattr(unhooked, "hooked", False):
        unhooked = unhooked.__wrapped__
    view: Optimizer = object.__new__(raw)
    view.__dict__ = optimizer.__dict__
    none: dict[int, Any] = {}  # hooks run around the whole step, also where the user's class calls its parent's step
    body = {
        "param_groups": property(lambda self: groups),
        "step": property(lambda self: unhooked.__get__(self)),
        "_optimizer_step_pre_hooks": property(lambda self: none),
        "_optimizer_step_post_hooks": property(lambda self: none),
    }
    disguise(view, body)
    return view


class _Sent(NamedTuple):
    """Stands for a tensor that comes by itself."""

    shape: torch.Size
    dtype: torch.dtype


def _everyones(own: dict[Any, Any], device: torch.device) -> dict[Any, Any]:
    """The states of all ranks' parameters, by the parameters' numbers; this rank's tensors are the live ones."""
    whole: dict[Any, Any] = {}
    for owner in range(dist.get_world_size()):
        leaves, spec = tree_flatten(own if owner == dist.get_rank() else None)
        skeleton = tree_unflatten([_Sent(leaf.shape, leaf.dtype) if _is_large(leaf) else leaf for leaf in leaves], spec)
        skeleton = collectives.broadcast(skeleton, owner)
        if owner == dist.get_rank():
            for leaf in filter(_is_large, leaves):
                dist.broadcast(leaf.detach().to(device).contiguous(), owner)
            whole.update(own)
            continue
        parts, spec = tree_flatten(skeleton, is_leaf=lambda part: isinstance(part, _Sent))
        for index, part in enumerate(parts):
            if isinstance(part, _Sent):
                buffer = torch.empty(part.shape, dtype=part.dtype, device=device)
                dist.broadcast(buffer, owner)
                parts[index] = buffer.cpu()
        whole.update(tree_unflatten(parts, spec))
    return dict(sorted(whole.items(), key=_by_number))


def _by_number(item: tuple[Any, Any]) -> tuple[bool, Any]:
    """Parameters in their order, then what a state keeps by other keys."""
    return (not isinstance(item[0], int), item[0] if isinstance(item[0], int) else str(item[0]))


def _is_large(leaf: Any) -> bool:
    return type(leaf) is Tensor and leaf.nbytes > _SMALL_BYTES
