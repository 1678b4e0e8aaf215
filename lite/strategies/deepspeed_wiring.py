"""How DeepSpeed is wired to a user's model: its engine, what it changes in the model, and the way back."""

from __future__ import annotations

import argparse
import copy
import logging
import warnings
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from lite.errors import ConfigError, UsageError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_LATER = ("ds_", "_ds_", "applied_pre_backward_ref_cnt")  # attributes that come in forward and backward


class Original:
    """What DeepSpeed changes in the parts of a model and their parameters, as it was.

    `settle` is called after the change; `restore` takes back what came between the two.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = weakref.ref(module)
        self._before = self._now(module)
        self._tables = {part: type(part._parameters) for part in module.modules()}
        self._added: set[tuple[Any, str, Any]] = set()

    def _now(self, module: nn.Module) -> set[tuple[Any, str, Any]]:
        parts = list(module.modules())
        hooks = {(part, kind, key) for part in parts for kind in _HOOKS for key in getattr(part, kind)}
        return hooks | {(thing, "", name) for thing in (*parts, *module.parameters()) for name in thing.__dict__}

    def settle(self) -> None:
        """The module has been changed: what it has more than before is DeepSpeed's."""
        root = self._root()
        assert root is not None
        self._added = self._now(root) - self._before

    def restore(self) -> None:
        """Take it away, with what DeepSpeed has added since under names of its own."""
        root = self._root()
        assert root is not None
        for part, kind, key in self._added:
            if not kind:
                part.__dict__.pop(key, None)
                continue
            for table in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
                getattr(part, table, {}).pop(key, None)
        for thing in (*root.modules(), *root.parameters()):
            for name in [name for name in thing.__dict__ if name.startswith(_LATER)]:
                if (thing, "", name) not in self._before:
                    del thing.__dict__[name]
        for part in root.modules():
            if part in self._tables and type(part._parameters) is not self._tables[part]:
                part._parameters = self._tables[part](part._parameters.items())


def check_config(config: dict[str, Any]) -> None:
    """Refuse a configuration as DeepSpeed would, before anything is changed.

    Raises:
        ConfigError: A value is none that it takes, or a key is not known.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    logger.addFilter(_is_a_warning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in initialize
            DeepSpeedConfig(copy.deepcopy(config))
    except Exception as error:
        raise ConfigError(f"config is refused by DeepSpeed: {_explain(error)}") from error
    finally:
        logger.removeFilter(_is_a_warning)


def _is_a_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def _explain(error: Exception) -> str:
    told: Any = getattr(error, "errors", None)  # of pydantic, which DeepSpeed's configuration is made of
    if told is None:
        return f"{error or type(error).__name__}"
    kind = getattr(error, "title", "")
    return "; ".join(f"{'.'.join(map(str, one['loc']))!r} ({kind}): {one['msg']}" for one in told())


def initialize(module: nn.Module, optimizer: Any, config: dict[str, Any], device: torch.device) -> Any:
    """DeepSpeed's engine around a model on its device."""
    # It takes the GPU of LOCAL_RANK otherwise.
    args = None if device.index is None else argparse.Namespace(device_rank=device.index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deepspeed 0.19.8: deprecations of torch's and pydantic's, in its own code
        import deepspeed
        from deepspeed.utils import logger

        # It knows few optimizers by name, and warns of all others.
        logger.addFilter(_knows_optimizers)
        try:
            engine, *_ = deepspeed.initialize(
                args=args, model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
        except (AssertionError, NotImplementedError, ValueError) as error:
            raise ConfigError(f"DeepSpeed can't train {type(module).__name__} so: {_explain(error)}") from error
        finally:
            logger.removeFilter(_knows_optimizers)
    return engine


def _knows_optimizers(record: logging.LogRecord) -> bool:
    return "untested optimizer" not in record.getMessage()


def destroy(engine: Any, view: Any) -> None:
    """End DeepSpeed's engine, also one that has failed while it was made, and that nobody was given.

    Args:
        engine: DeepSpeed's, or None.
        view: The optimizer that it was given, or None.
    """
    if engine is not None:
        engine.destroy()
    if view is not None:
        # deepspeed 0.19.8: an engine destroys itself (again) when the garbage collector finds it, whenever that is.
        # Stages 1 and 2 then go through the optimizer's groups, and take the places of parts off the parameters, which
        # may be another engine's by then.
        view.param_groups = []


def forget(module: nn.Module) -> None:
    """Take a model off the stack, and out of the cache, that DeepSpeed keeps for the whole process."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    for index in [i for i, other in enumerate(FWD_MODULE_STACK) if other is module]:
        del FWD_MODULE_STACK[index]
    # deepspeed 0.19.8: a cache of a method keeps each coordinator and the layers it was called with, for ever. It holds
    # what another model would compute again.
    cached: Any = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    for cell in (cached, *(cell.cell_contents for cell in getattr(cached, "__closure__", None) or ())):
        if hasattr(cell, "cache_clear"):
            cell.cache_clear()


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """A context in which parameters that stage 3 has divided are whole. Collective: call on all ranks."""
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, enabled=bool(parameters))
    return context


def _refuse_copy(it: Any, *unused: Any) -> Any:
    raise UsageError(
        f"this {type(it).__name__} is in use by DeepSpeed, whose hooks and parts can't be pickled or copied with it; "
        "store it by lite.save or lite.export, or call lite.teardown() before."
    )


NO_COPIES = dict.fromkeys(("__reduce_ex__", "__deepcopy__"), _refuse_copy)
