"""What to do about mistakes around sharded models: the texts of errors, and which of torch's errors they are for.

torch's own words are those of torch 2.13.
"""

from __future__ import annotations

from torch import nn

MIXED = "got mixed torch.Tensor and DTensor"
_BY_ITSELF = (
    "differentiated by itself, after lite.backward(loss) and before the step: "
    "sum(p.full_tensor().pow(2).sum() for p in model.parameters()).mul(0.01).backward(), say; what that adds up to is "
    "also the optimizer's weight_decay."
)
_ON_PARTS = (
    "Change each rank's part in place, under torch.no_grad(), in the loop after the step, or in a method that is given "
    "no tensors and calls no layers: for a, b in zip(model.q.parameters(), model.k.parameters()): "
    "b.lerp_(a, 1 - momentum), say, or b.copy_(...)."
)


def past_hooks(module: nn.Module) -> str:
    """A method computed with sharded parameters and plain tensors."""
    return (
        f"a method of {class_name(module)} used sharded parameters past the module that holds them: a layer's own "
        "weight, or a method of a wrapped layer other than its forward. Call layers by their forward, give the method "
        "the tensors that it works on, or keep that layer's class out of auto_wrap. A penalty on weights is "
        f"{_BY_ITSELF}"
    )


def second_gradient(module: nn.Module, error: RuntimeError) -> str | None:
    """Gradients were asked for of gradients through layers that are put together one by one; None for other errors."""
    if not str(error).startswith("setStorage:") or "of size 0" not in str(error):
        return None
    return (
        f"a backward needed weights of {class_name(module)}'s layers that FSDP has taken apart again, as that of a "
        "gradient penalty (create_graph=True) does, which fully_shard can't with layers that it puts together one by "
        "one. Shard this model in one piece, FSDPStrategy(auto_wrap=lambda part: False), or use strategy='ddp'. torch "
        f"says: {error}"
    )


def hook_of_split(error: RuntimeError) -> str | None:
    """A hook on a split parameter computed with plain tensors; None for other errors."""
    name = _hook_in_backward(error) if MIXED in str(error) else None
    if name is None:
        return None
    return (
        f"the hook {name} computed with a plain tensor and the gradient of a parameter that is split over the ranks, a "
        "DTensor; split the tensor as the parameter is: distribute_tensor(mask, parameter.device_mesh, "
        f"parameter.placements), from torch.distributed.tensor. torch says: {error}"
    )


def _hook_in_backward(error: BaseException) -> str | None:
    """The function, of neither torch nor lite, that a backward has called and that has failed."""
    trace, within = error.__traceback__, False
    while trace is not None:
        code = trace.tb_frame.f_code
        if within and not trace.tb_frame.f_globals.get("__name__", "").startswith(("torch.", "lite.")):
            return f"{code.co_name!r} ({code.co_filename}:{trace.tb_lineno})"
        within = within or code.co_name == "_engine_run_backward"
        trace = trace.tb_next
    return None


def second_backward(error: RuntimeError) -> str | None:
    """A loss was differentiated twice whose activations are kept for one time; None for other errors."""
    if "backward once on any region computed under selective activation checkpoint" not in str(error):
        return None
    return (
        "activation_checkpointing='selective' keeps what a backward needs for one backward alone, and this was the "
        "second one of a forward (retain_graph=True): add the losses up and call lite.backward once, or use a set of "
        f"classes for activation_checkpointing, or None. torch says: {error}"
    )


def of_weights_alone(module: nn.Module) -> str:
    """A method returned what has come from sharded parameters."""
    return (
        f"a method of {class_name(module)} returned what it has computed from sharded weights, of which each rank "
        f"has a part, so that it doesn't go with the loss. A penalty on weights is {_BY_ITSELF}"
    )


def past_model(module: nn.Module, parameter: str | None = None) -> str:
    """A loss depends on a weight of the model, and not by way of its forward and methods."""
    which = f"parameter {parameter!r}" if parameter else "weights"
    return (
        f"lite.backward got a loss that depends on {class_name(module)}'s {which} past what its forward and methods "
        "return, so that the gradient would not be reduced over the ranks. Return what the loss needs (a hook's "
        "features, say), and differentiate within the model (a gradient penalty, say), by a method of it, in which "
        f"layers are called. A penalty on weights is {_BY_ITSELF}"
    )


