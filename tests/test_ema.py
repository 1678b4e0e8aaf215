"""The moving average of the weights: torch's numbers, back to the weights bit for bit, on every kind of parameter."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lite import CheckpointError, ConfigError, Lite, UsageError
from lite.ema import EMA
from lite.precision.mixed import MixedPrecision
from tests.support.models import MLP
from tests.support.processes import run_distributed


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def values(module: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in module.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("buffers", [False, True])
def test_numbers_are_those_of_torchs_averaged_model(buffers: bool) -> None:
    """Bit for bit, buffers by both choices, evaluation within swap included; the weights come back bit for bit."""
    lite = Lite(accelerator="cpu")
    model = net()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    ema = lite.ema(model, decay=0.9, buffers=buffers)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    reference.update_parameters(model)  # its first one copies
    for step in range(5):
        optimizer.zero_grad()
        lite.backward(model(batch(step)).pow(2).mean())
        optimizer.step()
        ema.update()
        reference.update_parameters(model)
    assert ema.num_updates == 5
    before = values(model)
    with ema.swap():
        wanted = values(reference.module)
        inside = values(model)
        # num_batches_tracked is averaged by neither: torch rounds its mean, here it is the model's
        assert all(torch.equal(a, b) for a, b in zip(inside, wanted, strict=True) if a.is_floating_point())
        model.eval()
        assert torch.equal(model(batch(9)), reference.module.eval()(batch(9)))
        model.train()
    assert same(values(model), before)
    assert not same(inside, before)
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    assert same(values(model), before)


def test_what_a_loss_scale_leaves_out_does_not_count() -> None:
    """An inf's step changes neither the average nor its number of updates."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    lite = Lite(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
    model = net()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    ema = lite.ema(model, decay=0.5)
    averages = []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(batch(step)).pow(2).mean()
        lite.backward(loss * float("inf") if step == 1 else loss)
        optimizer.step()
        ema.update()
        averages.append([t.clone() for t in ema.state_dict()["averages"].values()])
    assert ema.num_updates == 2
    assert same(averages[0], averages[1])
    assert not same(averages[1], averages[2])


def test_16_bit_weights_are_averaged_in_float32() -> None:
    """Changes below bfloat16's resolution add up."""
    lite = Lite(accelerator="cpu", precision="bf16-true")
    model = lite.setup(nn.Linear(1, 1, bias=False))
    model.weight.data.fill_(1.0)
    ema = lite.ema(model, decay=0.999)
    model.weight.data.fill_(2.0)
    for _ in range(10):
        ema.update()
    (average,) = ema.state_dict()["averages"].values()
    assert average.dtype is torch.float32
    # 1 + 1 - 0.999 ** 10; ten roundings of float32
    assert average.item() == pytest.approx(2 - 0.999**10, abs=1e-6)
    with ema.swap():
        assert model.weight.item() == average.bfloat16().item()
    assert model.weight.item() == 2.0


def distributed(folder: str) -> Any:
    lite = Lite(accelerator="cpu")
    answers = []

    def train(parts: Any, start: int, end: int) -> list[Tensor]:
        model, optimizer, ema = parts
        for step in range(start, end):
            optimizer.zero_grad()
            lite.backward(model(batch(step, lite.global_rank)).pow(2).mean())
            optimizer.step()
            ema.update()
        return list(ema.state_dict()["averages"].values())

    def build() -> Any:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        return model, optimizer, lite.ema(model, decay=0.9)

    parts = build()
    train(parts, 0, 3)
    for path in ("one.ckpt", "parts"):
        lite.save(f"{folder}/{path}", dict(zip(("model", "optimizer", "ema"), parts, strict=True)))
    expected = train(parts, 3, 6)
    for path in ("one.ckpt", "parts"):
        again = build()
        train(again, 7, 8)
        lite.load(f"{folder}/{path}", dict(zip(("model", "optimizer", "ema"), again, strict=True)))
        answers.append(again[2].num_updates == 3 and same(train(again, 3, 6), expected))
    return answers, [t.tolist() for t in expected]


