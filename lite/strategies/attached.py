"""What hangs on a model's parameters, gradients and hooks, goes with them when others take their places.

Relies on two facts of torch 2.13: a tensor's hooks are in a table of its own, `_backward_hooks` or
`_post_accumulate_grad_hooks`, which tensors may share; and fully_shard calls the latter ones of the sharded parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lite import collectives
from lite.sharded import cut, is_sharded

_TABLES = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Attached:
    """What hangs on the parameters of a module, as it is now, by their names."""

    def __init__(self, module: nn.Module) -> None:
        named = list(module.named_parameters())
        self._gradients = {name: p.grad for name, p in named if p.grad is not None}
        self._hooks = {name: hooks for name, p in named if (hooks := hooks_of(p))}

    def move_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Attach it to the parameters that have these names now. Collective: call on all ranks.

        Gradients that the ranks had computed by themselves become their mean, as those of a backward would.
        """
        for name, hooks in self._hooks.items():
            attach_hooks(parameters[name], hooks)
        for name in sorted(set().union(*collectives.all_gather_objects(list(self._gradients)))):
            parameter, own = parameters[name], self._gradients.pop(name, None)
            if is_sharded(parameter):
                own = torch.zeros(parameter.shape, dtype=parameter.dtype) if own is None else own
                own = own.to(parameter.device, parameter.dtype)
                parameter.grad = cut(collectives.all_reduce(own, "mean"), parameter)


def hooks_of(parameter: Tensor) -> dict[str, Any]:
    """The tables of hooks that a parameter has, by their attributes' names."""
    with torch._C.DisableTorchFunctionSubclass():
        return {name: hooks for name in _TABLES if (hooks := getattr(parameter, name))}


def attach_hooks(parameter: Tensor, tables: Mapping[str, Any]) -> None:
    """Let a parameter have these hooks, which their handles remove from it, too."""
    for name, hooks in tables.items():
        setattr(parameter, name, hooks)


def lend_hooks(held: Iterable[Any]) -> None:
    """Let hooks of sharded parameters see the gradients of the copies that FSDP puts together, as this rank has
    computed them.

    Args:
        held: What fully_shard keeps for each parameter.
    """
    with torch._C.DisableTorchFunctionSubclass():
        lent = [(one, hooks) for one in held if (hooks := one.sharded_param._backward_hooks)]
    for one, hooks in lent:
        copy = getattr(one, "_unsharded_param", None)  # which comes with the first run
        if copy is not None and copy._backward_hooks is not hooks:
            copy._backward_hooks = hooks
