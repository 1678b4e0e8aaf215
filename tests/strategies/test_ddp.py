"""DDP's traps: what would leave a gradient unsynchronised is synchronised, or refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite import ConfigError, DDPStrategy, Lite, UsageError
from lite.strategies.ddp_parameters import Tables
from tests.support.models import MLP, VAE
from tests.support.processes import run_distributed


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


def inputs(lite: Lite, width: int = 4) -> Tensor:
    return torch.full((2, width), 1.0 + lite.global_rank)


def gradients(*models: nn.Module) -> list[list[float] | None]:
    return [None if p.grad is None else p.grad.flatten().tolist() for m in models for p in m.parameters()]


def assert_ranks_agree(fn: Callable[..., Any], *args: Any) -> Any:
    first, second = run_distributed(fn, *args)
    assert first == second
    return first


# ---- parameters that come and go


def changed_models() -> list[str]:
    lite = Lite(accelerator="cpu")
    messages = []

    def added(model: nn.Module) -> None:
        model.add_module("lora", nn.Linear(3, 3))

    def replaced(model: nn.Module) -> None:
        model.body[2] = nn.Linear(8, 2)  # type: ignore[operator]

    def single(model: nn.Module) -> None:
        model.scale = nn.Parameter(model.scale.detach().clone())  # equal, and another one

    def parametrized(model: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(model.body[0])  # type: ignore[index]

    for change in (added, replaced, single, parametrized):
        model = MLP()
        model.scale = nn.Parameter(torch.ones(()))
        lite.setup(model)
        change(model)
        messages.append(told(lambda model=model: model(inputs(lite))))
        new = torch.optim.SGD(model.parameters(), lr=0.1)
        messages.append(told(lambda new=new: lite.setup_optimizers(new)))
        lite.teardown()
    model = lite.setup(MLP())
    model.body[0].double()
    messages.append(told(lambda: model(inputs(lite))))
    messages.append(told(lambda: model.to("meta")))
    lite.teardown()
    model = MLP()
    lite.setup(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    lite.backward(model(inputs(lite)).sum())
    messages.append(told(optimizer.step))
    return messages


def test_parameters_that_come_after_setup_are_refused() -> None:
    """LoRA, a new head, a replaced scalar, weight_norm, a converted part, add_param_group: named at once."""
    names = ["lora.weight", "body.2.weight", "scale", "weight.original0"]
    for messages in run_distributed(changed_models):
        forwards, optimizers = messages[:8:2], messages[1:8:2]
        assert all(name in message for name, message in zip(names, forwards, strict=True)), forwards
        assert "'body.0.weight' was converted from torch.float32 to torch.float64" in messages[8]
        assert "from cpu to meta" in messages[9]
        assert all("came into being after lite.setup" in m for m in (*optimizers, messages[10])), optimizers


def test_a_changed_module_is_noticed_and_an_unchanged_one_is_not() -> None:
    """Identity counts, not equality; buffers and plain attributes may change."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    tables = Tables(model)
    model(torch.ones(2, 2))
    model.note = 1
    assert tables.unchanged()
    weight = model[0].weight
    model[0].weight = nn.Parameter(weight.detach().clone())
    assert not tables.unchanged()
    model[0].weight = weight
    assert tables.unchanged()
    model[1] = nn.BatchNorm1d(2)
    assert not tables.unchanged()


def freezing(strategy: str) -> list[Any]:
    lite = Lite(accelerator="cpu", strategy=strategy)
    torch.manual_seed(lite.global_rank)
    model = VAE()
    model.encoder.requires_grad_(False)
    teacher = nn.Linear(4, 1).requires_grad_(False)
    lite.setup(model)
    lite.setup(teacher)
    seen: list[Any] = [[p.tolist() for m in (model, teacher) for p in m.parameters()]]
    for frozen in ([], ["decoder"], ["encoder", "decoder"], ["encoder"]):
        model.requires_grad_(True)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        teacher.requires_grad_(len(frozen) == 1)
        for _ in range(2):
            model.zero_grad()
            teacher.zero_grad()
            x = inputs(lite).requires_grad_(len(frozen) == 2)
            lite.backward(teacher(model(x)).sum())
            seen.append(gradients(model, teacher))
    return seen


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_freezing_and_unfreezing_after_setup_keeps_ranks_in_step(strategy: str) -> None:
    """Also of a model that was frozen as a whole at setup, whose weights are rank 0's all the same."""
    seen = assert_ranks_agree(freezing, strategy)
    assert [sum(g is not None for g in grads) for grads in seen[1:]] == [4, 4, 4, 4, 0, 0, 4, 4]


