"""Law 1: a converted loop's numbers are the raw loop's, on one process and on two."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lite import Lite
from tests.support.models import MLP, regression
from tests.support.processes import run_distributed


def train_raw(batch_size: int, num_samples: int, dtype: torch.dtype, shuffle: bool, clip: float | None = None):
    torch.manual_seed(3)
    loader = DataLoader(regression(num_samples, dtype), batch_size=batch_size, shuffle=shuffle)
    model = MLP(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    losses = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).mean()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict())


def train_lite(batch_size: int, num_samples: int, dtype: torch.dtype, shuffle: bool, clip: float | None = None):
    torch.manual_seed(3)
    lite = Lite(accelerator="cpu", precision="64-true" if dtype == torch.float64 else "32-true")
    loader = lite.setup_dataloaders(DataLoader(regression(num_samples, dtype), batch_size=batch_size, shuffle=shuffle))
    model = MLP(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model, optimizer, scheduler = lite.setup(model, optimizer, scheduler)
    losses = []
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).mean()
            lite.backward(loss)
            if clip:
                lite.clip_gradients(model, optimizer, max_norm=clip)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
    return losses, copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("shuffle", [False, True])
def test_one_process_equals_raw_bit_for_bit(shuffle: bool, clip: float | None) -> None:
    """Losses and weights of a 32-true run on one process are the raw loop's."""
    raw_losses, raw_weights = train_raw(4, 13, torch.float32, shuffle, clip)
    losses, weights = train_lite(4, 13, torch.float32, shuffle, clip)
    assert losses == raw_losses
    assert all(torch.equal(weights[key], raw_weights[key]) for key in raw_weights)


def summed(num_samples: int, steps: int) -> list[torch.Tensor]:
    """Gradients of an epoch's losses that are sums; a batch that keeps a rank in step has no sample of its own."""
    lite = Lite(accelerator="cpu", precision="64-true")
    loader = DataLoader(regression(num_samples, torch.float64), batch_size=8 // lite.world_size)
    loader = lite.setup_dataloaders(loader)
    model = lite.setup(MLP(torch.float64))
    window = lite.accumulate(model, steps=steps)
    for x, y in loader:
        with window():
            lite.backward((model(x) - y).pow(2).sum(), weight=lite.world_size)
            lite.backward(model(x).pow(4).mean())  # which the batch weighs
    return [p.grad.clone() for p in model.parameters()]


def search() -> torch.Tensor:
    """Strong Wolfe decides by the loss, a sum here, whose gradient must be its own."""
    lite = Lite(accelerator="cpu", precision="64-true")
    loader = DataLoader(regression(16, torch.float64), batch_size=16 // lite.world_size)
    loader = lite.setup_dataloaders(loader)
    model = MLP(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=10, line_search_fn="strong_wolfe")
    lite.setup(model, optimizer)
    for x, y in loader:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).pow(2).sum()
            lite.backward(loss, weight=lite.world_size)
            return loss

        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_line_search_sees_the_loss_as_it_was_weighed() -> None:
    """LBFGS on a sum over two ranks is LBFGS on one."""
    expected = search()
    for weights in run_distributed(search):
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("num_samples", [13, 9])
def test_sums_have_the_weight_that_they_are_given(num_samples: int, steps: int) -> None:
    """In the ragged batch, of 5 samples or 1, no loss is counted twice or weighed as a mean."""
    expected = summed(num_samples, steps)
    for grads in run_distributed(summed, num_samples, steps):
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("num_samples", [16, 13, 9])
def test_two_processes_equal_one_with_the_doubled_batch(num_samples: int, shuffle: bool) -> None:
    """Also with a ragged last batch (13: 3 + 2 samples; 9: one rank without a sample), in float64 to 1e-12."""
    results = run_distributed(train_lite, 4, num_samples, torch.float64, shuffle, 0.1)
    _, weights = train_raw(8, num_samples, torch.float64, shuffle, 0.1)
    for _, others in results:
        for key, value in weights.items():
            torch.testing.assert_close(others[key], value, rtol=0, atol=1e-12)


def accumulate_tokens(steps: int, counts: list[list[int]], rank_of: int | None = None):
    """Micro-batches of unequal sizes; every rank takes its own list of counts."""
    lite = Lite(accelerator="cpu", precision="64-true")
    torch.manual_seed(5)
    model = MLP(torch.float64)
    model = lite.setup(model)
    data = regression(sum(map(sum, counts)), torch.float64).tensors
    window = lite.accumulate(model, steps=steps)
    start = sum(sum(c) for c in counts[: lite.global_rank])
    mine = counts[lite.global_rank]
    for i, count in enumerate(mine):
        x, y = (t[start : start + count] for t in data)
        start += count
        with window(last=i + 1 == len(mine), weight=count):
            lite.backward((model(x) - y).pow(2).sum(1).mean())
    assert window.ready
    return [p.grad.clone() for p in model.parameters()]


def test_token_weights_give_the_gradient_of_one_large_batch() -> None:
    """Ranks x micro-batches with unequal sample counts: exactly the mean over all samples, partial window included."""
    counts = [[3, 1, 2], [1, 1, 5]]
    torch.manual_seed(5)
    model = MLP(torch.float64)
    x, y = regression(13, torch.float64).tensors
    (model(x) - y).pow(2).sum(1).mean().backward()
    expected = [p.grad for p in model.parameters()]
    for grads in run_distributed(accumulate_tokens, 4, counts):
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-12)