def test_a_resumed_average_is_exact(tmp_path: Path) -> None:
    """On two ranks, whose averages are equal, out of a file and a directory; raw torch reads it."""
    (first, averages), (second, others) = run_distributed(distributed, str(tmp_path))
    assert first == second == [True, True]
    assert averages == others
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["ema"]["averages"]
    net().load_state_dict(stored, strict=False)
    assert list(stored) == [name for name, _ in net().named_parameters()]


def sharded() -> Any:
    """torch's fully_shard, against the same model whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    Lite(accelerator="cpu")  # joins the job
    whole, model = MLP(torch.float64), MLP(torch.float64)
    torch.manual_seed(0)
    for p in whole.parameters():
        nn.init.normal_(p)
    model.load_state_dict(whole.state_dict())
    fully_shard(model.body[0], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (whole, model)]
    averages = [EMA(m, decay=0.9) for m in (whole, model)]
    answers: list[Any] = []
    for step in range(3):
        x = batch(step).double()  # the same on both ranks, so that no gradient has to be averaged
        for m, optimizer, ema in zip((whole, model), optimizers, averages, strict=True):
            optimizer.zero_grad()
            m(x).pow(2).mean().backward()
            optimizer.step()
            ema.update()
    with torch.no_grad():
        before = model(x)  # leaves gathered weights behind, which swap must not be fooled by
        with averages[0].swap(), averages[1].swap():
            answers.append((whole(x) - model(x)).abs().max().item())
            answers.append((before - model(x)).abs().max().item())
        answers.append(torch.equal(before, model(x)))
    mine, theirs = averages[1].state_dict(), averages[0].state_dict()
    answers.append(all(hasattr(t, "full_tensor") for t in mine["averages"].values()))
    local = sum(t.to_local().numel() for t in mine["averages"].values())
    answers.append(local < sum(t.numel() for t in theirs["averages"].values()))
    # Either one loads into the other.
    fresh = EMA(model, decay=0.9), EMA(whole, decay=0.9)
    fresh[0].load_state_dict(theirs)
    fresh[1].load_state_dict(mine)
    for one in fresh:
        for name, t in one.state_dict()["averages"].items():
            full = t.full_tensor() if hasattr(t, "full_tensor") else t
            answers.append((full - theirs["averages"][name]).abs().max().item() < 1e-12)
    dist.barrier()
    return answers


def test_sharded_weights_are_averaged_shard_by_shard() -> None:
    """fully_shard's DTensors, kept gathered after a forward: the same averages as the whole model's, to 1e-12."""
    for difference, change, restored, is_sharded, is_smaller, *loaded in run_distributed(sharded):
        assert difference < 1e-12
        assert change > 1e-3
        assert restored
        assert is_sharded
        assert is_smaller
        assert loaded == [True] * 8


def test_what_would_go_wrong_is_refused() -> None:
    """Averages in the model's place, replaced parameters, foreign checkpoints, wrong numbers."""
    lite = Lite(accelerator="cpu")
    model = lite.setup(MLP())
    ema = lite.ema(model)
    with ema.swap():
        for call, words in (
            (ema.update, r"ema\.update\(\) within"),
            (ema.state_dict, "in the model's place"),
            (lambda: ema.swap().__enter__(), "is open already"),
        ):
            with pytest.raises(UsageError, match=words):
                call()
    for decay in (1, -0.1, "0.9", True):
        with pytest.raises(ConfigError, match="decay="):
            lite.ema(model, decay=decay)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="MLP"):
        lite.ema(MLP())
    other = lite.ema(lite.setup(nn.Linear(2, 2))).state_dict()
    state = copy.deepcopy(ema.state_dict())
    from lite.loading import restore_object

    with pytest.raises(CheckpointError, match=r"does not fit EMA.*bias"):
        restore_object(ema, other, "ema", strict=True)
    state["averages"]["body.0.bias"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"\[2\] there and \[8\] here"):
        ema.load_state_dict(state)
    model.body[0] = nn.Linear(4, 8)
    with pytest.raises(UsageError, match=r"body\.0\.weight"), ema.swap():
        pass