def adversaries() -> list[float]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    maker, critic = nn.Linear(2, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    makers, critics = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (maker, critic))
    lite.setup(maker, makers)
    lite.setup(critic, critics)
    for step in range(3):
        noise = torch.full((2, 2), float(step + lite.global_rank))
        critic.requires_grad_(True)
        critics.zero_grad()
        real = noise.repeat(1, 2).requires_grad_()
        scores = critic(real)
        (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).pow(2).mean()
        lite.backward(critic(maker(noise).detach()).mean() - scores.mean() + penalty)
        critics.step()
        critic.requires_grad_(False)
        makers.zero_grad()
        lite.backward(-critic(maker(noise)).mean())
        makers.step()
    return [p.sum().item() for m in (maker, critic) for p in m.parameters()]


def test_a_frozen_critic_and_a_gradient_penalty_stay_in_step() -> None:
    """The usual way of writing a GAN."""
    assert_ranks_agree(adversaries)


# ---- losses


class Out:
    """What a model may return: tensors deep inside an object."""

    def __init__(self, y: Tensor) -> None:
        self.y = {"a": [y]}


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Out:
        return Out(self.layer(x))

    def train_step(self, lite: Lite, x: Tensor) -> float:
        loss = self(x).y["a"][0].sum()
        lite.backward(loss)
        return loss.item()


def wrong_losses() -> list[str]:
    lite = Lite(accelerator="cpu")
    first, second, third = lite.setup(nn.Linear(4, 4)), lite.setup(nn.Linear(4, 1)), lite.setup(VAE())
    x, messages = inputs(lite), []

    def refused(call: Callable[[], Any]) -> None:
        messages.append(told(call))

    with lite.no_backward_sync(first):
        z = first(x)
    refused(lambda: lite.backward(second(z).sum()))
    z = first(x)
    lite.backward(second(z).sum(), retain_graph=True)
    refused(lambda: lite.backward(z.sum()))
    refused(lambda: lite.backward(first(x).mean() + third.encoder(x).mean()))
    refused(lambda: lite.backward(second(third.decoder(third.encoder(x))).mean()))
    head = nn.Linear(4, 1)
    refused(lambda: lite.backward(head(first(x)).mean()))
    refused(lambda: lite.backward(first(x).sum(), inputs=[first.weight]))
    refused(lambda: lite.backward(first(x).sum(), None, None, False, [first.weight]))
    refused(lambda: lite.backward(first(x).sum(), model=head))
    inner = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(third(inner).sum(), inner, create_graph=True)
    refused(lambda: lite.backward(slope.pow(2).sum()))
    state = first(x)
    for _ in range(1500):  # a long rollout through one model is one phase
        state = first(state.tanh())
    lite.backward(state.sum() + first.weight.pow(2).sum())
    first.zero_grad()
    loss = first(x).sum()
    lite.teardown()
    refused(lambda: lite.backward(loss))
    return messages


def test_losses_whose_gradients_would_differ_are_refused() -> None:
    """Through a model upstream, past a model, for some inputs alone, of gradients alone, after teardown."""
    parts = [
        "inside no_backward_sync",
        "second backward",
        "'encoder.weight' past the model",
        "past the model",
        "(1, 4) of no model that is set up",
        "inputs=[...]",
        "inputs=[...]",
        "backward got a Linear that lite.setup has not prepared",
        "made of gradients",
        "lite.teardown() has given back",
    ]
    for messages in run_distributed(wrong_losses):
        assert len(messages) == len(parts)
        assert all(part in message for part, message in zip(parts, messages, strict=True)), messages


def unusual_losses() -> list[Any]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(0)
    model, net = lite.setup(Nested()), lite.setup(MLP())
    x, seen = inputs(lite), []
    lite.backward(model(x).y["a"][0].sum())
    seen.append(gradients(model))
    model.zero_grad()
    for _ in range(2):
        model.train_step(lite, x)
    seen.append(gradients(model))
    lite.backward(torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False).sum())
    seen.append(gradients(net))
    for compiled in (net, net.forward, lambda x: net(x)):
        net.zero_grad()
        lite.backward(torch.compile(compiled, backend="eager")(x).sum())
        seen.append(gradients(net))
    lite.teardown()
    net.compile(backend="eager")
    lite.setup(net)
    net.zero_grad()
    lite.backward(net(x).sum())
    return [*seen, gradients(net)]


def test_unusual_ways_to_a_loss_are_synchronised() -> None:
    """Tensors deep in an object, backward in a method of the model, checkpointing, compilation."""
    first, stepped, checkpointed, *compiled = assert_ranks_agree(unusual_losses)
    assert first == [[3.0] * 4, [2.0]]
    assert stepped == [[6.0] * 4, [4.0]]
    assert compiled == [checkpointed] * 4


