"""Law 2: what `setup` returns is still the user's model, on one process and on two, under every precision."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lite import Lite, UsageError
from tests.support.models import VAE
from tests.support.processes import run_distributed

PRECISIONS = ["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]


def check_still_yours(precision: str) -> None:
    lite = Lite(accelerator="cpu", precision=precision)
    raw = VAE()
    keys = list(raw.state_dict())
    before = set(vars(raw))
    calls = []
    handle = raw.register_forward_hook(lambda *_: calls.append("hook"))
    model = lite.setup(raw)
    assert model is raw
    assert isinstance(model, VAE)
    assert type(model).__name__ == "VAE"
    assert "VAE(" in repr(model)
    assert set(vars(model)) == before
    assert list(model.state_dict()) == keys
    model.saved_actions.append(1)
    assert model.saved_actions == [1]
    model.note = "mine"
    assert model.note == "mine"
    del model.note
    assert not hasattr(model, "note")
    dtype = next(model.parameters()).dtype
    out = model(torch.ones(3, 4))
    assert calls == ["hook"]
    handle.remove()
    assert out.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert model.decode(torch.ones(3, 2)).shape == (3, 4)
    assert model.count() == 22
    twin = copy.deepcopy(model)
    assert type(twin) is VAE
    assert next(twin.parameters()).dtype == dtype
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert type(torch.load(stream, weights_only=False)) is VAE
    lite.teardown()
    assert type(model) is VAE
    assert set(vars(model)) == before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_stays_the_users_on_one_process(precision: str) -> None:
    """Same object, class, attributes, keys, hooks and methods; copies and pickles are raw."""
    check_still_yours(precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_model_stays_the_users_on_two_processes(precision: str) -> None:
    """The same under DDP."""
    run_distributed(check_still_yours, precision)


def test_full_precision_on_one_process_changes_nothing() -> None:
    """Law 3: the class is the user's very own, so a step is raw PyTorch's."""
    lite = Lite(accelerator="cpu")
    model = VAE()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lite.setup(model, optimizer)
    assert type(model) is VAE
    assert type(optimizer) is torch.optim.SGD
    assert "step" not in vars(optimizer)


def pickle_in_process(path: str) -> None:
    model = Lite(accelerator="cpu").setup(nn.Sequential(nn.Linear(2, 2)))
    torch.save(model, path)


def test_a_pickled_model_loads_without_lite(tmp_path: os.PathLike[str]) -> None:
    """`torch.save(model)` of a model under DDP must not bind its owner to the wrapper."""
    path = os.fspath(tmp_path) + "/model.pt"
    run_distributed(pickle_in_process, path)
    code = (
        "import sys, torch; sys.modules['lite'] = None; "
        f"m = torch.load({path!r}, weights_only=False); print(type(m).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "Sequential", done.stderr


def train_by_method(method: str) -> list[torch.Tensor]:
    lite = Lite(accelerator="cpu", strategy="ddp_find_unused_parameters_true" if lite_world() > 1 else "auto")
    torch.manual_seed(0)
    model, optimizer = lite.setup(model := VAE(), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        x = torch.full((2, 4), float(step + lite.global_rank))
        optimizer.zero_grad()
        lite.backward(model.decode(x[:, :2]).pow(2).mean() if method == "decode" else model.loss(x))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def lite_world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


@pytest.mark.parametrize("method", ["decode", "loss"])
def test_own_methods_are_synchronised(method: str) -> None:
    """Training through a method other than forward keeps the ranks' weights equal."""
    first, second = run_distributed(train_by_method, method)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def rank_zero_works_alone() -> list[float]:
    lite = Lite(accelerator="cpu")
    torch.manual_seed(lite.global_rank)
    model = lite.setup(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    out = model(torch.randn(8, 4))
    lite.backward(out.sum())
    alone = 0.0
    if lite.is_global_zero:  # the model has buffers, which DDP would broadcast
        with torch.no_grad():
            alone = model.eval()(torch.ones(2, 4)).sum().item()
            model.train()
    lite.barrier()
    model(torch.randn(8, 4))
    return [alone, model[1].num_batches_tracked.item()]


def test_one_rank_may_evaluate_alone() -> None:
    """A forward without gradients is no collective, also of a model with buffers, and later steps go on."""
    (alone, steps), (_, other_steps) = run_distributed(rank_zero_works_alone)
    assert alone != 0.0
    assert steps == other_steps == 2


class Registered(nn.Module):
    """A base class that keeps a register of its subclasses."""

    register: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.register[cls.__name__] = cls


class Net(Registered):
    """With an argument."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_another_object_of_the_models_type_is_raw() -> None:
    """type(model)(...) has nothing to do with the set-up one, and registers don't hear of the exchanged class."""
    lite = Lite(accelerator="cpu", precision="64-true")
    model = lite.setup(Net(3))
    other = type(model)(2)
    assert type(other) is Net
    assert Registered.register["Net"] is Net
    assert other(torch.ones(1, 2)).dtype == torch.float32
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    scaled = Lite(accelerator="cpu", precision="16-mixed")
    scaled.setup(other, optimizer)
    assert type(type(optimizer)([nn.Parameter(torch.ones(1))], lr=0.1)) is torch.optim.SGD


class Cached(nn.Module):
    """Fills what it is given, as a key-value cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, cache: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        cache["keys"].append(self.layer(x))
        return cache["keys"][-1]

    def history(self) -> list[int]:
        return self.seen


@pytest.mark.parametrize("precision", PRECISIONS)
def test_containers_stay_the_users_own(precision: str) -> None:
    """What a model writes into a cache or list that was passed in or handed out is seen by both."""
    model = Lite(accelerator="cpu", precision=precision).setup(Cached())
    cache: dict[str, list[torch.Tensor]] = {"keys": []}
    for count in (1, 2):
        model(torch.ones(1, 2), cache)
        assert len(cache["keys"]) == count
    model.history().append(1)
    assert model.seen == [1]


def unsynchronised_calls() -> list[str]:
    lite = Lite(accelerator="cpu")
    model = lite.setup(VAE())
    messages = []

    def refused(fn) -> None:
        try:
            fn()
        except UsageError as error:
            messages.append(str(error))
        else:
            messages.append("not refused")

    refused(lambda: lite.backward(model.encoder(torch.ones(2, 4)).sum()))
    refused(lambda: lite.backward(copy.deepcopy(model)(torch.ones(2, 4)).sum()))
    one, two = model(torch.ones(2, 4)), model(torch.zeros(2, 4))
    lite.backward(one.sum())
    refused(lambda: lite.backward(two.sum()))
    out = model(torch.ones(2, 4)).sum()

    def late() -> None:
        with lite.no_backward_sync(model):
            lite.backward(out)

    refused(late)
    with torch.no_grad():
        dead = model(torch.ones(2, 4)).sum()
    refused(lambda: lite.backward(dead))
    return messages


def test_gradients_that_would_stay_unsynchronised_are_refused() -> None:
    """A submodule's output, a copy's, a second backward, a forward outside no_backward_sync, a loss without graph."""
    for messages in run_distributed(unsynchronised_calls):
        parts = [
            "does not come from",
            "does not come from",
            "second backward",
            "outside no_backward_sync",
            "no gradient",
        ]
        assert len(messages) == len(parts)
        assert all(part in message for part, message in zip(parts, messages, strict=True)), messages


def unused_parameters() -> str:
    lite = Lite(accelerator="cpu")
    model = lite.setup(VAE())
    try:
        lite.backward(model.decode(torch.ones(2, 2)).sum())
    except UsageError as error:
        return str(error)
    return "not refused"


def test_unused_parameters_are_named_with_the_remedy() -> None:
    """At the end of the backward that left them out, with their names and the strategy to use."""
    for message in run_distributed(unused_parameters):
        assert "encoder.weight" in message
        assert "ddp_find_unused_parameters_true" in message


def test_another_precision_is_refused() -> None:
    """A surrounding autocast of another dtype, and a conversion after setup."""
    model = Lite(accelerator="cpu", precision="bf16-mixed").setup(VAE())
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(UsageError, match="bf16-mixed"):
        model(torch.ones(2, 4))
    for convert in (model.half, model.double):
        with pytest.raises(UsageError, match="another precision"):
            convert()
    assert next(model.parameters()).dtype == torch.float32
    model.float().to("cpu")


class Oddity(nn.Module):
    """Methods that must not be touched: generators, properties, static and class methods, overridden torch methods."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.trained = 0

    def train(self, mode: bool = True) -> Oddity:
        self.trained += 1
        return super().train(mode)

    @property
    def size(self) -> int:
        return 2

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @classmethod
    def make(cls) -> Oddity:
        return cls()

    def stream(self):
        yield self.layer.weight

    def groups(self) -> list[nn.Parameter]:
        return [self.layer.weight]

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"out": self.layer(x) * scale}


def odd_methods() -> None:
    lite = Lite(accelerator="cpu", strategy="ddp_find_unused_parameters_true")
    model = lite.setup(Oddity())
    model.eval()
    assert model.trained == 1
    assert (model.size, model.double(3), type(model.make()).__name__) == (2, 6, "Oddity")
    assert next(model.stream()) is model.layer.weight
    assert model.groups()[0] is model.layer.weight
    torch.optim.SGD(model.groups(), lr=0.1)
    out = model(torch.ones(2, 2), scale=2.0)
    lite.backward(out["out"].sum())
    assert torch.equal(model.forward(torch.ones(2, 2))["out"] * 2, out["out"])


def test_other_members_of_the_class_work() -> None:
    """Under DDP with the search for unused parameters, which rebuilds outputs."""
    run_distributed(odd_methods)
