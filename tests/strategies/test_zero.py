"""ZeRO-1: less state on each rank, the same numbers, the same checkpoints, still the user's optimizer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lite import ConfigError, DDPStrategy, Lite, UsageError
from tests.support.models import MLP, regression
from tests.support.processes import run_distributed


class Counting(torch.optim.AdamW):
    """An optimizer of the user's own: an attribute that its step changes, and an __init__ that takes other words."""

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.calls = 0
        body, head = model.body[0], model.body[2]
        super().__init__([{"params": body.parameters(), "lr": speed}, {"params": head.parameters()}], lr=speed / 2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure)


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def build(zero: bool, seed: int = 0) -> tuple[Lite, MLP, Counting, Any]:
    lite = Lite(accelerator="cpu", precision="64-true", strategy=DDPStrategy(zero_optimizer=zero))
    torch.manual_seed(seed)
    model = MLP(torch.float64)
    optimizer = Counting(model, 0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    lite.setup(model, optimizer, scheduler)
    return lite, model, optimizer, scheduler


def train(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, start: int, end: int) -> Any:
    for step in range(start, end):
        generator = torch.Generator().manual_seed(10 * step + lite.global_rank)
        optimizer.zero_grad()
        lite.backward(model(torch.randn(3, 4, generator=generator, dtype=torch.float64)).pow(2).mean())
        optimizer.step()
        scheduler.step()
    return [p.detach().tolist() for p in model.parameters()]


def copies(optimizer: torch.optim.Optimizer) -> list[str]:
    """What is said to each way of copying."""
    return [told(lambda call=call: call(optimizer)) for call in (pickle.dumps, copy.copy, copy.deepcopy)]


def zero_is_ddp(folder: str) -> list[Any]:
    answers: list[Any] = []
    whole = build(False)
    expected = train(*whole, 0, 6)
    lite, model, optimizer, scheduler = build(True)
    answers.append(isinstance(optimizer, Counting) and isinstance(optimizer, torch.optim.AdamW))
    answers.append(all("set up with zero_optimizer=True" in text for text in copies(optimizer)))
    seen: list[Any] = []
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append((o is optimizer, [p.detach().tolist() for p in model.parameters()]))
    )
    weights = train(lite, model, optimizer, scheduler, 0, 3)
    answers.append(len(seen) == 3 and seen[-1] == (True, weights))
    lite.check_sync()
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    lite.save(f"{folder}/zero.ckpt", state)
    lite.save(f"{folder}/zero", state)
    lite.save(f"{folder}/async", state, async_save=True)
    lite.wait_for_save()
    answers.append(train(lite, model, optimizer, scheduler, 3, 6) == expected)
    answers.append((optimizer.calls, bytes_of_state(optimizer), bytes_of_state(whole[2])))
    # Its checkpoint into DDP, and a DDP's into it, on the same curve.
    for path in ("zero.ckpt", "zero", "async"):
        plain = build(False, seed=5)
        plain[0].load(f"{folder}/{path}", dict(zip(("model", "optimizer", "scheduler"), plain[1:], strict=True)))
        answers.append(train(*plain, 3, 6) == expected)
        if path == "zero":
            plain[0].save(f"{folder}/ddp.ckpt", dict(zip(("model", "optimizer", "scheduler"), plain[1:], strict=True)))
    other = build(False)
    train(*other, 0, 3)
    other[0].save(f"{folder}/ddp3.ckpt", dict(zip(("model", "optimizer", "scheduler"), other[1:], strict=True)))
    again = build(True, seed=7)
    again[0].load(f"{folder}/ddp3.ckpt", dict(zip(("model", "optimizer", "scheduler"), again[1:], strict=True)))
    again[0].save(f"{folder}/again.ckpt", dict(zip(("model", "optimizer", "scheduler"), again[1:], strict=True)))
    answers.append(bytes_of_state(again[2]))
    answers.append(train(*again, 3, 6) == expected)
    return answers


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else bool(a == b)


def test_zero_is_ddp_with_a_share_of_the_state(tmp_path: Path) -> None:
    """Weights bit for bit, the user's class, hooks after the broadcast, checkpoints exact in both directions."""
    first, second = run_distributed(zero_is_ddp, str(tmp_path))
    for answers in (first, second):
        assert all(answers[:4]), answers
        assert answers[4][0] == 6
        assert all(answers[5:8]), answers
        assert answers[9], answers
    whole = first[4][2]
    assert first[4][1] + second[4][1] == whole
    # 32 + 8 + 24 + 3 parameters: the largest shares possible of whole parameters are 35 and 32.
    assert max(first[4][1], second[4][1]) <= 0.55 * whole
    assert first[8] + second[8] == whole
    before, after = (torch.load(tmp_path / name, weights_only=True) for name in ("ddp3.ckpt", "again.ckpt"))
    assert equal(before["model"], after["model"])
    assert equal(before["optimizer"], after["optimizer"])
    model = MLP(torch.float64)
    raw = Counting(model, 0.05)
    raw.load_state_dict(torch.load(tmp_path / "zero.ckpt", weights_only=True)["optimizer"])
    assert bytes_of_state(raw) == whole


