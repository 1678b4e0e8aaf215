"""Which parts of a model are its blocks: the layers that repeat, or those that the user names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

from lite.errors import ConfigError

_FOUND = "transformer blocks found"
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def find_blocks(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of a model: siblings of one class that have layers of their own, the outermost ones.

    Layers that share parameters with anything else are left to the model around them.

    Example:
        >>> layers = [nn.TransformerEncoderLayer(8, 2, batch_first=True) for _ in range(2)]
        >>> list(find_blocks(nn.Sequential(nn.Linear(8, 8), nn.Sequential(*layers), nn.Linear(8, 8))))
        ['1.0', '1.1']
    """
    found: dict[str, nn.Module] = {}

    def look(parent: nn.Module, prefix: str) -> None:
        children = dict(parent.named_children())
        counts = Counter(type(child) for child in children.values())
        for name, child in children.items():
            composed = any(True for _ in child.children()) and not isinstance(child, (*_CONTAINERS, nn.Sequential))
            if counts[type(child)] > 1 and composed and any(True for _ in child.parameters()):
                found[f"{prefix}{name}"] = child
            else:
                look(child, f"{prefix}{name}.")

    look(module, "")
    shared = _shared(module, found)
    return {name: block for name, block in found.items() if name not in shared}


def choose_blocks(module: nn.Module, choice: Any, argument: str, *, tied: bool = False) -> dict[str, nn.Module]:
    """The blocks that `choice` names: None for those that repeat, a set of classes, or a function of a module.

    Args:
        module: The model.
        choice: What the user passed.
        argument: As what.
        tied: Whether blocks may share parameters with other parts.

    Raises:
        ConfigError: `choice` is something else, matches nothing, or matches layers that share parameters.
    """
    if choice is None or choice == _FOUND:
        return find_blocks(module)
    if isinstance(choice, type) and issubclass(choice, nn.Module):
        choice = {choice}
    if isinstance(choice, (set, frozenset, list, tuple)):
        classes = tuple(choice)
        if not classes or not all(isinstance(c, type) and issubclass(c, nn.Module) for c in classes):
            raise ConfigError(
                f"{argument}={choice!r} must hold classes of torch.nn.Module, e.g. {argument}={{Block}} for the class "
                "of the model's blocks."
            )
        wanted: Callable[[nn.Module], bool] = lambda part: isinstance(part, classes)  # noqa: E731
    elif callable(choice):
        wanted = choice
    else:
        raise ConfigError(f"{argument}={choice!r} is not known; use None, a set of module classes, or a function.")
    found = {name: part for name, part in module.named_modules() if name and wanted(part)}
    containers = [name for name, part in found.items() if isinstance(part, _CONTAINERS)]
    if containers:
        raise ConfigError(
            f"{argument} matches {containers[0]!r}, a {type(found[containers[0]]).__name__}, which has no forward of "
            "its own; name the class of what it holds."
        )
    if not found and not callable(choice):
        there = sorted({type(part).__name__ for part in module.modules()})
        names = ", ".join(sorted(c.__name__ for c in classes))
        raise ConfigError(
            f"{argument}={{{names}}} matches nothing in {type(module).__name__}, which is made of {', '.join(there)}."
        )
    shared = {} if tied else _shared(module, found)
    if shared:
        name, parameter = next(iter(shared.items()))
        raise ConfigError(
            f"{argument} matches {name!r}, whose parameter {parameter!r} is also used outside of it (tied weights): "
            f"leave it out of {argument}, so that both uses belong to the model around them."
        )
    return found


def _shared(module: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, str]:
    """Blocks with a parameter that is also used outside of them, and its name."""
    users: dict[int, set[str]] = {}
    names: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        owner = next((b for b in sorted(blocks, key=len, reverse=True) if name.startswith(f"{b}.")), "")
        users.setdefault(id(parameter), set()).add(owner)
        names[id(parameter)] = name
    return {block: names[key] for key, owners in users.items() if len(owners) > 1 for block in owners - {""}}


def describe_blocks(blocks: dict[str, nn.Module]) -> str:
    """Say how many of which class, e.g. '12 Block (blocks.0 to blocks.11)'."""
    by_class: dict[str, list[str]] = {}
    for name, block in blocks.items():
        by_class.setdefault(type(block).__name__, []).append(name)
    return ", ".join(
        f"{len(names)} {kind} ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})"
        for kind, names in by_class.items()
    )