def several_methods() -> list[Any]:
    lite = Lite(accelerator="cpu", strategy="ddp_find_unused_parameters_true")
    torch.manual_seed(0)
    model, seen = lite.setup(VAE()), []
    x = inputs(lite)
    for terms in (
        [lambda: model.encode(x), lambda: model.decode(x[:, :2])],
        [lambda: model(x), lambda: model.encode(x)],
        [lambda: model.decode(model.encode(x)), lambda: model.encoder.weight],
    ):
        model.zero_grad()
        lite.backward(sum(term().pow(2).mean() for term in terms))
        seen.append(gradients(model))
    model.zero_grad()
    _, z = model.decode(x[:, :2]), model.encode(x)  # one that is not used
    lite.backward(z.sum())
    return [*seen, gradients(model)]


def test_methods_together_under_the_search_for_unused_parameters() -> None:
    """Two before one backward, one of them unused: the loss tells which parameters take part."""
    seen = assert_ranks_agree(several_methods)
    assert all(None not in grads for grads in seen[:3])
    assert [g is None for g in seen[3]] == [False, False, True, True]


def own_autocast() -> str:
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(inputs(lite))

    return told(call)


def test_an_autocast_that_the_precision_does_not_know_is_refused() -> None:
    """With several ranks there is a way through lite, which says so."""
    assert all("precision='32-true'" in message for message in run_distributed(own_autocast))


def collectives_of_clipping() -> list[int]:
    import torch.distributed as dist

    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    calls = [0]
    real = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return real(*args, **kwargs)

    dist.all_reduce = counting
    try:
        lite.backward(model(inputs(lite)).sum())
        lite.clip_gradients(model, max_norm=1.0)
        synchronised = calls[0]
        with lite.no_backward_sync(model):
            lite.backward(model(inputs(lite)).sum())
        lite.clip_gradients(model, max_norm=1.0)
    finally:
        dist.all_reduce = real
    return [synchronised, calls[0]]


def test_clipping_asks_other_ranks_only_where_norms_may_differ() -> None:
    """Averaged gradients are equal on all ranks already; local ones are not."""
    assert run_distributed(collectives_of_clipping) == [[0, 1], [0, 1]]


def test_unknown_options_are_refused_at_once() -> None:
    """Not when DDP is built, much later."""
    with pytest.raises(ConfigError, match="find_unused_parameters"):
        DDPStrategy(find_unused=True)
    with pytest.raises(ConfigError, match="bucket_cap_mb='a'"):
        DDPStrategy(bucket_cap_mb="a")  # type: ignore[arg-type]
    DDPStrategy(broadcast_buffers=False)


class TwoHeads(nn.Module):
    """Its second head is left out on request."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fixed, self.second = nn.Linear(2, 1), nn.Linear(2, 1).requires_grad_(False), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, both: bool = True) -> torch.Tensor:
        return self.first(x) + self.second(x) if both else self.first(x)


def half_synchronised() -> list[str]:
    lite = Lite(accelerator="cpu")
    messages = []
    x = torch.full((1, 2), lite.global_rank + 1.0)
    model = TwoHeads()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    lite.backward(model(x).mean())
    optimizer.step()
    with pytest.raises(UsageError) as caught:  # the gradients of the backward before are still there
        lite.backward(model(x, both=False).mean())
    messages.append(str(caught.value))
    lite.teardown()
    model = nn.Linear(2, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    window = lite.accumulate(model, steps=3)
    with window():
        lite.backward(model(x).mean())
    with pytest.raises(UsageError) as caught:
        optimizer.step()
    messages.append(str(caught.value))
    with window(last=True):
        lite.backward(model(x).mean())
    optimizer.step()
    with pytest.raises(UsageError) as caught:
        lite.backward(model(x).mean(), create_graph=True)
    messages.append(str(caught.value))
    return [*messages, str(model.weight.tolist())]


def test_gradients_that_are_this_ranks_alone_are_not_stepped() -> None:
    """Parameters that a backward left out, a step within a window, a graph of the gradients: each refused at once."""
    first, second = run_distributed(half_synchronised)
    assert first == second
    unused, early, graph, _ = first
    assert "some parameters (second.weight, second.bias) got no gradient" in unused
    assert "after 1 of 3 micro-batches" in early and "window(last=True)" in early
    assert "torch.autograd.grad(create_graph=True)" in graph


def joined_windows() -> list[float]:
    lite = Lite(accelerator="cpu", strategy="ddp")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with lite.join(model):
        for number in range(2 + 2 * (lite.global_rank == 0)):
            last = number % 2 == 1
            with lite.no_backward_sync(model, enabled=not last):
                lite.backward(model(torch.randn(5, 3)).pow(2).mean())
            if last:
                optimizer.step()
                optimizer.zero_grad()
    return [value for tensor in model.state_dict().values() for value in tensor.double().flatten().tolist()]


def test_ranks_that_have_ended_answer_those_in_a_window() -> None:
    """Also where buffers are sent: uneven inputs, accumulation and BatchNorm together."""
    first, second = run_distributed(joined_windows)
    assert first == second
