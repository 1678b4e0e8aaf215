"""Random numbers in a model that several ranks compute together: they must be the same ones on each of them.

A dropout that differs where weights are whole on every rank gives these different gradients, and the ranks train apart.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from lite import collectives
from lite.errors import UsageError
from lite.seed import RandomState
from lite.strategies.remedies import class_name


def watch_first_draws(module: nn.Module, group: Any) -> None:
    """Refuse a first training forward of the model that draws from generators which stand otherwise on other ranks.

    Later forwards cost nothing. What the compiler, or a transform of torch.func, runs is not looked at.

    Args:
        module: The model, split already.
        group: The ranks that compute it together.
    """
    before: list[list[bytes]] = []

    def note(model: nn.Module, inputs: Any) -> None:
        looks = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
        if looks and model.training and torch.is_grad_enabled():
            before[:] = [_stands()]

    def check(model: nn.Module, inputs: Any, outputs: Any) -> None:
        if not before:
            return
        for handle in handles:
            handle.remove()
        states = collectives.all_gather_objects((before[0], before[0] != _stands()), group=group)
        if any(drew for _, drew in states) and any(state != states[0][0] for state, _ in states):
            raise UsageError(
                f"{class_name(model)} draws random numbers in its forward (dropout, say), and the ranks that compute "
                "it together under tensor parallelism have differently seeded generators, so that weights which each "
                "holds whole would train apart; call torch.manual_seed(seed) with the same seed on these ranks, after "
                "the model is set up or loaded."
            )

    handles = [module.register_forward_pre_hook(note), module.register_forward_hook(check)]


def _stands() -> list[bytes]:
    """Where torch's generators stand, of the CPU and of the CUDA device that is in use."""
    state = RandomState.capture(torch_only=True, cuda=True)
    found = [state.torch_state, state.cuda_state]
    return [hashlib.blake2b(one.numpy().tobytes(), digest_size=8).digest() for one in found if one is not None]