def on_one(path: str) -> Any:
    lite, model, optimizer, scheduler = build(True)
    lite.load(path, {"model": model, "optimizer": optimizer, "scheduler": scheduler}, rng=False)
    return optimizer.state_dict()


def test_a_checkpoint_loads_on_other_numbers_of_processes(tmp_path: Path) -> None:
    """Saved by two ranks, read by three and by one."""
    run_distributed(zero_is_ddp, str(tmp_path))
    expected = torch.load(tmp_path / "zero.ckpt", weights_only=True)["optimizer"]
    assert equal(on_one(str(tmp_path / "zero.ckpt")), expected)
    for path in ("zero.ckpt", "zero"):
        for whole in run_distributed(on_one, str(tmp_path / path), world_size=3):
            assert equal(whole, expected)


def told(call: Any) -> str:
    try:
        call()
    except (UsageError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def misused() -> list[Any]:
    lite, model, optimizer, scheduler = build(True)
    train(lite, model, optimizer, scheduler, 0, 2)
    whole = optimizer.state_dict()
    assert all("lite.save" in text and "UsageError" in text for text in copies(optimizer))
    lite.teardown()
    messages = [type(optimizer) is Counting, told(optimizer.step), told(optimizer.state_dict)]
    assert all(text == messages[-1] for text in copies(optimizer))
    optimizer.load_state_dict(whole)
    messages += [told(optimizer.step), bytes_of_state(optimizer)]
    copied = pickle.loads(pickle.dumps(optimizer))
    assert type(copied) is type(copy.deepcopy(optimizer)) is Counting
    assert bytes_of_state(copied) == bytes_of_state(optimizer)
    lite = Lite(accelerator="cpu", strategy=DDPStrategy(zero_optimizer=True))
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    messages.append(told(lambda: lite.setup(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1))))
    net = nn.Linear(2, 2)
    messages.append(told(lambda: lite.setup(net, torch.optim.LBFGS(net.parameters()))))
    messages.append(type(net) is nn.Linear)
    # A group that comes later is divided too.
    body, head = MLP(), nn.Linear(3, 1)
    both = nn.ModuleList([body, head])
    both.forward = lambda x: head(body(x))  # type: ignore[method-assign]
    late = torch.optim.Adam(body.parameters(), lr=0.1)
    lite.setup(both, late)
    for step in range(2):
        late.zero_grad()
        lite.backward(both(torch.full((2, 4), 1.0 + lite.global_rank)).sum())
        late.step()
        if step == 0:
            late.add_param_group({"params": list(head.parameters()), "lr": 0.01})
    lite.check_sync()
    messages.append((len(late.state), sorted(late.state_dict()["state"])))
    return messages


def test_what_zero_cannot_do_is_refused() -> None:
    """Copies with a share of the state, also after teardown, LBFGS, several dtypes; groups may come later."""
    results = run_distributed(misused)
    for raw, step, state, loaded, size, mixed, lbfgs, untouched, _ in results:
        assert raw
        assert "lite.teardown()" in step
        assert "lite.teardown()" in state
        assert loaded == "nothing was raised"
        assert size > 0
        assert "2 dtypes (torch.float32, torch.float64)" in mixed
        assert "LBFGS" in lbfgs
        assert untouched
    assert sum(result[-1][0] for result in results) == 6
    assert all(result[-1][1] == [0, 1, 2, 3, 4, 5] for result in results)
    with pytest.raises(ConfigError, match="zero_optimizer='adam'"):
        DDPStrategy(zero_optimizer="adam")  # type: ignore[arg-type]


def scaled(zero: bool) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    from lite.precision.mixed import MixedPrecision

    strategy = DDPStrategy(zero_optimizer=zero)
    lite = Lite(accelerator="cpu", strategy=strategy, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    torch.manual_seed(0)
    loader = lite.setup_dataloaders(DataLoader(regression(12), batch_size=2))
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    lite.setup(model, optimizer)
    skipped = []
    for step, (x, y) in enumerate(loader):
        optimizer.zero_grad()
        loss = (model(x) - y).pow(2).mean()
        lite.backward(loss * float("inf") if step == 1 and lite.global_rank == 1 else loss)
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        skipped.append(lite.step_was_skipped(optimizer))
    return [p.tolist() for p in model.parameters()], skipped


def test_a_loss_scale_sees_through_it() -> None:
    """An inf on one rank skips the step on both; weights are those without zero_optimizer."""
    (weights, skipped), other = run_distributed(scaled, True)
    assert (weights, skipped) == other
    assert skipped == [False, True, False]
    assert (weights, skipped) == run_distributed(scaled, False)[0]
