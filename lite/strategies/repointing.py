"""Optimizers follow the parameters of a model that are exchanged for others: sharded for plain ones, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lite.errors import ConfigError
from lite.sharded import cut, is_sharded, whole
from lite.state import parameters_of

Successor = Callable[[Tensor], nn.Parameter | None]

# torch 2.13: they look at a parameter as one matrix or vector, and fail on, or compute otherwise with, parts of it.
_UNFIT = {
    "LBFGS": "flattens all parameters into one vector",
    "Adafactor": "keeps sums over rows and columns, which torch can't compute from parts",
    "Muon": "orthogonalises whole matrices, which it does not have",
    "Rprop": "chooses elements by their gradients' signs, which torch can't write into parts",
    "SparseAdam": "needs sparse gradients, which sharded parameters don't get",
}


def check_fit(optimizer: Optimizer, strategy: str) -> None:
    """Refuse an optimizer that can't step on sharded parameters.

    Raises:
        ConfigError: It is one of those.
    """
    name = type(optimizer).__name__
    if name in _UNFIT and type(optimizer).__module__.startswith("torch.optim"):
        raise ConfigError(
            f"{name} {_UNFIT[name]}, so it can't train under strategy={strategy!r}; use an optimizer that works "
            "element by element (AdamW, SGD, RMSprop, ...), or strategy='ddp'."
        )


def repoint(optimizer: Optimizer, successor: Successor) -> bool:
    """Let the optimizer hold the successors of its parameters, with its state converted to how they are sharded.

    Lists of parameters are changed in place. Collective where state is put together.

    Returns:
        Whether a parameter was exchanged.
    """
    exchanged = {}
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            new = successor(parameter)
            if new is not None:
                group["params"][index] = new
                exchanged[parameter] = new
    for old, new in exchanged.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {key: _converted(value, old, new) for key, value in state.items()}
    return bool(exchanged)


def _converted(value: Any, old: Tensor, new: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    if is_sharded(value):
        full = whole(value)
        return cut(full, new) if is_sharded(new) else full
    return cut(value, new) if is_sharded(new) and value.shape == old.shape and value.ndim else value


def loading_into_shards(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of `Optimizer.load_state_dict`: cut whole tensors to the parts of sharded parameters.

    Tensors that are read from a checkpoint when they are asked for are read here, this rank's part alone.
    """
    held = parameters_of(optimizer)
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    if len(held) != len(numbers):
        return state_dict  # the optimizer itself says what doesn't fit
    parameters = dict(zip(numbers, held, strict=True))
    state = {
        number: {key: _fitted(value, parameters[number]) for key, value in entries.items()}
        if number in parameters and isinstance(entries, dict)
        else entries
        for number, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _fitted(value: Any, parameter: Tensor) -> Any:
    fits = getattr(value, "shape", None) == parameter.shape and parameter.ndim and not is_sharded(value)
    if fits and is_sharded(parameter):
        return cut(value, parameter)
    if hasattr(value, "read_part"):
        return value.read()
    return value.clone() if isinstance(value, Tensor) and not is_sharded(value) else value


def check_kernels(optimizer: Optimizer, strategy: str) -> None:
    """Refuse foreach and fused steps over parameters that lie on several meshes.

    Raises:
        ConfigError: They were asked for.
    """
    for group in optimizer.param_groups:
        for option in ("foreach", "fused"):
            if group.get(option):
                raise ConfigError(
                    f"{type(optimizer).__name__}({option}=True) steps over all parameters in one kernel, which torch "
                    f"can't do where they lie on several meshes, as under {strategy}; leave {option} out."
                )
