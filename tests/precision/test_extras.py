"""Precisions that need an extra: float8 layers, and frozen weights in few bits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lite import ConfigError, Lite, MissingExtraError, UsageError
from lite.accelerators import DeviceProbe
from lite.plan import resolve
from lite.precision import Precision, make_precision
from tests.support.processes import run_distributed

ROUNDING = {"int8-frozen": ("torchao", 0.01), "nf4-frozen": ("bitsandbytes", 0.12)}
pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's and bitsandbytes' own


class Adapted(nn.Module):
    """A frozen layer and a low-rank one beside it, which does nothing at first."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(32, 32).requires_grad_(False)
        self.down = nn.Linear(32, 4, bias=False)
        self.up = nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def train(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> list[float]:
    losses = []
    for _ in range(20):
        loss = (model(x) - y).pow(2).mean()
        lite.backward(loss)
        lite.clip_gradients(model, optimizer, max_norm=10.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ROUNDING)
def test_adapters_train_on_a_base_in_few_bits(name: str, tmp_path: Path) -> None:
    """Through the frozen layers, whose weights are rounded by no more than their format does; checkpoints have the raw
    keys and whole tensors, and load into the raw model and back; teardown gives plain layers."""
    package, rounding = ROUNDING[name]
    pytest.importorskip(package)
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), nn.Tanh(), Adapted())
    raw = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = torch.randn(16, 32), torch.randn(16, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    lite = Lite(accelerator="cpu", precision=name)
    lite.setup(model, optimizer)
    losses = train(lite, model, optimizer, x, y)
    assert losses[-1] < 0.6 * losses[0]
    for path in (tmp_path / "file.ckpt", tmp_path / "folder"):
        lite.save(path, {"model": model, "optimizer": optimizer})
    saved = torch.load(tmp_path / "file.ckpt", weights_only=True)["model"]
    assert list(saved) == list(raw)
    for key in ("0.base.weight", "2.base.weight"):
        assert type(saved[key]) is Tensor
        assert 0 < (saved[key] - raw[key]).norm() < rounding * raw[key].norm()
    assert torch.equal(saved["0.base.bias"], raw["0.base.bias"])
    with torch.no_grad():
        before = model(x)
        model.load_state_dict(raw)
        assert not torch.allclose(model(x), before, atol=0.1)
        lite.load(tmp_path / "folder", {"model": model, "optimizer": optimizer})
        # Rounded once more, from what rounding had left.
        torch.testing.assert_close(model(x), before, rtol=0, atol=0.05)
    lite.teardown()
    assert type(model[0].base) is nn.Linear
    assert list(model.state_dict()) == list(raw)
    assert type(model[0].base.weight) is nn.Parameter and model[0].base.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ROUNDING)
def test_an_ema_averages_what_trains_beside_them(name: str) -> None:
    """A base in few bits stays as it is, within the block and after it."""
    pytest.importorskip(ROUNDING[name][0])
    torch.manual_seed(0)
    model = Adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    lite = Lite(accelerator="cpu", precision=name)
    lite.setup(model, optimizer)
    ema, x = lite.ema(model, decay=0.5), torch.randn(8, 32)
    lite.backward(model(x).pow(2).mean())
    before, base = model.up.weight.detach().clone(), model.base(x)
    ema.update()
    optimizer.step()
    ema.update()
    with ema.swap():
        assert torch.equal(model.base(x), base)
        averaged = model.up.weight.detach().clone()
    torch.testing.assert_close(averaged, before.lerp(model.up.weight, 0.5))
    lite.teardown()


def train_apart(name: str, strategy: str) -> tuple[list[float], list[Tensor], list[str]]:
    """From weights of each rank's own making, each with its half of a batch."""
    lite = Lite(accelerator="cpu", strategy=strategy, precision=name)
    torch.manual_seed(lite.global_rank)
    frozen = name.endswith("frozen")
    model = nn.Sequential(Adapted(), nn.Tanh(), Adapted())
    if not frozen:
        model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    lite.setup(model, optimizer)
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 32, generator=generator)
    half = slice(8 * lite.global_rank, 8 * lite.global_rank + 8)
    losses = train(lite, model, optimizer, x[half], y[half])
    lite.check_sync()
    with torch.no_grad():
        outputs = model(x[:2])
    lite.teardown()
    return losses, [outputs, *model.state_dict().values()], [type(part).__name__ for part in model[0].children()]


