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


class FirstDraws:
    """Refuses a model's first training run that draws from generators which stand otherwise on other ranks.

    What comes after it costs nothing, and is not looked at; nor is what the compiler, or a transform of torch.func,
    runs.

    Args:
        group: The ranks that compute the model together.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._runs = 0
        self._done = False

    def stand(self, module: nn.Module) -> RandomState | None:
        """Where generators stand before a run; None where it is not looked at."""
        traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        if self._done or traced or not module.training or not torch.is_grad_enabled():
            return None
        return RandomState.capture(torch_only=True, cuda=True)

    def check(self, module: nn.Module, before: RandomState) -> None:
        """Compare after the first run, and after the first one that has drawn. Collective over the group then.

        Raises:
            UsageError: The ranks would train apart.
        """
        self._runs += 1
        now = RandomState.capture(torch_only=True, cuda=True)
        drew = not all(map(torch.equal, _states(before), _states(now)))
        if self._runs > 1 and not drew:
            return
        mine = [hashlib.blake2b(state.numpy().tobytes()).digest() for state in _states(before)]
        everyones = collectives.all_gather_objects((mine, drew), group=self._group)
        if any(drawn for _, drawn in everyones) and any(theirs != mine for theirs, _ in everyones):
            raise UsageError(
                f"{class_name(module)} draws random numbers in training (dropout, say), and the ranks that compute it "
                "together under tensor parallelism have differently seeded generators, so that weights which each "
                "holds whole would train apart; call torch.manual_seed(seed) with the same seed on these ranks, after "
                "the model is set up or loaded."
            )
        self._done = drew


def _states(state: RandomState) -> list[torch.Tensor]:
    """Of the CPU's generator, and of that of the CUDA device in use."""
    return [one for one in (state.torch_state, state.cuda_state) if one is not None]
