"""A batch that fails on all ranks, out of memory, say, can be left out: training goes on as if it had not been."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lite import DDPStrategy, Lite, UsageError
from tests.contracts.test_numbers import STRATEGIES
from tests.support.models import TinyGPT, next_token_loss, sentences
from tests.support.processes import run_distributed


class Failing(TinyGPT):
    """Fails between its blocks, in forward or in backward, when it is told to."""

    fails = ""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](self.tokens(tokens))
        if self.fails == "forward":
            raise ValueError("in forward")
        if self.fails == "backward":
            x.register_hook(fail_in_backward)
        return self.head(self.norm(self.blocks[1](x)))

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        if self.fails == "method":
            raise ValueError("in a method")
        return self.norm(x)


def fail_in_backward(gradient: torch.Tensor) -> None:
    raise ValueError("in backward")


def start(strategy: str, precision: str) -> tuple[Lite, Failing, torch.optim.Optimizer]:
    made = DDPStrategy(find_unused_parameters=True) if strategy == "ddp unused" else STRATEGIES[strategy][2]()
    lite = Lite(accelerator="cpu", strategy=made, precision=precision)
    torch.manual_seed(3)
    model = Failing()
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return lite, model, optimizer


def weights(lite: Lite, model: Failing) -> dict[str, torch.Tensor]:
    lite.teardown()
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(strategy: str, precision: str, where: str) -> dict[str, torch.Tensor]:
    """The weights after three steps; with a `where`, a batch failed there before two of them, and after the last."""
    lite, model, optimizer = start(strategy, precision)
    tokens = sentences(12)[:][0]
    for number in range(4):
        if where and number != 1:
            model.fails = where
            with contextlib.suppress(ValueError):
                if where == "method":
                    model.embed(tokens)
                lite.backward(model(tokens).pow(2).sum())
                raise AssertionError("nothing failed")
            model.fails = ""
        if number < 3:
            batch = tokens[4 * number : 4 * number + 4]
            optimizer.zero_grad()
            lite.backward(next_token_loss(model(batch[:, :-1]), batch))
            optimizer.step()
    return weights(lite, model)


def accumulate(strategy: str, precision: str, *, fails: bool) -> dict[str, torch.Tensor]:
    """The weights after two windows of two batches; or with a window before each of them in which one fails."""
    lite, model, optimizer = start(strategy, precision)
    window = lite.accumulate(model, steps=2)
    for number, failing in enumerate((0, None, 1, None) if fails else (None, None)):
        batches = sentences(16)[:][0].view(4, 2, 2, -1)[number // 2 if fails else number]
        for place, batch in enumerate(batches):
            model.fails = "backward" if place == failing else ""
            try:
                with window():
                    lite.backward(next_token_loss(model(batch[:, :-1]), batch))
            except ValueError:
                optimizer.zero_grad()
                window.drop()
                break
        else:
            optimizer.step()
            optimizer.zero_grad()
    return weights(lite, model)


def compare(strategy: str, precision: str) -> list[str]:
    """Where what came of failures differs from what comes without."""
    wanted = train(strategy, precision, "")
    found = []
    for where in ("forward", "method", "backward"):
        got = train(strategy, precision, where)
        found += _differing(where, got, wanted)
    whole = accumulate(strategy, precision, fails=False)
    return found + _differing("window", accumulate(strategy, precision, fails=True), whole)


def _differing(where: str, got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [f"{where}: {k}" for k, v in wanted.items() if got[k].dtype != v.dtype or not torch.equal(got[k], v)]


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("single", "32-true"),
        ("ddp", "32-true"),
        ("ddp unused", "32-true"),
        ("ddp zero", "32-true"),
        ("fsdp", "32-true"),
        ("fsdp", "bf16-mixed"),
        ("fsdp grad", "bf16-mixed"),
        ("fsdp hybrid", "32-true"),
        ("tp", "32-true"),
        ("ddp x tp", "32-true"),
    ],
)
def test_what_comes_after_a_failing_batch(strategy: str, precision: str) -> None:
    """torch's DDP would wait for the rest of the backward; fully_shard leave weights together, and add gradients."""
    processes = 2 if strategy == "ddp unused" else STRATEGIES[strategy][0]
    for found in run_distributed(compare, strategy, precision, world_size=processes):
        assert found == []


def go_on_without_drop(strategy: str) -> str:
    """What the next micro-batch of a window says, of which the second one's backward failed."""
    lite, model, optimizer = start(strategy, "32-true")
    window = lite.accumulate(model, steps=3)
    for place, batch in enumerate(sentences(12)[:][0].view(3, 4, -1)):
        model.fails = "backward" if place == 1 else ""
        try:
            with window():
                lite.backward(next_token_loss(model(batch[:, :-1]), batch))
        except ValueError:
            optimizer.zero_grad()
        except UsageError as error:
            window.drop()
            with window():  # a new one
                lite.backward(next_token_loss(model(batch[:, :-1]), batch))
            return f"{window.count}: {error}"
    return "nothing was said"


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp", "tp"])
def test_a_window_of_which_a_backward_failed_waits_for_drop(strategy: str) -> None:
    """What its earlier micro-batches had added up is gone, or mixed with a part of the failed one's."""
    for told in run_distributed(go_on_without_drop, strategy, world_size=STRATEGIES[strategy][0]):
        assert told.startswith("1: a backward failed after 1 of 3 micro-batches")
        assert "window.drop()" in told


def test_a_window_goes_on_after_a_backward_that_was_refused() -> None:
    """Of a loss that is no single number, on one process: no gradient has been added by then."""
    lite, model, optimizer = start("single", "32-true")
    window = lite.accumulate(model, steps=2)
    batch = sentences(4)[:][0].view(4, -1)
    for reduced in (False, True, True):
        refusal = contextlib.nullcontext() if reduced else pytest.raises(UsageError, match="no single number")
        with refusal, window():
            loss = next_token_loss(model(batch[:, :-1]), batch)
            lite.backward(loss if reduced else loss.repeat(2))
    assert window.ready
    found = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    next_token_loss(model(batch[:, :-1]), batch).backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), found, strict=True))
