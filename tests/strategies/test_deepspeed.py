"""DeepSpeedStrategy: what it refuses, and what a loop may do under it."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import re
import warnings
import weakref
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lite import CheckpointError, ConfigError, DeepSpeedStrategy, Lite, MissingExtraError, UsageError
from lite.accelerators import DeviceProbe
from lite.plan import resolve
from lite.strategies.deepspeed_wiring import initialize
from lite.trainer import LightningModule, Trainer
from lite.trainer.callbacks.model_summary import summarize
from tests.contracts.test_numbers import FLOAT32_TOLERANCE, WITH_DEEPSPEED, deepspeed
from tests.support.models import MLP, VAE, TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed, run_python

DIVIDED = (1, 2, 3)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_without_the_package_it_says_what_to_install(name: str) -> None:
    """Before any process starts."""
    with pytest.raises(MissingExtraError, match=r"pip install lite\[deepspeed\]"):
        Lite(accelerator="cpu", strategy=name)


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"stage": 4}, ["stage=4", "0, 1, 2, 3"]),
    ({"stage": True}, ["stage=True"]),
    ({"stage": 2.5}, ["stage=2.5"]),
    ({"config": 3}, ["config=3", "a dict, or the path of a JSON file"]),
    ({"config": "nowhere.json"}, ["config='nowhere.json'", "can't be read", "No such file"]),
    ({"stage": 1, "config": {"zero_optimization": {"stage": 2}}}, ["stage=1", "{'stage': 2}", "one of the two"]),
    ({"config": {"zero_optimization": 2}}, ["'zero_optimization' is 2", "a dict"]),
    ({"config": {"fp16": {"enabled": True}}}, ["'fp16'", "precision='16-mixed'"]),
    ({"config": {"bf16": {"enabled": True}}}, ["'bf16'", "precision='bf16-mixed'"]),
    ({"config": {"torch_autocast": {"enabled": True}}}, ["'torch_autocast'", "precision="]),
    ({"config": {"gradient_clipping": 1.0}}, ["'gradient_clipping': 1.0", "lite.clip_gradients"]),
    ({"config": {"optimizer": {"type": "AdamW"}}}, ["'optimizer'", "lite.setup(model, optimizer)"]),
    ({"config": {"scheduler": {"type": "WarmupLR"}}}, ["'scheduler'", "lite.setup(model, optimizer, scheduler)"]),
    ({"config": {"gradient_accumulation_steps": 4}}, ["'gradient_accumulation_steps': 4", "lite.accumulate"]),
    ({"config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, ["offload", "cpu_offload=True"]),
    ({"stage": 1, "config": {"zero_optimization": {"overlap_comm": True}}}, ["overlap_comm", "stage=2"]),
    ({"config": {"zero_optimisation": {}}}, ["'zero_optimisation'", "did you mean 'zero_optimization'?"]),
    ({"config": {"mine": 1}}, ["'mine'", "leave it out"]),
    ({"config": {"bf16": {"enabled": True, "x": "auto"}}}, ["'bf16'", "precision='bf16-mixed'"]),
    ({"config": {"train_batch_size": 7}}, ["'train_batch_size': 7", "the batch_size of your DataLoader"]),
    ({"config": {"train_micro_batch_size_per_gpu": 0}}, ["'train_micro_batch_size_per_gpu': 0", "above 0"]),
    ({"config": {"prescale_gradients": True}}, ["'prescale_gradients': True", "leave it out"]),
    ({"config": {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}}, ["zenflow", "cpu_offload=True"]),
]


@pytest.mark.parametrize(("arguments", "parts"), WRONG)
def test_wrong_arguments_are_told(arguments: dict[str, Any], parts: list[str]) -> None:
    """With the key that is wrong and what to use instead, before any process starts and DeepSpeed is asked for."""
    with pytest.raises(ConfigError) as caught:
        DeepSpeedStrategy(**arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_file_that_is_no_configuration_is_told(tmp_path: Path) -> None:
    """No JSON, or JSON of something else."""
    path = tmp_path / "config.json"
    for text, part in (("{", "is no JSON"), ("[1]", "holds a list")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=part):
            DeepSpeedStrategy(config=path)


@WITH_DEEPSPEED
def test_a_file_and_what_says_nothing_are_taken(tmp_path: Path) -> None:
    """The stage may be the file's; "auto" and what is off contradict nothing."""
    path = tmp_path / "config.json"
    off = {"fp16": {"enabled": False}, "gradient_clipping": "auto", "gradient_accumulation_steps": 1}
    path.write_text(json.dumps({**off, "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    assert DeepSpeedStrategy(config=str(path)).stage == 3
    assert DeepSpeedStrategy().stage == 2
    as_hugging_face = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}, "stage3_prefetch_bucket_size": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": 2000,
    }
    strategy = DeepSpeedStrategy(config=as_hugging_face)
    assert strategy.stage == 3
    assert "auto" not in repr(strategy._config)
    assert [DeepSpeedStrategy(stage).divides_models for stage in range(4)] == [False, True, True, True]


@pytest.mark.parametrize(
    ("found", "fits"), [("0.18.9", False), ("0.19.0rc1", True), ("0.19.8+git", True), ("1.0", True)]
)
def test_an_older_package_is_told(found: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its inner parts are others."""
    monkeypatch.setattr("lite.strategies.deepspeed_process.find_spec", lambda name: True)
    monkeypatch.setattr("lite.strategies.deepspeed_process.version", lambda name: found)
    with nullcontext() if fits else pytest.raises(MissingExtraError, match=rf"deepspeed {found} .* 0.19 or later"):
        DeepSpeedStrategy()


@WITH_DEEPSPEED
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_precisions_that_are_not_float32_are_refused(precision: str) -> None:
    """Before any process starts."""
    with pytest.raises(ConfigError, match=rf"precision='{precision}' can't run .* use '32-true', 'bf16-mixed'"):
        resolve({"strategy": DeepSpeedStrategy(), "precision": precision}, {}, DeviceProbe())


@WITH_DEEPSPEED
def test_it_is_imported_by_processes_that_use_it_alone() -> None:
    """Neither by `import lite` nor by a Lite of one process."""
    code = (
        "import sys, lite; lite.Lite(accelerator='cpu'); lite.Lite(accelerator='cpu', strategy='deepspeed'); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


def start(stage: int) -> Lite:
    return Lite(accelerator="cpu", strategy=deepspeed(stage))


def half(number: int) -> torch.Tensor:
    """Half of a batch of 4 sequences; numbers 0 and 1 are of the first."""
    (tokens,) = sentences(16)[2 * number : 2 * number + 2]
    return tokens


def losses(model: TinyGPT, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
    return [next_token_loss(model(tokens[:, :-1]), tokens) for tokens in (first, second)]


def many_backwards(stage: int) -> dict[str, torch.Tensor]:
    lite = start(stage)
    torch.manual_seed(3)
    model, optimizer = lite.setup(model := TinyGPT(), torch.optim.AdamW(model.parameters(), lr=0.02))
    for step in range(4):
        mine = half(2 * step + lite.global_rank), half(2 * step + 1 - lite.global_rank)
        one, two = losses(model, *mine)
        if step == 1:
            lite.backward(one + two)
        else:
            lite.backward(one)
            if step == 2:
                lite.clip_gradients(model, optimizer, max_norm=0.1)
            lite.backward(two)
        optimizer.step()
        optimizer.zero_grad()
        lite.backward(losses(model, *mine)[0])  # and thought better of it
        optimizer.zero_grad() if step % 2 else model.zero_grad()
    return {key: value.clone() for key, value in model.state_dict().items()}


def raw_many_backwards() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = TinyGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(4):
        batch = torch.cat([half(2 * step), half(2 * step + 1)])
        for again in range(2):
            next_token_loss(model(batch[:, :-1]), batch).backward()
            if step == 2 and not again:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", DIVIDED)
def test_backwards_add_up_as_raw(stage: int) -> None:
    """Two forwards before two backwards, or before one; clipping in between; gradients that are dropped.

    In float32, to the tolerance of the contract's numbers.
    """
    expected = raw_many_backwards()
    for weights in run_distributed(many_backwards, stage):
        for key, wanted in expected.items():
            torch.testing.assert_close(weights[key], wanted, rtol=0, atol=FLOAT32_TOLERANCE)


def gan(lite: Lite | None, noises: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    maker, critic = nn.Linear(2, 4), nn.Linear(4, 1)
    makers, critics = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (maker, critic))
    if lite is not None:
        lite.setup(maker, makers)
        lite.setup(critic, critics)
    for noise in noises:
        critics.zero_grad()
        loss = critic(maker(noise).detach()).mean() - critic(noise.repeat(1, 2)).mean()
        (lite.backward if lite is not None else torch.Tensor.backward)(loss)
        critics.step()
        makers.zero_grad()
        loss = -critic(maker(noise)).mean()
        (lite.backward if lite is not None else torch.Tensor.backward)(loss)
        makers.step()
    if lite is not None:
        lite.teardown()
    return [p.detach().clone() for m in (maker, critic) for p in m.parameters()]


def divided_gan(stage: int) -> list[torch.Tensor]:
    lite = start(stage)
    return gan(lite, [torch.full((2, 2), float(step + lite.global_rank)) for step in range(3)])


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", DIVIDED)
def test_two_models_train_each_with_its_optimizer(stage: int) -> None:
    """A GAN's pattern, in float32: a dozen additions of numbers of about 1."""
    noises = [torch.cat([torch.full((2, 2), float(step + rank)) for rank in range(2)]) for step in range(3)]
    for mine in run_distributed(divided_gan, stage):
        for value, wanted in zip(mine, gan(None, noises), strict=True):
            torch.testing.assert_close(value, wanted, rtol=0, atol=2e-6)


class Fork(nn.Module):
    """Uses one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, left: bool) -> torch.Tensor:
        return (self.left if left else self.right)(x)


def take_turns(stage: int) -> tuple[list[set[str]], list[str]]:
    lite = start(stage)
    model, optimizer = lite.setup(model := Fork(), torch.optim.SGD(model.parameters(), lr=0.1))
    changed = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for left in (True, False, True):
            before = {key: value.clone() for key, value in model.state_dict().items()}
            optimizer.zero_grad()
            lite.backward(model(torch.ones(2, 4), left).sum())
            optimizer.step()
            changed.append({k for k, v in model.state_dict().items() if not torch.equal(v, before[k])})
    return changed, [str(message.message) for message in caught if message.category is UserWarning]


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", DIVIDED)
def test_a_parameter_without_a_gradient_gets_zeros_and_is_told_of_once(stage: int) -> None:
    """Not the gradient of an earlier step, which stage 3 still has."""
    left, right = ({f"{side}.{name}" for name in ("weight", "bias")} for side in ("left", "right"))
    for changed, messages in run_distributed(take_turns, stage):
        assert changed == [left, right, left]
        assert [message.split(" got no gradient")[0] for message in messages] == ["right.weight, right.bias"]


def keep_and_give_back(stage: int, folder: Path) -> dict[str, Any]:
    """An optimizer that has state before setup; an average in a checkpoint; objects of the user's; teardown."""
    lite = start(stage)
    torch.manual_seed(3)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.linspace(0, 1, 8).view(2, 4)
    model.loss(x).backward()
    optimizer.step()
    optimizer.zero_grad()
    parameters, attributes = list(model.parameters()), set(vars(model))
    model, optimizer = lite.setup(model, optimizer)
    ema = lite.ema(model, decay=0.5)
    for step in range(4):
        optimizer.zero_grad()
        lite.backward(model.loss(x) if step % 2 else (model.decode(model.encode(x)) - x).pow(2).mean())
        optimizer.step()
        ema.update()
        if step == 1:
            lite.save(folder / f"{stage}.ckpt", {"model": model, "optimizer": optimizer, "ema": ema})
    model.saved_actions.append(1)
    weights, averages = model.state_dict(), ema.state_dict()["averages"]
    lite.load(folder / f"{stage}.ckpt", {"model": model, "optimizer": optimizer, "ema": ema})
    for step in range(2, 4):
        optimizer.zero_grad()
        lite.backward(model.loss(x) if step % 2 else (model.decode(model.encode(x)) - x).pow(2).mean())
        optimizer.step()
        ema.update()
    for again, first in ((model.state_dict(), weights), (ema.state_dict()["averages"], averages)):
        assert all(torch.equal(again[key], value) for key, value in first.items())
    lite.check_sync()
    lite.teardown()
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert all(type(p) is nn.Parameter and not vars(p) for p in parameters)
    assert type(model) is VAE
    assert set(vars(model)) == attributes, set(vars(model)) ^ attributes
    assert model.saved_actions == [1]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any(m._state_dict_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    assert type(optimizer) is torch.optim.Adam
    optimizer.zero_grad()
    model.loss(x).backward()
    optimizer.step()
    state = optimizer.state[parameters[0]]
    return {"weights": [p.tolist() for p in parameters], "step": state["step"].item(), "averages": averages}


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", DIVIDED)
def test_what_is_set_up_stays_the_users(stage: int, tmp_path: Path) -> None:
    """State from before setup is gone on from, and given back; what was added to the model stays, DeepSpeed's goes.

    In float32, to the tolerance of the contract's numbers.
    """
    torch.manual_seed(3)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    x = torch.linspace(0, 1, 8).view(2, 4)
    averages: dict[str, torch.Tensor] = {}
    for step in range(6):
        if step == 1:
            averages = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        if 1 <= step < 5:
            first = step == 1  # an average begins with its first update
            averages = {k: v.clone() if first else 0.5 * (averages[k] + v) for k, v in model.state_dict().items()}
    for result in run_distributed(keep_and_give_back, stage, tmp_path):
        assert result["step"] == 6
        for mine, wanted in zip(result["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(mine), wanted.detach(), rtol=0, atol=FLOAT32_TOLERANCE)
        assert result["averages"].keys() == averages.keys()


def wrong_calls(stage: int) -> dict[str, str]:
    told: dict[str, str] = {}

    def tell(what: str, call: Any) -> None:
        try:
            call()
        except (ConfigError, RuntimeError) as error:
            told[what] = f"{type(error).__name__}: {error}"

    def made(kind: Any = torch.optim.SGD, **options: Any) -> tuple[Lite, MLP, Any]:
        model = MLP()
        return start(stage), model, kind(model.parameters(), **{"lr": 0.1, **options})

    x = torch.ones(2, 4)
    lite, model, optimizer = made(torch.optim.LBFGS)
    tell("lbfgs", lambda: lite.setup(model, optimizer))
    lite, model, optimizer = made(torch.optim.Adagrad)
    tell("adagrad", lambda: lite.setup(model, optimizer))
    halves = [torch.optim.SGD(list(model.parameters())[i : i + 2], lr=0.1) for i in (0, 2)]
    tell("two optimizers", lambda: lite.setup(model, *halves))
    tell("float64", lambda: lite.setup(MLP(torch.float64)))
    for what, value in (("scalar", torch.tensor(2.0)), ("transposed", torch.ones(3, 2).t()), ("empty", torch.ones(0))):
        odd = MLP()
        odd.mine = nn.Parameter(value)
        if stage == 3 or what != "empty":
            tell(what, lambda: lite.setup(odd))  # noqa: B023
    other = MLP()
    both = torch.optim.SGD([*model.parameters(), *other.parameters()], lr=0.1)
    lite.setup(other)
    tell("two models", lambda: lite.setup(model, both))
    tell("no optimizer", lambda: lite.backward(other(x).sum()))
    if stage == 3:
        tell("early average", lambda: lite.ema(other))

    lite, model, optimizer = made()
    lite.setup(model, optimizer)
    tell("copied", lambda: copy.deepcopy(nn.Sequential(model)))
    tell("pickled", lambda: pickle.dumps(model))
    tell("copied optimizer", lambda: copy.deepcopy(optimizer))
    tell("another optimizer", lambda: lite.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1)))
    tell("added group", lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}))
    tell("inputs", lambda: lite.backward(model(x).sum(), inputs=[model.body[0].weight]))
    tell("raw loss", lambda: lite.backward(nn.Linear(4, 1)(x).sum()))
    wrong = {**model.state_dict(), "body.0.weight": torch.ones(2, 2)}
    tell("wrong shape", lambda: model.load_state_dict(wrong))
    window = lite.accumulate(model, steps=2)
    with window():
        lite.backward(model(x).sum())
    tell("open window", window.state_dict)
    model.body[0].requires_grad_(False)
    tell("frozen later", lambda: model(x))
    return told


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", [2, 3])
def test_wrong_calls_are_told(stage: int) -> None:
    """On every rank alike, with what to do instead."""
    first, second = run_distributed(wrong_calls, stage)
    assert first == second
    expected = {
        "lbfgs": "ConfigError: LBFGS flattens .* strategy='deepspeed'; use an optimizer that works element by element",
        "adagrad": "ConfigError: Adagrad can't train under strategy='deepspeed'",
        "two optimizers": "ConfigError: SGD leaves out body.2.weight, body.2.bias of MLP, .* param_groups",
        "float64": r"ConfigError: parameter 'body.0.weight' of this MLP is torch.float64, .* model.float\(\)",
        "scalar": r"ConfigError: parameter 'mine' .* is a scalar, .*nn.Parameter\(value.reshape\(1\)\)",
        "transposed": r"ConfigError: parameter 'mine' .* lies in memory in another order .*contiguous_format\)",
        "copied": r"UsageError: this MLP is in use by DeepSpeed, .* can't be pickled or copied .* lite.teardown\(\)",
        "pickled": "UsageError: this MLP is in use by DeepSpeed",
        "copied optimizer": "UsageError: this SGD is in use by DeepSpeed",
        "two models": "ConfigError: SGD trains MLP, .* make one for each",
        "no optimizer": r"UsageError: lite.backward through MLP before its optimizer .* lite.setup\(model, optimizer\)",
        "another optimizer": "UsageError: MLP has an optimizer that is set up already",
        "added group": "UsageError: SGD.add_param_group after lite.setup",
        "inputs": r"UsageError: lite.backward\(loss, inputs=\[...\]\)",
        "raw loss": "UsageError: lite.backward got a loss that depends on a parameter .* of a model that is set up",
        "wrong shape": "size mismatch for body.0.weight",
        "open window": "UsageError: the gradients of an open accumulation window can't be saved",
        "frozen later": "UsageError: requires_grad of body.0.weight, body.0.bias was changed after lite.setup",
    }
    if stage == 3:
        expected["empty"] = r"ConfigError: parameter 'mine' .* is empty, of shape \(0,\), .* use stage=2"
        expected["early average"] = "UsageError: lite.ema of a MLP whose optimizer is not set up"
    for what, pattern in expected.items():
        assert re.search(pattern, first.get(what, "nothing"), re.DOTALL), (what, first.get(what))


def again(lite: Lite | None, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """Train for two steps, in a setup each, and tell the optimizer's momenta in each."""
    torch.manual_seed(3)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    momenta = []
    for _ in range(2):
        if lite is not None:
            set_up_at_the_second_try(lite, model, optimizer)
            gc.collect()  # finds the engines of the try and of the setup before
        loss = model(x).pow(2).mean()
        (lite.backward if lite is not None else torch.Tensor.backward)(loss)
        optimizer.step()
        optimizer.zero_grad()
        momenta.append([one["momentum_buffer"].clone() for one in optimizer.state_dict()["state"].values()])
        if lite is not None:
            lite.teardown()
    return momenta


def set_up_at_the_second_try(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not lite.strategy.divides_models:  # in stage 0 DeepSpeed knows no optimizer
        lite.setup(model, optimizer)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("deepspeed.runtime.engine.DeepSpeedEngine._configure_lr_scheduler", fail)  # after the division
        with pytest.raises(RuntimeError, match="within DeepSpeed"):
            lite.setup(model, optimizer)
    lite.setup_optimizers(optimizer)


def set_up_again(stage: int) -> list[list[torch.Tensor]]:
    lite = start(stage)
    gc.disable()
    try:
        return again(lite, torch.linspace(0, 1, 16).view(4, 4)[2 * lite.global_rank :][:2])
    finally:
        gc.enable()


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", [0, *DIVIDED])
def test_a_second_setup_keeps_the_optimizers_state(stage: int) -> None:
    """Whenever the garbage collector finds the first one's engine, which DeepSpeed destroys once more then.

    In float32, to the tolerance of the contract's numbers.
    """
    expected = again(None, torch.linspace(0, 1, 16).view(4, 4))
    for momenta in run_distributed(set_up_again, stage):
        for mine, wanted in zip(momenta, expected, strict=True):
            for value, raw in zip(mine, wanted, strict=True):
                torch.testing.assert_close(value, raw, rtol=0, atol=FLOAT32_TOLERANCE)


def lose_places(stage: int) -> list[str]:
    """What a second engine of the same parameters does as it is destroyed."""
    lite = start(stage)
    model, optimizer = lite.setup(model := MLP(), torch.optim.Adam(model.parameters()))
    lite.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    before = optimizer.state_dict()
    for parameter in model.parameters():
        parameter._hp_mapping = None  # type: ignore[attr-defined]
    told = []
    for call in (optimizer.state_dict, lambda: optimizer.load_state_dict(before)):
        with pytest.raises(UsageError) as caught:
            call()
        told.append(str(caught.value))
    return told


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", [1, 2])
def test_state_whose_place_is_lost_is_told(stage: int) -> None:
    """Zeros in its stead would be trained on with."""
    for told in run_distributed(lose_places, stage):
        assert len(told) == 2
        assert all("DeepSpeed has lost where this rank's part of body." in message for message in told), told


def load_after_a_step(stage: int, folder: Path) -> None:
    """With small parameters that stage 3 keeps whole between steps, as is its default."""
    lite = Lite(accelerator="cpu", strategy=DeepSpeedStrategy(stage))
    torch.manual_seed(3)
    raw = MLP().state_dict()
    model, optimizer = lite.setup(model := MLP(), torch.optim.Adam(model.parameters(), lr=0.1))
    lite.save(folder / f"{stage}.ckpt", {"model": model, "optimizer": optimizer})
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.linspace(0, 1, 8).view(2, 4) + lite.global_rank
    for wanted in (raw, saved):
        lite.backward(model(x).sum())
        optimizer.step()
        if wanted is raw:
            model.load_state_dict(raw)
        else:
            lite.load(folder / f"{stage}.ckpt", {"model": model, "optimizer": optimizer})
        assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            output = model(x)
        torch.testing.assert_close(output, torch.func.functional_call(MLP(), wanted, x), rtol=0, atol=1e-6)
    lite.teardown()


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", DIVIDED)
def test_whole_weights_are_loaded_after_a_step(stage: int, tmp_path: Path) -> None:
    """By the model's own load_state_dict, and by lite.load. Outputs are those of the same weights, to float32's."""
    run_distributed(load_after_a_step, stage, tmp_path)


def overflow_without_a_scale() -> tuple[list[bool], list[str]]:
    lite = start(3)
    model, optimizer = lite.setup(model := MLP(), torch.optim.SGD(model.parameters(), lr=0.1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        unchanged = []
        for factor in (torch.inf, 1.0):
            before = {key: value.clone() for key, value in model.state_dict().items()}
            optimizer.zero_grad()
            lite.backward(model(torch.ones(2, 4)).sum() * (factor if lite.global_rank else 1.0))
            optimizer.step()
            unchanged.append(all(torch.equal(value, before[key]) for key, value in model.state_dict().items()))
    return unchanged, [str(message.message) for message in caught if message.category is UserWarning]


@WITH_DEEPSPEED
def test_a_step_that_deepspeed_leaves_out_is_told() -> None:
    """Stage 3 does so with inf or NaN, also without a loss scale."""
    for unchanged, messages in run_distributed(overflow_without_a_scale):
        assert unchanged == [True, False]
        assert len(messages) == 1
        assert "DeepSpeed has left out the step of SGD" in messages[0]


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: dict[str, Any] = optimizer.state_dict()
    return {
        "groups": [{**group, "params": len(group["params"])} for group in state["param_groups"]],
        "state": {n: {key: torch.as_tensor(v).tolist() for key, v in one.items()} for n, one in state["state"].items()},
    }


def half_stepped(**options: Any) -> tuple[Fork, torch.optim.Optimizer]:
    """One of whose layers' parameters have state, and the others' have none."""
    torch.manual_seed(1)
    model = Fork()
    optimizer = torch.optim.Adam(model.parameters(), **{"lr": 0.1, **options})
    model(torch.ones(2, 4), True).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def refused(stage: int, folder: Path) -> dict[str, str]:
    """What is refused, with everything as it was before; and what a failure within DeepSpeed leaves."""
    told: dict[str, str] = {}

    def tell(what: str, call: Any) -> None:
        with pytest.raises((ConfigError, CheckpointError, UsageError, RuntimeError)) as caught:
            call()
        told[what] = f"{caught.type.__name__}: {caught.value}"

    # setup
    lite = start(stage)
    model, optimizer = half_stepped()
    before = state_of(optimizer)
    tell("setup", lambda: lite.setup(model, optimizer))
    typo = {"zero_optimization": {"stgae": 3, "contiguous_gradients": 5}}
    mistaken = Lite(accelerator="cpu", strategy=DeepSpeedStrategy(stage, typo))
    tell("typo", lambda: mistaken.setup(model, optimizer))
    assert type(model) is Fork
    assert type(optimizer) is torch.optim.Adam
    assert state_of(optimizer) == before

    # a failure within DeepSpeed
    whole = torch.optim.Adam(model.parameters(), lr=0.1)
    (model(torch.ones(2, 4), True) + model(torch.ones(2, 4), False)).sum().backward()
    whole.step()
    whole.zero_grad()
    torch.optim.lr_scheduler.StepLR(whole, 1)  # which patches step
    values, before = [p.detach().clone() for p in model.parameters()], state_of(whole)
    attributes = set(vars(whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lite.strategies.deepspeed_state.Parts._link_state", fail)
        tell("within", lambda: lite.setup(model, whole))
    assert type(whole) is torch.optim.Adam
    assert set(vars(whole)) == attributes
    assert state_of(whole) == before
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), values, strict=True))
    lite.setup_optimizers(whole)
    assert state_of(whole) == before
    lite.backward((model(torch.ones(2, 4), True) + model(torch.ones(2, 4), False)).sum())
    whole.step()

    tell("join", lambda: lite.join(model))

    # loading
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = state_of(whole)
    other, its = half_stepped(lr=0.7)
    tell("load_state_dict", lambda: whole.load_state_dict(its.state_dict()))
    path = folder / f"{stage}-{lite.global_rank}.pt"
    torch.save({"model": other.state_dict(), "optimizer": its.state_dict()}, path)
    tell("load", lambda: lite.load(path, {"model": model, "optimizer": whole}))
    assert state_of(whole) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    lite.teardown()
    assert type(model) is Fork
    return told


def fail(*args: Any) -> None:
    raise RuntimeError("within DeepSpeed")


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_refused_stays_as_it_was(stage: int, tmp_path: Path) -> None:
    """A setup and a load are done whole, or not at all."""
    first, second = run_distributed(refused, stage, tmp_path)
    assert first == second
    uneven = "'right.weight' has no optimizer state, but others of its param_group have"
    expected = {
        "setup": f"ConfigError: Adam has state: {uneven}",
        "typo": "ConfigError: config is refused by DeepSpeed: .*'stgae' .*Extra inputs",
        "within": "RuntimeError: within DeepSpeed",
        "join": "UsageError: lite.join is for DDP, and strategy='deepspeed' .*equally many batches",
        "load_state_dict": f"CheckpointError: {uneven}",
        "load": f"CheckpointError: {uneven}",
    }
    for what, pattern in expected.items():
        assert re.search(pattern, first[what], re.DOTALL), (what, first[what])


def refused_backwards(lite: Lite, stage: int) -> tuple[list[torch.Tensor], list[Any]]:
    torch.manual_seed(3)
    model, optimizer = lite.setup(model := MLP(), torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.linspace(0, 1, 8).view(2, 4) + lite.global_rank
    window = lite.accumulate(model, steps=2)
    with window(weight=3.0):
        lite.backward(model(x).mean())
    for wrong in (lambda: lite.backward(model(x)), lambda: lite.backward(model(x).mean(), nonsense=True)):
        with pytest.raises((RuntimeError, TypeError)), window(weight=1.0):
            wrong()
    with pytest.raises(UsageError, match="give all or none"), window():
        lite.backward(model(x).mean())
    with window(weight=1.0):
        lite.backward(model(x + 1).mean())
    if stage > 0:
        from deepspeed.utils import safe_get_full_grad

        lite.clip_gradients(model, optimizer, max_norm=float("inf"))
        gradients = [safe_get_full_grad(p).clone() for p in model.parameters()]
    else:
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    lite.teardown()
    return gradients, [weakref.ref(thing) for thing in (model, *model.parameters())]


def steps_of_one(stage: int) -> tuple[list[torch.Tensor], int]:
    """The gradients after some refused backwards, and how much of the model is left after teardown."""
    lite = start(stage)
    gradients, references = refused_backwards(lite, stage)
    gc.collect()
    kept = sum(reference() is not None for reference in references)
    if stage == 3:
        model, _ = lite.setup(model := MLP(), torch.optim.SGD(model.parameters(), lr=0.1))
        output = model(torch.ones(2, 4))
        lite.backward(output.mean(), retain_graph=True)
        with pytest.raises(UsageError, match=r"a second time \(retain_graph=True\), and stage 3"):
            lite.backward(output.pow(2).mean())
    return gradients, kept


@WITH_DEEPSPEED
@pytest.mark.parametrize("stage", [0, *DIVIDED])
def test_gradients_are_read_after_clipping_and_nothing_is_kept(stage: int) -> None:
    """Also after backwards that were refused before they began; a graph that stage 3 can't keep is told.

    In float32, to the tolerance of the contract's numbers.
    """
    torch.manual_seed(3)
    model = MLP()
    x = torch.linspace(0, 1, 8).view(2, 4)
    (sum(3 * model(x + rank).mean() + model(x + rank + 1).mean() for rank in range(2)) / 8).backward()
    for gradients, kept in run_distributed(steps_of_one, stage):
        assert kept == 0
        for mine, parameter in zip(gradients, model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(mine, parameter.grad, rtol=0, atol=FLOAT32_TOLERANCE)


def unused_in_stage_0() -> list[torch.Tensor]:
    lite = start(0)
    torch.manual_seed(1)
    model, optimizer = lite.setup(model := Fork(), torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    for lefts in ((True, True), (True, False), (True, True)):
        optimizer.zero_grad()
        lite.backward(model(torch.ones(2, 4), lefts[lite.global_rank]).sum())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@WITH_DEEPSPEED
def test_stage_0_leaves_a_parameter_alone_that_no_rank_used() -> None:
    """As raw: no decay, no momentum. Where one rank used it, the others count zeros.

    In float32, to the tolerance of the contract's numbers.
    """
    torch.manual_seed(1)
    model = Fork()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for lefts in ((True, True), (True, False), (True, True)):
        optimizer.zero_grad()
        (sum(model(torch.ones(2, 4), left).sum() for left in lefts) / 2).backward()
        optimizer.step()
    for mine in run_distributed(unused_in_stage_0):
        for value, wanted in zip(mine, model.parameters(), strict=True):
            torch.testing.assert_close(value, wanted.detach(), rtol=0, atol=FLOAT32_TOLERANCE)


def device_of_gpu_1() -> Any:
    import deepspeed

    given: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "initialize", lambda **options: given.append(options["args"]) or (None,))
        for device in (torch.device("cuda", 1), torch.device("cpu")):
            initialize(nn.Linear(1, 1), None, {}, device)
    return vars(given[0]), given[1]


@WITH_DEEPSPEED
def test_deepspeed_is_told_which_gpu_it_is() -> None:
    """That of the Lite, not that of LOCAL_RANK."""
    assert run_distributed(device_of_gpu_1) == 2 * [({"device_rank": 1}, None)]


class Regression(LightningModule):
    """Notes the summary that it has while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        self.summary = ""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.summary = summarize(self)
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(stage: int) -> tuple[str, str]:
    module, quiet = Regression(), {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    loader = DataLoader(TensorDataset(torch.ones(8, 4)), batch_size=4)
    trainers = [
        Trainer(accelerator="cpu", strategy=deepspeed(stage), max_steps=1, track_grad_norm=norm, **quiet)
        for norm in (2, -1)
    ]
    with pytest.raises(ConfigError) as caught:
        trainers[0].fit(module, loader)
    trainers[1].fit(module, loader)
    return str(caught.value), module.summary


@WITH_DEEPSPEED
def test_the_trainer_asks_for_no_gradients_that_are_not_there() -> None:
    """It refuses track_grad_norm, and counts divided parameters whole."""
    for error, table in run_distributed(fit, 3):
        assert "track_grad_norm=2 under strategy='deepspeed'" in error
        assert "5 parameters, 5 of them trained, 0.000 MB" in table
        assert "net  | Linear | 5" in table
