"""`Pipeline`: what trains a model whose layers run one after another, on one rank or on several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lite.errors import ConfigError, UsageError
from lite.strategies.base import Engine
from lite.strategies.running_order import PipelinePlan
from lite.strategies.stages import Stage, split

LossFunction = Callable[[Any, Tensor], Tensor]


class Pipeline:
    """Runs batches through the layers of a model, microbatch by microbatch. Made by `Lite.setup_pipeline`.

    On one process all layers are here, and microbatches run one after another.

    Args:
        model: The model, set up.
        run: What holds this rank's stages; or all layers as one stage, where they are all here.
        plan: The number of microbatches.
        loss: A function of (output, target) that returns a microbatch's mean loss.
        backward: What is called on a loss where all layers are here.
        weigh: What is asked, before a batch, for what is done to its losses before their backwards.

    Attributes:
        model: The model; on several ranks, those layers that others hold are on the meta device.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Engine | Stage,
        plan: PipelinePlan,
        loss: LossFunction,
        backward: Callable[[Tensor], None],
        weigh: Callable[[], Callable[[Tensor], Tensor]],
    ) -> None:
        self.model = model
        self._whole = run if isinstance(run, Stage) else None
        self._engine: Any = run
        self._plan, self._loss = plan, loss
        self._backward, self._ask_weight = backward, weigh

    def forward_backward(self, *inputs: Tensor, target: Tensor) -> Tensor:
        """Compute a batch's mean loss and add its gradients to those that are there.

        Collective: call on all ranks, with the same batch. It takes the place of forward, loss and `lite.backward`; a
        window of `lite.accumulate` around it counts it as one.

        Args:
            *inputs: What the first layer takes: tensors with the batch as their first dimension.
            target: What the loss function takes second, with the same first dimension.

        Returns:
            The mean of the microbatches' losses, 0-dim, without a graph, on every rank.

        Raises:
            ConfigError: The microbatches don't divide the batch, or something is no tensor.
        """
        count = self._plan.microbatches
        self._check(inputs, target)
        if len(target) % count:
            raise ConfigError(
                f"microbatches={count} does not divide a batch of {len(target)} samples; use a batch size that is a "
                "multiple of it, and drop_last=True in the DataLoader if its last batch is smaller."
            )
        if self._whole is None:
            if self._engine.closed:
                raise UsageError("the pipeline's model was given back by lite.teardown(); set it up again.")
            value: Tensor = self._engine.forward_backward(inputs, target, self._loss, self._ask_weight())
            return value
        losses = []
        for *part, wanted in split([*inputs, target], count):
            loss = self._loss(self._whole(*part), wanted)
            self._backward(loss / count)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def __call__(self, *inputs: Tensor) -> Any:
        """The last layer's outputs for a batch, on every rank, without gradients.

        Collective: call on all ranks, with the same batch. `model.eval()` is yours to call, as ever.
        """
        self._check(inputs, None)
        if self._whole is None:
            return self._engine.outputs(inputs)
        with torch.no_grad():
            return self._whole(*inputs)

    def _check(self, inputs: tuple[Any, ...], target: Any) -> None:
        given = [*inputs, *([] if target is None else [target])]
        if not inputs or not all(isinstance(x, Tensor) and x.ndim for x in given):
            kinds = ", ".join(type(x).__name__ for x in given)
            raise ConfigError(
                f"a pipeline got {kinds or 'no inputs'}; pass tensors that have the batch as their first dimension, "
                "which is what can be split into microbatches."
            )
        if len({len(x) for x in given}) > 1:
            raise ConfigError(
                f"a pipeline got tensors for {', '.join(str(len(x)) for x in given)} samples; inputs and target must "
                "be of the same samples."
            )
