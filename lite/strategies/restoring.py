"""What a module was before torch's parallel wrappers changed it in place, and the way back.

fully_shard and parallelize_module exchange classes and parameters, and add hooks without a handle. Relies on where they
keep things in torch 2.13: `_get_fsdp_state`, its hook handles, marks on modules (by `_distribute_module_applied` torch
refuses to split a layer twice), and torch.distributed's table of module states.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from lite import collectives
from lite.sharded import is_sharded, whole
from lite.strategies.attached import attach_hooks, hooks_of
from lite.strategies.parallel_plan import shared_names

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_STATE_HOOKS = ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class Original:
    """The classes, hooks and instance attributes of a module's parts, as they are now.

    `settle` is called after the change; `restore` takes back what came between the two.
    """

    def __init__(self, module: nn.Module) -> None:
        self._root = module
        self._classes = {part: type(part) for part in module.modules()}
        self._before = self._hooks()
        self._added: list[tuple[nn.Module, str, int]] = []
        self._tied = shared_names(module)
        # Held weakly, so that a block's whole parameters go when it is sharded.
        self.names = WeakIdKeyDictionary({p: n for n, p in module.named_parameters(remove_duplicate=False)})

    def _hooks(self) -> set[tuple[nn.Module, str, int]]:
        return {(part, kind, key) for part in self._root.modules() for kind in _HOOKS for key in getattr(part, kind)}

    def settle(self) -> None:
        """The module has been changed: what hooks it has more than before are the wrappers'."""
        self._added = list(self._hooks() - self._before)

    def restore(self) -> dict[int, nn.Parameter]:
        """Make every part a plain module with plain parameters again. Collective: all parts are put together.

        Returns:
            The new parameter for each sharded one, by its id.
        """
        from torch.distributed.fsdp import FSDPModule

        for part in self._root.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        successors = _plain_parameters(self._root)
        for first, *others in self._tied:
            for name in others:
                path, _, attribute = name.rpartition(".")
                self._root.get_submodule(path)._parameters[attribute] = self._root.get_parameter(first)
        for part, kind, key in self._added:
            for table in (kind, *_HOOK_OPTIONS):
                getattr(part, table).pop(key, None)
        for part in self._root.modules():
            _drop_state_hooks(part)
        for part, raw in self._classes.items():
            if type(part) is not raw:
                _leave_fsdp(part)
                part.__class__ = raw
            for mark in ("_is_fsdp_managed_module", "_fsdp_use_orig_params", "_distribute_module_applied"):
                part.__dict__.pop(mark, None)
        return successors


def _drop_state_hooks(module: nn.Module) -> None:
    """Take off what fully_shard has put around state dicts, some of it at the first forward."""
    for kind in _STATE_HOOKS:
        table: dict[int, Any] = getattr(module, kind)
        for key, hook in list(table.items()):
            if getattr(hook, "hook", hook).__module__.startswith("torch.distributed.fsdp."):
                del table[key]


def _plain_parameters(module: nn.Module) -> dict[int, nn.Parameter]:
    successors: dict[int, nn.Parameter] = {}
    kept: list[Any] = []  # so that no id is given to another one
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if id(parameter) not in successors:
                kept.append(parameter)
                plain = nn.Parameter(whole(parameter).detach().clone(), requires_grad=parameter.requires_grad)
                if parameter.grad is not None:
                    plain.grad = whole(parameter.grad)
                attach_hooks(plain, hooks_of(parameter))
                successors[id(parameter)] = plain
            part._parameters[name] = successors[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None and is_sharded(buffer):
                part._buffers[name] = whole(buffer).clone()
    return successors


def _leave_fsdp(part: nn.Module) -> None:
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = part._get_fsdp_state()  # type: ignore[operator]
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    for group in state._fsdp_param_groups:
        for handles in (
            group._module_to_pre_save_state_dict_hook_handle,
            group._module_to_pre_load_state_dict_hook_handle,
        ):
            for handle in handles.values():
                handle.remove()
    _module_state_mapping.pop(part, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        part.__dict__.pop(key, None)


def broadcast_from_rank_0(module: nn.Module) -> None:
    """Rank 0's values for every plain parameter and buffer. Collective: call on all ranks."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel() and not is_sharded(tensor) and not tensor.is_meta:
            collectives.take_from_rank_0(tensor)
