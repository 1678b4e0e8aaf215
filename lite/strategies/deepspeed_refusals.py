"""What DeepSpeed can't train: models and optimizers that are refused while they are as the user made them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer

from lite.errors import ConfigError, some
from lite.state import parameters_of
from lite.strategies.deepspeed_state import misfit
from lite.strategies.repointing import check_fit


def check_parameters(module: nn.Module, stage: int) -> None:
    """Refuse a model that DeepSpeed can't train.

    Raises:
        ConfigError: It is none that is called, or has parameters of a kind that DeepSpeed does not handle.
    """
    name = type(module).__name__
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        raise ConfigError(f"{name} has no forward, and is never called; set up the module that holds it.")
    for key, parameter in module.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise ConfigError(
                f"parameter {key!r} of this {name} is a DTensor, which DeepSpeed can't divide; pass the raw model."
            )
        if parameter.is_meta:
            raise ConfigError(
                f"parameter {key!r} of this {name} is on the meta device, where DeepSpeed can't divide it; make "
                "the model with its values, or use strategy='fsdp'."
            )
        if parameter.ndim == 0:
            raise ConfigError(
                f"parameter {key!r} of this {name} is a scalar, which DeepSpeed can't send from rank to rank; make "
                "it a vector of one element, torch.nn.Parameter(value.reshape(1)), or use strategy='ddp'."
            )
        if parameter.stride(-1) != 1 or not parameter.is_contiguous():
            raise ConfigError(
                f"parameter {key!r} of this {name} lies in memory in another order than that of its dimensions "
                "(channels_last, a transpose), which DeepSpeed can't send from rank to rank; use parameter.data = "
                "parameter.data.clone(memory_format=torch.contiguous_format), or strategy='ddp'."
            )
        if parameter.numel() == 0 and stage == 3:
            raise ConfigError(
                f"parameter {key!r} of this {name} is empty, of shape {tuple(parameter.shape)}, which DeepSpeed's "
                "stage 3 can't put together; leave it out, or use stage=2 or strategy='ddp'."
            )
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"parameter {key!r} of this {name} is {parameter.dtype}, and DeepSpeed's optimizers keep float32; "
                "use model.float(), or strategy='ddp' or 'fsdp'."
            )


def check_optimizer(optimizer: Optimizer, models: Sequence[nn.Module]) -> None:
    """Refuse an optimizer that DeepSpeed can't divide, from stage 1 on.

    Args:
        optimizer: The user's.
        models: The one that is about to be set up, where there is one, and then those that are.

    Raises:
        ConfigError: It is of a kind that looks at whole tensors, does not train one whole model, or has a state that
            DeepSpeed can't go on from.
    """
    name = type(optimizer).__name__
    check_fit(optimizer, "deepspeed")
    if isinstance(optimizer, (Adagrad, LBFGS)):
        raise ConfigError(
            f"{name} can't train under strategy='deepspeed', which would exchange or flatten it; use AdamW, "
            "SGD, RMSprop, ..., or strategy='ddp'."
        )
    if optimizer.defaults.get("differentiable"):
        raise ConfigError(f"{name}(differentiable=True) can't train under strategy='deepspeed'; leave it out.")
    held = {id(p) for p in parameters_of(optimizer)}
    mine = [model for model in models if any(id(p) in held for p in model.parameters())]
    owned = {id(model): {id(p) for p in model.parameters()} for model in mine}
    if mine and any(not owned[id(mine[0])] >= held & owned[id(m)] for m in mine):
        raise ConfigError(
            f"{name} trains {' and '.join(sorted({type(m).__name__ for m in mine}))}, and DeepSpeed divides each "
            "model with its own optimizer; make one for each, or one module that holds all."
        )
    for model in mine[:1]:
        left = [key for key, p in model.named_parameters() if p.requires_grad and id(p) not in held]
        if left:
            raise ConfigError(
                f"{name} leaves out {some(left)} of {type(model).__name__}, and DeepSpeed trains a model by one "
                "optimizer; put all into one, with several param_groups where they differ, or freeze them "
                "(requires_grad_(False)) before lite.setup."
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError(f"{name} has nothing to train: all parameters of {type(model).__name__} are frozen.")
        names = {id(p): key for key, p in model.named_parameters()}
        problem = misfit(optimizer.state, [group["params"] for group in optimizer.param_groups], names)
        if problem is not None:
            raise ConfigError(
                f"{name} has state: {problem}; give these parameters a group of their own, make the optimizer "
                "anew, or use strategy='ddp' or 'fsdp'."
            )
