"""Whether stored states fit the objects that shall take them over: found out before any of them is changed.

What has a `load_state_dict` of its own is the only one to know, unless it has `check_state_dict` too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lite.errors import CheckpointError, some
from lite.sharded import whole_shape
from lite.state import plain_key

# What torch's optimizers keep of a parameter's own shape, and Adafactor of its rows and columns.
_MOMENTS = {"acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"}
_MOMENTS |= {"prev", "square_avg", "step_size", "sum", "variance", "row_var", "col_var"}
# What torch's optimizers have got in later versions, and add to groups of older ones by themselves.
_LATER = {"amsgrad", "capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused", "maximize"}
_LATER |= {"nesterov"}


def check_fit(target: Any, loaded: Any, name: str, *, strict: bool) -> None:
    """Refuse a stored state that its object would refuse half-way, or take and fail with later.

    Args:
        target: A module, an optimizer or another object with `load_state_dict`.
        loaded: What is to be given to it.
        name: What it is called, for the error.
        strict: Whether keys of a module that are missing or unexpected are errors.

    Raises:
        CheckpointError: It doesn't fit.
    """
    if isinstance(target, nn.Module):
        _check_module(target, loaded, name, strict=strict)
    elif isinstance(target, Optimizer):
        _check_optimizer(target, loaded, name)
    elif hasattr(target, "check_state_dict"):
        target.check_state_dict(loaded)


# ---- modules


def _check_module(module: nn.Module, loaded: Any, name: str, *, strict: bool) -> None:
    if not isinstance(loaded, Mapping):
        raise CheckpointError(
            f"the checkpoint's {name!r} is a {type(loaded).__name__} and no state dict of {type(module).__name__}."
        )
    own = tuple(_prefixes_loaded_in_own_ways(module))
    if "" in own:
        return
    here = {plain_key(key): value for key, value in module.state_dict().items() if not key.startswith(own)}
    there = {key: value for key, value in loaded.items() if not key.startswith(tuple(map(plain_key, own)))}
    problems = []
    if strict and (missing := [key for key in here if key not in there and not _is_filled_in(key)]):
        problems.append(f"missing keys: {some(missing)}")
    if strict and (unexpected := [key for key in there if key not in here]):
        problems.append(f"unexpected keys: {some(unexpected)}")
    problems += [
        f"size mismatch for {key}: {list(there[key].shape)} in the checkpoint, {list(value.shape)} here"
        for key, value in here.items()
        if isinstance(value, Tensor)
        and not is_lazy(value)
        and hasattr(there.get(key), "shape")
        and there[key].shape != value.shape
        and not (value.ndim == 0 and list(there[key].shape) == [1])  # as torch 0.3 stored numbers
    ]
    if problems:
        remedy = "" if len(problems) > 1 or problems[0].startswith("size") else "; strict=False loads the rest"
        raise CheckpointError(
            f"the checkpoint's {name!r} does not fit {type(module).__name__}: {'; '.join(problems[:4])}{remedy}. "
            "Nothing was loaded."
        )


def _is_filled_in(key: str) -> bool:
    """Whether BatchNorm fills it in by itself, where an old torch saved."""
    return key.rpartition(".")[2] == "num_batches_tracked"


def _prefixes_loaded_in_own_ways(module: nn.Module) -> Iterator[str]:
    """What the keys of submodules begin with whose class, or a hook on which, has a say in loading; "" for all."""
    for name, part in module.named_modules():
        methods = ("load_state_dict", "_load_from_state_dict")
        classes = [kind for kind in type(part).__mro__ if any(method in vars(kind) for method in methods)]
        hooks = [getattr(hook, "hook", hook) for hook in part._load_state_dict_pre_hooks.values()]
        if any(not _is_known(thing) for thing in (*classes, *hooks)):
            yield f"{name}." if name else ""


def _is_known(thing: Any) -> bool:
    return getattr(thing, "__module__", "").split(".")[0] in ("torch", "lite")


# ---- optimizers


def _check_optimizer(optimizer: Optimizer, loaded: Any, name: str) -> None:
    misfit = f"the checkpoint's {name!r} does not fit {type(optimizer).__name__}: "
    if not isinstance(loaded, Mapping) or not {"state", "param_groups"} <= loaded.keys():
        raise CheckpointError(f"{misfit}it is no optimizer's state.")
    if hasattr(optimizer, "check_state_dict"):
        optimizer.check_state_dict(loaded)
    if not _is_torchs(optimizer):
        return
    saved, groups = loaded["param_groups"], optimizer.param_groups
    counts = [[len(group["params"]) for group in side] for side in (saved, groups)]
    if counts[0] != counts[1]:
        raise CheckpointError(
            f"{misfit}it has {_groups(counts[0])}, but the optimizer here has {_groups(counts[1])}. Give it the same "
            f"parameters in the same order as when it was saved, or leave {name!r} out of state."
        )
    lacking = sorted({key for group in saved for key in optimizer.defaults.keys() - group.keys() - _LATER})
    if lacking:
        raise CheckpointError(
            f"{misfit}it has no {', '.join(lacking)}, so another kind of optimizer saved it. Use the optimizer that "
            f"it was, or leave {name!r} out of state to begin with this one."
        )
    numbers = (number for group in saved for number in group["params"])
    parameters = (parameter for group in groups for parameter in group["params"])
    for position, (number, parameter) in enumerate(zip(numbers, parameters, strict=True)):
        shape = whole_shape(parameter)
        others = {"row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, *shape[-1:])}
        for entry, value in loaded["state"].get(number, {}).items():
            if entry not in _MOMENTS or not isinstance(value, torch.Tensor) or value.ndim == 0:
                continue
            if tuple(value.shape) != others.get(entry, shape):
                raise CheckpointError(
                    f"{misfit}its {entry} for parameter {position} (counted from 0, over all groups) has shape "
                    f"{list(value.shape)}, but the parameter here has {list(shape)}. Give the optimizer the same "
                    f"parameters in the same order as when it was saved, or leave {name!r} out of state."
                )


def _groups(counts: list[int]) -> str:
    if len(counts) == 1:
        return f"{counts[0]} parameters"
    return f"{len(counts)} groups of {', '.join(map(str, counts))} parameters"


def _is_torchs(optimizer: Optimizer) -> bool:
    """Whether torch's own code takes its steps: others may keep moments in shapes of their own."""
    kinds = [kind.__module__ for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    return next(kind for kind in kinds if not kind.startswith("lite.")).startswith("torch.optim")