def accumulate_plain():
    lite = Lite(accelerator="cpu", precision="64-true")
    torch.manual_seed(5)
    model = lite.setup(MLP(torch.float64))
    x, y = regression(12, torch.float64).tensors
    mine = range(lite.global_rank * 6, lite.global_rank * 6 + 6, 2)
    window = lite.accumulate(model, steps=4)
    partial = []
    for i in mine:
        with window(last=i == mine[-1]):
            lite.backward((model(x[i : i + 2]) - y[i : i + 2]).pow(2).mean())
        partial.append(model.body[0].weight.grad.clone())
    return [p.grad.clone() for p in model.parameters()], partial[0]


def test_partial_window_counts_what_it_has() -> None:
    """Three micro-batches in a window of four, on two ranks, equal one batch of all; before the end ranks differ."""
    torch.manual_seed(5)
    model = MLP(torch.float64)
    x, y = regression(12, torch.float64).tensors
    (model(x) - y).pow(2).mean().backward()
    results = run_distributed(accumulate_plain)
    for grads, _ in results:
        for grad, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12)
    assert not torch.equal(results[0][1], results[1][1])


def accumulate_ragged(num_samples: int) -> tuple[list[torch.Tensor], list[str]]:
    lite = Lite(accelerator="cpu", precision="64-true")
    torch.manual_seed(5)
    model = lite.setup(MLP(torch.float64))
    loader = lite.setup_dataloaders(DataLoader(regression(num_samples, torch.float64), batch_size=4))
    window = lite.accumulate(model, steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i, (x, y) in enumerate(loader):
            with window(last=i + 1 == len(loader), weight=len(x)):
                lite.backward((model(x) - y).pow(2).sum(1).mean())
    return [p.grad.clone() for p in model.parameters()], [str(w.message) for w in caught]


@pytest.mark.parametrize("num_samples", [13, 9])
def test_weights_over_a_ragged_loader_count_each_sample_once(num_samples: int) -> None:
    """The user's weight takes the place of the loader's; 9: one rank's last batch is a filler."""
    torch.manual_seed(5)
    model = MLP(torch.float64)
    x, y = regression(num_samples, torch.float64).tensors
    (model(x) - y).pow(2).sum(1).mean().backward()
    for grads, messages in run_distributed(accumulate_ragged, num_samples):
        assert not messages
        for grad, p in zip(grads, model.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12)


def shared_window() -> list[float]:
    lite = Lite(accelerator="cpu")
    first, second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(first.weight)
    second.weight = first.weight
    both = lite.setup(nn.ModuleList([first, second]))
    lite._modules[first] = lite._modules[second] = lite._modules[both]
    window = lite.accumulate(both, first, second, steps=4)
    first.weight.grad = torch.full((1, 1), 0.5)
    with window(last=True):
        pass
    return first.weight.grad.flatten().tolist()


def test_a_shared_parameter_is_counted_once() -> None:
    """A partial window multiplies it by 4 once, however many models hold it."""
    assert shared_window() == [2.0]


def lbfgs(line_search: str | None, num_samples: int) -> list[float]:
    lite = Lite(accelerator="cpu", precision="64-true")
    torch.manual_seed(0)
    model = MLP(torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=10, line_search_fn=line_search)
    lite.setup(model, optimizer)
    loader = lite.setup_dataloaders(
        DataLoader(regression(num_samples, torch.float64), batch_size=32 // lite.world_size)
    )
    losses = []
    for _ in range(3):
        for x, y in loader:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = (model(x) - y).pow(2).mean()
                lite.backward(loss)
                return loss

            losses.append(optimizer.step(closure).item())
    lite.teardown()
    return [*losses, *(p.sum().item() for p in model.parameters())]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_an_optimizer_that_decides_by_the_loss_sees_everybodys(line_search: str | None) -> None:
    """LBFGS on two ranks, with a ragged batch, is LBFGS on one; 30 evaluations add up rounding to about 1e-10."""
    expected = lbfgs(line_search, 21)
    first, second = run_distributed(lbfgs, line_search, 21)
    assert first == second
    assert first == pytest.approx(expected, rel=1e-7)
