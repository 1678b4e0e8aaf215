"""Between the runs of a model under FSDP its parameters are the shards, whatever is done with them and whenever."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lite import FSDPStrategy, Lite, UsageError
from lite.sharded import whole
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed

SHARDINGS: dict[str, Callable[[], Any]] = {
    "full": lambda: "fsdp",
    "grad": lambda: FSDPStrategy(sharding="grad"),
    "one piece": lambda: FSDPStrategy(auto_wrap=lambda part: False),
}


class Loop:
    """A model, its optimizer, and the batches of a short training: of each, this rank's part."""

    def __init__(self, strategy: Any) -> None:
        torch.manual_seed(3)
        self.lite = Lite(accelerator="cpu", strategy=strategy, precision="64-true")
        model = TinyGPT(torch.float64)
        self.model, self.optimizer = self.lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
        parts = sentences(16)[:][0].view(4, self.lite.world_size, -1, 7)
        self.batches = list(parts[:, self.lite.global_rank])

    def loss(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.model(batch[:, :-1]), batch)


def zero_grad_before_backward(loop: Loop) -> None:
    for batch in loop.batches:
        loss = loop.loss(batch)
        loop.model.zero_grad()
        loop.lite.backward(loss)
        loop.optimizer.step()


def freeze_after_a_look(loop: Loop) -> None:
    loop.loss(loop.batches[0])
    loop.model.head.requires_grad_(False)
    for number, batch in enumerate(loop.batches):
        if number == 2:
            loop.loss(batch)
            loop.model.head.requires_grad_(True)
        loop.optimizer.zero_grad()
        loop.lite.backward(loop.loss(batch))
        loop.optimizer.step()


def look_before_clipping(loop: Loop) -> None:
    for batch in loop.batches:
        loop.optimizer.zero_grad()
        loop.lite.backward(loop.loss(batch))
        loop.loss(batch)  # how it does now, say
        loop.lite.clip_gradients(loop.model, loop.optimizer, max_norm=0.1)
        for parameter in loop.model.parameters():
            assert parameter.grad is not None
            parameter.grad.mul_(0.5)
        loop.optimizer.step()


def look_before_writing(loop: Loop) -> None:
    for batch in loop.batches:
        loop.optimizer.zero_grad()
        loop.lite.backward(loop.loss(batch))
        loop.optimizer.step()
        loop.loss(batch)
        for parameter in loop.model.parameters():
            parameter.data.clamp_(-0.2, 0.2)


def optimizer_after_a_look(loop: Loop) -> None:
    loop.loss(loop.batches[0])
    loop.optimizer = loop.lite.setup_optimizers(torch.optim.Adam(loop.model.parameters(), lr=0.01))
    for batch in loop.batches:
        loop.optimizer.zero_grad()
        loop.lite.backward(loop.loss(batch))
        loop.optimizer.step()


def look_within_a_closure(loop: Loop) -> None:
    for batch in loop.batches:

        def closure(batch: Tensor = batch) -> Tensor:
            loop.optimizer.zero_grad()
            loss = loop.loss(batch)
            loop.lite.backward(loss)
            loop.loss(batch)
            return loss

        loop.optimizer.step(closure)


def throw_a_window_away(loop: Loop) -> None:
    for number, batch in enumerate(loop.batches):
        if number % 2:
            with loop.lite.no_backward_sync(loop.model):
                loop.lite.backward(loop.loss(batch))
            loop.optimizer.zero_grad() if number == 1 else loop.model.zero_grad()
        else:
            loop.lite.backward(loop.loss(batch))
            loop.optimizer.step()
            loop.optimizer.zero_grad()


LOOPS = {
    function.__name__: function
    for function in (
        zero_grad_before_backward,
        freeze_after_a_look,
        look_before_clipping,
        look_before_writing,
        optimizer_after_a_look,
        look_within_a_closure,
        throw_a_window_away,
    )
}


def train(strategy: str, name: str) -> dict[str, Tensor]:
    loop = Loop(SHARDINGS[strategy]() if strategy else "single")
    LOOPS[name](loop)
    loop.lite.teardown()
    return {key: value.clone() for key, value in loop.model.state_dict().items()}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_as_on_one_process(sharding: str, name: str) -> None:
    """torch's fully_shard leaves whole copies in the model after a forward, until its backward comes."""
    (wanted,) = run_distributed(train, "", name, world_size=1)
    for got in run_distributed(train, sharding, name):
        for key, value in wanted.items():
            torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10)


