"""Precisions: dtypes, loss scaling with one or several optimizers, schedulers and clipping."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lite import Lite
from tests.support.models import MLP
from tests.support.processes import run_distributed


@pytest.mark.parametrize(
    ("precision", "param", "compute"),
    [
        ("32-true", torch.float32, torch.float32),
        ("64-true", torch.float64, torch.float64),
        ("16-true", torch.float16, torch.float16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
        ("16-mixed", torch.float32, torch.float16),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_what_computes_in_which_dtype(precision: str, param: torch.dtype, compute: torch.dtype) -> None:
    """Parameters, the computation inside, outputs, and tensors that are created under init_tensor."""
    lite = Lite(accelerator="cpu", precision=precision)
    model = MLP()
    seen = []
    model.body[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    model, _ = lite.setup(model, torch.optim.SGD(model.parameters()))
    x = torch.ones(2, 4, dtype=param if precision == "32-true" else torch.float32)
    out = model(x)
    assert next(model.parameters()).dtype == param
    assert seen == [compute]
    assert out.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    lite.backward(out.sum())
    assert all(p.grad.dtype == param for p in model.parameters())
    with lite.init_tensor():
        assert torch.ones(1).dtype == param
    assert torch.get_default_dtype() == torch.float32


@dataclass
class Output:
    """What a model may return."""

    logits: torch.Tensor
    name: str


class Returns(nn.Module):
    """Returns its output in several wrappings."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        out = self.layer(x)
        return {"list": [out, None, 3], "data": Output(out, "n"), "tuple": (out, object())}


def test_outputs_come_back_in_float32_whatever_holds_them() -> None:
    """dict, list, tuple and dataclass; other leaves are left alone."""
    model = Lite(accelerator="cpu", precision="bf16-mixed").setup(Returns())
    out = model(torch.ones(2, 4))
    assert out["list"][0].dtype == out["data"].logits.dtype == out["tuple"][0].dtype == torch.float32
    assert out["list"][1:] == [None, 3]
    assert out["data"].name == "n"


def test_bf16_mixed_equals_raw_autocast_bit_for_bit() -> None:
    """Losses and weights of a loop with torch.autocast around forward and loss."""

    def run(with_lite: bool) -> list[float]:
        torch.manual_seed(0)
        model, losses = MLP(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        x, y = torch.randn(8, 4), torch.randint(3, (8,))
        if with_lite:
            lite = Lite(accelerator="cpu", precision="bf16-mixed")
            model, optimizer = lite.setup(model, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            if with_lite:
                loss = nn.functional.cross_entropy(model(x), y)
                lite.backward(loss)
            else:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses + [p.sum().item() for p in model.parameters()]

    assert run(True) == run(False)


def scaled(num_optimizers: int = 1) -> tuple[Lite, nn.Module, list[torch.optim.Optimizer], list[object]]:
    lite = Lite(accelerator="cpu", precision="16-mixed")
    torch.manual_seed(0)
    model = MLP()
    halves = [model.body[0].parameters(), model.body[2].parameters()]
    optimizers = (
        [torch.optim.AdamW(model.parameters(), lr=0.1)]
        if num_optimizers == 1
        else [torch.optim.SGD(h, lr=0.1) for h in halves]
    )
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1) for o in optimizers]
    lite.setup(model, *optimizers, *schedulers)
    return lite, model, optimizers, schedulers


def test_a_skipped_step_is_known_to_the_scheduler() -> None:
    """Inf gradients: weights and learning rate stay, no warning; the next good step moves both; isinstance holds."""
    lite, model, (optimizer,), (scheduler,) = scaled()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(scheduler, torch.optim.lr_scheduler.StepLR)
    before = [p.detach().clone() for p in model.parameters()]
    scale = lite.precision.scaler.get_scale()  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for factor, skipped in ((float("inf"), True), (1e-3, False)):
            optimizer.zero_grad()
            lite.backward((model(torch.ones(2, 4)) * factor).sum())
            lite.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            scheduler.step()
            assert lite.step_was_skipped(optimizer) is skipped
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) is skipped
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 if skipped else 0.01)
    lite.precision.state_dict()
    assert lite.precision.scaler.get_scale() == scale / 2  # type: ignore[attr-defined]
    lite.teardown()
    assert type(optimizer) is torch.optim.AdamW
    assert type(scheduler) is torch.optim.lr_scheduler.StepLR