def outside(module: nn.Module, layer: str) -> str:
    """A layer whose weights are put together with the model's was called by itself."""
    return (
        f"{layer!r}, a layer of {class_name(module)}, was called outside of {class_name(module)}, whose weights are "
        "put together while it runs itself; call the model, or put these lines into a method of it and call that, with "
        "the tensors that it works on. The body of a generator (a method with yield) runs when the method has returned "
        "already: let it call a method that computes one item and returns it."
    )


def part_as_number(module: nn.Module) -> str:
    """A number was asked of a tensor of which each rank has a part."""
    return (
        f"{class_name(module)} asked for the Python number (item(), float(), bool(), max(), if) of a tensor that comes "
        "from sharded weights or outputs, and each rank would go on with that of its own part. Compute it before the "
        "model is called, on all ranks, from weight.full_tensor(), and pass it on; or in the forward of the layer that "
        "holds the weight, where it is whole. A number of outputs that stay split is that of outputs.full_tensor(), "
        "which all ranks must call."
    )


def of_both_kinds(error: RuntimeError) -> str:
    """A loss adds up what has come from split logits and what has not."""
    return (
        "lite.backward got a loss that adds up a term of split logits, a DTensor, and one of plain tensors (a hidden "
        "state, another output), which would get a DTensor for its gradient; make the former plain before they are "
        f"added: loss.full_tensor() + penalty, on all ranks. torch says: {error}"
    )


def written_copy(module: nn.Module, parameter: str) -> str:
    """A weight was changed while FSDP had put it together."""
    return (
        f"{class_name(module)}'s parameter {parameter!r} was changed while FSDP had put it together from all ranks' "
        "parts, as it does for a forward, or a method that computes; the change would be lost when it is taken apart "
        f"again. {_ON_PARTS}"
    )


def assigned_data(module: nn.Module, parameter: str) -> str:
    """`parameter.data = value` of a sharded parameter."""
    return (
        f"{class_name(module)}'s parameter {parameter!r} was assigned by parameter.data = ..., which leaves a sharded "
        f"parameter as it was. {_ON_PARTS}"
    )


def copied(module: nn.Module) -> str:
    """A rank's part was to be pickled or copied as the model."""
    return (
        f"this {class_name(module)} is sharded, and a rank's part of its weights can't be pickled or copied as the "
        "model; store it by lite.save or lite.export, or call lite.teardown() before."
    )


def explain(module: nn.Module, error: RuntimeError) -> str | None:
    """What to do about torch's error in a forward or method of a model that is sharded over data; None if not known."""
    text = str(error)
    if MIXED in text:
        return (
            f"a layer of {class_name(module)} used the weights of another one without calling it, and FSDP puts those "
            "together when it is called (torch.nn.MultiheadAttention uses its out_proj's so): keep the inner layer's "
            f"class out of auto_wrap, or have the outer one's in it instead. torch says: {text}"
        )
    if (told := second_gradient(module, error)) is not None:
        return told
    if text.startswith("mixed dtype (CPU)"):
        return (
            f"{class_name(module)} gave a norm an input in float32 and weights in 16 bits, in which FSDP puts weights "
            "together under mixed precision, and the CPU has no kernel for that. Cast the weights, too: "
            "F.layer_norm(x.float(), shape, weight.float(), bias.float()); under mixed precision a subclass of "
            f"torch.nn.LayerNorm, GroupNorm or InstanceNorm gets them in float32 by itself. torch says: {text}"
        )
    if "already been lazily initialized" in text:
        return (
            f"a layer of {class_name(module)} was called outside of it before its own first call, and can't be part of "
            "it any more; call lite.teardown(), set the model up again, and call it, or a method of it that calls the "
            f"layer. torch says: {text}"
        )
    return None


def class_name(module: nn.Module) -> str:
    """The name of the user's class, which fully_shard's subclass hides."""
    return type(module).__name__.removeprefix("FSDP")