@pytest.mark.parametrize(
    ("name", "strategy"), [("fp8", "ddp"), ("fp8", "fsdp"), ("int8-frozen", "ddp"), ("nf4-frozen", "ddp")]
)
def test_ranks_have_the_same_model(name: str, strategy: str) -> None:
    """Rank 0's, packed weights included; what they train stays in step, and teardown gives plain layers."""
    pytest.importorskip("bitsandbytes" if name == "nf4-frozen" else "torchao")
    (losses, mine, kinds), (others, theirs, _) = run_distributed(train_apart, name, strategy)
    assert losses[-1] + others[-1] < 0.8 * (losses[0] + others[0])
    assert all(map(torch.equal, mine, theirs))
    assert kinds == ["Linear"] * 3


def pack_apart() -> str:
    """Packed by the user, from weights of each rank's own making."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    lite = Lite(accelerator="cpu", strategy="ddp")
    torch.manual_seed(lite.global_rank)
    model = Adapted()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda part, name: name == "base")
    with pytest.raises(UsageError) as caught:
        lite.setup(model)
    return str(caught.value)


def test_packed_weights_that_differ_are_refused() -> None:
    """They can't be sent."""
    pytest.importorskip("torchao")
    for text in run_distributed(pack_apart):
        assert "base.weight" in text and "precision='int8-frozen'" in text


@pytest.mark.parametrize("strategy", ["fsdp", "pipeline"])
def test_packed_weights_are_not_divided(strategy: str) -> None:
    """Told before any process starts."""
    probe, asked = DeviceProbe(), {"strategy": strategy, "devices": 2, "accelerator": "cpu"}
    precision = Precision()
    precision.name, precision.divisible = "int8-frozen", False
    with pytest.raises(ConfigError, match=rf"'int8-frozen' with strategy='{strategy}'.*use strategy='ddp'"):
        resolve(asked, {}, probe, plugins=precision)
    resolve({**asked, "devices": 1}, {}, probe, plugins=precision)


@pytest.mark.parametrize("name", ROUNDING)
def test_a_base_that_is_not_frozen_or_tied_is_refused(name: str) -> None:
    """Nothing would be kept in few bits, or a layer would lose its weight."""
    pytest.importorskip(ROUNDING[name][0])
    lite = Lite(accelerator="cpu", precision=name)
    with pytest.raises(ConfigError, match="requires_grad_"):
        lite.setup(nn.Sequential(nn.Linear(32, 32)))
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).requires_grad_(False)
    model[1].weight = model[0].weight
    with pytest.raises(ConfigError, match="untie"):
        lite.setup(model)


def test_float8_layers_train_the_same_parameters() -> None:
    """The layers whose sizes fit are exchanged and given back; keys, parameters and the optimizer's stay the same
    objects, and gradients are the float32 ones but for rounding to 8 bits."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 3))
    kinds, parameters, keys = [type(part) for part in model], list(model.parameters()), list(model.state_dict())
    x = torch.randn(16, 16)
    model(x).pow(2).mean().backward()
    exact = [p.grad for p in parameters if p.grad is not None]
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    lite = Lite(accelerator="cpu", precision="fp8")
    lite.setup(model, optimizer)
    assert [type(part).__name__ for part in model] == ["Float8Linear", "Tanh", "Float8Linear", "Linear"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    output = model(x)
    lite.backward(output.pow(2).mean())
    assert output.dtype == torch.float32
    for parameter, wanted in zip(parameters, exact, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert 0 < (parameter.grad - wanted).norm() < 0.3 * wanted.norm()  # 3 bits of mantissa, through three layers
    optimizer.zero_grad()
    losses = train(lite, model, optimizer, x, torch.zeros(16, 3))
    assert losses[-1] < 0.1 * losses[0]
    lite.teardown()
    assert [type(part) for part in model] == kinds
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    with pytest.raises(ConfigError, match="multiples of 16"):
        lite.setup(nn.Sequential(nn.Linear(3, 3)))


ENGINE = """
from contextlib import contextmanager
import torch
from torch import nn

