"""Loss scaling when optimizers step, clip and leave steps out at their own pace."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from lite import ConfigError, Lite, NonFiniteError
from lite.precision import MixedPrecision


class Two(nn.Module):
    """Two parts with an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Extra(torch.optim.SGD):
    """Its step takes more than a closure."""

    seen = 0.0

    def step(self, closure: Any = None, *, factor: float = 1.0) -> Any:
        self.seen = factor
        return super().step(closure)


X = torch.ones(2, 2)
ONE = 2**0.5  # the norm of the gradient of one mean output with respect to a weight of (1, 1)


def made(lr: float = 0.1, growth_interval: int = 1) -> tuple[Lite, nn.Module, torch.optim.Optimizer, Any]:
    """A scale that grows at every good step, so that a mistake with it shows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=growth_interval)
    lite = Lite(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
    model = Two()
    first, second = Extra(model.a.parameters(), lr=lr), torch.optim.SGD(model.b.parameters(), lr=lr)
    lite.setup(model, first, second)
    return lite, model, first, second


def norm(lite: Lite, optimizer: torch.optim.Optimizer, **arguments: Any) -> float:
    return lite.clip_gradients(optimizer=optimizer, max_norm=1e9, **arguments).item()


def back(lite: Lite, model: nn.Module, factor: float = 1.0) -> None:
    lite.backward(model(X).mean() * factor)


def test_gradients_have_their_true_size_whenever_they_are_looked_at() -> None:
    """Clip, step, clip the other; one steps at each batch and the other at each second; clip after each micro-batch."""
    lite, model, first, second = made()
    back(lite, model)
    assert norm(lite, first) == pytest.approx(ONE)
    first.step()
    assert norm(lite, first) == pytest.approx(ONE)  # after its step too
    assert norm(lite, second) == pytest.approx(ONE)
    second.step()
    for optimizer in (first, second):
        optimizer.zero_grad()
    for _ in range(3):
        back(lite, model)
        first.step()
        first.zero_grad()
    assert norm(lite, second) == pytest.approx(3 * ONE)
    back(lite, model, float("inf"))
    second.zero_grad()
    first.step()
    first.zero_grad()
    for count in (1, 2, 3):
        back(lite, model)
        assert norm(lite, second) == pytest.approx(count * ONE)
    before = model.b.weight.clone()
    second.step()
    assert (before - model.b.weight).norm().item() == pytest.approx(0.1 * 3 * ONE)


def test_a_step_that_the_user_leaves_out_changes_nothing_for_the_next() -> None:
    """A spike filter of one's own, a caught NonFiniteError, and setup again after teardown."""
    lite, model, first, _ = made()
    for spike in (1.0, 3.0, float("inf")):
        back(lite, model, spike)
        if spike == float("inf"):
            with pytest.raises(NonFiniteError):
                norm(lite, first, nonfinite="raise")
        else:
            assert norm(lite, first) == pytest.approx(spike * ONE)
        first.zero_grad()
        back(lite, model)
        assert norm(lite, first) == pytest.approx(ONE)
        before = model.a.weight.clone()
        first.step()
        assert not lite.step_was_skipped(first)
        assert (before - model.a.weight).norm().item() == pytest.approx(0.1 * ONE)
        first.zero_grad()
    back(lite, model)
    norm(lite, first)
    lite.teardown()
    model.zero_grad()
    lite.setup(model, first)
    back(lite, model)
    assert norm(lite, first) == pytest.approx(ONE)


def test_zero_steps_with_zero_gradients() -> None:
    """nonfinite="zero" under a loss scale: weight decay acts, the step counts, and the scale falls all the same."""
    lite, model, first, _ = made(growth_interval=2000)
    first.param_groups[0]["weight_decay"] = 0.5
    before = model.a.weight.clone()
    back(lite, model, float("inf"))
    norm(lite, first, nonfinite="zero")
    first.step(factor=3.0)
    assert not lite.step_was_skipped(first)
    torch.testing.assert_close(model.a.weight, before * 0.95)
    assert lite.precision.state_dict()["scale"] == 2.0
    assert first.seen == 3.0


def test_what_was_skipped_is_remembered_per_optimizer() -> None:
    """Until its own next step, whatever others do; and nothing of one that is gone."""
    lite, model, first, second = made()
    back(lite, model, float("inf"))
    first.step()
    for _ in range(2):
        second.zero_grad()
        back(lite, model)
        second.step()
        assert lite.step_was_skipped(first)
        assert not lite.step_was_skipped(second)
    first.zero_grad()
    back(lite, model)
    first.step()
    assert not lite.step_was_skipped(first)
    scaling = lite.precision._scaling  # type: ignore[attr-defined]
    lite.teardown()
    del first, second
    gc.collect()
    assert not scaling._known
    assert not scaling._counts


def test_loading_forgets_what_came_before() -> None:
    """An overflow between saving and loading doesn't touch the loaded scale."""
    lite, model, first, _ = made(growth_interval=2000)
    back(lite, model)
    first.step()
    saved = lite.precision.state_dict()
    first.zero_grad()
    back(lite, model, float("inf"))
    first.step()
    lite.precision.load_state_dict(saved)
    first.zero_grad()
    back(lite, model)
    assert norm(lite, first) == pytest.approx(ONE)
    first.step()
    state = lite.precision.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (4.0, 2)


def epoch_end(make: Any, bad: list[int], *, metric: bool = False) -> float:
    lite, model, first, _ = made(lr=1.0)
    scheduler: LRScheduler = make(first)
    lite.setup(nn.Linear(1, 1), scheduler)
    for epoch in range(2):
        for batch in range(3):
            first.zero_grad()
            back(lite, model, float("inf") if epoch == 0 and batch in bad else 1e-3)
            first.step()
        scheduler.step(1.0 + epoch) if metric else scheduler.step()  # type: ignore[arg-type]
    rate: float = first.param_groups[0]["lr"]
    return rate


def test_a_scheduler_stands_still_only_when_every_step_was_skipped() -> None:
    """Per epoch, one bad batch costs no epoch; ReduceLROnPlateau follows its metric alone."""
    assert epoch_end(lambda o: StepLR(o, 1, 0.1), [2]) == pytest.approx(0.01)
    assert epoch_end(lambda o: StepLR(o, 1, 0.1), [0, 1, 2]) == pytest.approx(0.1)
    assert epoch_end(lambda o: ReduceLROnPlateau(o, patience=0), [0, 1, 2], metric=True) == pytest.approx(0.1)


def test_a_precision_for_another_device_is_refused() -> None:
    """It would compute in full precision without a word."""
    for name in ("16-mixed", "bf16-mixed"):
        scaler = torch.amp.GradScaler("cuda", enabled=False) if name == "16-mixed" else None
        with pytest.raises(ConfigError, match=r"'cuda'.*cpu"):
            Lite(accelerator="cpu", plugins=MixedPrecision(name, "cuda", scaler))


def test_optimizer_state_gets_the_dtype_of_its_parameters() -> None:
    """AdamW that has stepped before it is set up under another dtype."""
    model = Two()
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    lite = Lite(accelerator="cpu", precision="64-true")
    lite.setup(model, optimizer)
    optimizer.zero_grad()
    lite.backward(model(X).sum())
    optimizer.step()
    state = optimizer.state[model.a.weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float64
