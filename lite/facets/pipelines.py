"""Models whose layers lie on different ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lite.errors import ConfigError, UsageError
from lite.facets.records import Records
from lite.facets.steps import Steps

if TYPE_CHECKING:
    from lite.pipeline import Pipeline


class Pipelines(Steps, Records):
    """The side of `Lite` that sets up pipelines."""

    def setup_pipeline(
        self,
        model: nn.Module,
        *optimizers: Optimizer | LRScheduler,
        loss: Callable[[Any, Tensor], Tensor],
        microbatches: int,
        stages: int | Sequence[str] | None = None,
        schedule: str = "1f1b",
        layers: Sequence[str] | None = None,
    ) -> Any:
        """Put the layers of a model on different ranks, under `Lite(strategy="pipeline")`; on one process, keep them.

        Collective: call on all ranks. Layers run one after another, each with what the one before it returned (a
        tensor, or between ranks a tuple of tensors); the model's own forward is not used. All ranks get the same
        batches from `setup_dataloaders`. Weights that layers of several ranks share stay equal. BatchNorm sees each
        microbatch by itself, on one process too.

        Args:
            model: An nn.Sequential, or another module whose layers are named by `layers`. It is changed in place: the
                layers of other ranks lie on the meta device.
            *optimizers: Its optimizers and schedulers, as for `setup`.
            loss: A function of (output, target) that returns the mean loss over a microbatch's samples.
            microbatches: How many parts a batch is split into, which is what keeps ranks busy: with n stages and m
                microbatches each rank waits for (n - 1) / (m + n - 1) of the time. With "1f1b" at least one for each
                stage; one process, whose number of stages is not known without `stages`, can't tell.
            stages: Where to cut: a number of stages, balanced by their parameters (None: one for each rank, two with
                "interleaved_1f1b"), or the names of the layers with which the second and further stages begin.
            schedule: "1f1b" (few activations are kept), "gpipe" (all forwards, then all backwards), or
                "interleaved_1f1b" (several stages on each rank: less waiting, more communication).
            layers: The names of the layers in the order in which they run; an nn.ModuleList or nn.Sequential stands
                for what is in it. Left out for an nn.Sequential.

        Returns:
            A `lite.pipeline.Pipeline`, whose `forward_backward(inputs, target=...)` computes loss and gradients; or a
            tuple of it and the optimizers.

        Raises:
            ConfigError: An argument is wrong, the stages don't fit the ranks, or the strategy splits no layers.
            UsageError: As for `setup`.

        Example:
            >>> import torch
            >>> from lite import Lite
            >>> lite = Lite(accelerator="cpu", strategy="pipeline")
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> pipeline, optimizer = lite.setup_pipeline(
            ...     model, optimizer, loss=torch.nn.functional.mse_loss, microbatches=2
            ... )
            >>> loss = pipeline.forward_backward(torch.ones(4, 2), target=torch.zeros(4, 1))
            >>> optimizer.step()

        Source: https://arxiv.org/abs/1811.06965 (GPipe), https://arxiv.org/abs/2104.04473 (1F1B and interleaving)
        """
        from lite.pipeline import Pipeline
        from lite.strategies.running_order import PipelinePlan, running_order
        from lite.strategies.stages import Stage

        self._require_connected("setup_pipeline")
        if not callable(loss):
            raise ConfigError(f"loss={loss!r} must be a function of (output, target), such as F.cross_entropy.")
        if not isinstance(model, nn.Module):
            raise ConfigError(f"setup_pipeline got {model!r} as the model; pass a torch.nn.Module first.")
        plan = PipelinePlan.checked(layers, stages, schedule, microbatches)
        found = list(running_order(model, plan.layers).values())
        self.strategy.plan_pipeline(model, plan)
        try:
            self._prepared.check("setup_pipeline", (model,), optimizers)
            with self._prepared.adding(model, *optimizers):
                self._prepared.add_module(model, self._device, move=True)
                hooks = self._methods("on_after_optimizer_step")
                self._prepared.add_optimizers(optimizers, self._prepare_optimizer, hooks)
        except (ConfigError, UsageError):
            self.strategy.drop_pipeline(model)
            raise
        self.call("on_after_setup", self, model)
        engine = self._modules[model]
        whole = Stage(found, self.precision, first=True, last=True)
        pipeline: Pipeline = Pipeline(
            model,
            engine if engine is not None and self.strategy.distributes_layers else whole,
            plan,
            loss,
            lambda value: self._backward(value),
            self._weigh_losses,
        )
        return (pipeline, *optimizers) if optimizers else pipeline

    def _weigh_losses(self) -> Callable[[Tensor], Tensor]:
        """What the open window and the loss scale do to losses whose backwards torch calls."""
        scale, factor = self._scale, self.precision.begin_backward()

        def weigh(loss: Tensor) -> Tensor:
            loss = loss if scale is None else scale.apply(loss)
            return loss if factor is None else loss * factor.to(loss.device)

        return weigh
