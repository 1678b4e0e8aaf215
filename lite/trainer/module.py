"""`LightningModule`: a torch module that says how it is trained, evaluated and asked; the Trainer calls it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lite import collectives
from lite.errors import UsageError
from lite.trainer.hooks import CALLBACKS_ALONE, MODULE_ALONE, SHARED
from lite.trainer.hparams import HyperparametersMixin, of_the_class
from lite.trainer.logging.entries import Options
from lite.trainer.module_hooks import ModuleHooks
from lite.trainer.optimization.manual import Optimisation

M = TypeVar("M", bound="LightningModule")


class LightningModule(Optimisation, ModuleHooks, HyperparametersMixin, nn.Module):
    """A model together with its loss, optimizers and data: override the steps and `configure_optimizers`.

    Outside of a Trainer it is a plain module; `log` does nothing there.

    Attributes:
        automatic_optimization: False: `training_step` runs backward and steps by itself.
        strict_loading: Whether a checkpoint must have all of the module's keys, and no others.
        example_input_array: An input, for ModelSummary and exports.
    """

    # How Lite treats its methods: a training step is a whole forward, and hooks compute nothing of their own.
    forward_methods: ClassVar[frozenset[str]] = frozenset({"forward", "training_step"})
    plain_methods: ClassVar[frozenset[str]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer: Any = None
        self._metrics: Any = None
        self._automatic_optimization = True
        self._strict_loading: bool | None = None
        self._example_input_array: Any = None

    # ---- the steps

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One training batch.

        Args:
            *args: `batch`, and `batch_idx` where the method takes a second argument.
            **kwargs: None.

        Returns:
            The loss, a dict with "loss" (and "weight", for exact accumulation), or None to leave the batch out.
        """
        raise NotImplementedError

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """One validation batch: `batch`, `batch_idx`, and `dataloader_idx` where the method has it."""
        raise NotImplementedError

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """One test batch, as in validation."""
        raise NotImplementedError

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """What is predicted for one batch; the forward's output unless overridden."""
        return self(args[0] if args else kwargs["batch"])

    def manual_step(self, step: Callable[..., Any], *args: Any) -> Any:
        """A training step that runs backward by itself: what it returns is not differentiated any more."""
        return detached(step(*args))

    # ---- logging

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: Any = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Keep a number under a name, for loggers, progress bar and callbacks. It is not waited for.

        Args:
            name: The key.
            value: A number, a tensor with one element, or a Metric of torchmetrics.
            prog_bar: Whether the progress bar shows it.
            logger: Whether loggers get it (unless False).
            on_step: Whether the value of a step counts; None: in training's steps.
            on_epoch: Whether the epoch's reduction counts; None: in evaluation and in epochs' hooks.
            reduce_fx: "mean" (weighed by batch size), "sum", "min", "max", or a function of a tensor of all values.
            enable_graph: Ignored: what is logged has no gradient.
            sync_dist: Whether it is reduced over the ranks, by their numbers of samples.
            sync_dist_group: Ignored: all ranks.
            add_dataloader_idx: Whether the loader is part of the name, where there are several.
            batch_size: Samples that the value stands for; None finds it in the batch.
            metric_attribute: The attribute that holds a Metric.
            rank_zero_only: Only rank 0 keeps it.
        """
        metrics = self._metrics
        if metrics is None or not metrics.enabled:
            self._log_nowhere()
            return
        # A plain tuple is made ten times as fast as a named one, and compares with it.
        options = (prog_bar, logger, on_step, on_epoch, reduce_fx, sync_dist, add_dataloader_idx, rank_zero_only)
        entry = metrics.here.entries.get(name)
        if entry is None or entry.options != options:
            entry = metrics.register(name, value, Options(*options), metric_attribute, self)
        entry.add(value, batch_size)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """`log` for each item."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def _log_nowhere(self) -> None:
        if self._metrics is None:
            text = "log was called outside of a Trainer's run, where nobody keeps the value"
        else:
            text = "log does nothing with Trainer(barebones=True)"
        warnings.warn(f"{text}; it is ignored.", stacklevel=3)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0."""
        if self._trainer is None or self._trainer.is_global_zero:
            print(*args, **kwargs)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Every rank's tensors, with a rank dimension in front. Collective: call on all ranks."""
        if self._trainer is None:
            return collectives.all_gather(data, sync_grads=sync_grads, group=group)
        return self._trainer.lite.all_gather(data, sync_grads=sync_grads)

    # ---- the run

    @property
    def trainer(self) -> Any:
        """The Trainer whose run this is.

        Raises:
            UsageError: There is none.
        """
        return self._require_trainer("trainer")

    def attach(self, trainer: Any, metrics: Any) -> None:
        """A Trainer's run begins (or ends, with None)."""
        object.__setattr__(self, "_trainer", trainer)
        object.__setattr__(self, "_metrics", metrics)

    def _require_trainer(self, call: str) -> Any:
        trainer = self.__dict__.get("_trainer")
        if trainer is None and self.__dict__.get("_is_exported"):
            raise AttributeError(call)  # TorchScript asks for every property, and goes on where there is none
        if trainer is None:
            raise UsageError(
                f"{type(self).__name__}.{call} needs a Trainer, and this module is in no Trainer's hands; call "
                "trainer.fit(model) or another of its methods first."
            )
        return trainer

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer runs backward and steps."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        self._automatic_optimization = value

    @property
    def strict_loading(self) -> bool:
        """Whether all keys must fit when a checkpoint is loaded."""
        return self._strict_loading is not False

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        self._strict_loading = value

    @property
    def example_input_array(self) -> Any:
        """An input of the forward."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, value: Any) -> None:
        self._example_input_array = value

    @property
    def device(self) -> torch.device:
        """Where the first parameter or buffer lies."""
        tensor: Tensor | None = next(self.parameters(), None)
        tensor = next(self.buffers(), None) if tensor is None else tensor
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def on_gpu(self) -> bool:
        """Whether it lies on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def current_epoch(self) -> int:
        """The Trainer's, or 0."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps so far, or 0."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """This process's number."""
        return self._trainer.global_rank if self._trainer is not None else 0

    @property
    def local_rank(self) -> int:
        """This process's number on its machine."""
        return self._trainer.local_rank if self._trainer is not None else 0

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        return self._trainer.logger if self._trainer is not None else None

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        return self._trainer.loggers if self._trainer is not None else []

    @property
    def fabric(self) -> Any:
        """The Lite object of the run."""
        return self.trainer.lite

    # ---- weights

    def freeze(self: M) -> M:
        """No parameter wants gradients, and the module evaluates."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        return self.eval()

    def unfreeze(self: M) -> M:
        """Every parameter wants gradients, and the module trains."""
        for parameter in self.parameters():
            parameter.requires_grad = True
        return self.train()

    @of_the_class
    def load_from_checkpoint(
        cls: type[M],
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        hparams_file: str | os.PathLike[str] | None = None,
        strict: bool | None = None,
        weights_only: bool = True,
        **kwargs: Any,
    ) -> M:
        """Make the module that a checkpoint of lite or of PyTorch Lightning (1.8, 2.x) holds.

        Args:
            checkpoint_path: A file, a directory or a URL.
            map_location: A device for the weights; None is the CPU. A dict or function as torch.load takes is asked
                where the file's first tensor goes, and they all go there.
            hparams_file: A .json, .yaml or .csv file with hyperparameters, for a checkpoint that has none.
            strict: Whether all keys must fit; None asks `strict_loading`.
            weights_only: False lets the file run code.
            **kwargs: Arguments of `__init__`; they outrank the stored ones.
        """
        from lite.trainer.checkpoints.loading import load_module_from_checkpoint

        made: M = load_module_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs
        )
        return made

    def to_torchscript(self, *args: Any, **kwargs: Any) -> Any:
        """Compile by TorchScript; see `lite.trainer.export.to_torchscript`."""
        from lite.trainer.export import to_torchscript

        return to_torchscript(self, *args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Any:
        """Write as ONNX; see `lite.trainer.export.to_onnx`."""
        from lite.trainer.export import to_onnx

        return to_onnx(self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None, "_metrics": None, "_toggled": None}


def detached(outputs: Any) -> Any:
    """The same nesting without gradients; a subclass of dict becomes a dict, one of list a list."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if isinstance(outputs, dict):
        return {key: detached(value) for key, value in outputs.items()}
    if isinstance(outputs, tuple):
        parts = [detached(value) for value in outputs]
        return outputs._make(parts) if hasattr(outputs, "_make") else tuple(parts)
    return [detached(value) for value in outputs] if isinstance(outputs, list) else outputs


_COMPUTING = {"forward", "training_step", "validation_step", "test_step", "predict_step", "manual_step"}
_OWN = {name for base in LightningModule.__mro__ if base not in (nn.Module, object) for name in vars(base)}
# TorchScript would compile them.
LightningModule.__jit_unused_properties__ = [  # type: ignore[attr-defined]
    name for base in LightningModule.__mro__ for name, value in vars(base).items() if isinstance(value, property)
]
LightningModule.plain_methods = frozenset((_OWN | {*SHARED, *CALLBACKS_ALONE, *MODULE_ALONE}) - _COMPUTING)
