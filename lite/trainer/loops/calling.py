"""How the module's training steps are called, and what they may return."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lite import collectives
from lite.errors import ConfigError, UsageError
from lite.gradients import is_weight
from lite.trainer.hooks import accepted
from lite.trainer.module import detached

Step = Callable[[Any, int], Any]
Signature = tuple[tuple[str, ...], int, bool]
_signatures: weakref.WeakKeyDictionary[Any, Signature] = weakref.WeakKeyDictionary()


def training_call(trainer: Any, name: str = "training_step") -> Callable[[Any, int], Any]:
    """The module's step function of that name, with a profiler around it, and what 1.8 had follow `training_step`."""
    call, old = step_caller(getattr(trainer.module, name)), trainer.fit_loop.epoch_loop.old
    if trainer.wrap_hook is not None:
        call = trainer.wrap_hook(name, trainer.module, call)
    return old.around(call) if old is not None and name == "training_step" else call


def step_caller(method: Callable[..., Any]) -> Callable[..., Any]:
    """A training step as a function of (batch, batch_idx).

    Raises:
        ConfigError: It takes arguments that only older versions gave.
    """
    names, most, _ = signature_of(method)
    if "optimizer_idx" in names:
        raise ConfigError(
            "training_step(batch, batch_idx, optimizer_idx) is the form of older versions; set "
            "self.automatic_optimization = False in __init__, and for each optimizer of self.optimizers() call "
            "zero_grad(), self.manual_backward(loss) and step() in training_step(batch, batch_idx)."
        )
    if "hiddens" in names or names[:1] == ("dataloader_iter",):
        raise ConfigError(
            f"training_step({', '.join(names)}): only batch and batch_idx are given; split sequences in training_step, "
            "or let the loader give what you would draw from it."
        )
    if most == 0:
        raise ConfigError("training_step() takes no batch; write def training_step(self, batch, batch_idx).")
    return method if most > 1 else lambda batch, batch_idx: method(batch)


def signature_of(method: Callable[..., Any]) -> Signature:
    """Names of a method's parameters, how many it takes by position, whether it takes any name; looked at once."""
    function = getattr(method, "__func__", method)
    found = _signatures.get(function)
    if found is None:
        parameters = inspect.signature(method).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        found = (tuple(parameters), accepted(method)[1], takes_any)
        _signatures[function] = found
    return found


def pick_loss(output: Any) -> Tensor | None:
    """The loss in what `training_step` returned.

    Raises:
        ConfigError: There is none.
    """
    if isinstance(output, Tensor):
        return output
    if output is None:
        return None
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise ConfigError(
                f"training_step returned a dict with the keys {list(output)} and without 'loss'; return the loss, a "
                "dict with 'loss', or None to leave the batch out."
            )
        loss = output["loss"]
        if loss is None or isinstance(loss, Tensor):
            return loss
        output = loss
    raise ConfigError(
        f"training_step returned a {type(output).__name__} as its loss; return a tensor, a dict with 'loss', or None."
    )


def given_weight(output: Any) -> Any:
    """The tokens or samples behind the loss, where the step function has told; else None.

    Raises:
        ConfigError: It is no number of them.
    """
    weight = output.get("weight") if isinstance(output, Mapping) else None
    if weight is not None and not is_weight(weight):
        raise ConfigError(
            f"training_step returned {{'weight': {weight!r:.80}}}, which is no number of at least 0, of tokens or "
            "samples that the loss is a mean over; return what it is under another name."
        )
    return weight


def alone_weight(output: Any) -> Any:
    """The weight of a batch that is the whole step of the only process: None, where that changes nothing."""
    weight = given_weight(output)
    return None if isinstance(weight, (int, float)) and weight > 0 else weight


class Weights:
    """The weights that a step function returns in a run: for every batch and on every rank, or for none.

    Attributes:
        given: Whether it returns them, on all ranks; None until a batch has told.
    """

    def __init__(self) -> None:
        self.given: bool | None = None

    def of(self, output: Any, loss: Tensor | None) -> Any:
        """The output's weight, or None. Collective at a run's first batch, whatever each rank's step function returned.

        Args:
            output: What it returned.
            loss: The loss in that; a batch without one is left out, and tells nothing.

        Raises:
            ConfigError: The weight is no number of tokens or samples.
            UsageError: Some batches or ranks have one and others not.
        """
        weight = None if loss is None else given_weight(output)
        has, lacks = weight is not None, weight is None and loss is not None
        if self.given is None:
            has, lacks = collectives.any_rank(has), collectives.any_rank(lacks)
            self.given = has if has or lacks else None
            differs = has and lacks  # on all ranks, so that all of them end
        else:
            differs = lacks if self.given else has
        if differs:
            raise UsageError(
                "training_step returned a dict with 'weight' for some batches or on some ranks only, and they can't be "
                "put together; return it for every batch, 0 where a batch has nothing that counts, or for none."
            )
        return weight


def hook_outputs(output: Any) -> Any:
    """What `on_train_batch_end` gets: a dict with the loss as training_step returned it, without its graph."""
    if output.__class__ is Tensor:
        return {"loss": output.detach()}
    return detached(output if isinstance(output, Mapping) or output is None else {"loss": output})