def momentum_encoder() -> float:
    """How far a copy that follows the model, as in MoCo, is from what one process has."""
    lite = Lite(accelerator="cpu", strategy="fsdp", precision="64-true")
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(lite.setup(TinyGPT(torch.float64)))
    model, follower = models
    tokens = sentences(2)[:][0]
    for parameter in model.parameters():
        parameter.data.add_(1.0)
    model(tokens)
    follower(tokens)
    with torch.no_grad():
        for own, other in zip(follower.parameters(), model.parameters(), strict=True):
            own.mul_(0.9).add_(other, alpha=0.1)
    torch.manual_seed(3)
    raw = TinyGPT(torch.float64)
    pairs = zip(follower.parameters(), raw.parameters(), strict=True)
    return max(float((whole(own) - plain - 0.1).detach().abs().max()) for own, plain in pairs)


def test_a_momentum_encoder_follows_after_forwards() -> None:
    assert max(run_distributed(momentum_encoder)) < 1e-12


class Checkpointed(nn.Module):
    """Two parts; one is computed again in backward, where the model's own weights are needed once more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=False)
        return self.second(hidden.tanh())

    def first_loss(self, x: Tensor) -> Tensor:
        return self.first(x).pow(2).sum()

    def second_loss(self, x: Tensor) -> Tensor:
        return self.second(x).pow(2).sum()


def several() -> dict[str, float]:
    """How far gradients are from one process's, in what goes past one forward and its `lite.backward`."""
    lite = Lite(accelerator="cpu", strategy="fsdp", precision="64-true")
    models, raws = [], []
    for _ in range(2):
        torch.manual_seed(3)
        raws.append(Checkpointed().double())
        torch.manual_seed(3)
        models.append(lite.setup(Checkpointed()))
    (model, other), (raw, _) = models, raws
    optimizer = lite.setup_optimizers(torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1))
    x = torch.ones(2, 8, dtype=torch.float64, requires_grad=True)
    wanted, got = (torch.autograd.grad(one(x).sum(), x)[0] for one in (raw, model))
    facts = {"by autograd.grad": float((got - wanted).abs().max())}
    x = x.detach()

    # Two losses of two parts: the step changes nothing that the second one needs.
    first, second = model.first_loss(x), model.second_loss(x)
    lite.backward(first)
    optimizer.step()
    optimizer.zero_grad()
    lite.backward(second)
    raw.second_loss(x).backward()
    facts["of parts"] = float((whole(model.second.weight.grad) - raw.second.weight.grad).abs().max())
    optimizer.zero_grad()

    # Another model's failing backward leaves those that wait alone.
    with lite.no_backward_sync(other):
        lite.backward(other.second_loss(x))
    loss = model.first_loss(x)
    loss.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        lite.backward(loss)
    lite.backward(other.second_loss(x))
    facts["of another model"] = float((whole(other.second.weight.grad) - 2 * raw.second.weight.grad).abs().max())
    lite.teardown()
    facts["left at zero_grad"] = float("zero_grad" in vars(optimizer))
    return facts


def fail(gradient: Tensor) -> None:
    raise ValueError("on purpose")


def test_several_models_losses_and_backwards() -> None:
    for facts in run_distributed(several):
        assert {name: value for name, value in facts.items() if value > 1e-12} == {}


def step(loop: Loop) -> None:
    loop.optimizer.step()


def write(loop: Loop) -> None:
    with torch.no_grad():
        for parameter in loop.model.parameters():
            parameter.mul_(0.9)


def load(loop: Loop) -> None:
    loop.model.load_state_dict({name: 0.9 * whole(value) for name, value in loop.model.state_dict().items()})


def change_between(strategy: str, change: Callable[[Loop], None]) -> list[str]:
    """What comes of a backward after a change of the weights of its forward; and the loop goes on after it."""
    loop = Loop(SHARDINGS[strategy]() if strategy else "single")
    told = []
    for _ in range(2):
        first, second = (loop.loss(batch) for batch in loop.batches[:2])
        loop.lite.backward(first)
        change(loop)
        loop.optimizer.zero_grad()
        try:
            loop.lite.backward(second)
        except RuntimeError as error:
            told.append(str(error))
        loop.optimizer.zero_grad()
        loop.lite.backward(loop.loss(loop.batches[2]))
        loop.optimizer.step()
    return told