def step(lite: Lite, model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    lite.backward(model(batch(1, lite.global_rank).to(next(model.parameters()).dtype)).pow(2).mean())
    optimizer.step()


def told(call: Any) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    return str(caught.value)


def within(ema: EMA, *calls: Any) -> None:
    with ema.swap():
        for call in calls:
            call()


def misused(strategy: str, folder: str) -> list[bool]:
    """What would be thrown away at the end of swap: by each way, whether it is told and the own weights are back."""
    lite = Lite(accelerator="cpu", strategy=strategy)
    model = MLP()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True))
    path = f"{folder}/{strategy}.ckpt"
    lite.save(path, {"model": model})
    step(lite, model, optimizer)
    ema = lite.ema(model, decay=0.5)
    state = ema.state_dict()
    step(lite, model, optimizer)
    before = values(model)
    answers = []

    def is_told(words: str, *calls: Any) -> None:
        answers.append(words in told(lambda: within(ema, *calls)) and same(values(model), before))

    is_told("changed within ema.swap() (body.0.", lambda: step(lite, model, optimizer))
    is_told("changed within ema.swap() (body.2.bias)", lambda: model.body[2].bias.data.add_(1))
    with pytest.raises(KeyError), ema.swap():  # what is on its way already is what counts
        step(lite, model, optimizer)
        raise KeyError
    answers.append(same(values(model), before))
    is_told("averages can't be loaded within", lambda: ema.load_state_dict(state))
    averaged = []
    for words, call in (
        ("lite.load of a", lambda: lite.load(path, {"model": model})),
        ("lite.load of a", lambda: lite.load(f"{folder}/none.ckpt", {"whole": nn.ModuleList([model])})),
        ("lite.load_raw of a", lambda: lite.load_raw(path, model.body)),
        ("lite.teardown() of a", lite.teardown),
    ):
        with ema.swap():
            inside = values(model)
            answers.append(words in told(call) and same(values(model), inside))
            averaged.append(inside)
        answers.append(same(values(model), before))
    answers += [same(inside, averaged[0]) and not same(inside, before) for inside in averaged]
    lite.load(path, {"model": model})
    answers.append(not same(values(model), before))
    return answers


def test_what_the_end_of_swap_would_undo_is_told(tmp_path: Path) -> None:
    """Steps, also fused ones, and writes by hand at its end; loads and teardown before anything changes."""
    for answers in (misused("single", str(tmp_path)), *run_distributed(misused, "fsdp", str(tmp_path))):
        assert answers == [True] * 17


def interrupted(strategy: str) -> bool:
    lite = Lite(accelerator="cpu", strategy=strategy)
    model = MLP()
    lite.setup(model)
    ema = lite.ema(model, decay=0.5)
    with torch.no_grad():
        model.body[0].weight.fill_(7.0)
    with pytest.raises(KeyError), ema.swap():
        try:
            raise KeyError
        finally:
            lite.teardown()
    return type(model) is MLP and bool((model.body[0].weight == 7.0).all())


def test_a_teardown_for_an_error_within_swap_gives_the_models_own_weights_back() -> None:
    """The error stays the one that is raised; also where teardown exchanges the parameters."""
    assert [interrupted("single"), *run_distributed(interrupted, "fsdp")] == [True] * 3


def test_what_comes_back_by_itself_within_swap_is_no_change() -> None:
    """Another average's swap within the block, NaN, buffers, and weights that are put back."""
    lite = Lite(accelerator="cpu", precision="bf16-true")
    model = lite.setup(net())
    first, second = lite.ema(model, decay=0.5), lite.ema(model, decay=0.9, buffers=True)
    with torch.no_grad():
        model[0].bias.fill_(float("nan"))
    for ema in (first, second):
        ema.update()
    before = [p.detach().clone() for p in model.parameters()]
    with first.swap(), torch.no_grad():
        assert model[0].bias.isnan().all()
        with second.swap():
            model(batch(0).bfloat16())  # BatchNorm's statistics, in training
        model[2].weight.mul_(2).div_(2)
    for mine, wanted in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(mine.detach(), wanted, rtol=0, atol=0, equal_nan=True)
    column = nn.ParameterList([nn.Parameter(torch.ones(5, 3)[:1, 0])])  # of one element, with a stride
    lite = Lite(accelerator="cpu")
    with lite.ema(lite.setup(column), decay=0.5).swap():
        assert column[0].item() == 1