seen = []


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias, params_dtype, device):
        super().__init__()
        kwargs = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **kwargs))
        self.bias = nn.Parameter(torch.empty(out_features, **kwargs)) if bias else None

    def get_extra_state(self):
        return torch.zeros(3)

    def set_extra_state(self, state):
        raise AssertionError

    def forward(self, x):
        seen.append(inside)
        return nn.functional.linear(x, self.weight, self.bias)


inside = None


@contextmanager
def autocast(enabled, recipe):
    global inside
    inside = type(recipe).__name__ if enabled else None
    try:
        yield
    finally:
        inside = None
"""
RECIPES = """
class Float8CurrentScaling: pass
class DelayedScaling: pass
"""


def test_transformer_engines_layers_take_the_same_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in with its interface, which needs no GPU: layers, keys, tied ones, the context around them."""
    for name, text in {
        "__init__.py": "",
        "pytorch.py": ENGINE,
        "common/__init__.py": "",
        "common/recipe.py": RECIPES,
    }.items():
        path = tmp_path / "transformer_engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for name in [key for key in sys.modules if key.startswith("transformer_engine")]:
            patch.delitem(sys.modules, name)
        from transformer_engine.common.recipe import DelayedScaling  # type: ignore[import-not-found,unused-ignore]
        from transformer_engine.pytorch import seen  # type: ignore[import-not-found,unused-ignore]

        from lite.precision import TransformerEnginePrecision

        with pytest.raises(ConfigError, match="no checkpoint of the raw model's keys"):
            TransformerEnginePrecision("cuda", DelayedScaling())
        precision = TransformerEnginePrecision("cuda")
        shared = nn.Linear(16, 16, bias=False)
        own = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        model = nn.Sequential(nn.Linear(16, 16), shared, nn.Sequential(shared, nn.Linear(16, 3))).eval()
        hooked: list[int] = []
        model[0].register_forward_hook(lambda *unused: hooked.append(1))
        parameters, state = list(model.parameters()), model.state_dict()
        x = torch.randn(4, 16)
        wanted = model(x)
        precision.convert_module(model)
        assert type(model[2][1]) is nn.Linear  # whose sizes don't fit
        assert not isinstance(model[0], nn.Linear) and model[1] is model[2][0] and not model[0].training
        assert list(model.state_dict()) == list(state)
        model.load_state_dict(state)
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
        around = precision.autocast()
        for _ in range(2):
            with around:
                assert torch.equal(model(x), wanted)
        assert seen == ["Float8CurrentScaling"] * 6
        assert len(hooked) == 3
        with pytest.raises(ConfigError, match="multiples of 16"):
            precision.convert_module(nn.Sequential(own))
        precision.release_module(model)
        assert model[1] is shared and isinstance(model[0], nn.Linear)
        for name in [key for key in sys.modules if key.startswith("transformer_engine")]:
            sys.modules.pop(name)


def test_transformer_engine_is_for_gpus() -> None:
    """What else there is, is named."""
    with pytest.raises(ConfigError, match=r"precision='transformer-engine' on 'cpu'.*'fp8'.*'bf16-mixed'"):
        Lite(accelerator="cpu", precision="transformer-engine")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("fp8", "torchao"),
        ("transformer-engine", "transformer_engine"),
        ("int8-frozen", "torchao"),
        ("nf4-frozen", "bitsandbytes"),
    ],
)
def test_a_missing_extra_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it, before anything is set up."""
    for module in [key for key in sys.modules if key == package or key.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install '(lite|transformer_engine)\["):
        make_precision(name, "cuda" if name == "transformer-engine" else "cpu")