@pytest.mark.parametrize("change", [step, write, load])
@pytest.mark.parametrize("sharding", ["", *SHARDINGS])
def test_a_change_between_forward_and_backward_is_torchs_error(sharding: str, change: Callable[[Loop], None]) -> None:
    """fully_shard would differentiate with other weights than the forward had."""
    for told in run_distributed(change_between, sharding, change, world_size=2 if sharding else 1):
        assert len(told) == 2
        assert all("has been modified by an inplace operation" in one for one in told)


def average_between(strategy: str) -> float:
    """How far the gradient is off after averages stood in the weights' place between forward and backward."""
    loop = Loop(strategy)
    average = loop.lite.ema(loop.model, decay=0.5)
    loop.lite.backward(loop.loss(loop.batches[0]))
    loop.optimizer.step()
    average.update()
    gradients = []
    for swaps in (False, True):
        loop.optimizer.zero_grad()
        loss = loop.loss(loop.batches[1])
        if swaps:
            with average.swap(), torch.no_grad():
                loop.loss(loop.batches[2])
        loop.lite.backward(loss)
        gradients.append(whole(loop.model.head.weight.grad).clone())
    return float((gradients[0] - gradients[1]).abs().max())


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_averages_may_come_and_go_between_forward_and_backward(strategy: str) -> None:
    processes = 1 if strategy == "single" else 2
    assert run_distributed(average_between, strategy, world_size=processes) == [0.0] * processes


@pytest.mark.parametrize("begins_within", [False, True])
def test_a_backward_takes_the_weights_of_its_forward(begins_within: bool) -> None:
    """Averages are no weights that a backward of the model's own may use, nor the other way round."""
    loop = Loop("single")
    average = loop.lite.ema(loop.model, decay=0.5)
    loss = loop.loss(loop.batches[1])
    with average.swap():
        if begins_within:
            loss = loop.loss(loop.batches[1])
        else:
            with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
                loop.lite.backward(loss)
    if begins_within:
        with torch.no_grad():
            loop.model.head.weight.mul_(0.5)  # the next version
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loop.lite.backward(loss)


def early_step() -> str:
    loop = Loop("fsdp")
    with loop.lite.no_backward_sync(loop.model):
        loop.lite.backward(loop.loss(loop.batches[0]))
    try:
        loop.optimizer.step()
    except UsageError as error:
        return str(error)
    return "nothing was raised"


def test_a_step_leaves_no_gradients_behind() -> None:
    for told in run_distributed(early_step):
        assert "SGD.step() came after a backward within lite.no_backward_sync" in told


class Penalized(nn.Module):
    """A critic with a gradient penalty, of layers that repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def penalty(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.forward(x).sum(), x, create_graph=True)
        return gradient.pow(2).sum()


def penalties() -> tuple[str, float]:
    told, value = "nothing was raised", 0.0
    for strategy in (FSDPStrategy(auto_wrap={nn.Sequential}), FSDPStrategy(auto_wrap=lambda part: False)):
        torch.manual_seed(3)
        lite = Lite(accelerator="cpu", strategy=strategy, precision="64-true")
        raw = Penalized().double()
        raw.penalty(torch.ones(2, 8, dtype=torch.float64)).backward()
        wanted = raw.layers[0][0].weight.grad  # type: ignore[index]
        raw.zero_grad()
        model = lite.setup(raw)
        try:
            lite.backward(model.penalty(torch.ones(2, 8, dtype=torch.float64)))
            value = float((whole(model.layers[0][0].weight.grad) - wanted).abs().max())  # type: ignore[index]
        except UsageError as error:
            told = str(error)
        lite.teardown()
    return told, value


def test_a_gradient_penalty_needs_the_model_in_one_piece() -> None:
    for told, difference in run_distributed(penalties):
        assert "Shard this model in one piece, FSDPStrategy(auto_wrap=lambda part: False)" in told
        assert difference < 1e-12
