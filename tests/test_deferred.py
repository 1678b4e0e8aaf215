"""Models made without memory: setup makes the values that their constructors would have made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lite import ConfigError, FSDPStrategy, Lite
from lite.deferred import Recording
from lite.sharded import is_sharded, local, whole
from tests.contracts.test_numbers import STRATEGIES, train_raw
from tests.support.models import MLP, TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed


class Odd(nn.Module):
    """All kinds of beginnings."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = TinyGPT(tied=True)
        self.norm = nn.BatchNorm1d(4)
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))
        self.register_buffer("table", 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8)), persistent=False)
        self.register_buffer("values", torch.tensor([1.0, 2.0, 3.0]))
        self.mixed = nn.Parameter(torch.randn(3, 4).T.contiguous())
        with torch.no_grad():
            self.mixed[0].fill_(2.0)
            self.mixed[:, 1].normal_()
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)  # these two return at once from a meta tensor
        nn.init.orthogonal_(self.conv.weight)
        self.half = nn.Linear(2, 2).to(torch.bfloat16)


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: whole(v).detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_values_are_those_of_the_constructor_bit_for_bit(precision: str) -> None:
    """Weights, buffers, dtypes, ties, and the random numbers that follow; whichever of two models is set up first."""
    lite = Lite(accelerator="cpu", precision=precision)
    made = []
    for empty_init in (None, "meta"):
        torch.manual_seed(7)
        with lite.init_module(empty_init=empty_init):
            first = Odd()
        with lite.init_module(empty_init=empty_init):
            second = MLP()
        assert all(p.is_meta for p in first.parameters()) == (empty_init == "meta")
        after = torch.rand(3)
        lite.setup(second)
        lite.setup(first)
        made.append((first, second, after))
    for mine, wanted in zip(made[1], made[0], strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, wanted)  # type: ignore[arg-type]
            continue
        expected = tensors(wanted)  # type: ignore[arg-type]
        for key, value in tensors(mine).items():
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, expected[key]), key
    assert made[1][0].gpt.head.weight is made[1][0].gpt.tokens.weight


def deferred_training(name: str) -> tuple[list[float], dict[str, torch.Tensor], bool]:
    """The table's plain loop, with a model that was made on the meta device."""
    _, parts, make = STRATEGIES[name]
    lite = Lite(accelerator="cpu", strategy=make(), precision="64-true")
    torch.manual_seed(3 + (lite.global_rank if name != "single" else 0))  # rank 0's values count
    with lite.init_module(empty_init="meta"):
        # The table's model is made in float32, and converted.
        torch.set_default_dtype(torch.float32)
        model = TinyGPT(torch.float64, tied=name != "tp")
    lite.setup(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    lite.setup_optimizers(optimizer)
    losses = []
    part = lite.strategy.data_shards(lite.world_size, lite.global_rank)[1]
    for _ in range(2):
        for start in range(0, 16, 4):
            (tokens,) = sentences(16)[start + part * 4 // parts : start + (part + 1) * 4 // parts]
            loss = next_token_loss(model(tokens[:, :-1]), tokens)
            lite.backward(loss)
            losses.append(lite.all_reduce(loss.detach()).item())
            optimizer.step()
            optimizer.zero_grad()
    weights = {k: whole(v).clone() for k, v in model.state_dict().items()}
    lite.teardown()
    return losses, weights, torch.equal(model.state_dict()["head.weight"], weights["head.weight"])


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "fsdp hybrid", "tp", "fsdp x tp", "ddp x tp"])
def test_training_goes_as_from_an_eager_model(name: str) -> None:
    """Tied weights included; ranks that were seeded differently get rank 0's values."""
    world_size = STRATEGIES[name][0]
    run = (
        [deferred_training(name)]
        if world_size == 1
        else run_distributed(deferred_training, name, world_size=world_size)
    )
    losses, weights = train_raw("plain" if name == "tp" else "tied")
    for mine, mine_weights, torn_down in run:
        assert mine == pytest.approx(losses, abs=1e-10)
        assert torn_down
        for key, wanted in weights.items():
            torch.testing.assert_close(mine_weights[key], wanted, rtol=0, atol=1e-10)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.body(x)) * self.scale


def by_reset_parameters(folder: Path) -> dict[str, Any]:
    lite = Lite(accelerator="cpu", strategy="fsdp")
    torch.manual_seed(lite.global_rank)
    with torch.device("meta"):
        model = Scaled()
    lite.setup(model)
    lite.backward(model(torch.ones(4, 4)).sum())
    mine = tensors(model)
    with lite.init_module(empty_init="meta"):
        other = Scaled()
    lite.setup(other)
    lite.save(folder / "a", {"model": model})
    lite.load(folder / "a", {"model": other})
    same = all(torch.equal(v, mine[k]) for k, v in tensors(other).items())
    return {"tensors": mine, "loaded": same, "parts": sum(local(p).nbytes for p in model.parameters())}


def test_reset_parameters_fills_what_was_not_recorded(tmp_path: Path) -> None:
    """Made under torch's own meta device: whole tensors are filled, and cut; a checkpoint loads into such a model."""
    first, second = run_distributed(by_reset_parameters, tmp_path)
    for key, value in first["tensors"].items():
        assert torch.equal(value, second["tensors"][key]), key
        assert torch.isfinite(value).all()
    assert first["tensors"]["scale"].item() == 3.0
    assert first["tensors"]["body.weight"].abs().max() <= 0.5  # the bound of a Linear with 4 inputs
    assert first["tensors"]["norm.running_var"].min() > 0.8
    assert first["loaded"]
    assert first["parts"] + second["parts"] == sum(p.nbytes for p in Scaled().parameters())


def test_one_tensor_at_a_time_is_whole() -> None:
    """What is done with is let go of before the next one is made."""
    recording = Recording(torch.device("cpu"))
    with torch.device("meta"), recording:
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    import weakref

    from lite.deferred import _Meta

    alive: list[int] = []
    made: list[Any] = []

    def deliver(number: int, value: torch.Tensor) -> None:
        made.append(weakref.ref(value.untyped_storage()))
        alive.append(sum(storage() is not None for storage in made))

    recording.play(recording.start, deliver, [_Meta.of(p) for p in model.parameters()])
    assert alive == [1] * 5


def test_misuse() -> None:
    """Each with the remedy."""
    lite = Lite(accelerator="cpu")
    with (
        pytest.raises(ConfigError, match="empty_init=True is not known; use 'meta'"),
        lite.init_module(empty_init=True),
    ):  # type: ignore[arg-type]
        pass
    with lite.init_module(empty_init="meta"):
        model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"set the model up first, .*lite\.setup_optimizers"):
        lite.setup(model, optimizer)
    with torch.no_grad():
        model.body[0].weight.fill_(1.0)
    with pytest.raises(ConfigError, match="was written to on the meta device"):
        lite.setup(model)

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

    with torch.device("meta"):
        bare = Bare()
    with pytest.raises(ConfigError, match=r"has 'w' of a Bare on the meta device.*reset_parameters\(\)"):
        lite.setup(bare)


def offloaded() -> list[bool]:
    lite = Lite(accelerator="cpu", strategy=FSDPStrategy(cpu_offload=True, reshard_after_forward=True))
    model = TinyGPT()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    for _ in range(2):
        (tokens,) = sentences(2)[:]
        lite.backward(next_token_loss(model(tokens[:, :-1]), tokens))
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [is_sharded(p) for p in model.parameters()]


def test_offloading_to_the_cpu_trains() -> None:
    """On the CPU it changes nothing, and asks for no pinned memory."""
    assert all(all(flags) for flags in run_distributed(offloaded))
