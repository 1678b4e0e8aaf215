"""Laws that every precision keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lite import Lite
from lite.precision import PRECISIONS, make_precision
from tests.support.models import MLP
from tests.support.processes import run_distributed


def train(precision: str) -> tuple[list[float], list[torch.Tensor]]:
    lite = Lite(accelerator="cpu", precision=precision)
    torch.manual_seed(0)
    model = MLP()
    # Adam's default eps is below float16's smallest number.
    model, optimizer = lite.setup(model, torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-4))
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(lite.global_rank))
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        lite.backward(loss)
        lite.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_lowers_the_loss_and_ranks_agree(precision: str) -> None:
    """On two processes; the ranks' weights are equal bit for bit."""
    (losses, first), (_, second) = run_distributed(train, precision)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Fails(nn.Module):
    """Raises in the middle of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x)
        if x.sum() > 0:
            raise ArithmeticError("inside")
        return out


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_error_in_a_forward_leaves_nothing_behind(precision: str) -> None:
    """No autocast, no default dtype, and the next forward works."""
    lite = Lite(accelerator="cpu", precision=precision)
    model = lite.setup(Fails())
    with pytest.raises(ArithmeticError):
        model(torch.ones(2, 4))
    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == torch.float32
    assert model(-torch.ones(2, 4)).shape == (2, 4)
    with pytest.raises(ArithmeticError), lite.autocast():
        raise ArithmeticError
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_no_float_is_not_converted(precision: str) -> None:
    """Whole numbers, booleans, strings and None go in as they are."""
    it = make_precision(precision, "cpu")
    data = {"i": torch.arange(3), "b": torch.tensor([True]), "s": "x", "n": None, "f": torch.ones(2)}
    for convert in (it.convert_input, it.convert_output):
        out = convert(data)
        assert (out["i"].dtype, out["b"].dtype, out["s"], out["n"]) == (torch.int64, torch.bool, "x", None)
    assert data["f"].dtype == torch.float32


@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_comes_back(precision: str) -> None:
    """What state_dict returns, load_state_dict takes, in another object."""
    state = copy.deepcopy(make_precision(precision, "cpu").state_dict())
    other = make_precision(precision, "cpu")
    other.load_state_dict(state)
    assert other.state_dict() == state