def test_several_optimizers_share_one_scale() -> None:
    """Both step on one scaled backward; the scale changes once per iteration, as PyTorch's AMP notes ask."""
    lite, model, optimizers, _ = scaled(2)
    scaler = lite.precision.scaler  # type: ignore[attr-defined]
    start = scaler.get_scale()
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        lite.backward(model(torch.ones(2, 4)).sum() * float("inf"))
        for optimizer in optimizers:
            optimizer.step()
            assert lite.step_was_skipped(optimizer)
    lite.precision.state_dict()
    assert scaler.get_scale() == start / 4


def test_clipping_sees_unscaled_gradients() -> None:
    """The norm under a loss scale equals the one without, up to float16's rounding of the forward and backward."""
    norms = []
    for precision in ("16-mixed", "32-true"):
        lite = Lite(accelerator="cpu", precision=precision)
        torch.manual_seed(0)
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        lite.setup(model, optimizer)
        lite.backward(model(torch.ones(2, 4)).sum() * 0.1)  # small enough for the first scale, 65536
        norms.append(lite.clip_gradients(model, optimizer, max_norm=0.1))
        total = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        assert total.item() == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(norms[0], norms[1], rtol=5e-3, atol=0)


def first_inf_on_one_rank() -> tuple[bool, float, float]:
    lite = Lite(accelerator="cpu", precision="16-mixed")
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lite.setup(model, optimizer)
    factor = float("inf") if lite.global_rank == 1 else 1.0
    lite.backward((model(torch.ones(2, 4)) * factor).sum())
    optimizer.step()
    skipped = lite.step_was_skipped(optimizer)
    lite.precision.state_dict()
    return skipped, lite.precision.scaler.get_scale(), model.body[0].weight.sum().item()  # type: ignore[attr-defined]


def test_an_inf_on_one_rank_skips_the_step_on_all() -> None:
    """The ranks' scales and weights stay equal."""
    first, second = run_distributed(first_inf_on_one_rank)
    assert first == second
    assert first[0] is True


def test_the_scale_is_in_the_checkpoint(tmp_path: object) -> None:
    """Saved and loaded with the state, without a word of the user."""
    lite, model, (optimizer,), _ = scaled()
    lite.backward(model(torch.ones(2, 4)).sum() * float("inf"))
    optimizer.step()
    lite.save(f"{tmp_path}/a.ckpt", {"model": model, "optimizer": optimizer})
    other, model_2, (optimizer_2,), _ = scaled()
    other.load(f"{tmp_path}/a.ckpt", {"model": model_2, "optimizer": optimizer_2})
    assert other.precision.scaler.get_scale() == lite.precision.scaler.get_scale()  # type: ignore[attr-defined]


def test_a_closure_works_with_and_without_a_scale() -> None:
    """LBFGS raw, and a plain optimizer's closure under a loss scale."""
    lite = Lite(accelerator="cpu")
    model = MLP()
    lite.setup(model, optimizer := torch.optim.LBFGS(model.parameters(), lr=0.1))

    def closure(lite: Lite, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).pow(2).sum()
        lite.backward(loss)
        return loss

    losses = [optimizer.step(lambda: closure(lite, model, optimizer)).item() for _ in range(3)]
    assert losses[2] < losses[0]
    lite, model, (optimizer,), _ = scaled()
    losses = [optimizer.step(lambda: closure(lite, model, optimizer)).item() for _ in range(8)]
    assert losses[-1] < losses[0]


def nonfinite_policies() -> list[list[float]]:
    lite = Lite(accelerator="cpu")
    results = []
    for policy in ("skip", "zero"):
        torch.manual_seed(0)
        model = MLP()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        lite.setup(model, optimizer)
        before = model.body[0].weight.sum().item()
        lite.backward((model(torch.ones(2, 4)) * (float("nan") if lite.global_rank == 0 else 1.0)).sum())
        norm = lite.clip_gradients(model, optimizer, max_norm=1.0, nonfinite=policy)
        assert not torch.isfinite(norm)
        optimizer.step()
        results.append([before, model.body[0].weight.sum().item()])
        lite.teardown()
    return results


def test_policies_for_bad_norms_act_on_all_ranks_alike() -> None:
    """'skip' changes nothing at all; 'zero' still decays the weights."""
    first, second = run_distributed(nonfinite_policies)
    assert first == second
    (before, skipped), (_, zeroed) = first
    assert skipped == before
    assert zeroed == pytest.approx(before * 0.95)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_precisions_train_on_a_gpu(precision: str) -> None:
    """A few steps lower the loss; fused optimizers under a loss scale too."""
    lite = Lite(accelerator="cuda", devices=1, precision=precision)
    model = MLP()
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True))
    x = lite.to_device(torch.ones(8, 4))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        lite.backward(loss)
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
